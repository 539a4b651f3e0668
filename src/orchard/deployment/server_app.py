"""The rounds of a coordinated run, in the process that Flower starts for them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchard.engine.coordinator import SITES_FILE, Coordinator
from orchard.engine.evaluations import measured_ranges
from orchard.engine.exchange import Patience, Post
from orchard.engine.processes import end_when_free, only_one
from orchard.engine.progress import Lines, make_console
from orchard.experiment.checking import check_between_sites
from orchard.experiment.methods import build_strategy, check_strategy
from orchard.experiment.own_methods import import_from
from orchard.experiment.protecting import Costs, privacy_facts
from orchard.experiment.run_folder import (
    LOCK_FILE,
    RECIPE_FILE,
    check_folder,
    facts_of,
    recipe_digest,
    recorded_as,
)
from orchard.experiment.running import build_schedule, load_model
from orchard.experiment.secrecy import build_secrecy, secrecy_facts
from orchard.experiment.settings import learning_rate
from orchard.experiment.start_values import starting_values
from orchard.experiment.wiring import build_channel
from orchard.models.stored.loading import load_tokenizer, threads
from orchard.process_memory import release_freed_memory, return_memory_at_once
from orchard.recipe.options import Recipe
from orchard.recipe.reading import read_recipe, to_toml, words
from orchard.reports import build_result
from orchard.results import write_json
from orchard.seeding import Seeds
from orchard.server.admission import Admission
from orchard.server.beside import Bounds
from orchard.server.checkpoint import ServerState
from orchard.strategies.strategy import Strategy, start_server
from orchard.trees import digest

if TYPE_CHECKING:
    from flwr.serverapp import Grid

# Of a run's folder; hosting.py writes the first and waits for the others.
RUN_FILE, RESULT_FILE, FAILURE_FILE = "run.json", "result.json", "failure.json"

log = logging.getLogger(__name__)


def run_in_server_app(folder: Path, grid: Grid) -> None:
    """Run the rounds of ``folder`` over a Flower grid, and write its result.

    Raises:
        Exception: Whatever ends the rounds; it is also written to ``failure.json``.
    """
    from orchard.engine.flower import Coordinated

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    end_when_free(folder / LOCK_FILE)
    return_memory_at_once()  # messages come and go in blocks of megabytes
    with only_one(folder / "rounds.lock", seconds=60.0, what="process that runs rounds"):
        try:
            Coordinated(partial(run_over, folder)).start(grid)
        except Exception as error:
            write_json(folder / FAILURE_FILE, {"error": f"{type(error).__name__}: {error}"})
            raise


def run_over(folder: Path, post: Post) -> dict[str, Any]:
    """Run the rounds of ``folder`` over any post, and write its result."""
    recipe = read_recipe(folder / RECIPE_FILE).recipe
    facts = json.loads((folder / RUN_FILE).read_text())
    import_from(Path(facts["directory"]))
    check_folder(folder, recipe, resume=True)
    tokenizer = load_tokenizer(recipe.model.path)
    with threads(recipe.model.num_threads):
        model = load_model(recipe, tokenizer)
        base_digest = model.base_digest
        fresh = dict(starting_values(recipe, model.fresh, base_digest=base_digest))
        rate = learning_rate(recipe, model.view)
        del model
        release_freed_memory()
        coordinator = build_coordinator(
            recipe,
            folder,
            run=facts["run"],
            base_digest=base_digest,
            num_sites=facts["num_sites"],
            rate=rate,
        )

        def begin(num_clients: int) -> tuple[Strategy, ServerState]:
            strategy = build_strategy(recipe, num_clients=num_clients)
            return strategy, start_server(strategy, fresh)

        state = coordinator.run_rounds(post, begin, num_sites=facts["num_sites"])
    sites = json.loads((folder / SITES_FILE).read_text())
    sizes = countable(recipe, sites)
    result = build_result(
        folder,
        {
            **facts_of(recorded_as(recipe)),
            **(privacy_facts(recipe, sizes, rounds=state.round_number) if sizes else {}),
            **secrecy_facts(recipe),
            # The data is at the sites, and of what it is nothing leaves them.
            "data_digest": None,
            "test_digest": None,
            "learning_rate": rate,
            "base_digest": base_digest,
            "shared_digest": digest(state.shared),
            "clients": {site: {} for site in sites},
            "data": {"has_central_test": False},
        },
    )
    write_json(folder / RESULT_FILE, result)
    return result


def countable(recipe: Recipe, sites: Mapping[str, int | None]) -> dict[str, int]:
    """Return the numbers of rows, as sites told them, for which the cost in privacy can be counted.

    What a site told must not cost the others their result.
    """
    if not recipe.privacy.unit:
        return {}
    counted = {}
    for site, rows in sites.items():
        if not rows:
            continue
        try:
            Costs(recipe, {site: rows})
        except ValueError as error:
            log.warning("what rounds cost the rows of %s is not counted: %s", site, error)
            continue
        counted[site] = rows
    return counted


def build_coordinator(
    recipe: Recipe,
    folder: Path,
    *,
    run: str,
    base_digest: str,
    num_sites: int,
    rate: float | None = None,
) -> Coordinator:
    """Return what runs the rounds of a recipe.

    Raises:
        ValueError: It promises a protection that there is not between sites.
    """
    check_between_sites(recipe, num_sites=num_sites)
    options = recipe.deployment
    cohort = min(recipe.server.clients_per_round or num_sites, num_sites)
    return Coordinator(
        schedule=build_schedule(recipe, rate=rate),
        channel=build_channel(recipe),
        seeds=Seeds(recipe.seed),
        folder=folder,
        about={"base_digest": base_digest, "recipe_digest": recipe_digest(recipe)},
        recipe=to_toml(recipe),
        run=run,
        base_digest=base_digest,
        patience=Patience(
            join_seconds=options.join_seconds,
            round_seconds=options.round_seconds,
            probe_seconds=options.probe_seconds,
            quorum=options.quorum or cohort // 2 + 1,
            wanted=0 if options.quorum else cohort,
            attempts=options.attempts,
            accept_late=options.stragglers == "late",
            staleness=options.staleness,
            sum_seconds=options.sum_seconds,
        ),
        admission=Admission(
            options.max_update_norm,
            options.max_weight,
            has_own_metrics=bool(recorded_as(recipe).digests),
        ),
        reporter=Lines(make_console()),
        bounds=Bounds(
            options.max_norm_ratio, options.max_examples, is_equal=options.weights == "equal"
        ),
        max_move=options.max_move,
        ranges=measured_ranges(words(recipe.evaluation.metrics)),
        methods=recorded_as(recipe).digests,
        has_preferences="hfedmoe" in check_strategy(recipe.strategy.name)
        and recipe.selection.router != "examples",
        secrecy=build_secrecy(recipe, {}),
    )
