"""The page of HFedMoE and what it is compared with, from results/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.blocks import Finding, Page, findings, paragraph, table
from benchmarks.records import Record, origins, read

HERE = Path(__file__).parent
EVERY = 2  # rounds between evaluations
RECIPES = (
    "fedavg",
    "fedavg_dropout",
    "hfedmoe",
    "hfedmoe_trained",
    "hfedmoe_carved",
    "fedavg_random",
    "pflmoe",
    "fedmoe",
    "seermoe",
)
NUM_EXPERTS = 64  # of the base: 16 in each of 4 layers
COLUMNS = (
    "recipe",
    "seeds",
    "final accuracy, % (spread over seeds)",
    "each seed",
    "best, %",
    "rounds to FedAvg's best",
    "rounds to drop-out's best",
    "active share, %",
    "pass rate, %",
    "frozen experts at the end",
    "uplink, MB a round",
    "training, s",
)


def page() -> Page:
    """Return what is made of the results that are here."""
    found = {name: read(HERE / "results", f"{name}-[0-9]*.json") for name in RECIPES}
    results = {name: runs for name, runs in found.items() if runs}
    every = [run for runs in results.values() for run in runs]
    error = max(run["accuracy_stderr"] for run in every)
    shown = table(COLUMNS, [_row(name, runs, results) for name, runs in results.items()])
    note = (
        "Accuracy of the global model on one central test set; its standard error is at most "
        f"{100 * error:.1f} points in one run."
    )
    return Page(
        HERE,
        {
            "findings": findings(_findings(results)),
            "threshold": findings(_threshold(results)),
            "origin": paragraph(origins(every)),
        },
        {"table.md": f"{shown}\n\n{note}\n"},
    )


def _row(name: str, runs: Sequence[Record], results: Mapping[str, Sequence[Record]]) -> list[str]:
    finals = list(_finals(runs).values())
    spread = f" ± {stdev(finals):.1f}" if len(finals) > 1 else ""
    return [
        name,
        str(len(runs)),
        f"{fmean(finals):.1f}{spread}",
        " ".join(f"{final:.1f}" for final in finals),
        f"{fmean(100 * max(_curve(run).values()) for run in runs):.1f}",
        _shown(_rounds_to(runs, results.get("fedavg", ()))),
        _shown(_rounds_to(runs, results.get("fedavg_dropout", ()))),
        _share(runs, "active_share"),
        _share(runs, "pass_rate"),
        f"{_frozen(runs):.0f}",
        f"{_mean(runs, 'uplink_bytes') / 1e6:.1f}",
        f"{fmean(run['train_seconds'] for run in runs):.0f}",
    ]


def _curve(run: Record) -> dict[int, float]:
    """Return round to accuracy, in order."""
    return {int(number): value for number, value in run["accuracy_by_round"].items()}


def _finals(runs: Sequence[Record]) -> dict[int, float]:
    """Return seed to final accuracy, %."""
    return {run["seed"]: 100 * list(_curve(run).values())[-1] for run in runs}


def _rounds_to(runs: Sequence[Record], reference: Sequence[Record]) -> list[int | None]:
    """Return the first round at or above the reference's best, seed by seed; None = never."""
    best = {run["seed"]: max(_curve(run).values()) for run in reference}
    return [
        next(
            (n for n, value in _curve(run).items() if value >= best.get(run["seed"], 2.0)),
            None,
        )
        for run in runs
    ]


def _shown(rounds: Sequence[int | None]) -> str:
    return " ".join("-" if number is None else str(number) for number in rounds)


def _values(runs: Sequence[Record], name: str) -> list[float]:
    return [value for run in runs for value in run[name] if value is not None]


def _mean(runs: Sequence[Record], name: str) -> float:
    return fmean(_values(runs, name))


def _share(runs: Sequence[Record], name: str) -> str:
    values = _values(runs, name)
    return f"{100 * fmean(values):.1f}" if values else ""


def _frozen(runs: Sequence[Record]) -> float:
    return fmean(run["frozen"][-1] for run in runs)


def _threshold(results: Mapping[str, Sequence[Record]]) -> list[Finding]:
    runs = results["hfedmoe"]
    passed, frozen = 100 * _mean(runs, "pass_rate"), _frozen(runs)
    return [
        Finding(
            f"A client sends {passed:.0f} % of the experts, and at the end {frozen:.0f} of "
            f"{NUM_EXPERTS} (mean over {len(runs)} seeds) have not been sent for three rounds or "
            "more.",
            passed < 50 and frozen > NUM_EXPERTS / 2,
        )
    ]


