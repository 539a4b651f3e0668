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
_KINDS = ("attention", "routers", "experts")


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
        f"{seconds / 60:.1f} minutes on one core of a machine that did other work; the table says how many seeds each row has, and "
        "a row of one seed has no interval."
    )
    names = ("attack", "rule", "seeds", *_COLUMNS)
    return Page(
        HERE,
        {
            "findings": findings(_findings(found)),
            "results": table(names, rows, num_words=2),
            "kinds": table(("attack", "rule", *_KINDS), _by_kind(found), num_words=2),
            "cost": paragraph(cost),
            "origin": paragraph(origins(found)),
        },
    )


def _findings(found: Sequence[Record]) -> list[Finding]:
    def of(attack: str, rule: str, key: str) -> float:
        return fmean(r["rules"][rule][key] for r in found if r["attack"] == attack)

    def kind_of(attack: str, rule: str, kind: str) -> float:
        return fmean(r["rules"][rule]["kinds"][kind] for r in found if r["attack"] == attack)

    robust = ("median", "trimmed_mean", "krum")
    clean = of("none", "mean", "clean_loss")
    free, product = (of("inner_product", r, "clean_loss") for r in ("mean_unbounded", "mean"))
    little = {rule: of("little", rule, "clean_loss") for rule in ("mean_unbounded", "mean")}
    answered = {rule: 100 * of("backdoor", rule, "trigger_exact_match") for rule in RULES}
    said = ", ".join(f"{rule} {answered[rule]:.1f} %" for rule in RULES[1:])
    worst = {rule: max(of(a, rule, "clean_loss") for a in ATTACKS[1:]) for rule in RULES}
    alone = {rule: of("one_expert", rule, "worst_distance") for rule in RULES}
    parts = {kind: kind_of("inner_product", "mean", kind) for kind in ("routers", "experts")}
    return [
        Finding(
            f"Without bounds inner-product manipulation ends a mean at a clean loss of {free:.1f} "
            f"where {clean:.2f} is without an attack. The default bounds leave it {product:.2f}, "
            "and equal weights no less: the mean is not for rounds in which some may be hostile.",
            free > 5 * clean and 2 * clean < product < free / 3,
        ),
        Finding(
            f"A little is enough where nothing is bounded ({little['mean_unbounded']:.1f}); behind "
            f"the default bounds it moves no name by an honest standard deviation, and the loss "
            f"stays ({little['mean']:.2f}).",
            little["mean_unbounded"] > 5 * clean
            and little["mean"] < 1.15 * clean
            and of("little", "mean", "names_moved") == 0,
        ),
        Finding(
            "Median, trimmed mean and Krum keep the clean loss under every attack tried: "
            + ", ".join(f"{rule} at most {worst[rule]:.2f}" for rule in robust)
            + f"; the clipped mean is at {worst['clipped_mean']:.2f} in the worst.",
            all(worst[rule] < 1.5 * clean for rule in robust)
            and worst["clipped_mean"] > 1.6 * clean,
        ),
        Finding(
            f"Krum alone stops the backdoor on one category, greetings, whose trigger gets the "
            f"attacker's answer: {said}. The loss on clean text does not show it.",
            min(answered[rule] for rule in RULES[1:6]) > 60 > 40 > answered["krum"],
        ),
        Finding(
            f"One expert can be taken over with no update too long: {alone['mean_unbounded']:.1f} "
            f"honest standard deviations without bounds, {alone['mean']:.1f} under the mean, "
            f"{alone['clipped_mean']:.1f} under the clipped mean and {alone['krum']:.1f} under "
            f"Krum, which compares whole updates; {alone['median']:.1f} under the median.",
            alone["mean"] > 3 > alone["krum"] > 1 > alone["median"],
        ),
        Finding(
            f"By kind of name, routers are moved farthest: {parts['routers']:.1f} honest standard "
            f"deviations under inner-product manipulation and the mean, experts "
            f"{parts['experts']:.1f}.",
            parts["routers"] > 1.2 * parts["experts"],
        ),
    ]


def _by_kind(found: Sequence[Record]) -> list[list[str]]:
    """Return how far the farthest name of each kind was moved, where one was by more than 1."""
    rows = []
    for attack in ATTACKS:
        runs = [record["rules"] for record in found if record["attack"] == attack]
        for rule in RULES if runs else ():
            own = {kind: [run[rule]["kinds"][kind] for run in runs] for kind in _KINDS}
            if max(map(fmean, own.values())) > 1:
                rows.append([attack, rule, *(_interval(own[kind], 1) for kind in _KINDS)])
    return rows


def _cells(runs: Sequence[Record], rule: str) -> list[str]:
    return [
        _interval([scale * run["rules"][rule][key] for run in runs], digits)
        for key, scale, digits in _COLUMNS.values()
    ]


def _interval(values: Sequence[float], digits: int) -> str:
    number = len(values)
    half = _T[number] * stdev(values) / number**0.5 if number > 1 else 0.0
    return f"{fmean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if number > 1 else "")
