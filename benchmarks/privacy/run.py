"""Attack clients of the packaged model through what they send and through the models it makes.

    OMP_NUM_THREADS=1 python -m benchmarks.privacy.run [--only category memory step] [--seeds 0 1 2]
    python -m benchmarks.privacy.run --table

A record of each part, setting and seed is kept in results/; what has one is not run again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.privacy.attacks import Reals, classify
from benchmarks.privacy.federation import Federation, as_names, as_vectors
from benchmarks.privacy.report import CATEGORY, HERE, MEMORY, page
from benchmarks.privacy.rows import canaries, members, of_one_kind, write_clients
from benchmarks.privacy.step import measure_step
from benchmarks.records import OF_A_RECIPE, keep
from benchmarks.running import arguments_of
from orchard.communication.messages import Update
from orchard.communication.quantization import Int8
from orchard.communication.sparsification import TopK
from orchard.data import world
from orchard.experiment.run_folder import recipe_digest
from orchard.models.stored.loading import threads
from orchard.results import environment
from orchard.server.accounting import noise_for
from orchard.trees import Tree

EPSILON, DELTA, CLIP = 8.0, 1e-3, 0.5
EXAMPLE = (
    *("privacy.unit=example", f"privacy.epsilon={EPSILON}", f"privacy.delta={DELTA}"),
    f"privacy.clip={CLIP}",
)
"""Noise is the system's: one that follows the seed would be the same for shadow clients."""
CLIENT = (
    *("privacy.unit=client", f"privacy.epsilon={EPSILON}", "privacy.delta=1e-2"),
    *(f"privacy.clip={CLIP}", "privacy.random=seed"),
)
RANDOM = ("strategy.graft_choice=random",)
EXPERTS = ("model.lora_targets=q_proj,v_proj,experts", "client.budget=25%")
METHODS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "fedavg": ("fedavg", ()),
    "fedavg, example": ("fedavg", EXAMPLE),
    "flex": ("flex", ()),
    "flex, example": ("flex", (*EXAMPLE, *RANDOM)),
    "hfedmoe": ("hfedmoe", EXPERTS),
    "hfedmoe, experts=all": ("hfedmoe", (*EXPERTS, "selection.experts=all")),
}
"""How clients of one category train; what is done to their messages afterwards is ``CATEGORY``."""
PER_KIND, NUM_ROWS = 2, 10
GROUP = 6
"""Clients whose updates are one sum, of which the attacked one is one."""


def attack_category(seed: int) -> list[dict[str, Any]]:
    """Return how often a client's category is read from what it sends, in every way."""
    found = []
    with TemporaryDirectory() as name:
        for method, (recipe, options) in METHODS.items():
            sides = []
            for side, of_rows in (("shadow", seed + 1000), ("seen", seed)):
                data = Path(name) / f"{side}-rows"
                if not data.exists():
                    clients = of_one_kind(of_rows, per_kind=PER_KIND, num_rows=NUM_ROWS)
                    write_clients(data, clients)
                # The attacker is sent the same global values.
                own = [*options, f"seed={seed}", "client.steps=2", "client.batch_size=5"]
                folder = Path(name) / f"{side}-{method}"
                federation = Federation(
                    data, folder, method=recipe, options=[*own, "server.rounds=1"]
                )
                sides.append(federation.updates())
                shared = federation.state.shared
            shadow, seen = sides
            labels = [[u.client_id.rpartition("-")[0] for u in side] for side in sides]
            for view in CATEGORY[method]:
                vectors = [
                    _seen_as(view, updates, shared, np.random.default_rng([seed, side]))
                    for side, updates in enumerate((shadow, seen))
                ]
                guessed = classify(vectors[0], labels[0], vectors[1])
                hits = sum(g == right for g, right in zip(guessed, labels[1], strict=True))
                sent = np.mean([sum(t.numel() for t in u.delta.values()) for u in seen])
                found.append(
                    {
                        "method": method,
                        "view": view,
                        "hits": hits,
                        "total": len(guessed),
                        "values": float(sent),
                        "recipe_digest": recipe_digest(federation.recipe),
                        "data_digest": federation.experiment.digest.overall,
                    }
                )
    return found


