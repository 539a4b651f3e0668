"""The page of attacks on privacy, from results/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.blocks import Finding, Page, findings, paragraph, table
from benchmarks.privacy.attacks import (
    Reals,
    auc,
    bootstrap,
    exposure,
    true_positives,
    wilson,
)
from benchmarks.privacy.secure_cost import block as secure_cost
from benchmarks.records import Record, origins, read

HERE = Path(__file__).parent
CATEGORY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fedavg": ("update", "int8", "top_k", "sum", "noisy mean"),
        "fedavg, example": ("update", "sum"),
        "flex": ("update", "sum", "noisy mean"),
        "flex, example": ("update",),
        "hfedmoe": ("names", "update", "sum"),
        "hfedmoe, experts=all": ("names", "update", "sum"),
    }
)
"""How a client trained, and what an attacker has of its message."""
MEMORY = ("fedavg", "fedavg, client", "fedavg, example", "flex", "flex, example")
"""Settings whose models are asked for members and secrets."""
CHANCE = 1 / 8
"""Eight categories, as many clients of each."""


def page() -> Page:
    """Return what is made of the results that are here."""
    category = read(HERE / "results", "category-*.json")
    memory = read(HERE / "results", "memory-*.json")
    step = read(HERE / "results", "step.json")
    guessed = _guessed(category)
    models = {(s, m): _asked(memory, s, m) for s in MEMORY for m in ("global", "personal")}
    models = {key: value for key, value in models.items() if value}
    every = [*category, *memory, *step]
    spent = sum(record["cpu_seconds"] for record in every if "cpu_seconds" in record)
    return Page(
        HERE,
        {
            "secure": secure_cost(),
            "findings": findings(_findings(guessed, models, step)),
            "category": table(
                ("client", "seen", "guessed", "right, %", "95 %", "values sent"),
                [_category_row(key, own) for key, own in guessed.items()],
                num_words=2,
            ),
            "memory": table(
                (
                    *("client", "model", "seeds", "AUC", "95 %", "TPR at 1 % FPR, %", "95 %"),
                    *("test loss", "ROUGE-L"),
                ),
                [_memory_row(key, own) for key, own in models.items()],
                num_words=2,
            ),
            "canaries": table(
                ("client", "model", "once", "eight times", "first of 64, eight times"),
                [_canary_row(key, own) for key, own in models.items()],
                num_words=2,
            ),
            "step": table(
                (
                    *("base", "rows", "tokens", "plain, s", "DP-SGD, s", "row by row, s"),
                    *("DP-SGD over plain", "row by row over plain"),
                ),
                [_step_row(own) for record in step for own in record["steps"]],
            ),
            "cost": paragraph(
                f"{len(every)} records, which took {spent / 60:.1f} minutes of CPU on one core of "
                "a machine that did other work."
            ),
            "origin": paragraph(origins(every)),
        },
    )


def _guessed(records: Sequence[Record]) -> dict[tuple[str, str], dict[str, float]]:
    """Return hits, clients and values of each way in which categories are read, over seeds."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for method, views in CATEGORY.items():
        for view in views:
            own = [
                entry
                for record in records
                for entry in record["found"]
                if (entry["method"], entry["view"]) == (method, view)
            ]
            if own:
                found[method, view] = {
                    "hits": sum(entry["hits"] for entry in own),
                    "total": sum(entry["total"] for entry in own),
                    "values": fmean(entry["values"] for entry in own),
                }
    return found


def _asked(records: Sequence[Record], setting: str, model: str) -> dict[str, Any]:
    """Return what one kind of model gave away, over seeds; empty where there is no record."""
    runs = [record for record in records if record["setting"] == setting]
    if not runs:
        return {}
    own = [record["models"][model] for record in runs]
    exposures: dict[int, list[float]] = {}
    for record, found in zip(runs, own, strict=True):
        for repeats, scores in zip(record["repeats"], found["secrets"], strict=True):
            exposures.setdefault(repeats, []).append(exposure(scores[0], scores[1:]))
    return {
        "runs": len(runs),
        "members": np.concatenate([np.array(found["members"]) for found in own]),
        "others": np.concatenate([np.array(found["others"]) for found in own]),
        "exposures": exposures,
        "loss": fmean(found["test_loss"] for found in own),
        "rouge_l": fmean(found["test_rouge_l"] for found in own),
    }


def _category_row(key: tuple[str, str], own: Mapping[str, float]) -> list[str]:
    hits, total = int(own["hits"]), int(own["total"])
    low, high = wilson(hits, total)
    share = f"{100 * hits / total:.0f}"
    interval = f"{100 * low:.0f} to {100 * high:.0f}"
    return [*key, f"{hits} of {total}", share, interval, f"{own['values']:,.0f}"]


