"""The page of what leaving one machine costs, from results/."""

from __future__ import annotations

from pathlib import Path

from benchmarks.blocks import Finding, Page, findings, paragraph, table
from benchmarks.records import Record, origins, read

HERE = Path(__file__).parent


def page() -> Page:
    """Return what is made of the results that are here."""
    small = sorted(read(HERE / "results", "sites-*.json"), key=lambda record: record["sites"])
    [large] = read(HERE / "results", "large.json")
    columns = (
        *("sites", "seconds a round outside training", "seconds of training"),
        *("base loads per site", "in all, s", "rounds"),
    )
    return Page(
        HERE,
        {
            "sites": table(columns, [_row(record) for record in small]),
            "findings": findings(_findings(small)),
            "large": table(("", ""), _large(large)),
            "origin": paragraph(origins([*small, large])),
        },
    )


def _row(record: Record) -> list[str]:
    return [
        str(record["sites"]),
        f"{record['overhead_seconds_per_round']:.1f}",
        f"{record['train_seconds_per_round']:.2f}",
        f"{max(record['base_loads_by_site'])}",
        f"{record['seconds_in_all']:.0f}",
        str(record["rounds"]),
    ]


def _findings(records: list[Record]) -> list[Finding]:
    loads = {count for record in records for count in record["base_loads_by_site"]}
    return [Finding("Every site loads the base once, whatever the number of sites.", loads == {1})]


def _large(record: Record) -> list[list[str]]:
    peaks = {name: f"{size / 1e6:,.0f} MB" for name, size in record["peak_bytes"].items()}
    up, down = record["uplink_bytes_per_client"], record["downlink_bytes_per_client"]
    outside = f"seconds a round outside training, {down / 1e6:.0f} MB down and {up / 1e6:.0f} MB up"
    return [
        ["bytes of the update over those of the tree's file", f"{up / record['tree_bytes']:.4f}"],
        [f"{outside} among them", f"{record['overhead_seconds_per_round']:.1f}"],
        ["peak of the SuperLink", peaks["superlink"]],
        ["peak of the process that runs the rounds", peaks["rounds"]],
        ["peak of the command, which only waits", peaks["coordinate"]],
    ]
