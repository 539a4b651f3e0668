"""The page of frozen experts that are not in memory in full, from results/."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.blocks import Finding, Page, findings, paragraph, table
from benchmarks.records import Record, origins

HERE = Path(__file__).parent
RESULTS = HERE / "results"
METHODS = {"flex": "FLEx", "hfedmoe": "HFedMoE"}


def page() -> Page:
    """Return what is made of the results that are here."""
    shapes = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("true_shape_*.json"))]
    bits = json.loads((RESULTS / "precision.json").read_text())
    rows = [
        _row(record["layers"], record["model_bytes"], METHODS[method], record[method])
        for record in shapes
        for method in METHODS
        if method in record
    ]
    blocks = {
        "true_shape": table(
            (
                *("layers", "model, GB", "round of", "its own memory, GB", "predicted, GB"),
                *("predicted / measured", "limit, GB", "read, GB", "seconds"),
            ),
            rows,
            num_words=0,
        ),
        "true_shape_findings": findings(_shape_findings(shapes)),
        "true_shape_origin": paragraph(origins(shapes)),
        "precision": table(
            ("kept in", "bytes a value", "loss", "minus full", "largest error of a matrix"),
            [_bits_row(row, bits["rows"][0]) for row in bits["rows"]],
        ),
        "precision_origin": paragraph(origins([bits])),
    }
    return Page(HERE, blocks)


def _row(layers: int, model_bytes: int, name: str, run: Record) -> list[str]:
    limit = run["limit_bytes"]
    return [
        str(layers),
        f"{model_bytes / 1e9:.1f}",
        name,
        f"{run['peak_anonymous_bytes'] / 1e9:.2f}",
        f"{run['predicted_anonymous_bytes'] / 1e9:.2f}",
        f"{run['predicted_over_measured']:.3f}",
        f"{limit / 1e9:.0f}" if limit else "none",
        f"{run['bytes_read'] / 1e9:.0f}",
        f"{run['seconds']:.0f}",
    ]


def _shape_findings(shapes: list[Record]) -> list[Finding]:
    found = []
    for record in shapes:
        for method, name in METHODS.items():
            if method in record:
                share = record["model_bytes"] / record[method]["peak_anonymous_bytes"]
                found.append(
                    Finding(
                        f"A round of {name} on {record['layers']} layers took a process of its own "
                        f"memory {share:.1f} times smaller than the model.",
                        share > 1,
                    )
                )
    return found


def _bits_row(row: Record, full: Record) -> list[str]:
    name = "float32" if row["precision"] == "bf16" else row["precision"]
    return [
        name,
        f"{row['bytes_per_value']:.2f}",
        f"{row['loss']:.4f}",
        f"{row['loss'] - full['loss']:+.4f}",
        f"{row['largest_relative_error']:.4f}",
    ]