def _memory_row(key: tuple[str, str], own: Mapping[str, Any]) -> list[str]:
    groups: tuple[Reals, Reals] = (own["members"], own["others"])
    area, caught = auc(*groups), true_positives(*groups)
    low, high = bootstrap(groups, auc)
    least, most = bootstrap(groups, true_positives)
    return [
        *(*key, str(own["runs"]), f"{area:.3f}", f"{low:.3f} to {high:.3f}"),
        *(f"{100 * caught:.0f}", f"{100 * least:.0f} to {100 * most:.0f}"),
        *(f"{own['loss']:.3f}", f"{100 * own['rouge_l']:.1f}"),
    ]


def _canary_row(key: tuple[str, str], own: Mapping[str, Any]) -> list[str]:
    once, often = own["exposures"][1], own["exposures"][8]
    first = sum(value == 6.0 for value in often)
    means = [f"{fmean(values):.2f} bits" for values in (once, often)]
    return [*key, *means, f"{first} of {len(often)}"]


def _step_row(own: Mapping[str, Any]) -> list[str]:
    seconds = own["cpu_seconds"]
    names = ("plain", "private", "row_by_row")
    return [
        *(own["model"], str(own["batch_size"]), str(own["num_tokens"])),
        *(f"{seconds[name]:.3f}" for name in names),
        *(f"{seconds[name] / seconds['plain']:.2f}" for name in names[1:]),
    ]


def _findings(
    guessed: Mapping[tuple[str, str], Mapping[str, float]],
    models: Mapping[tuple[str, str], Mapping[str, Any]],
    step: Sequence[Record],
) -> list[Finding]:
    found = []
    for method, view in (("hfedmoe", "names"), ("fedavg", "update"), ("flex", "update")):
        if (method, view) in guessed:
            own = guessed[method, view]
            low, _ = wilson(int(own["hits"]), int(own["total"]))
            found.append(
                Finding(
                    f"{method}: a client's category is read from its {view} in "
                    f"{int(own['hits'])} of {int(own['total'])} cases, "
                    f"{'above' if low > CHANCE else 'not surely above'} chance."
                )
            )
    hidden = {
        "selection.experts=all takes the names away": ("hfedmoe, experts=all", "names"),
        "secure aggregation leaves a sum": ("fedavg", "sum"),
        "example-level noise leaves of the update": ("fedavg, example", "update"),
    }
    left = [
        f"{what}: {int(guessed[key]['hits'])} of {int(guessed[key]['total'])}"
        for what, key in hidden.items()
        if key in guessed
    ]
    if left:
        found.append(Finding(f"What protects: {'; '.join(left)}. int8 and top_k do not."))
    plain, private = models.get(("fedavg", "global")), models.get(("fedavg, example", "global"))
    if plain and private:
        often = [fmean(own["exposures"][8]) for own in (plain, private)]
        found.append(
            Finding(
                f"A secret that stands eight times in one client's rows has an exposure of "
                f"{often[0]:.1f} bits of 6 in FedAvg's global model, and {often[1]:.1f} with "
                f"example-level privacy at epsilon 8, whose test loss is {private['loss']:.2f} in "
                f"the place of {plain['loss']:.2f}.",
                often[1] < often[0] and private["loss"] > plain["loss"],
            )
        )
        area = auc(plain["members"], plain["others"])
        low, high = bootstrap((plain["members"], plain["others"]), auc)
        found.append(
            Finding(
                f"The loss says little of membership after so short a training even without "
                f"protection: AUC {area:.2f}, {low:.2f} to {high:.2f}. This attack cannot show what "
                "protection is worth here; one with shadow models may find more.",
                low < 0.5,
            )
        )
    noisy = models.get(("fedavg, client", "global"))
    if plain and noisy:
        found.append(
            Finding(
                f"Client-level noise for four clients leaves no model: test loss {noisy['loss']:.1f}.",
                noisy["loss"] > plain["loss"],
            )
        )
    for record in step:
        ratios = [
            own["cpu_seconds"]["private"] / own["cpu_seconds"]["plain"] for own in record["steps"]
        ]
        said = ", ".join(
            f"{ratio:.2f} times at {own['batch_size']} rows ({own['model'].rpartition('/')[2]})"
            for ratio, own in zip(ratios, record["steps"], strict=True)
        )
        found.append(
            Finding(f"A step of DP-SGD takes {said} what a plain one takes.", max(ratios) <= 2)
        )
    return found