def _findings(results: Mapping[str, Sequence[Record]]) -> list[Finding]:
    finals = {name: _finals(runs) for name, runs in results.items()}
    mean = {name: fmean(own.values()) for name, own in finals.items()}
    seeds = sorted(finals["fedavg"])
    whole = [name for name in RECIPES if sorted(finals.get(name, {})) == seeds]
    budgets = [name for name in whole if name != "fedavg"]

    def ahead(one: str, other: str) -> list[float]:
        return [finals[one][seed] - finals[other][seed] for seed in finals[one]]

    behind = [mean["fedavg"] - mean[name] for name in budgets]
    reached = {
        name: sum(n is not None for n in _rounds_to(results[name], results["fedavg"]))
        for name in budgets
    }
    reaching = [f"{name} in {n} of {len(seeds)}" for name, n in reached.items() if n]
    dropout, random = ahead("hfedmoe", "fedavg_dropout"), ahead("fedavg_random", "hfedmoe")
    uplink = {name: _mean(runs, "uplink_bytes") / 1e6 for name, runs in results.items()}
    others = sorted(("pflmoe", "seermoe", "fedmoe"), key=mean.__getitem__, reverse=True)
    spreads = {name: stdev(finals[name].values()) for name in whole}
    worst = min(finals["fedmoe"].items(), key=lambda item: item[1])
    error = 100 * max(run["accuracy_stderr"] for runs in results.values() for run in runs)
    variants = {name: ahead(name, "hfedmoe") for name in ("hfedmoe_trained", "hfedmoe_carved")}
    active = [
        100 * _mean(results[n], "active_share") for n in whole if _share(results[n], "active_share")
    ]
    return [
        Finding(
            f"{len(seeds)} seeds, of which the accuracy of one run has a standard error of up to "
            f"{error:.1f} points, and the partition alone moves every row by "
            f"{min(spreads.values()):.1f} points or more (standard deviation).",
        ),
        Finding(
            f"**A budget costs.** FedAvg without one ends at {mean['fedavg']:.1f} %; every method "
            f"with budgets ends {min(behind):.1f} to {max(behind):.1f} points lower. FedAvg's best "
            f"is reached by {', '.join(reaching) or 'none'} seeds.",
            min(behind) > 0,
        ),
        Finding(
            f"**HFedMoE is level with dropping out.** {mean['hfedmoe']:.1f} against "
            f"{mean['fedavg_dropout']:.1f} %; seed by seed {_signed(dropout)}. It reaches the best "
            f"of drop-out after {_shown(_rounds_to(results['hfedmoe'], results['fedavg_dropout']))} "
            "rounds, drop-out itself after "
            f"{_shown(_rounds_to(results['fedavg_dropout'], results['fedavg_dropout']))} (a dash "
            "is never).",
            abs(fmean(dropout)) < error and min(dropout) < 0 < max(dropout),
        ),
        Finding(
            f"**Random experts are ahead of HFedMoE**: {mean['fedavg_random']:.1f} against "
            f"{mean['hfedmoe']:.1f} %, in each seed (by {_plain(random)} points). That is not what "
            "the paper finds. Two things differ besides the choice: random sends every expert, "
            f"trained or not, and its uplink is {uplink['fedavg_random']:.1f} against "
            f"{uplink['hfedmoe']:.1f} MB a round; and HFedMoE's default weighs routers by "
            "preference. The table does not separate them.",
            min(random) > 0,
        ),
        Finding(
            f"Of the others {', '.join(f'{name} is at {mean[name]:.1f} %' for name in others)}. "
            f"seermoe and fedmoe vary most between seeds ({spreads['seermoe']:.0f} and "
            f"{spreads['fedmoe']:.0f} points): in seed {worst[0]} fedmoe ends at {worst[1]:.1f} %. "
            "Their clients choose once, by an untrained model.",
            sorted(spreads, key=spreads.__getitem__)[-2:] == ["seermoe", "fedmoe"],
        ),
        Finding(
            "The two variants of HFedMoE have one seed each. In that seed they are ahead of it by "
            f"{variants['hfedmoe_trained'][0]:.1f} (sends only what was trained) and "
            f"{variants['hfedmoe_carved'][0]:.1f} points (carved), within two standard errors of "
            "one run.",
            all(len(own) == 1 and 0 < own[0] < 2 * error for own in variants.values()),
        ),
        Finding(
            f"Masked clients train {min(active):.0f} to {max(active):.0f} % of the experts in a "
            "step.",
        ),
    ]


def _signed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.1f}" for value in values)


def _plain(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)
