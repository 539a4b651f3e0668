"""Draw a chart of each measurement from results/: what was measured, its target, and the limit.

``python -m benchmarks.kernels.run --table`` draws them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from orchard.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from benchmarks.kernels.report import HERE

OURS, PEER, LIMIT = "#2a6f97", "#c08552", "#9aa5b1"
Bar: TypeAlias = tuple[str, float, str]
"""What it is, how much, and its color."""


def bars(
    panel: Axes,
    title: str,
    values: Sequence[Bar],
    *,
    unit: str,
    target: float | None = None,
    more_is_better: bool = False,
) -> None:
    """Draw horizontal bars with their values, and the target as a line."""
    names = [name for name, _, _ in values]
    panel.barh(range(len(values)), [v for _, v, _ in values], color=[c for _, _, c in values])
    panel.set_yticks(range(len(values)), names, fontsize=8)
    panel.invert_yaxis()
    panel.set_title(title, fontsize=9, loc="left")
    panel.set_xlabel(unit, fontsize=8)
    panel.tick_params(axis="x", labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)
    largest = max([v for _, v, _ in values] + ([target] if target else []))
    panel.set_xlim(0, 1.18 * largest)
    for place, (_, value, _) in enumerate(values):
        panel.text(value + 0.01 * largest, place, f"{value:.3g}", va="center", fontsize=7)
    if target is not None:
        sign = "≥" if more_is_better else "≤"
        panel.axvline(target, color="black", linewidth=0.8, linestyle="--")
        panel.text(target, -0.5, f" target {sign} {target:.3g}", fontsize=7, va="bottom")


def draw_step(found: Mapping[str, Any], panels: Sequence[Axes]) -> None:
    """Speed and memory of a training step beside transformers and PEFT."""
    cases = [name for name in ("small", "large") if name in found]
    speed: list[Bar] = []
    memory: list[Bar] = []
    for name in cases:
        own = found[name]
        speed += [
            (f"{name}: ours", own["speedup"], OURS),
            (f"{name}: ours, padded as the peer", own["speedup_padded"], OURS),
            (f"{name}: {own['peer']}", 1.0, PEER),
        ]
        memory += [
            (f"{name}: whole process", own["peak_bytes_ratio"], OURS),
            (f"{name}: beyond the loaded model", own["training_bytes_ratio"], OURS),
        ]
    bars(
        panels[0],
        "Tokens per second over the peer's",
        speed,
        unit="times",
        target=1.5,
        more_is_better=True,
    )
    bars(panels[1], "Peak memory over the peer's", memory, unit="share", target=0.7)


def draw_graft(found: Mapping[str, Any], panels: Sequence[Axes]) -> None:
    """The search for grafts beside its floor and beside enumeration."""
    sizes = [size for size in ("1", "2", "3") if f"search_seconds_r{size}" in found]
    times = [("every expert once (floor)", found["floor_seconds"], LIMIT)]
    times += [(f"search, {size} grafts", found[f"search_seconds_r{size}"], OURS) for size in sizes]
    bars(
        panels[0],
        "Choosing grafts of 60 experts",
        times,
        unit="seconds",
        target=2 * found["floor_seconds"],
    )
    gains = [(f"{size} grafts", found[f"speedup_r{size}"], OURS) for size in sizes]
    bars(
        panels[1],
        "Enumeration over search",
        gains,
        unit="times",
        target=1000.0,
        more_is_better=True,
    )


def draw_aggregate(found: Mapping[str, Any], panels: Sequence[Axes]) -> None:
    """Aggregation beside a copy and Flower."""
    cases = {"float32": "24 tensors", "float32_small_tensors": "2,400 tensors"}
    times: list[Bar] = []
    for key, name in cases.items():
        own = found[key]
        times.append((f"copy, {name}", 1e3 * own["copy_cpu_seconds_per_update"], LIMIT))
        times.append((f"ours, {name}", 1e3 * own["ours_cpu_seconds_per_update"], OURS))
        if "flower_cpu_seconds_per_update" in own:
            flower = 1e3 * own["flower_cpu_seconds_per_update"]
            times.append((f"Flower, {name}", flower, PEER))
    bars(panels[0], "Adding an update of 100 MB", times, unit="ms of CPU time")
    memory = [("ours, 100 clients", found["float32"]["memory"]["peak_trees"], OURS)]
    if "flower_memory" in found["float32"]:
        peer = found["float32"]["flower_memory"]["peak_trees"]
        memory.append((f"Flower, {found['peer_clients']} clients", peer, PEER))
    bars(panels[1], "Peak memory", memory, unit="trees", target=3.0)


def draw_rounds(found: Mapping[str, Any], panels: Sequence[Axes]) -> None:
    """The simulator's overhead and memory."""
    own = 1e3 * found["seconds_per_client"], 1e3 * found["cpu_seconds_per_client"]
    bars(
        panels[0],
        "A client's turn without training",
        [("wall", own[0], OURS), ("CPU", own[1], OURS)],
        unit="ms per client and round",
    )
    peaks = [(f"{n} clients", size / 1e6, OURS) for n, size in found["peak_bytes_of"].items()]
    bars(panels[1], "Peak memory", peaks, unit="MB")


