"""The page of attackers that adapt, from results/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.adaptive_attacks.attacks import ATTACKS
from benchmarks.blocks import Finding, Page, findings, paragraph, table
from benchmarks.records import Record, origins, read

HERE = Path(__file__).parent
NUM_CLIENTS, NUM_HOSTILE = 10, 2
RULES = ("mean_unbounded", "mean", "mean_equal", "clipped_mean", "median", "trimmed_mean", "krum")
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Of Student, 95 %, by the number of seeds."""
_COLUMNS = {
    "clean loss": ("clean_loss", 1, 3),
    "trigger answered, %": ("trigger_exact_match", 100, 1),
    "names moved, %": ("names_moved", 100, 1),
    "experts moved, %": ("experts_moved", 100, 1),
    "worst name, honest SD": ("worst_distance", 1, 1),
}


def page() -> Page:
    """Return what is made of the results that are here."""
    found = read(HERE / "results")
    rows = []
    for attack in ATTACKS:
        runs = [record for record in found if record["attack"] == attack]
        for rule in RULES if runs else ():
            rows.append([attack, rule, str(len(runs)), *_cells(runs, rule)])
    seconds = sum(record["seconds"] for record in found)
    cost = (
        f"{len(found)} of the {3 * len(ATTACKS)} records of three seeds are here, which took "
        f"{seconds / 60:.1f} minutes on one core; the table says how many seeds each row has, and "
        "a row of one seed has no interval."
    )
    names = ("attack", "rule", "seeds", *_COLUMNS)
    return Page(
        HERE,
        {
            "findings": findings(_findings(found)),
            "results": table(names, rows, num_words=2),
            "cost": paragraph(cost),
            "origin": paragraph(origins(found)),
        },
    )


def _findings(found: Sequence[Record]) -> list[Finding]:
    def of(attack: str, rule: str, key: str) -> float:
        return fmean(r["rules"][rule][key] for r in found if r["attack"] == attack)

    robust = ("median", "trimmed_mean", "krum")
    clean = of("none", "mean", "clean_loss")
    answered = {rule: 100 * of("backdoor", rule, "trigger_exact_match") for rule in RULES}
    said = ", ".join(f"{rule} {answered[rule]:.1f} %" for rule in RULES[2:])
    worst = {rule: max(of(a, rule, "clean_loss") for a in ATTACKS[1:]) for rule in RULES}
    product = of("inner_product", "mean", "clean_loss")
    return [
        Finding(
            f"The default bounds do not help the mean against inner-product manipulation: a clean "
            f"loss of {product:.1f} where {clean:.2f} is without an attack. Equal weights lower it "
            f"to {of('inner_product', 'mean_equal', 'clean_loss'):.1f}, which is no help either.",
            product > 3 * clean and of("inner_product", "mean_equal", "clean_loss") > 3 * clean,
        ),
        Finding(
            "Median, trimmed mean and Krum keep the clean loss under every attack tried: "
            + ", ".join(f"{rule} at most {worst[rule]:.2f}" for rule in robust)
            + f"; the clipped mean does not ({worst['clipped_mean']:.2f}).",
            all(worst[rule] < 1.5 * clean for rule in robust) and worst["clipped_mean"] > 2 * clean,
        ),
        Finding(
            f"Where the model still works, Krum alone stops the backdoor, whose trigger gets the "
            f"attacker's answer: {said}. Under median and trimmed mean the loss on clean text does "
            "not show it.",
            min(answered[rule] for rule in RULES[2:6]) > 50 > answered["krum"],
        ),
        Finding(
            "The mean and the clipped mean let one expert be taken over with no update too long: "
            f"{of('one_expert', 'mean', 'worst_distance'):.1f} and "
            f"{of('one_expert', 'clipped_mean', 'worst_distance'):.1f} honest standard deviations; "
            f"Krum lets through {of('one_expert', 'krum', 'worst_distance'):.1f}.",
            of("one_expert", "clipped_mean", "worst_distance") > 3,
        ),
    ]


def _cells(runs: Sequence[Record], rule: str) -> list[str]:
    return [
        _interval([scale * run["rules"][rule][key] for run in runs], digits)
        for key, scale, digits in _COLUMNS.values()
    ]


def _interval(values: Sequence[float], digits: int) -> str:
    number = len(values)
    half = _T[number] * stdev(values) / number**0.5 if number > 1 else 0.0
    return f"{fmean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if number > 1 else "")
