"""The page of what a GPU gave, from results/; what nobody measured is called so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.blocks import Page, paragraph, table
from benchmarks.records import Record, origins, read

HERE = Path(__file__).parent
NOT_MEASURED = "not measured"


def page() -> Page:
    """Return what is made of the results that are here."""
    on_gpu = read(HERE / "results", "gpu.json")
    without = read(HERE / "results", "without.json")
    return Page(
        HERE,
        {
            "figures": table(("figure", "goal", "measured"), rows(on_gpu[0] if on_gpu else None)),
            "product": table(
                ("where", "largest relative difference, values and gradients"),
                [
                    [r["device"] or "CPU", f"{r['product']['largest_relative_difference']:.1e}"]
                    for r in (*on_gpu, *without)
                ],
            ),
            "origin": paragraph(origins([*on_gpu, *without])),
        },
    )


def rows(record: Record | None) -> list[list[str]]:
    """Return a line for each figure; without a record of a GPU, that it was not measured."""
    step: Any = (record or {}).get("step")
    grafts: Any = (record or {}).get("grafts")
    return [
        ["GPU", "", str(record["device"]) if record else NOT_MEASURED],
        [
            "tokens per second over transformers and PEFT with grouped_mm",
            "≥ 2",
            f"{step['speedup']:.2f}" if step else NOT_MEASURED,
        ],
        [
            "peak memory over theirs",
            "≤ 0.65",
            f"{step['peak_ratio']:.2f}" if step else NOT_MEASURED,
        ],
        [
            "choice of grafts over 24 layers, s",
            "< 60",
            f"{grafts['seconds_of_choice']:.1f} ({grafts['layers']} layers)"
            if grafts
            else NOT_MEASURED,
        ],
    ]


def draw() -> None:
    """Draw tokens per second of each side, where a GPU was measured."""
    found = read(HERE / "results", "gpu.json")
    if not found:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sides = found[0]["step"]["tokens_per_second"]
    figure, axes = pyplot.subplots(figsize=(6, 2.5))
    axes.barh(list(sides), list(sides.values()))
    axes.set_xlabel(f"tokens per second, {found[0]['device']}")
    figure.tight_layout()
    figure.savefig(HERE / "step.png", dpi=120)
    pyplot.close(figure)