def draw_wire(found: Mapping[str, Any], panels: Sequence[Axes]) -> None:
    """Bytes of FedAvg on all experts over those of FLEx."""
    same: list[Bar] = []
    mixed: list[Bar] = []
    for model, storages in found["fedavg_experts_over_flex"].items():
        for storage, ratios in storages.items():
            name = model if storage == "fused" else f"{model}, {storage}"
            same.append((name, ratios["bfloat16"], OURS))
            mixed.append((name, ratios["bfloat16 over int8"], OURS))
    bars(
        panels[0],
        "Bytes of FedAvg over FLEx, both bfloat16",
        same,
        unit="times",
        target=50.0,
        more_is_better=True,
    )
    bars(
        panels[1],
        "FedAvg in bfloat16 over FLEx in int8",
        mixed,
        unit="times",
        target=100.0,
        more_is_better=True,
    )


def draw_start(found: Mapping[str, Any], panels: Sequence[Axes]) -> None:
    """How long a person waits."""
    quick = [
        ("python -c pass", found["interpreter_seconds"], LIMIT),
        ("import orchard (≤ 0.3)", found["import_seconds"], OURS),
        ("orchard --help (≤ 0.5)", found["help_seconds"], OURS),
    ]
    bars(panels[0], "Commands", quick, unit="seconds", target=0.3)
    slow = [
        ("import torch, transformers", found["libraries_seconds"], LIMIT),
        ("first training of tiny/flex", found["first_training_seconds"], OURS),
    ]
    bars(panels[1], "To the first trained client", slow, unit="seconds", target=10.0)


def draw_memory(found: Mapping[str, Any], panels: Sequence[Axes]) -> None:
    """A carved client beside a whole one."""
    whole, carved = found["whole"], found["carved"]
    bars(
        panels[0],
        "Peak of full fine-tuning, 420 M parameters",
        [
            ("all experts", whole["peak_memory_bytes"] / 1e9, PEER),
            ("all, predicted", whole["predicted_peak_bytes"] / 1e9, LIMIT),
            ("25 %, carved", carved["peak_memory_bytes"] / 1e9, OURS),
            ("25 %, predicted", carved["predicted_peak_bytes"] / 1e9, LIMIT),
        ],
        unit="GB",
        target=0.4 * whole["peak_memory_bytes"] / 1e9,
    )
    bars(
        panels[1],
        "Speed",
        [
            ("all experts", whole["tokens_per_second"], PEER),
            ("25 %, carved", carved["tokens_per_second"], OURS),
        ],
        unit="tokens per second",
        target=1.5 * whole["tokens_per_second"],
        more_is_better=True,
    )


DRAW: Mapping[str, Callable[[Mapping[str, Any], Sequence[Axes]], None]] = {
    "step": draw_step,
    "graft": draw_graft,
    "aggregate": draw_aggregate,
    "rounds": draw_rounds,
    "wire": draw_wire,
    "start": draw_start,
    "memory": draw_memory,
}


def draw_all() -> None:
    """Draw what has a result."""
    try:
        require("report", to="draw charts")
    except ValueError as error:
        sys.exit(f"error: {error}")
    from matplotlib import pyplot

    for name, draw in DRAW.items():
        path = HERE / "results" / f"{name}.json"
        if not path.exists():
            continue
        figure, panels = pyplot.subplots(1, 2, figsize=(9.5, 2.6))
        draw(json.loads(path.read_text()), panels)
        figure.tight_layout()
        figure.savefig(HERE / f"{name}.png", dpi=130)
        pyplot.close(figure)
