"""The command: parse, call one function, print. Torch is imported inside commands only."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from orchard.cli import exporting, judging, models, observing, sites, studies
from orchard.cli.encodings import write_what_the_terminal_knows
from orchard.cli.errors import BAD_INPUT, FAILED, clear_errors
from orchard.cli.parameters import (
    JsonOption,
    OutOption,
    Overrides,
    RecipeArgument,
    ResumeOption,
    Traceback,
    default_folder,
    resolve,
)
from orchard.cli.resuming import back_to_start, is_run, recipe_of, where_it_stopped

app = typer.Typer(
    name="orchard",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


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
    traceback: Traceback = False,
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
    with clear_errors(code=FAILED, traceback=traceback):
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
    workers: Annotated[
        int, typer.Option(help="Processes that compute the clients, each with a model of its own.")
    ] = 1,
    ray: Annotated[str, typer.Option(help="Ray cluster that they run on: host:port or auto.")] = "",
    traceback: Traceback = False,
) -> None:
    """Run a recipe; with --resume, go on with the run in --out, or in the folder in its place."""
    from orchard.process_memory import loading_to_stay

    with clear_errors(code=BAD_INPUT, traceback=traceback), loading_to_stay():
        if resume and out is None and is_run(recipe):
            recipe, out, track = recipe_of(recipe.resolve()), recipe.resolve(), track or []
            start = back_to_start(out)
            track = [*start.track, *track]
            # As it was started, unless it is said anew.
            workers = workers if workers != 1 else start.workers
            ray = ray or start.ray
        resolved = resolve(recipe, overrides)
        folder = out or default_folder(recipe)
        from orchard.api import execute, prepare
        from orchard.engine.processes import leaves_on_termination
        from orchard.engine.progress import choose_reporter, make_console
        from orchard.reports import run_sentence
        from orchard.tables import print_table

        prepared = prepare(
            resolved.recipe,
            out=folder,
            resume=resume,
            track=track or (),
            workers=workers,
            ray=ray,
        )
    console = make_console()

    def note(text: str) -> None:
        console.print(f"note: {text}", style="yellow", highlight=False, markup=False)

    for text in prepared.notes:
        note(text)
    stopped = partial(where_it_stopped, folder, resolved.recipe.server.rounds)
    with (
        clear_errors(code=FAILED, traceback=traceback, stopped=stopped),
        leaves_on_termination(),
    ):
        result = execute(prepared, progress=choose_reporter(console), warn=note)
    print_table(console, result.table(), num_keys=2)
    console.print(run_sentence(result.record, folder), highlight=False)
    for text in result.notes:
        note(text)


@app.command("resume")
def resume_run(
    folder: Annotated[Path, typer.Argument(help="The run's folder.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value ...]", help="How long to wait may change: deployment."),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Go on with a run that stopped; its folder knows its recipe and how it was started."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.experiment.starting import read_start

        folder = folder.resolve()
        recipe, start = recipe_of(folder), read_start(folder)
        if start is not None and start.address:
            back_to_start(folder)
    if start is None or not start.address:
        run(folder, overrides, resume=True, traceback=traceback)
        return
    sites.coordinate(
        recipe,
        overrides,
        start.address,
        folder,
        keys=Path(start.keys) if start.keys else None,
        insecure=start.is_insecure,
        resume=True,
        traceback=traceback,
    )


@app.command()
def ls(
    what: Annotated[
        str, typer.Argument(help="families: each, and why it does not pass.", show_default=False)
    ] = "",
    as_json: JsonOption = False,
    traceback: Traceback = False,
) -> None:
    """List methods, model families and recipes."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.catalog import print_catalog, print_families
        from orchard.families import families_as_rows

        if what not in ("", "families") or (as_json and not what):
            raise ValueError(
                f"what to list must be families{' with --json' if as_json else ''} or nothing, "
                f"got {what or 'nothing'}; orchard ls lists all in short"
            )
        if as_json:
            print(json.dumps(families_as_rows(), indent=1))
        elif what:
            print_families()
        else:
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
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.catalog import print_recipe, recipe_as_json

        resolved = resolve(recipe, overrides)
        if as_json:
            print(recipe_as_json(resolved, show_all=show_all))
        else:
            print_recipe(resolved, show_all=show_all)


