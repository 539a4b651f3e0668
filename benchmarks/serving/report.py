"""The page of what serving costs, from results/: one record of ``orchard bench serve`` a base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.blocks import Finding, Page, findings, paragraph, table
from benchmarks.records import Record, machine, origins, read

HERE = Path(__file__).parent
GOALS: dict[str, float] = {
    "mixed_over_sequential": 3.0,
    "mixed_over_single": 0.8,
}
"""Key to the least that it should be."""


def page() -> Page:
    """Return what is made of the results that are here."""
    found = sorted(read(HERE / "results"), key=lambda record: str(record["model"]))
    beside = [*found, *read(HERE / "results" / "beside")]
    return Page(
        HERE,
        {
            "goals": _goals(found, beside),
            "speeds": _speeds(found),
            "load": _load(found),
            "peer": _peer(beside),
            "findings": findings(_findings(found, beside)),
            "machine": paragraph(_machine(beside)),
            "origin": paragraph(origins(beside)),
        },
    )


def _goals(found: Sequence[Record], beside: Sequence[Record]) -> str:
    said = {
        "mixed_over_sequential": "8 clients in one batch, over one after another",
        "mixed_over_single": "8 clients in one batch, over 8 rows of one client",
    }
    rows = []
    for key, what in said.items():
        cells = [_at_least(record[key], GOALS[key]) for record in found]
        rows.append([f"`{key}`", what, f"≥ {GOALS[key]:g}", *cells])
    cells = [
        " / ".join(
            _at_least(own["over_transformers_serve"], 1.0)
            for own in beside
            if own["model"] == record["model"]
        )
        for record in found
    ]
    what = "the base alone, over `transformers serve`; each measurement below"
    rows.append(["`over_transformers_serve`", what, "≥ 1", *cells])
    errors = [f"{r['errors']}" if r["errors"] == 0 else f"**{r['errors']}**" for r in found]
    rows.append(["`errors`", "of 50 requests at a time", "0", *errors])
    for number in (8, 100):
        key = f"memory_{number}_over_1"
        cells = [f"{record[key]:.2f}" for record in found]
        rows.append([f"`{key}`", f"peak memory with {number} models over one", "", *cells])
    return table(("key", "what", "goal", *(str(r["model"]) for r in found)), rows, num_words=2)


def _at_least(value: float | None, goal: float) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value >= goal else f"**{value:.2f}**"


def _speeds(found: Sequence[Record]) -> str:
    columns = ("base", "mixed", "one client", "one after another", "a model's bytes, kB")
    rows = [
        [
            str(record["model"]),
            *(
                f"{record[f'{side}_tokens_per_second']:,.0f}"
                for side in ("mixed", "single", "sequential")
            ),
            f"{record['bytes_per_model'] / 1e3:,.0f}",
        ]
        for record in found
    ]
    return table(columns, rows)


def _load(found: Sequence[Record]) -> str:
    columns = ("base", "answers", "first p50", "first p99", "next p50", "next p99", "errors")
    rows = [
        [
            str(record["model"]),
            f"{record['load_answers']:,}",
            *(
                f"{record[f'{percent}_{what}_seconds']:.3f}"
                for what in ("first_token", "between_tokens")
                for percent in ("p50", "p99")
            ),
            str(record["errors"]),
        ]
        for record in found
    ]
    return table(columns, rows)


def _peer(found: Sequence[Record]) -> str:
    names = ("orchard", "transformers_continuous", "transformers")
    rows = []
    for record in found:
        if record["over_transformers_serve"] is None:
            rows.append([str(record["model"]), "-", "-", "-", "-", "-"])
            continue
        turns = record["base_tokens_per_second_of_each_turn"]
        cells = [
            f"{record['base_tokens_per_second'][name]:,.0f} "
            f"({min(turns[name]):,.0f} to {max(turns[name]):,.0f})"
            for name in names
        ]
        lengths = record.get("base_tokens_per_answer")
        length = f"{lengths['orchard']:.0f}" if lengths else "not written down"
        same = f"{record['same_greedy_texts']} of 8"
        rows.append([str(record["model"]), length, *cells, same])
    columns = (
        "base",
        "tokens an answer",
        "orchard",
        "continuous batching",
        "without",
        "same texts",
    )
    return table(columns, rows)


def _findings(found: Sequence[Record], beside: Sequence[Record]) -> list[Finding]:
    def of(key: str) -> str:
        said = [f"{record[key]:.2f} ({record['model']})" for record in found if record[key]]
        return " and ".join(said) or "none measured"

    def missed(key: str) -> str:
        goal = GOALS[key]
        names = [str(r["model"]) for r in found if not (r[key] or 0.0) >= goal]
        return f" The goal of {goal:g} is missed on {' and '.join(names)}." if names else ""

    num_errors = sum(record["errors"] for record in found)
    return [
        Finding(
            f"**Eight clients in one batch** write {of('mixed_over_sequential')} times the tokens "
            f"of the eight one after another.{missed('mixed_over_sequential')}"
        ),
        Finding(
            f"**That they differ** leaves {of('mixed_over_single')} of the speed of a batch of one "
            f"client.{missed('mixed_over_single')}"
        ),
        *(
            Finding(
                f"**The base alone** ({record['model']}, answers of "
                f"{record['base_tokens_per_answer']['orchard']:.0f} tokens) is written "
                f"{record['over_transformers_serve']:.2f} times as fast as by the better of the two "
                "ways of `transformers serve`."
            )
            for record in beside
            if record.get("base_tokens_per_answer")
        ),
        Finding(
            f"**{num_errors or 'None'} of {sum(r['load_answers'] for r in found):,} requests** of 50 "
            "askers failed."
        ),
    ]


def _machine(found: Sequence[Record]) -> str:
    threads = sorted({str(record["num_threads"]) for record in found})
    loads = [f"{r['load_before']:g} to {r['load_after']:g} ({r['model']})" for r in found]
    return (
        f"{machine(found[0]['hardware'])}, {', '.join(threads)} thread a process. Others worked on the machine "
        f"meanwhile: its load was {', '.join(loads)}. So read ratios, whose sides take turns, and "
        "no absolute figure."
    )
