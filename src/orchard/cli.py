"""The command: parse, call one function, print. Torch is imported inside commands only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from orchard.recipe.reading import Resolved

BAD_INPUT, FAILED = 2, 1

app = typer.Typer(
    name="orchard",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

RecipeArgument = Annotated[
    Path, typer.Argument(help="TOML file, or a recipe that orchard ls names.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Override values of the recipe."),
]
OutOption = Annotated[
    Path | None,
    typer.Option(help="The run's folder; by default runs/tiny-flex for tiny/flex.toml."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")]


@contextmanager
def _clear_errors(*, code: int, traceback: bool) -> Iterator[None]:
    """Print the message of a library error alone and leave with ``code``."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        if traceback:
            raise
        text = " ".join(str(error).split())
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        print(f"error: {text}{notes}", file=sys.stderr)
        raise typer.Exit(code) from None


def _resolve(recipe: Path, overrides: list[str] | None) -> Resolved:
    from orchard.catalog import find_recipe
    from orchard.recipe.reading import read_recipe

    resolved = read_recipe(find_recipe(recipe), overrides or [])
    if ":" in resolved.recipe.strategy.name:
        from orchard.experiment.own_methods import import_from

        import_from(Path.cwd())
    return resolved


def _default_folder(recipe: Path) -> Path:
    return Path("runs") / "-".join(recipe.with_suffix("").parts[-2:])


def _show_version(is_asked: bool) -> None:
    if is_asked:
        import orchard

        print(f"orchard {orchard.__version__}")
        raise typer.Exit


