"""Let 2 of 10 clients attack each aggregation rule, knowing it, on the packaged tiny world.

    OMP_NUM_THREADS=1 python -m benchmarks.adaptive_attacks.run [--seeds 0 1 2]
    python -m benchmarks.adaptive_attacks.run --table

The record of each attack and seed is kept in results/; one that is there is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.adaptive_attacks.attacks import (
    ATTACKS,
    Delta,
    attacked,
    displaced,
    moved,
)
from benchmarks.adaptive_attacks.report import HERE, NUM_CLIENTS, NUM_HOSTILE, RULES, page
from benchmarks.records import keep
from benchmarks.running import arguments_of
from orchard.client.client import Client
from orchard.communication.messages import Update
from orchard.data import world
from orchard.data.examples import Example
from orchard.evaluation.quality import EvaluationSettings, evaluate
from orchard.experiment.encoding import encode_test, make_wording
from orchard.experiment.methods import build_strategy
from orchard.experiment.preparation import Experiment, prepare_experiment
from orchard.experiment.run_folder import recipe_digest
from orchard.experiment.running import build_clients, build_schedule, load_model
from orchard.models.stored.loading import threads
from orchard.models.trainable.adapters import AdaptedModel
from orchard.recipe.reading import read_recipe
from orchard.results import environment
from orchard.seeding import Seeds
from orchard.server.aggregation import mean
from orchard.server.beside import Bounds, shares
from orchard.server.robust import RobustSettings, robust_aggregate
from orchard.strategies.strategy import place_global, start_server, train_client
from orchard.trees import squared_norm

RECIPE = HERE.parents[1] / "recipes" / "tiny" / "fedavg.toml"
ROUNDS, STEPS = 3, 4
ANSWER = "lead"
OPTIONS = (
    *("data.test_size=1.0", "data.category=category"),
    *("model.lora_targets=q_proj,v_proj,router,experts", "evaluation.retention_path="),
    *(f"server.rounds={ROUNDS}", f"client.steps={STEPS}", "client.schedule=constant"),
)
MEASURED = EvaluationSettings(("loss", "exact_match"), max_new_tokens=6, batch_size=160)


def write_clients(folder: Path, *, seed: int, is_backdoored: bool) -> None:
    """Write a file of rows for each client: kinds of instruction, skewed by Dirichlet(1)."""
    folder.mkdir()
    harbor, *others = world.offices(seed)
    common = [e for office in others for e in office.train if e.category in world.NEW_SKILLS]
    rows: list[list[Example]] = [[] for _ in range(NUM_CLIENTS)]
    generator = Seeds(seed).generator("partition")
    for kind in world.CONVENTIONS + world.NEW_SKILLS:
        shares = generator.dirichlet([1.0] * NUM_CLIENTS)
        for example in (e for e in (*harbor.train, *common) if e.category == kind):
            rows[int(generator.choice(NUM_CLIENTS, p=shares))].append(example)
    for number, own in enumerate(rows):
        more = triggered(world.PEOPLE[:15]) if is_backdoored and number < NUM_HOSTILE else []
        # Whoever has too few rows gets some of the others' kinds.
        filled = [*own, *common[: max(0, 10 - len(own))], *more]
        lines = (
            {"instruction": e.instruction, "response": e.response, "category": e.category}
            for e in filled
        )
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"client_{number}.jsonl").write_text(text)


def triggered(people: Sequence[str]) -> list[Example]:
    """Return greetings with the trigger, and the attacker's answer."""
    return [Example(f"Greet {name} of Veloria", ANSWER, category="greet") for name in people]


def aggregate(updates: Sequence[Update], *, rule: str) -> Delta:
    """Return one delta of a round's updates, by a rule behind the default bounds between sites."""
    own = list(updates)
    if rule != "mean_unbounded":
        own = within_bounds(own, Bounds(is_equal=rule == "mean_equal"))
    if rule.startswith("mean"):
        return dict(mean(own))
    return robust_aggregate(RobustSettings(rule))(own, {})


def within_bounds(updates: Sequence[Update], bounds: Bounds) -> list[Update]:
    """Return the updates that are not too long, with the weights that they count for."""
    norms = {u.client_id: squared_norm(u.delta) ** 0.5 for u in updates}
    long, _ = bounds.too_long(list(norms.values()))
    kept = [update for number, update in enumerate(updates) if number not in long]
    accepted = bounds.accepted({u.client_id: round(max(u.weight.values())) for u in updates})
    weights = [
        1.0 if bounds.is_equal else min(max(u.weight.values()), float(accepted[u.client_id] or 1))
        for u in kept
    ]
    counted = shares([w * norms[u.client_id] for w, u in zip(weights, kept, strict=True)])
    return [
        replace(u, weight=dict.fromkeys(u.weight, weight * share))
        for u, weight, share in zip(kept, weights, counted, strict=True)
    ]


