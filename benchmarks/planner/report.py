"""The page of what the planner predicts, from results/ and the memory of a carved client."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.blocks import Finding, Page, findings, paragraph, table
from benchmarks.records import Record, origins

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "cases.json"
MEMORY = HERE.parent / "kernels" / "results" / "memory.json"
COLUMNS = (
    *("model", "trains", "clients hold", "experts trained a layer", "base"),
    *("measured, GB", "predicted, GB", "predicted / measured"),
)


def page() -> Page:
    """Return what is made of the results that are here."""
    record = json.loads(RESULTS.read_text())
    memory = json.loads(MEMORY.read_text())
    cases = record["cases"]
    ratios = [case["ratio"] for case in cases]
    note = (
        f"Predicted over measured is between {min(ratios):.3f} and {max(ratios):.3f}. Batches of 8 "
        "rows, 128 tokens each for the random model and 256 for the other."
    )
    shown = table(COLUMNS, [_row(case) for case in cases], num_words=5)
    return Page(
        HERE,
        {
            "findings": findings(
                [
                    Finding(
                        f"Of {len(cases)} cases, predicted over measured is between "
                        f"{min(ratios):.3f} and {max(ratios):.3f}."
                    )
                ]
            ),
            "origin": paragraph(origins([record])),
            "carving": carving(memory),
            "carving_origin": paragraph(origins([memory])),
        },
        {"table.md": f"{shown}\n\n{note}\n"},
    )


def _row(case: Record) -> list[str]:
    return [
        *(case[key] for key in ("model", "trains", "held", "trained_per_layer", "dtype")),
        f"{case['measured_bytes'] / 1e9:.2f}",
        f"{case['predicted_bytes'] / 1e9:.2f}",
        f"{case['ratio']:.3f}",
    ]


def carving(memory: Record) -> str:
    """Return what a carved client needs beside a whole one."""
    whole, carved = memory["whole"], memory["carved"]
    experts = f"carved to {memory['carved_experts_per_layer']} of {memory['shape']['experts']}"
    rows = [
        [
            "peak resident memory, GB",
            *(f"{own['peak_memory_bytes'] / 1e9:.2f}" for own in (whole, carved)),
            f"{memory['memory_ratio']:.2f}",
        ],
        [
            "predicted peak, GB",
            *(f"{own['predicted_peak_bytes'] / 1e9:.2f}" for own in (whole, carved)),
            f"{carved['predicted_peak_bytes'] / whole['predicted_peak_bytes']:.2f}",
        ],
        [
            "tokens per second",
            *(f"{own['tokens_per_second']:.0f}" for own in (whole, carved)),
            f"{memory['speedup']:.2f}",
        ],
    ]
    return table(["", "whole", f"{experts} experts a layer", "ratio"], rows)