@app.command()
def partition(
    recipe: RecipeArgument, overrides: Overrides = None, traceback: Traceback = False
) -> None:
    """Show which client would hold how many examples of what."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.engine.progress import make_console
        from orchard.experiment.holdings import build_federation
        from orchard.reports import partition_table
        from orchard.tables import print_table

        federation = build_federation(resolve(recipe, overrides).recipe)
        console = make_console()
        print_table(console, partition_table(federation.train, federation.test))
        for note in federation.notes():
            console.print(f"note: {note}", style="yellow", highlight=False, markup=False)


@app.command()
def preview(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    client: Annotated[str, typer.Option(help="Whose examples; by default the first.")] = "",
    examples: Annotated[int, typer.Option(help="How many of each split.", min=1)] = 2,
    traceback: Traceback = False,
) -> None:
    """Show examples as the model sees them: tokens, what is learned, what is cut, lengths."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.engine.progress import make_console
        from orchard.preview import make_preview, print_preview

        made = make_preview(resolve(recipe, overrides).recipe, client=client)
        print_preview(made, make_console(), num_examples=examples)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    as_json: JsonOption = False,
    traceback: Traceback = False,
) -> None:
    """Show what a recipe asks of each client, before any weight is loaded."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.api import plan as make_plan
        from orchard.engine.progress import make_console
        from orchard.experiment.placements import placements_table
        from orchard.experiment.planning import plan_as_json, plan_sentences, plan_table
        from orchard.tables import print_table

        made = make_plan(resolve(recipe, overrides).recipe)
        if as_json:
            print(plan_as_json(made))
            return
        console = make_console()
        print_table(console, plan_table(made))
        if made.placements:
            print_table(console, placements_table(made.placements, free=made.free_bytes))
        for sentence in plan_sentences(made):
            console.print(f"note: {sentence}", style="yellow", highlight=False, markup=False)


@app.command()
def serve(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.", min=1, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A key a line, and after it the models that it may use.")
    ] = None,
    max_models: Annotated[
        int, typer.Option(help="At most so many personal models in memory.", min=1)
    ] = 64,
    max_rows: Annotated[
        int, typer.Option(help="At most so many answers are written at once.", min=1)
    ] = 64,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve other machines without a key.")
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Serve base, global and personal models of runs over one base, as OpenAI's interface."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.extras import require

        require("serve", to="serve models")
        from orchard.serving.running import make_server

        server = make_server(
            runs,
            host=host,
            port=port,
            key_file=api_key_file,
            max_models=max_models,
            max_rows=max_rows,
            is_insecure=insecure,
        )
    server.run()


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="What to measure: memory, placement, graft, step, aggregate, rounds, wire, start "
            "or serve.",
            show_default=False,
        ),
    ],
    as_json: JsonOption = False,
    repeats: Annotated[int, typer.Option(help="Runs of each side.", min=1)] = 3,
    model: Annotated[str, typer.Option(help="Base of step or serve; empty = a random one.")] = "",
    data: Annotated[str, typer.Option(help="Examples of step, for that base.")] = "",
    seconds: Annotated[
        float | None, typer.Option(help="How long serve is loaded; 60 if not given.", min=0.1)
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Measure this machine: always two things in one run, medians and ratios."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.measurements import run_bench

        said = run_bench(
            name, as_json=as_json, repeats=repeats, model=model, data=data, seconds=seconds
        )
        print(said)


# Help lists commands in the order in which they are added.
app.command()(studies.study)
app.command()(models.generate)
app.command()(models.chat)
app.command()(models.evaluate)
app.command()(observing.load)
app.command()(observing.gates)
app.command()(judging.judge)
app.command()(exporting.export)
app.command("import")(exporting.import_part)
app.command()(sites.coordinate)
app.command()(sites.site)


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
    with clear_errors(code=BAD_INPUT, traceback=traceback):
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
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        import json

        from orchard.communication.audit import AUDIT_FILE, audit_lines, read_audit

        events = read_audit(folder / AUDIT_FILE)
        print(json.dumps(events, indent=1) if as_json else "\n".join(audit_lines(events)))


@app.command()
def answers(
    folder: Annotated[
        Path, typer.Argument(help="A run's folder, or a site's.", show_default=False)
    ],
    client: Annotated[str, typer.Option(help="Of this client only.")] = "",
    round_number: Annotated[
        int | None, typer.Option("--round", help="After this round; by default the last.", min=0)
    ] = None,
    as_json: JsonOption = False,
    traceback: Traceback = False,
) -> None:
    """Show what models answered to held-out examples, beside the right answers."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.answers import answers_as_json, find_answers, print_answers

        found = find_answers(folder, client=client or None, round_number=round_number)
        if as_json:
            print(answers_as_json(found))
        else:
            from orchard.engine.progress import make_console

            print_answers(found, make_console())


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="Print a LaTeX table.")] = False,
    traceback: Traceback = False,
) -> None:
    """Show several runs in one table; those that differ in their seed alone are one row."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
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
        for note in (*found.incomparable, *found.notes):
            print(f"note: {note}", file=sys.stderr)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, or a study's.", show_default=False)
    ],
    html: Annotated[Path, typer.Option(help="The page's file; one that is there is replaced.")],
    traceback: Traceback = False,
) -> None:
    """Write a page about runs or a study: one file for any browser, which needs no network."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        from orchard.extras import require

        require("report", to="write a page")
        from orchard.pages.writing import write_page

        write_page(runs, html)
    print(f"the page is {html}")


def main() -> None:
    """Run the command line, in a terminal of any encoding."""
    write_what_the_terminal_knows()
    app()