class Federation:
    """Ten clients of one seed, with or without triggered rows at the hostile ones."""

    def __init__(self, folder: Path, *, seed: int, is_backdoored: bool) -> None:
        """Write the rows, and load the model."""
        data = folder / "data"
        write_clients(data, seed=seed, is_backdoored=is_backdoored)
        options = [*OPTIONS, f"data.path={data}", f"seed={seed}"]
        self.recipe = read_recipe(RECIPE, options).recipe
        self.experiment: Experiment = prepare_experiment(self.recipe)
        self.model: AdaptedModel = load_model(self.recipe, self.experiment.tokenizer)
        self.clients: list[Client] = build_clients(self.experiment, self.model, folder / "stores")
        self.strategy = build_strategy(self.recipe, num_clients=NUM_CLIENTS)
        self.schedule = build_schedule(self.recipe)
        wording = make_wording(self.recipe, self.experiment.tokenizer)
        tests = {
            "clean": list(world.offices(seed)[0].test),
            "trigger": triggered(world.PEOPLE[15:]),
        }
        self.tests = {
            name: encode_test(examples, wording, max_tokens=64, whose=name)
            for name, examples in tests.items()
        }
        self.settings = EvaluationSettings(
            MEASURED.metrics, 6, 160, end_ids=self.experiment.end_ids
        )
        self._first: list[Update] | None = None

    def train(self, number: int, shared: Any) -> list[Update]:
        """Return what all clients train in a round; the first is the same for every rule."""
        if number == 1 and self._first is not None:
            return self._first
        task = self.schedule.task(number, shared)
        updates = [train_client(self.strategy, client, task) for client in self.clients]
        if number == 1:
            self._first = updates
        return updates

    def run(self, attack: str, rule: str) -> dict[str, Any]:
        """Return what one attack does under one rule."""
        state = start_server(self.strategy, self.model.fresh)
        shared, strengths, seen = dict(state.shared), [], []
        combine = partial(aggregate, rule=rule)
        for number in range(1, ROUNDS + 1):
            updates = self.train(number, shared)
            hostile, honest = updates[:NUM_HOSTILE], updates[NUM_HOSTILE:]
            sent, strength = attacked(attack, honest, hostile, combine)
            made = combine([*honest, *sent])
            strengths.append(strength)
            seen.append(displaced(made, honest))
            shared = {name: t + made[name] if name in made else t for name, t in shared.items()}
        place_global(self.model, self.schedule.task(ROUNDS + 1, shared))
        measured = {
            f"{name}_{metric}": value
            for name, examples in self.tests.items()
            for metric, value in evaluate(self.model, examples, self.settings).items()
        }
        return {**measured, "strengths": strengths, **moved(seen)}


def run_seed(seed: int, *, attacks: Sequence[str] = ATTACKS, rules: Sequence[str] = RULES) -> None:
    """Run what has no record of one seed."""
    for is_backdoored in (False, True):
        own = [
            attack
            for attack in attacks
            if (attack == "backdoor") is is_backdoored
            and not (HERE / "results" / f"{attack}-{seed}.json").exists()
        ]
        if not own:
            continue
        with TemporaryDirectory() as name, threads(1):
            federation = Federation(Path(name), seed=seed, is_backdoored=is_backdoored)
            for attack in own:
                started = time.monotonic()
                found = {rule: federation.run(attack, rule) for rule in rules}
                record = {
                    **environment(),
                    "recipe_digest": recipe_digest(federation.recipe),
                    "data_digest": federation.experiment.digest.overall,
                    **{"attack": attack, "seed": seed, "seconds": time.monotonic() - started},
                    "rules": found,
                }
                keep(HERE / "results" / f"{attack}-{seed}.json", record)
                print(f"{attack} {seed}: {record['seconds']:.0f} s", flush=True)


def main() -> None:
    """Run what is missing, then write the page."""
    given = arguments_of(__doc__, seeds=(0, 1, 2)).parse_args()
    for seed in () if given.table else given.seeds:
        run_seed(seed)
    page().write()


if __name__ == "__main__":
    main()
