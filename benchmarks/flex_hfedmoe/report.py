"""The page of FLEx and HFedMoE joined, from results/."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.blocks import Finding, Page, findings, paragraph, table
from benchmarks.records import Record, origins, read

HERE = Path(__file__).parent
# Adapters of hfedmoe.toml; PEFT has no dropout where experts have adapters.
SAME_NAMES = ("model.lora_targets=q_proj,k_proj,v_proj,router,experts", "model.lora_dropout=0.0")
RUNS = {
    "flex_hfedmoe": ("flex_hfedmoe", ()),
    "hfedmoe": ("hfedmoe", ("client.budget=50%",)),
    "fedavg": ("fedavg", SAME_NAMES),
    "flex": ("flex", ()),
    "local": ("local", SAME_NAMES),
    "flex_same_names": ("flex", SAME_NAMES),
    "flex_hfedmoe_closed": ("flex_hfedmoe", ("strategy.graft_gate=closed",)),
}
MODELS = ("global", "personal")
METRICS = ("loss", "rouge_l")


def page() -> Page:
    """Return what is made of the results that are here."""
    found = {name: read(HERE / "results", f"{name}-[0-9]*.json") for name in RUNS}
    results = {name: runs for name, runs in found.items() if runs}
    columns = [
        "run",
        "seeds",
        *(f"{model} {metric}" for metric in ("loss", "ROUGE-L, %") for model in MODELS),
        "active share, %",
        "uplink, MB per client and round",
        "training, s",
    ]
    shown = table(columns, [_row(name, runs) for name, runs in results.items()])
    note = (
        "Mean over four clients of each client's own test examples; ± is the standard deviation "
        "over seeds, where there are several."
    )
    every = [run for runs in results.values() for run in runs]
    return Page(
        HERE,
        {"findings": findings(_findings(results)), "origin": paragraph(origins(every))},
        {"table.md": f"{shown}\n\n{note}\n"},
    )


def _row(name: str, runs: Sequence[Record]) -> list[str]:
    active = [share for own in runs for share in own["active_share"] if share is not None]
    return [
        name,
        " ".join(str(own["seed"]) for own in runs),
        *(_cell(runs, model, "loss", 1, 3) for model in MODELS),
        *(_cell(runs, model, "rouge_l", 100, 2) for model in MODELS),
        f"{100 * fmean(active):.1f}" if active else "",
        f"{_uplink(runs):.2f}",
        f"{_train_seconds(runs):.0f}",
    ]


def _cell(runs: Sequence[Record], model: str, metric: str, scale: float, digits: int) -> str:
    values = [scale * fmean(own["metrics"][model][metric].values()) for own in runs]
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def _uplink(runs: Sequence[Record]) -> float:
    """Return MB per client and round."""
    return 1e-6 * fmean(
        num_bytes / clients
        for own in runs
        for num_bytes, clients in zip(own["uplink_bytes"], own["num_clients"], strict=True)
    )


def _train_seconds(runs: Sequence[Record]) -> float:
    return fmean(own["train_seconds"] for own in runs)


def _findings(results: Mapping[str, Sequence[Record]]) -> list[Finding]:
    def mean(name: str, model: str, metric: str) -> float:
        scale = 1 if metric == "loss" else 100
        return scale * fmean(fmean(own["metrics"][model][metric].values()) for own in results[name])

    def by_client(name: str, other: str, model: str, metric: str) -> list[float]:
        scale = 1 if metric == "loss" else 100
        one, two = (results[n][0]["metrics"][model][metric] for n in (name, other))
        return [scale * (one[client] - two[client]) for client in one]

    loss = {name: mean(name, "personal", "loss") for name in results}
    rouge = {name: mean(name, "personal", "rouge_l") for name in results}
    sent = {name: _uplink(runs) for name, runs in results.items()}
    joined = "flex_hfedmoe"
    shifts = by_client(joined, "hfedmoe", "personal", "loss")
    points = by_client(joined, "hfedmoe", "personal", "rouge_l")
    lower = [-value for value in shifts if value < 0]
    higher = [value for value in shifts if value > 0]
    global_loss = {name: mean(name, "global", "loss") for name in results}
    global_rouge = {name: mean(name, "global", "rouge_l") for name in results}
    left = [name for name in RUNS if name not in results]
    seconds = {name: _train_seconds(runs) for name, runs in results.items()}
    num_seeds = max(len(runs) for runs in results.values())
    return [
        Finding(
            f"It is **one seed**, so it has no spread, and no difference below is known to be more "
            f"than chance. Not run: {', '.join(left)}, and all other seeds. What a graft gives "
            "*without* a budget on these names, and how much depends on where gates start, are "
            "open here.",
            num_seeds == 1,
        ),
        Finding(
            "**Training alone is best.** Without any federation, with all experts, a client's own "
            f"model has loss {loss['local']:.3f} and ROUGE-L {rouge['local']:.2f}, against "
            f"{loss[joined]:.3f} and {rouge[joined]:.2f} of the joined method's personal models; "
            "in loss it is ahead on every client. The setting gives each client one category and "
            "tests it on that, as flex_table1 found for attention alone. Grafts get back "
            f"{loss['hfedmoe'] - loss[joined]:.3f} of the {loss['hfedmoe'] - loss['local']:.3f} "
            "between hfedmoe and local.",
            min(loss, key=loss.__getitem__) == "local"
            and max(rouge, key=rouge.__getitem__) == "local"
            and max(by_client("local", joined, "personal", "loss")) < 0,
        ),
        Finding(
            "**The graft hardly moves the mean.** At the same budget the personal models of "
            f"flex_hfedmoe have loss {loss[joined]:.3f} and ROUGE-L {rouge[joined]:.2f}, hfedmoe "
            f"without grafts {loss['hfedmoe']:.3f} and {rouge['hfedmoe']:.2f}. By client it is "
            f"mixed: loss is lower by {min(lower):.3f} to {max(lower):.3f} on {len(lower)} and "
            f"higher by {max(higher):.3f} on {len(higher)}; ROUGE-L differs by "
            f"{min(points):+.1f} to {max(points):+.1f} points.",
            bool(lower and higher) and min(points) < 0 < max(points),
        ),
        Finding(
            "**The global model is not better for it.** flex_hfedmoe's has loss "
            f"{global_loss[joined]:.3f} against hfedmoe's {global_loss['hfedmoe']:.3f}, and ROUGE-L "
            f"{global_rouge[joined]:.2f} against {global_rouge['hfedmoe']:.2f}. The log's reading of "
            "larger grafts and open gates, that what a graft learns is not left for the shared "
            "adapters, would fit; this table does not test it.",
            global_loss[joined] > global_loss["hfedmoe"]
            and global_rouge[joined] < global_rouge["hfedmoe"],
        ),
        Finding(
            "**The budget costs little here.** FedAvg on the same names, with all experts, has "
            f"{loss['fedavg']:.3f} and {rouge['fedavg']:.2f}: by its side hfedmoe loses "
            f"{loss['hfedmoe'] - loss['fedavg']:.3f} in loss with half of the experts trained in a "
            f"step and {100 * sent['hfedmoe'] / sent['fedavg']:.0f} % of the uplink.",
            0 < loss["hfedmoe"] - loss["fedavg"] < 0.01,
        ),
        Finding(
            "**Training experts and routers counts for more than the graft does.** FLEx as its "
            f"authors run it, with attention alone shared, is at {loss['flex']:.3f} and "
            f"{rouge['flex']:.2f}, {loss['flex'] - loss[joined]:.3f} and "
            f"{rouge[joined] - rouge['flex']:.1f} behind the joined method, but sends "
            f"{sent['flex']:.2f} MB against {sent[joined]:.2f}. Names, dropout and budget all "
            "differ, so the table does not say which of them it is.",
            loss["flex"] - loss[joined] > 2 * (loss["hfedmoe"] - loss[joined]) > 0,
        ),
        Finding(
            f"A graft costs no uplink: {sent[joined]:.2f} MB against {sent['hfedmoe']:.2f}, where "
            "the difference is which experts pass the threshold of usage. It costs time: training "
            f"took {seconds[joined]:.0f} s against {seconds['hfedmoe']:.0f} s. Other jobs shared the "
            "machine, more of them during the first run, so only the direction of that is to be "
            "trusted.",
            math.isclose(sent[joined], sent["hfedmoe"], rel_tol=0.05)
            and seconds[joined] > seconds["hfedmoe"],
        ),
    ]
