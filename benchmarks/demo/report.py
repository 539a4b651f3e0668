"""The page of the demo, from the summaries that are kept here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.blocks import Finding, Page, findings, paragraph, table
from benchmarks.records import Record, origins, read

HERE = Path(__file__).parent
METHODS = {
    "base": "base",
    "local": "Local",
    "fedavg": "FedAvg",
    "orchard": "Orchard",
    "flex": "FLEx",
}


def page() -> Page:
    """Return what is made of the results that are here."""
    records = sorted(read(HERE, "seed*.json"), key=lambda record: record["seed"])
    columns = [
        "seed",
        *(f"exact match: {label}" for label in METHODS.values()),
        *(f"facts: {label}" for label in METHODS.values()),
    ]
    rows = [
        [
            str(record["seed"]),
            *(f"{_percent(record, name, 'exact_match'):.1f}" for name in METHODS),
            *(f"{_percent(record, name, 'facts_retained'):.1f}" for name in METHODS),
        ]
        for record in records
    ]
    return Page(
        HERE,
        {
            "table": table(columns, rows, num_words=0),
            "findings": findings(_findings(records)),
            "origin": paragraph(origins(records)),
        },
    )


def _percent(record: Record, method: str, what: str) -> float:
    return 100 * float(record["methods"][method][what])


def _on_seeds(
    records: Sequence[Record], orders: Sequence[list[str]], first: str, second: str
) -> str:
    """Say on which seeds one method is before another."""
    pairs = zip(records, orders, strict=True)
    seeds = [str(record["seed"]) for record, o in pairs if o.index(first) < o.index(second)]
    return f"on seed {' and '.join(seeds)}" if seeds else "on none"


def _findings(records: Sequence[Record]) -> list[Finding]:
    orders = [
        sorted(METHODS, key=lambda name: _percent(record, name, "exact_match"), reverse=True)
        for record in records
    ]
    fewer = [
        _percent(record, "fedavg", "facts_retained") - _percent(record, "flex", "facts_retained")
        for record in records
    ]
    seconds = [record["seconds"] for record in records]
    shown = ", ".join(
        f"{points:.1f} on seed {record['seed']}"
        for points, record in zip(fewer, records, strict=True)
    )
    return [
        Finding(
            f"The order of exact match is the same for all {len(records)} seeds: FLEx, Local, "
            "FedAvg, base.",
            all(
                [name for name in order if name != "orchard"] == ["flex", "local", "fedavg", "base"]
                for order in orders
            ),
        ),
        Finding(
            "Orchard is before FedAvg for all of them, "
            + ", ".join(
                f"before {METHODS[other]} {_on_seeds(records, orders, 'orchard', other)}"
                for other in ("local", "flex")
            )
            + ".",
            all(order.index("orchard") < order.index("fedavg") for order in orders),
        ),
        Finding(
            f"FLEx retains as many facts as FedAvg or fewer, by {shown} (points).",
            min(fewer) >= 0,
        ),
        Finding(
            f"A demo took {min(seconds):.0f} to {max(seconds):.0f} s, with other processes at work "
            "on the machine.",
        ),
    ]
