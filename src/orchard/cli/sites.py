"""Commands that run a federation between sites: the coordinator's and a site's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from orchard.cli.errors import BAD_INPUT, FAILED, clear_errors
from orchard.cli.parameters import (
    InsecureOption,
    KeysOption,
    OutOption,
    Overrides,
    RecipeArgument,
    ResumeOption,
    Traceback,
    default_folder,
    resolve,
)
from orchard.cli.resuming import where_it_stopped


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
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        log_to_stderr()
        resolved = resolve(recipe, overrides)
        folder = out or default_folder(recipe)
        from orchard.deployment.hosting import CoordinatorOptions, check_coordinator
        from orchard.deployment.hosting import coordinate as run_coordinator

        options = CoordinatorOptions(
            folder, address, keys, insecure, trusted_proxies=tuple(trusted_proxy or ())
        )
        num_sites = check_coordinator(resolved.recipe, options, resume=resume)
    from orchard.engine.processes import leaves_on_termination
    from orchard.engine.progress import make_console
    from orchard.reports import result_table, run_sentence
    from orchard.tables import print_table

    stopped = partial(where_it_stopped, folder, resolved.recipe.server.rounds)
    with (
        clear_errors(code=FAILED, traceback=traceback, stopped=stopped),
        leaves_on_termination(),
    ):
        result = run_coordinator(resolved.recipe, options, num_sites=num_sites)
    console = make_console()
    print_table(console, result_table(result), num_keys=2)
    console.print(run_sentence(result, folder), highlight=False)
    for text in result["notes"]:
        console.print(f"note: {text}", style="yellow", highlight=False, markup=False)


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
    requests_per_hour: Annotated[
        int, typer.Option(help="Requests to join or to do something, in an hour.", min=1)
    ] = 3600,
    keep_answers: Annotated[
        bool,
        typer.Option("--keep-answers", help="Keep answers that are generated over rows, if asked."),
    ] = False,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="Largest value of a recipe's option: client.steps=100; repeatable."),
    ] = None,
    peers: Annotated[
        Path | None,
        typer.Option(help="Folder of the public keys of the sites to be summed with in secret."),
    ] = None,
    secure_least: Annotated[
        int,
        typer.Option(
            help="Send updates only in secret sums of at least so many sites; 0 = as recipes say.",
            min=0,
        ),
    ] = 0,
    epsilon: Annotated[
        float,
        typer.Option(
            help="Most that updates may cost this site's rows in all runs, and nothing of rows "
            "leaves without noise; 0 = as recipes say.",
            min=0,
        ),
    ] = 0.0,
    delta: Annotated[
        float, typer.Option(help="Probability with which --epsilon may not hold.")
    ] = 1e-5,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what a coordinator asks, and join nothing.")
    ] = False,
    keys: KeysOption = None,
    insecure: InsecureOption = False,
    traceback: Traceback = False,
) -> None:
    """Take part in a federation with this machine's data."""
    with clear_errors(code=BAD_INPUT, traceback=traceback):
        log_to_stderr()
        from orchard.deployment.consent import Consent
        from orchard.deployment.key_files import own_key
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
            requests_per_hour=requests_per_hour,
            keeps_answers=keep_answers,
            limits=parse_limits(limit or ()),
            secure_least=secure_least,
            peers=str(peers.resolve()) if peers else "",
            signing_key=own_key(keys, name or data.stem) if peers and keys else "",
            epsilon=epsilon,
            delta=delta,
        )
        options = SiteOptions(name or data.stem, superlink, store, consent, keys, insecure)
        check_site(options)
    from orchard.engine.processes import leaves_on_termination

    def stopped() -> str:
        return f"site {options.name} stopped; the same command lets it take part again"

    with (
        clear_errors(code=FAILED, traceback=traceback, stopped=stopped),
        leaves_on_termination(),
    ):
        if dry_run:
            print(look(options), end="")
        else:
            run_site(options)


def log_to_stderr() -> None:
    """Let this process log what its own modules say, with the time."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    own = logging.getLogger("orchard")
    own.addHandler(handler)
    own.setLevel(logging.INFO)