@app.callback()
def orchard_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Federated fine-tuning of Mixture-of-Experts language models."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and summary.json.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Draws the offices' data and everything else.")] = 0,
    traceback: Traceback = False,
) -> None:
    """Compare no federation, FedAvg and FLEx on a small invented world, in two minutes."""
    with _clear_errors(code=FAILED, traceback=traceback):
        from orchard.demo import run_demo

        run_demo(out, seed=seed)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    track: Annotated[
        list[str] | None,
        typer.Option(help="Send metrics to tensorboard, wandb, mlflow or trackio; repeatable."),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Run a recipe."""
    from orchard.process_memory import loading_to_stay

    with _clear_errors(code=BAD_INPUT, traceback=traceback), loading_to_stay():
        resolved = _resolve(recipe, overrides)
        folder = out or _default_folder(recipe)
        from orchard.api import execute, prepare
        from orchard.engine.progress import choose_reporter, make_console
        from orchard.reports import run_sentence

        prepared = prepare(resolved.recipe, out=folder, resume=resume, track=track or ())
    console = make_console()

    def note(text: str) -> None:
        console.print(f"note: {text}", style="yellow", highlight=False)

    for text in prepared.notes:
        note(text)
    with _clear_errors(code=FAILED, traceback=traceback):
        result = execute(prepared, progress=choose_reporter(console), warn=note)
    console.print(result.table())
    console.print(run_sentence(result.record, folder), highlight=False)


@app.command()
def ls() -> None:
    """List methods, model families and recipes."""
    from orchard.catalog import print_catalog

    print_catalog()


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Show what is as by default, too.")
    ] = False,
    as_json: JsonOption = False,
    traceback: Traceback = False,
) -> None:
    """Show what of a recipe differs from the defaults, where it comes from and what it means."""
    with _clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.catalog import print_recipe, recipe_as_json

        resolved = _resolve(recipe, overrides)
        if as_json:
            print(recipe_as_json(resolved, show_all=show_all))
        else:
            print_recipe(resolved, show_all=show_all)


@app.command()
def partition(
    recipe: RecipeArgument, overrides: Overrides = None, traceback: Traceback = False
) -> None:
    """Show which client would hold how many examples of what."""
    with _clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.engine.progress import make_console
        from orchard.experiment.holdings import build_federation
        from orchard.reports import partition_table

        federation = build_federation(_resolve(recipe, overrides).recipe)
        console = make_console()
        console.print(partition_table(federation.train, federation.test))
        for note in federation.notes():
            console.print(f"note: {note}", style="yellow", highlight=False)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    as_json: JsonOption = False,
    traceback: Traceback = False,
) -> None:
    """Show what a recipe asks of each client, before any weight is loaded."""
    with _clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.api import plan as make_plan
        from orchard.engine.progress import make_console
        from orchard.experiment.planning import plan_as_json, plan_sentences, plan_table

        made = make_plan(_resolve(recipe, overrides).recipe)
        if as_json:
            print(plan_as_json(made))
            return
        console = make_console()
        console.print(plan_table(made))
        for sentence in plan_sentences(made):
            console.print(sentence, style="yellow", highlight=False)


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="What to measure: memory, graft, step, aggregate, rounds, wire or start.",
            show_default=False,
        ),
    ],
    as_json: JsonOption = False,
    repeats: Annotated[int, typer.Option(help="Runs of each side.", min=1)] = 3,
    model: Annotated[str, typer.Option(help="Base of step; empty = a random one.")] = "",
    data: Annotated[str, typer.Option(help="Examples of step, for that base.")] = "",
    traceback: Traceback = False,
) -> None:
    """Measure this machine: always two things in one run, medians and ratios."""
    with _clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.measurements import run_bench

        print(run_bench(name, as_json=as_json, repeats=repeats, model=model, data=data))


KeysOption = Annotated[
    Path | None, typer.Option(help="Folder that orchard keys made.", show_default=False)
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Cross a network without TLS and keys.")
]


@app.command()
def coordinate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option(help="host:port to listen at; 0.0.0.0 for all of this machine's.")
    ] = "127.0.0.1:8443",
    out: OutOption = None,
    keys: KeysOption = None,
    insecure: InsecureOption = False,
    resume: ResumeOption = False,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(help="Address of a reverse proxy before this coordinator; repeatable."),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Run a recipe with sites on other machines, over Flower."""
    with _clear_errors(code=BAD_INPUT, traceback=traceback):
        _log_to_stderr()
        resolved = _resolve(recipe, overrides)
        folder = out or _default_folder(recipe)
        from orchard.deployment.hosting import CoordinatorOptions, check_coordinator
        from orchard.deployment.hosting import coordinate as run_coordinator

        options = CoordinatorOptions(
            folder, address, keys, insecure, trusted_proxies=tuple(trusted_proxy or ())
        )
        num_sites = check_coordinator(resolved.recipe, options, resume=resume)
    from orchard.engine.processes import leaves_on_termination
    from orchard.engine.progress import make_console
    from orchard.reports import result_table, run_sentence

    with _clear_errors(code=FAILED, traceback=traceback), leaves_on_termination():
        result = run_coordinator(resolved.recipe, options, num_sites=num_sites)
    console = make_console()
    console.print(result_table(result))
    console.print(run_sentence(result, folder), highlight=False)


@app.command()
def site(
    data: Annotated[Path, typer.Option(help="This site's examples, JSON Lines.")],
    store: Annotated[Path, typer.Option(help="This site's folder: what never leaves it, logs.")],
    superlink: Annotated[str, typer.Option(help="host:port of the coordinator.")],
    name: Annotated[str, typer.Option(help="Of the site; by default that of its data file.")] = "",
    model: Annotated[str, typer.Option(help="The base model on this machine.")] = "",
    methods: Annotated[
        str, typer.Option(help="Methods to take part in; empty = all built-in.")
    ] = "",
    budget: Annotated[str, typer.Option(help="Experts to train: a number or a share.")] = "",
    memory: Annotated[str, typer.Option(help="Bytes that training may take, such as 8GB.")] = "",
    calibration: Annotated[str, typer.Option(help="This site's calibration corpus.")] = "",
    retention: Annotated[str, typer.Option(help="This site's file of what to retain.")] = "",
    data_recipe: Annotated[
        str,
        typer.Option(help="This site's own data section, TOML; else as the first recipe says."),
    ] = "",
    min_test: Annotated[
        int, typer.Option(help="Fewest rows that a measure or an update may rest on.", min=1)
    ] = 20,
    decimals: Annotated[
        int, typer.Option(help="Digits after the point of measures that leave.", min=0, max=8)
    ] = 4,
    trees_per_round: Annotated[
        int, typer.Option(help="Global trees that are measured or trained in one round.", min=1)
    ] = 2,
    runs_per_day: Annotated[
        int, typer.Option(help="New runs that are joined in 24 hours.", min=1)
    ] = 20,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="Largest value of a recipe's option: client.steps=100; repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what a coordinator asks, and join nothing.")
    ] = False,
    keys: KeysOption = None,
    insecure: InsecureOption = False,
    traceback: Traceback = False,
) -> None:
    """Take part in a federation with this machine's data."""
    with _clear_errors(code=BAD_INPUT, traceback=traceback):
        _log_to_stderr()
        from orchard.deployment.consent import Consent
        from orchard.deployment.limits import parse_limits
        from orchard.deployment.site import SiteOptions, check_site, look, run_site

        chosen = tuple(method.strip() for method in methods.split(",") if method.strip())
        if ":" in methods:
            from orchard.experiment.own_methods import import_from

            import_from(Path.cwd())
        consent = Consent(
            data=str(data.resolve()),
            model=model,
            methods=chosen,
            budget=budget,
            memory=memory,
            calibration=calibration,
            retention=retention,
            data_recipe=str(Path(data_recipe).resolve()) if data_recipe else "",
            min_test=min_test,
            decimals=decimals,
            trees_per_round=trees_per_round,
            runs_per_day=runs_per_day,
            limits=parse_limits(limit or ()),
        )
        options = SiteOptions(name or data.stem, superlink, store, consent, keys, insecure)
        check_site(options)
    from orchard.engine.processes import leaves_on_termination

    with _clear_errors(code=FAILED, traceback=traceback), leaves_on_termination():
        if dry_run:
            print(look(options), end="")
        else:
            run_site(options)


