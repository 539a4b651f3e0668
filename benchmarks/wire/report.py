"""The page of what encodings do to the loss, from results/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.blocks import Finding, Page, findings, paragraph, table
from benchmarks.records import Record, origins, read

HERE = Path(__file__).parent
REFERENCE = "bfloat16"
ENCODINGS = {
    "bfloat16": ("communication.dtype=bfloat16",),
    "int8": ("communication.dtype=int8",),
    "int8, no feedback": ("communication.dtype=int8", "communication.feedback=false"),
    "int8, differences down": ("communication.dtype=int8", "communication.downlink=differences"),
    "top 10 %": ("communication.top_k=0.1", "communication.dtype=bfloat16"),
    "top 10 %, int8": ("communication.top_k=0.1", "communication.dtype=int8"),
    "top 10 %, no feedback": (
        "communication.top_k=0.1",
        "communication.dtype=bfloat16",
        "communication.feedback=false",
    ),
}


def page() -> Page:
    """Return what is made of the results that are here."""
    records = read(HERE / "results")
    by_encoding = {
        name: sorted((r for r in records if r["encoding"] == name), key=lambda r: r["seed"])
        for name in ENCODINGS
    }
    runs = {name: own for name, own in by_encoding.items() if own}
    return Page(
        HERE,
        {
            "table": table(
                (
                    *("encoding", "seeds", "final loss (spread over seeds)", "each seed"),
                    *("minus bfloat16, seed by seed", "up, kB", "down, kB"),
                ),
                [_row(name, own, _shifts(runs, name)) for name, own in runs.items()],
            ),
            "findings": findings(_findings(runs)),
            "origin": paragraph(origins(records)),
        },
    )


def _shifts(runs: Mapping[str, Sequence[Record]], encoding: str) -> list[float]:
    """Return loss minus that of the reference, for each seed that both have."""
    reference = {r["seed"]: r["loss"] for r in runs.get(REFERENCE, ())}
    return [r["loss"] - reference[r["seed"]] for r in runs[encoding] if r["seed"] in reference]


def _row(encoding: str, runs: Sequence[Record], shifts: Sequence[float]) -> list[str]:
    losses = [r["loss"] for r in runs]
    spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
    return [
        encoding,
        str(len(runs)),
        f"{fmean(losses):.4f}{spread}",
        " ".join(f"{loss:.4f}" for loss in losses),
        " ".join(f"{shift:+.5f}" for shift in shifts),
        f"{_up(runs) / 1e3:.1f}",
        f"{_down(runs) / 1e3:.1f}",
    ]


def _up(runs: Sequence[Record]) -> float:
    return fmean(r["uplink_bytes_per_client"] for r in runs)


def _down(runs: Sequence[Record]) -> float:
    return fmean(r["downlink_bytes_per_client"] for r in runs)


def _findings(runs: Mapping[str, Sequence[Record]]) -> list[Finding]:
    shifts = {name: _shifts(runs, name) for name in runs}
    sent = {name: 100 * _up(own) / _up(runs[REFERENCE]) for name, own in runs.items()}
    received = {name: 100 * _down(own) / _down(runs[REFERENCE]) for name, own in runs.items()}
    spread = stdev([r["loss"] for r in runs[REFERENCE]])
    int8 = max(map(abs, shifts["int8"]))
    plain, both = "int8, no feedback", "int8, differences down"
    top, top_plain = "top 10 %", "top 10 %, no feedback"
    low, high = min(shifts[top]), max(shifts[top])
    left = [name for name in ENCODINGS if name not in runs]
    found = [
        Finding(
            "**int8 with feedback changes nothing that could be seen**: the loss is within "
            f"{int8:.1e} of bfloat16's in each of {len(shifts['int8'])} seeds, where seeds differ "
            f"by {spread:.3f} (standard deviation). It sends {sent['int8']:.0f} % of the bytes.",
            int8 < spread / 100,
        ),
        Finding(
            "**int8 without feedback** is as close "
            f"({_seeds(shifts[plain])}): at this length of run what int8 rounds away does not "
            "matter. That small values do arrive with feedback and never without is what "
            "`tests/client/test_exchange.py` shows.",
            max(map(abs, shifts[plain])) <= int8,
        ),
        Finding(
            f"**The largest tenth of each update** costs {low:.3f} to {high:.3f} "
            f"({_seeds(shifts[top])}), for {sent[top]:.0f} % of the bytes: well below the spread "
            "over seeds, but always of the same sign. **Without feedback** it costs "
            f"{fmean(shifts[top_plain]):.3f} ({_seeds(shifts[top_plain])}), "
            f"{fmean(shifts[top_plain]) / shifts[top][0]:.1f} times as much in the same seed.",
            0 < low <= high < spread / 2 and min(shifts[top_plain]) > 2 * high,
        ),
        Finding(
            f"**int8 both ways** (differences down) is {fmean(shifts[both]):+.5f} from bfloat16 "
            f"({_seeds(shifts[both])}), for {received[both]:.0f} % of the bytes down.",
            max(map(abs, shifts[both])) < spread / 100,
        ),
    ]
    if left:
        found.append(Finding(f"Not run yet: {'; '.join(left)}."))
    return found


def _seeds(values: Sequence[float]) -> str:
    return "one seed" if len(values) == 1 else f"{len(values)} seeds"
