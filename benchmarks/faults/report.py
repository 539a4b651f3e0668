"""The page of what breaks, from kills.json and network.json."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import median

from benchmarks.blocks import Finding, Page, findings, paragraph, table
from benchmarks.records import Record, origins

HERE = Path(__file__).parent


def page() -> Page:
    """Return what is made of the results that are here."""
    kills = json.loads((HERE / "kills.json").read_text())
    network = json.loads((HERE / "network.json").read_text())
    return Page(
        HERE,
        {
            "kills": findings(_kills(kills)),
            "network": findings(_network(network)),
            "origin": paragraph(origins([kills, network])),
        },
        {"kills.md": _table(kills) + "\n"},
    )


def _table(record: Record) -> str:
    rows = []
    for number, own in enumerate(record["kills"], start=1):
        who = f"{own['target']} of {own['site']}" if own["site"] else own["target"]
        seconds = own["recovered_seconds"]
        late = f"{seconds:.1f}" if seconds else "the run had ended"
        rows.append([str(number), who, str(own["after_round"]), f"{own['at_seconds']:.0f}", late])
    head = "| # | killed | after round | at, s | next round complete after, s |"
    rule = "| ---: | --- | ---: | ---: | ---: |"
    return "\n".join([head, rule, *table((), rows).split("\n")[2:]])


def _kills(record: Record) -> list[Finding]:
    kills = record["kills"]
    times = [own["recovered_seconds"] for own in kills if own["recovered_seconds"]]
    counts = Counter(own["target"] for own in kills)
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return [
        Finding(
            f"{len(kills)} kills in a run of {record['rounds']} rounds and "
            f"{record['seconds']:.0f} s ({kinds}): it ended with the tensors of the undisturbed "
            "run.",
            record["is_equal"],
        ),
        Finding(
            f"The next round was complete {median(times):.0f} s after a kill (median; "
            f"{min(times):.0f} to {max(times):.0f}). Where kills follow each other closely, one "
            "wait has several in it.",
        ),
    ]


def _network(record: Record) -> list[Finding]:
    return [
        Finding(
            f"{record['rounds']} rounds in {record['seconds']:.0f} s, with one site unplugged for "
            f"{record['unplugged_seconds']:.0f} s after round {record['unplugged_after_round']}; "
            f"{sum(record['packets_lost'])} packets were lost, those of that time among them, and "
            f"{sum(record['packets_carried']):,} carried. The run ended with the tensors of the "
            "undisturbed one.",
            record["is_equal"] and record["exit_code"] == 0 and not record["refused"],
        ),
        Finding(
            "A site that asks the coordinator to run an app is answered "
            f"{record['control_interface_answers_a_site']}.",
            record["control_interface_answers_a_site"] == 403,
        ),
    ]
