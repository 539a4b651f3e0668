"""The commands that use a trained model: ask it, talk to it, measure it on a new file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchard.cli.errors import BAD_INPUT, clear_errors
from orchard.cli.parameters import JsonOption, Traceback

if TYPE_CHECKING:
    from orchard.personal.state import ModelState

ClientOption = Annotated[
    str | None, typer.Option("--client", help="The personal model of this client.")
]
GlobalOption = Annotated[bool, typer.Option("--global", help="The global model.")]
BaseOption = Annotated[bool, typer.Option("--base", help="The base, as it was before training.")]
RoundOption = Annotated[
    str | None, typer.Option("--round", help="After this round, or best; by default the last.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Where the base is now.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="Where it runs.")]
StoreOption = Annotated[Path | None, typer.Option("--store", help="A site's store, for RUN.")]
TokensOption = Annotated[
    int | None,
    typer.Option("--max-new-tokens", help="Longest answer; by default 256, or what fits."),
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", help="0 = always the most probable token.")
]
TopPOption = Annotated[
    float, typer.Option("--top-p", help="Draw from the most probable tokens up to this share.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of the draws.")]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", help="Text before which an answer ends; repeatable.")
]
TemplateOption = Annotated[
    str | None,
    typer.Option(help="alpaca, chat or plain; by default what the run trained with."),
]


def choose_model(
    run: Path | None,
    *,
    client: str | None = None,
    is_global: bool = False,
    is_base: bool = False,
    round_number: str | None = None,
    model: str | None = None,
    store: Path | None = None,
) -> ModelState:
    """Return which of a run's models is meant by the options of a command.

    Args:
        run: A run's folder, or a site's store; None = ``store`` is given.
        client: Whose personal model; None = see ``choosing.choose_state``.
        is_global: The global one.
        is_base: The base.
        round_number: After which round; None = the last.
        model: Where the base is now; None = as the recipe says.
        store: A site's store, in the place of ``run``.

    Raises:
        FileNotFoundError: There is no such run.
        ValueError: There is no such model in it, or the options contradict each other.
    """
    from orchard.personal.choosing import choose_state

    if is_global and is_base:
        raise ValueError("--global and --base must not both be given, got both; drop one")
    if run is None and store is None:
        raise ValueError("RUN must be given, got nothing; name a run's folder, or --store FOLDER")
    if run is not None and store is not None:
        raise ValueError(f"RUN and --store must not both be given, got {run} and {store}; drop one")
    folder = run or store
    assert folder is not None
    kind: Literal["base", "global"] | None = "global" if is_global else "base" if is_base else None
    state = choose_state(folder, client=client, model=kind, round_number=round_number)
    return state if model is None else state.on_base(model)


def _options(**options: Any) -> dict[str, Any]:
    from orchard.personal.sampling import Sampling
    from orchard.personal.writing import StopTexts

    # Before a model is loaded.
    Sampling(options["temperature"], options["top_p"])
    StopTexts(tuple(options["stop"] or ()))
    if options["max_new_tokens"] is not None and options["max_new_tokens"] < 1:
        raise ValueError(
            f"--max-new-tokens must be at least 1, got {options['max_new_tokens']}; raise it"
        )
    known = ("alpaca", "chat", "plain")
    if options["template"] is not None and options["template"] not in known:
        raise ValueError(f"--template must be one of {', '.join(known)}, got {options['template']}")
    return {**options, "stop": tuple(options["stop"] or ())}


def generate(
    run: Annotated[
        str | None,
        typer.Argument(help="A run's folder, or a site's store.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None, typer.Argument(help="What is asked; by default read from stdin.")
    ] = None,
    client: ClientOption = None,
    is_global: GlobalOption = False,
    is_base: BaseOption = False,
    round_number: RoundOption = None,
    max_new_tokens: TokensOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    template: TemplateOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    store: StoreOption = None,
    traceback: Traceback = False,
) -> None:
    """Ask a run's model: a client's own, the global one, or the base."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        options = _options(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            template=template,
        )
        if store is not None and prompt is None:
            run, prompt = None, run  # the store is the run, so the first word is the prompt
        state = choose_model(
            Path(run) if run is not None else None,
            client=client,
            is_global=is_global,
            is_base=is_base,
            round_number=round_number,
            model=model,
            store=store,
        )
        asked = sys.stdin.read() if prompt is None else prompt
        if not asked.strip():
            raise ValueError("prompt must say something, got none; give one, or write it to stdin")
        from orchard.personal.opening import open_model

        with open_model(state, device=device) as opened:
            for piece in opened.stream(asked.strip(), **options):
                print(piece, end="", flush=True)
            print()


def chat(
    run: Annotated[
        Path | None, typer.Argument(help="A run's folder, or a site's store.", show_default=False)
    ] = None,
    client: ClientOption = None,
    is_global: GlobalOption = False,
    is_base: BaseOption = False,
    round_number: RoundOption = None,
    max_new_tokens: TokensOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    template: TemplateOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    store: StoreOption = None,
    traceback: Traceback = False,
) -> None:
    """Talk to a run's model, line by line; /reset forgets what was said, /quit ends."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        options = _options(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            template=template,
        )
        state = choose_model(
            run,
            client=client,
            is_global=is_global,
            is_base=is_base,
            round_number=round_number,
            model=model,
            store=store,
        )
        from orchard.personal import chatting
        from orchard.personal.opening import open_model

        with open_model(state, device=device) as opened:
            chatting.chat(opened, _lines(), sys.stdout, **options)


def _lines() -> Any:
    """Yield what a person types behind a prompt, or what a pipe holds."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def evaluate(
    run: Annotated[
        Path | None,
        typer.Argument(
            help="A run's folder, a site's store, or a folder that orchard export wrote.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Examples, as the run's own are.")] = None,
    client: ClientOption = None,
    is_global: GlobalOption = False,
    round_number: RoundOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
    traceback: Traceback = False,
) -> None:
    """Measure a run's model on a new file by the run's metrics, the base beside it."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        import json

        if data is None:
            raise ValueError("--data must be given, got nothing; name a file with examples")
        from orchard.engine.progress import make_console
        from orchard.personal.exported import EXPORTED
        from orchard.personal.measuring import measure, measure_folder, measured_table
        from orchard.tables import print_table

        if run is not None and (run / EXPORTED).is_file():
            if client is not None or is_global or round_number is not None:
                raise ValueError(
                    f"--client, --global and --round must be left out with an exported "
                    f"folder, got one with {run}, which holds one model"
                )
            measured, notes = measure_folder(run, data, base=model, device=device)
            title = f"{run.name}, on {data.name}"
        else:
            state = choose_model(
                run,
                client=client,
                is_global=is_global,
                round_number=round_number,
                model=model,
                store=store,
            )
            measured, notes = measure(state, data, device=device)
            whose = state.client_id or "global"
            title = f"{whose} after round {state.round_number}, on {data.name}"
        if as_json:
            print(json.dumps(measured, indent=1))
        else:
            console = make_console()
            print_table(console, measured_table(measured, title=title))
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
