"""The page of FLEx's four-client Dolly setting, from results/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.blocks import Finding, Page, findings, paragraph, table
from benchmarks.records import Record, origins

HERE = Path(__file__).parent
RECIPES = (
    "flex",
    "fedavg",
    "local",
    "flex_closed",
    "fedavgm",
    "fedprox",
    "scaffold",
    "fedadam",
    "fedadagrad",
    "fedyogi",
    "flex_random",
    "flex_no_gate",
)
MODELS = ("base", "global", "local", "personal")
# Server optimizers whose default rate is small for adapters.
_ADAPTIVE = ("fedadam", "fedyogi", "fedadagrad")


def page() -> Page:
    """Return what is made of the results that are here."""
    results = {
        recipe: json.loads((HERE / "results" / f"{recipe}.json").read_text())
        for recipe in RECIPES
        if (HERE / "results" / f"{recipe}.json").is_file()
    }
    first = next(iter(results.values()))
    columns = ["recipe", "model", *first["clients"], "mean", "worst"]
    parts = []
    for metric, scale, digits in (("rouge_l", 100, 2), ("loss", 1, 3)):
        rows = [["(no training)", "base", *_values(first, "base", metric, scale, digits)]]
        rows += [
            [recipe, model, *_values(result, model, metric, scale, digits)]
            for recipe, result in results.items()
            for model in MODELS[1:]
        ]
        parts.append(f"## {metric}\n\n{table(columns, rows, num_words=2)}")
    columns = ["recipe", "uplink B per client and round", "s in all", "s overhead", "overhead %"]
    costs = [
        [
            recipe,
            f"{_uplink(result):,.0f}",
            f"{result['seconds']['rounds']:.0f}",
            f"{result['seconds']['overhead']:.1f}",
            f"{100 * result['overhead_share']:.1f}",
        ]
        for recipe, result in results.items()
    ]
    parts.append(f"## cost\n\n{table(columns, costs)}")
    return Page(
        HERE,
        {
            "findings": findings(_findings(results)),
            "origin": paragraph(origins(results.values())),
        },
        {"table.md": "\n\n".join(parts) + "\n"},
    )


def _values(result: Record, model: str, metric: str, scale: int, digits: int) -> list[str]:
    values = result["metrics"][model][metric]
    summary = result["summary"][model][metric]
    numbers = [*values.values(), summary["mean"], summary["worst"]]
    return [f"{scale * number:.{digits}f}" for number in numbers]


def _uplink(result: Record) -> float:
    """Return bytes per client and round."""
    uplink = result["uplink_bytes_per_round"]
    return float(sum(uplink)) / len(uplink) / len(result["clients"])


def _findings(results: Mapping[str, Record]) -> list[Finding]:
    def own(name: str, metric: str, model: str = "personal") -> float:
        return float(results[name]["summary"][model][metric]["mean"])

    loss = {name: own(name, "loss") for name in results}
    rouge = {name: 100 * own(name, "rouge_l") for name in results}
    base_loss, base_rouge = own("flex", "loss", "base"), 100 * own("flex", "rouge_l", "base")
    sent = {name: _uplink(result) for name, result in results.items()}
    shares = {name: 100 * result["overhead_share"] for name, result in results.items()}
    aggregated = [name for name in results if name != "local"]
    others = [name for name in aggregated if name not in _ADAPTIVE]
    behind = ", ".join(f"{name} {loss[name]:.2f}" for name in _ADAPTIVE)
    left = [name for name in RECIPES if name not in results]
    most = max(share for name, share in shares.items() if name != "flex")
    return [
        Finding(
            "Every method with a row improves on the base (ROUGE-L "
            f"{base_rouge:.2f}, loss {base_loss:.3f}).",
            max(loss.values()) < base_loss and min(rouge.values()) > base_rouge,
        ),
        Finding(
            f"{behind}: at their default server learning rate of 1e-3 these are behind in loss.",
            min(loss[name] for name in _ADAPTIVE) > max(loss[name] for name in others),
        ),
        Finding(
            f"Training alone is best in both measures ({rouge['local']:.2f} and "
            f"{loss['local']:.3f}): each client is tested on its own category, and this small base "
            "gains little from the other clients.",
            max(rouge, key=rouge.__getitem__) == "local"
            and min(loss, key=loss.__getitem__) == "local",
        ),
        Finding(
            "FLEx in the paper's form (gates started at the router's row) is "
            f"{rouge['flex'] - rouge['fedavg']:.2f} ROUGE-L above FedAvg ({rouge['flex']:.2f} "
            f"against {rouge['fedavg']:.2f}) at about the same loss ({loss['flex']:.3f} against "
            f"{loss['fedavg']:.3f}). SCAFFOLD has the lowest loss of the methods that aggregate "
            f"({loss['scaffold']:.3f}) and less ROUGE-L ({rouge['scaffold']:.2f}). Without further "
            "seeds none of these differences is more than an observation.",
            rouge["flex"] > rouge["fedavg"] > rouge["scaffold"]
            and abs(loss["flex"] - loss["fedavg"]) < 0.005
            and min(aggregated, key=loss.__getitem__) == "scaffold",
        ),
        Finding(
            f"A FLEx client sends what a FedAvg client sends ({sent['flex'] / 1e6:.2f} MB a round "
            f"in float32, {sent['flex'] - sent['fedavg']:.0f} bytes of header apart); SCAFFOLD "
            f"sends {sent['scaffold'] / sent['fedavg']:.1f} times that. Time outside training and "
            f"evaluation was {shares['flex']:.1f} % of the FLEx run (the choice of experts) and at "
            f"most {most:.1f} % of the others.",
            0 <= sent["flex"] - sent["fedavg"] < 1000,
        ),
        Finding(f"Recipes without a row have not been run yet: {', '.join(left)}.", bool(left)),
    ]
