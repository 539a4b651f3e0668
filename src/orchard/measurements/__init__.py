"""Measurements of this machine, each one command: ``orchard bench NAME``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from orchard.extras import require
from orchard.results import environment


def _memory(repeats: int) -> dict[str, Any]:
    from orchard.measurements.client_memory import bench_memory

    return bench_memory(repeats=repeats, say=lambda line: print(line, file=sys.stderr))


def _placement(repeats: int) -> dict[str, Any]:
    from orchard.measurements.placement import bench_placement

    return bench_placement(repeats=repeats, say=lambda line: print(line, file=sys.stderr))


def _graft(repeats: int) -> dict[str, Any]:
    from orchard.measurements.graft import bench_graft, native_dtype

    dtype = native_dtype()
    print(f"graft: one layer of Qwen1.5-MoE's shape in {dtype}", file=sys.stderr)
    # Half of the usual tokens: three repeats end within five minutes on two cores.
    found = bench_graft(num_tokens=512, dtype=dtype, repeats=repeats)
    return {"dtype": dtype, "num_tokens": 512, **found}


def _aggregate(repeats: int) -> dict[str, Any]:
    from orchard.measurements.aggregate import bench_aggregate

    return bench_aggregate(repeats=repeats, say=lambda line: print(line, file=sys.stderr))


def _rounds(repeats: int) -> dict[str, Any]:
    from orchard.measurements.rounds import bench_rounds

    return bench_rounds(repeats=repeats, say=lambda line: print(line, file=sys.stderr))


def _start(repeats: int) -> dict[str, Any]:
    from orchard.measurements.start import bench_start

    return bench_start(repeats=repeats, say=lambda line: print(line, file=sys.stderr))


def _wire(repeats: int) -> dict[str, Any]:
    from orchard.measurements.wire import bench_wire

    return bench_wire(repeats=repeats)


def _step(repeats: int, *, model: str = "", data: str = "") -> dict[str, Any]:
    from orchard.measurements.step import bench_random, bench_steps

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    if not (model or data):
        return bench_random(repeats=repeats, say=say)
    return bench_steps(repeats=repeats, model=model or "orchard:tiny", data=data, say=say)


def _serve(
    repeats: int, *, model: str = "", data: str = "", seconds: float = 60.0
) -> dict[str, Any]:
    if data:
        raise ValueError(f"--data must be left out of serve, got {data}; prompts are random")
    require("serve", to="measure a server")
    from orchard.measurements.serving import bench_serving

    return bench_serving(
        repeats=repeats,
        model=model or "orchard:tiny",
        say=lambda line: print(line, file=sys.stderr),
        seconds=seconds,
    )


BENCHES: Mapping[str, Callable[[int], dict[str, Any]]] = MappingProxyType(
    {
        "memory": _memory,
        "placement": _placement,
        "graft": _graft,
        "step": _step,
        "aggregate": _aggregate,
        "rounds": _rounds,
        "wire": _wire,
        "start": _start,
        "serve": _serve,
    }
)
"""Name to what runs it, given how many repeats, and returns what it found."""

TAKE_A_MODEL = MappingProxyType({"step": _step, "serve": _serve})
"""Those that take a model and data."""


def run_bench(
    name: str,
    *,
    as_json: bool,
    repeats: int,
    model: str = "",
    data: str = "",
    seconds: float | None = None,
) -> str:
    """Run one measurement and return what it found, as JSON or as one line for each figure.

    What it ran on comes first, as in a run's ``result.json``: a speed is that of a machine.

    Args:
        name: Of the measurement.
        as_json: Whether to return JSON.
        repeats: Runs of each side.
        model: A base, for measurements that take one; "" = a random one, or with ``data`` the
            packaged one.
        data: Examples, for measurements that take some; "" = random ones, or with ``model``
            packaged ones.
        seconds: How long a server is loaded; None = 60. Of serve alone.

    Raises:
        ValueError: There is no measurement of this name, or it takes no model, data or seconds.
    """
    if name not in BENCHES:
        raise ValueError(f"NAME must be of {', '.join(BENCHES)}, got {name}; choose one of these")
    if seconds is not None:
        if name != "serve":
            raise ValueError(f"NAME must be serve with --seconds, got {name}; drop it")
        found = _serve(repeats, model=model, data=data, seconds=seconds)
    elif model or data:
        if name not in TAKE_A_MODEL:
            raise ValueError(
                f"NAME must be of {', '.join(TAKE_A_MODEL)} with --model or --data, got {name}; "
                "drop them"
            )
        found = TAKE_A_MODEL[name](repeats, model=model, data=data)
    else:
        found = BENCHES[name](repeats)
    found = {**environment(), **found}
    if as_json:
        return json.dumps(found, indent=1)
    return "\n".join(_lines(found, ""))


def _lines(found: Mapping[str, Any], prefix: str) -> list[str]:
    lines = []
    for key, value in found.items():
        if isinstance(value, Mapping):
            lines += _lines(value, f"{prefix}{key}.")
        else:
            lines.append(
                f"{prefix}{key}: {value:.4g}"
                if isinstance(value, float)
                else f"{prefix}{key}: {value}"
            )
    return lines
