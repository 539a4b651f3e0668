"""The page and the figure of clients that lie, from results/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.blocks import Finding, Page, findings, paragraph, table
from benchmarks.records import Record, origins, read

HERE = Path(__file__).parent
NUM_CLIENTS, NUM_HOSTILE = 20, 4
KERNELS = ("mean", "median", "trimmed_mean", "clipped_mean", "krum")
ATTACKS = ("none", "scaled", "flipped")
CHANCE, NUM_TEST = 25.0, 300


def records() -> dict[tuple[str, str, int], Record]:
    """Return the records that are here, by kernel, attack and seed."""
    return {(r["kernel"], r["attack"], r["seed"]): r for r in read(HERE / "results")}


def page() -> Page:
    """Return what is made of the results that are here."""
    found = records()
    runs = {
        (attack, kernel): [r for (k, a, _), r in found.items() if (k, a) == (kernel, attack)]
        for attack in ATTACKS
        for kernel in KERNELS
    }
    columns = ("attack", "kernel", "seeds", "final accuracy, %", "final loss (spread)")
    rows = [
        [*of, str(len(own)), _spread(_finals(own, "accuracy"), 1), _spread(_finals(own, "loss"), 3)]
        for of, own in runs.items()
        if own
    ]
    return Page(
        HERE,
        {
            "findings": findings(_findings(runs)),
            "origin": paragraph(origins(found.values())),
        },
        {"table.md": table(columns, rows, num_words=2) + "\n"},
    )


def _finals(runs: Sequence[Record], metric: str) -> list[float]:
    scale = 100 if metric == "accuracy" else 1
    return [scale * run[metric][-1] for run in runs]


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def _findings(runs: Mapping[tuple[str, str], Sequence[Record]]) -> list[Finding]:
    accuracy = {of: fmean(_finals(own, "accuracy")) for of, own in runs.items()}
    loss = {of: fmean(_finals(own, "loss")) for of, own in runs.items()}
    clean, clean_loss = accuracy["none", "mean"], loss["none", "mean"]
    # Of a share of about a third to a half of so many articles.
    error = 100 * (0.39 * 0.61 / NUM_TEST) ** 0.5
    num_seeds = max(map(len, runs.values()))
    hostile = ATTACKS[1:]

    def both(kernel: str) -> str:
        return " and ".join(f"{accuracy[attack, kernel]:.1f}" for attack in hostile)

    stay = [accuracy[attack, k] for attack in ATTACKS for k in ("median", "trimmed_mean")]
    return [
        Finding(
            f"{num_seeds} seed{'' if num_seeds == 1 else 's'}; {NUM_TEST} test articles, so an "
            f"accuracy has a standard error of about {error:.1f} points, and chance is "
            f"{CHANCE:.0f} %. What follows holds in spite of that."
        ),
        Finding(
            f"The mean fails under both attacks: it ends at {both('mean')} % instead of "
            f"{clean:.1f}, with a loss of {loss['scaled', 'mean']:.2f} (scaled) and "
            f"{loss['flipped', 'mean']:.1f} (flipped) instead of {clean_loss:.2f}.",
            all(accuracy[attack, "mean"] < CHANCE + 2 * error for attack in hostile)
            and all(loss[attack, "mean"] > 1.1 * clean_loss for attack in hostile),
        ),
        Finding(
            f"The median ({both('median')} %) and the trimmed mean ({both('trimmed_mean')} %) stay "
            f"within noise of the clean mean ({clean:.1f} %), and so do they without an attack "
            f"({accuracy['none', 'median']:.1f} and {accuracy['none', 'trimmed_mean']:.1f} %).",
            all(abs(value - clean) < 2 * error for value in stay),
        ),
        Finding(
            f"Krum leaves the {NUM_HOSTILE} out: under both attacks it ends with the same loss and "
            f"accuracy ({accuracy['scaled', 'krum']:.1f} %).",
            _finals(runs["scaled", "krum"], "loss") == _finals(runs["flipped", "krum"], "loss"),
        ),
        Finding(
            "Clipping bears updates that are too long, not those that point the other way: "
            f"{both('clipped_mean')} %.",
            accuracy["scaled", "clipped_mean"] - accuracy["flipped", "clipped_mean"] > 2 * error,
        ),
    ]


def draw() -> None:
    """Write figure.png."""
    from matplotlib import pyplot

    found = records()
    figure, panels = pyplot.subplots(1, len(ATTACKS), figsize=(11, 3.4), sharey=True)
    for panel, attack in zip(panels, ATTACKS, strict=True):
        for color, kernel in enumerate(KERNELS):
            runs = [r["accuracy"] for (k, a, _), r in found.items() if (k, a) == (kernel, attack)]
            for number, curve in enumerate(runs):
                rounds = [2 * (index + 1) for index in range(len(curve))]
                panel.plot(
                    rounds,
                    [100 * value for value in curve],
                    color=f"C{color}",
                    label=kernel.replace("_", " ") if number == 0 else None,
                    linewidth=1.3,
                )
        hostile_clients = f"{NUM_HOSTILE} of {NUM_CLIENTS} clients {attack}"
        panel.set_title("no attack" if attack == "none" else hostile_clients)
        panel.set_xlabel("round")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy, %")
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(HERE / "figure.png", dpi=130)