@app.command("keys")
def make_keys(
    folder: Annotated[Path, typer.Argument(help="Where the files go.", show_default=False)],
    host: Annotated[
        list[str] | None, typer.Option(help="Make the coordinator's, reached at this host.")
    ] = None,
    site_name: Annotated[
        list[str] | None, typer.Option("--site", help="Make the key pair of this site.")
    ] = None,
    days: Annotated[int, typer.Option(help="How long certificates are valid.", min=1)] = 365,
    traceback: Traceback = False,
) -> None:
    """Make the coordinator's certificate, or the key pair of a site."""
    with _clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.extras import require

        require("flower", to="make keys")
        from orchard.deployment.keys import make_coordinator_keys, make_site_keys

        if not host and not site_name:
            raise ValueError("--host or --site must be given, got neither; see orchard keys --help")
        made = make_coordinator_keys(folder, host, days=days) if host else []
        for one in site_name or ():
            made += make_site_keys(folder, one)
        for path in made:
            print(path)


@app.command()
def audit(
    folder: Annotated[
        Path, typer.Argument(help="A coordinated run's folder, or a site's.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all names.")] = False,
    traceback: Traceback = False,
) -> None:
    """Show what was asked, what ever left, and what was refused; check that nothing was changed."""
    with _clear_errors(code=BAD_INPUT, traceback=traceback):
        import json

        from orchard.communication.audit import AUDIT_FILE, audit_lines, read_audit

        events = read_audit(folder / AUDIT_FILE)
        print(json.dumps(events, indent=1) if as_json else "\n".join(audit_lines(events)))


def _log_to_stderr() -> None:
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    own = logging.getLogger("orchard")
    own.addHandler(handler)
    own.setLevel(logging.INFO)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="Print a LaTeX table.")] = False,
    traceback: Traceback = False,
) -> None:
    """Show several runs in one table; those that differ in their seed alone are one row."""
    with _clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard import comparison as comparisons
        from orchard.engine.progress import make_console

        if as_json + as_csv + as_latex > 1:
            raise ValueError("one of --json, --csv and --latex must be given, got several")
        found = comparisons.compare_runs(runs)
        if as_json:
            print(comparisons.comparison_as_json(found))
        elif as_csv:
            print(comparisons.comparison_as_csv(found), end="")
        elif as_latex:
            print(comparisons.comparison_as_latex(found), end="")
        else:
            console = make_console()
            console.print(comparisons.comparison_table(found, console))
            if found.differing:
                print(f"runs differ in {', '.join(found.differing)}")
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)


def main() -> None:
    """Run the command line."""
    app()