def _seen_as(
    view: str, updates: Sequence[Update], shared: Tree, generator: np.random.Generator
) -> Reals:
    """Return what an attacker has of each update: itself, its names, or a sum that it is in."""
    if view == "names":
        return as_names(updates, shared)
    if view in ("int8", "top_k"):
        stage: Any = Int8() if view == "int8" else TopK(0.1)
        trees = [stage.decode(stage.encode(dict(u.delta))) for u in updates]
        made = [
            Update(u.client_id, u.round_number, tree, u.weight, {})
            for u, tree in zip(updates, trees, strict=True)
        ]
        return as_vectors(made, shared)
    vectors = as_vectors(updates, shared)
    if view == "update":
        return vectors
    if view == "noisy mean":
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors * np.minimum(1.0, CLIP / np.maximum(norms, 1e-12))
    sums = np.empty_like(vectors)
    for index in range(len(vectors)):
        others = generator.choice(
            np.delete(np.arange(len(vectors)), index), GROUP - 1, replace=False
        )
        sums[index] = vectors[index] + vectors[others].sum(axis=0)
    if view == "noisy mean":
        noise = noise_for(epsilon=EPSILON, sampling_rate=GROUP / 24, rounds=1, delta=1e-2)
        sums += noise * CLIP * generator.standard_normal(sums.shape)
    return sums


SETTINGS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "fedavg": ("fedavg", ()),
    "fedavg, client": ("fedavg", CLIENT),
    "fedavg, example": ("fedavg", EXAMPLE),
    "flex": ("flex", RANDOM),
    "flex, example": ("flex", (*EXAMPLE, *RANDOM)),
}
assert {*SETTINGS} == {*MEMORY}
ROUNDS, STEPS = 4, 8


def attack_memory(setting: str, seed: int) -> dict[str, Any]:
    """Return the scores of members, of other rows and of secrets, and what the models are worth."""
    recipe, options = SETTINGS[setting]
    clients, outside = members(seed, per_kind=5)
    victim = world.OFFICES[0]
    inside = list(clients[victim])
    secrets = canaries(seed)
    clients[victim] = inside + [c.planted for c in secrets for _ in range(c.repeats)]
    with TemporaryDirectory() as name:
        data = Path(name) / "rows"
        write_clients(data, clients)
        federation = Federation(
            data,
            Path(name) / "clients",
            method=recipe,
            options=[
                *(*options, f"seed={seed}", f"server.rounds={ROUNDS}", f"client.steps={STEPS}"),
                "client.lr=4e-3",
            ],
        )
        federation.run()
        asked = [row for c in secrets for row in (c.planted, *c.rivals)]
        scored = federation.measure([*inside, *outside, *asked], whose=victim)
        tests = list(world.offices(seed)[0].test)
        worth = federation.measure(tests, whose=victim, metrics=("loss", "rouge_l"))
        values = sum(t.numel() for t in federation.state.shared.values())
    models = {}
    for model in ("global", "personal"):
        gains = np.array(scored["base"]["each"]) - np.array(scored[model]["each"])
        first, second = len(inside), len(inside) + len(outside)
        models[model] = {
            "members": [round(float(v), 6) for v in gains[:first]],
            "others": [round(float(v), 6) for v in gains[first:second]],
            "secrets": [
                [round(float(v), 6) for v in own]
                for own in gains[second:].reshape(len(secrets), -1)
            ],
            "test_loss": worth[model]["loss"],
            "test_rouge_l": worth[model]["rouge_l"],
        }
    return {
        "setting": setting,
        "models": models,
        "repeats": [c.repeats for c in secrets],
        "values": values,
        "recipe_digest": recipe_digest(federation.recipe),
        "data_digest": federation.experiment.digest.overall,
    }


def main() -> None:
    """Run what is missing, then write the page."""
    parser = arguments_of(__doc__, only=("category", "memory", "step"), seeds=(0, 1, 2))
    given = parser.parse_args()
    for seed in () if given.table else given.seeds:
        with threads(1):
            if "category" in given.only:
                _keep(f"category-{seed}", partial(_category, seed), seed)
            for setting in SETTINGS if "memory" in given.only else ():
                name = setting.replace(", ", "-")
                _keep(f"memory-{name}-{seed}", partial(attack_memory, setting, seed), seed)
    if "step" in given.only and not given.table:
        with threads(1):
            _keep("step", lambda: {"steps": measure_step(given.model, given.data)}, 0)
    page().write()


def _category(seed: int) -> dict[str, Any]:
    found = attack_category(seed)
    return {"found": found, **{key: together(found, key) for key in OF_A_RECIPE}}


def together(found: Sequence[Mapping[str, Any]], key: str) -> str:
    """Return one digest of what several recipes, or their data, have as ``key``."""
    parts = dict.fromkeys(str(entry[key]) for entry in found)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _keep(name: str, measure: Callable[[], dict[str, Any]], seed: int) -> None:
    path = HERE / "results" / f"{name}.json"
    if path.exists():
        return
    started = time.process_time()
    found = measure()
    seconds = time.process_time() - started
    keep(path, {**environment(), "seed": seed, "cpu_seconds": seconds, **found})
    print(f"{name}: {seconds:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
