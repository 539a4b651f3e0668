"""What a client sends and receives in a round, by method and encoding, and how fast it is encoded.

LoRA of rank 32, as in FLEx's script, on the q, k and v projections of all layers (FLEx, FedAvg on
attention), with every routed expert (FedAvg on all experts), or with the routers and half of the
experts of each layer (HFedMoE). A graft is never sent, so FLEx sends what FedAvg on attention does.

The small base is measured: a model of its shape with random weights, and messages as they would be
sent. The large ones are computed from their shapes, by the formula that is compared on the small.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from orchard.communication.channel import Channel
from orchard.communication.messages import LocalSettings, Task, Update
from orchard.communication.quantization import Int8
from orchard.communication.sparsification import TopK
from orchard.communication.stages import Cast, Stage, message_bytes
from orchard.models.stored.footprint import measure_footprint
from orchard.models.stored.loading import load_base, threads
from orchard.models.stored.random_checkpoint import Shape, write_random_checkpoint
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.targets import LoraSettings
from orchard.strategies.expert_names import expert_of, is_router
from orchard.trees import Tree, select, zeros_like

RANK = 32
BASE_9M = Shape(4, 256, 4, 16, 2, 128, 256, 4096)
LARGE = {
    "qwen1.5-moe-a2.7b": Shape(24, 2048, 16, 60, 4, 1408, 5632, 151_936),
    # Its first layer has no experts; the attention is that of Qwen2-MoE but for biases.
    "deepseek-moe-16b": Shape(27, 2048, 16, 64, 6, 1408, 2816, 102_400, 1, 10_944),
}
_FLOAT32, _BFLOAT16 = Cast(torch.float32), Cast(torch.bfloat16)
ENCODINGS = {
    "float32": Channel((_FLOAT32,), (_FLOAT32,)),
    "bfloat16": Channel((_BFLOAT16,), (_BFLOAT16,)),
    "int8": Channel((Int8(),), (_BFLOAT16,), differences=(Int8(),)),
}
"""Name to channel; int8 sends the client differences to what it has, from the second round on."""
TIMED: Mapping[str, tuple[Stage, ...]] = {
    "float32": (_FLOAT32,),
    "bfloat16": (_BFLOAT16,),
    "int8": (Int8(),),
    "top 10 %, int8": (TopK(0.1), Int8()),
}


def bench_wire(
    *, repeats: int = 3, large: Mapping[str, Shape] = LARGE, timed_values: int = 2**24
) -> dict[str, Any]:
    """Measure and compute bytes, and time encoding beside a plain copy.

    Args:
        repeats: Of each timing, in turn; figures are medians.
        large: Name to the shapes that are computed.
        timed_values: float32 values of the tree that is timed, in tensors of 65,536.

    Returns:
        ``models``: model, storage of experts, method, encoding, ``up_bytes`` and ``down_bytes`` per
        client and round. Storage ``fused`` has one adapter for an expert's gate and up projection,
        as transformers stores them; ``listed`` has one for each, as published checkpoints do.
        ``fedavg_experts_over_flex``: model, storage, encoding to how many times more FedAvg on all
        experts sends, ``bfloat16 over int8`` among them. ``formula_error``: the largest relative
        difference of a computed to a measured length. ``speed``: stages to ``encode_mb_per_second``
        and ``decode_mb_per_second`` of float32 values, whole messages, one thread, in CPU time, and
        ``copy_mb_per_second`` of the same values into memory that is there, in turn.
        ``int8_bits``: bits per value of an int8 message as sent, and the ``entropy_bits`` that no
        code of its levels alone gets below; of normal values.
    """
    measured, error = measure_small(BASE_9M)
    models = {"base-9m": {"fused": measured}}
    for name, shape in large.items():
        elements = elements_of(shape)
        models[name] = {
            "fused": compute(elements),
            "listed": compute(as_listed(elements, shape)),
        }
    with threads(1):
        speed = time_stages(timed_values, repeats=repeats)
    return {
        "lora_rank": RANK,
        "models": models,
        "fedavg_experts_over_flex": {
            name: {storage: _ratios(table) for storage, table in storages.items()}
            for name, storages in models.items()
        },
        "formula_error": error,
        "speed": speed,
        "int8_bits": int8_bits(),
    }


def _lora() -> LoraSettings:
    targets = ("q_proj", "k_proj", "v_proj", "router", "experts")
    return LoraSettings(rank=RANK, alpha=2.0 * RANK, dropout=0.0, targets=targets)


def elements_of(shape: Shape) -> dict[str, int]:
    """Return name to values of every adapter of a model, which needs no weights."""
    return measure_footprint(shape.config(), _lora(), dtype="bfloat16").trainable


def as_listed(elements: Mapping[str, int], shape: Shape) -> dict[str, int]:
    """Return the adapters of a model that stores gate and up projections apart."""
    listed: dict[str, int] = {}
    for name, number in elements.items():
        if ".gate_up_proj." not in name:
            listed[name] = number
            continue
        width = shape.width if name.endswith("lora_A") else shape.expert_width
        for part in ("gate_proj", "up_proj"):
            listed[name.replace("gate_up_proj", part)] = RANK * width
    return listed


def sent_names(method: str, names: Mapping[str, Any], *, up: bool) -> list[str]:
    """Return what of a model's adapters a method sends up or down.

    A client of HFedMoE sends half of the experts of each layer, and receives all.
    """
    numbers = {expert[1] for expert in map(expert_of, names) if expert is not None}
    half = len(numbers) // 2

    def is_sent(name: str) -> bool:
        expert = expert_of(name)
        if method == "hfedmoe":
            return expert is None or not up or expert[1] < half
        if is_router(name):
            return False
        return expert is None or method == "fedavg_experts"

    return [name for name in names if is_sent(name)]


METHODS = ("fedavg_experts", "fedavg_attention", "flex", "hfedmoe")


def compute(elements: Mapping[str, int]) -> dict[str, dict[str, dict[str, int]]]:
    """Return method, encoding, bytes, from the sizes of a model's adapters."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for method in METHODS:
        up, down = (
            {name: elements[name] for name in sent_names(method, elements, up=up)}
            for up in (True, False)
        )
        table[method] = {
            encoding: {
                "up_bytes": message_bytes(up, channel.uplink, has_weights=True),
                "down_bytes": message_bytes(
                    down, channel.differences or channel.downlink, has_weights=False
                ),
            }
            for encoding, channel in ENCODINGS.items()
        }
    return table


def measure_small(shape: Shape) -> tuple[dict[str, dict[str, dict[str, int]]], float]:
    """Return method, encoding, bytes of messages, and the largest relative error of ``compute``."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), shape, dtype="bfloat16", seed=0)
        base = load_base(folder, dtype="bfloat16")
        model = AdaptedModel(base.view, _lora(), tokenizer=None, base_digest=base.digest, seed=0)
        values = {name: tensor.float() for name, tensor in model.fresh.items()}
    generator = torch.Generator().manual_seed(0)
    moved = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in values.items()}
    computed = compute({name: tensor.numel() for name, tensor in values.items()})
    table: dict[str, dict[str, dict[str, int]]] = {}
    errors = []
    for method in METHODS:
        up = select(moved, sent_names(method, moved, up=True))
        down = sent_names(method, moved, up=False)
        table[method] = {}
        for encoding, channel in ENCODINGS.items():
            found = {
                "up_bytes": len(channel.pack_update(_update(up))),
                "down_bytes": _downlink(channel, select(values, down), select(moved, down)),
            }
            table[method][encoding] = found
            errors += [abs(computed[method][encoding][k] / found[k] - 1) for k in found]
    return table, max(errors)


def _update(delta: Tree) -> Update:
    names = ("num_examples", "prepare_seconds", "train_loss", "train_seconds", "num_tokens")
    metrics = {f"client/{name}": 1.0 for name in names}
    return Update("client", 2, delta, dict.fromkeys(delta, 100.0), metrics)


def _downlink(channel: Channel, before: Tree, after: Tree) -> int:
    """Return the length of the second round's task for a client that has the first."""
    settings = LocalSettings(5, 0, 1e-3)
    held = channel.broadcast(Task(1, before, settings), {}).task.shared
    return len(channel.broadcast(Task(2, after, settings), held).since)


def _ratios(table: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, float]:
    experts, flex = table["fedavg_experts"], table["flex"]
    ratios = {name: experts[name]["up_bytes"] / flex[name]["up_bytes"] for name in ENCODINGS}
    ratios["bfloat16 over int8"] = experts["bfloat16"]["up_bytes"] / flex["int8"]["up_bytes"]
    return ratios


def time_stages(num_values: int, *, repeats: int) -> dict[str, dict[str, float]]:
    """Return how fast whole messages are written and read, beside a copy of the same values."""
    generator = torch.Generator().manual_seed(0)
    delta = {
        f"layers.{number}": torch.randn(2**16, generator=generator)
        for number in range(max(1, num_values // 2**16))
    }
    update, into = _update(delta), zeros_like(delta)
    channels = {name: Channel(stages) for name, stages in TIMED.items()}
    megabytes = sum(tensor.nbytes for tensor in delta.values()) / 1e6
    taken: dict[str, dict[str, list[float]]] = {
        name: {"encode": [], "decode": [], "copy": []} for name in channels
    }
    for _ in range(repeats + 1):
        for name, channel in channels.items():
            own = taken[name]
            message = _timed(own["encode"], partial(channel.pack_update, update))
            _timed(own["decode"], partial(channel.unpack_update, message))
            _timed(own["copy"], partial(_copy, delta, into))
    # The first of each warms up.
    return {
        name: {
            f"{what}_mb_per_second": megabytes / median(own[1:])
            for what, own in taken[name].items()
        }
        for name in channels
    }


def _copy(tree: Tree, into: Tree) -> None:
    for name, tensor in tree.items():
        into[name].copy_(tensor)


def _timed(taken: list[float], work: Callable[[], Any]) -> Any:
    started = time.process_time()
    result = work()
    taken.append(time.process_time() - started)
    return result


def int8_bits(num_values: int = 2**20) -> dict[str, float]:
    """Return the bits per normal value of int8 as sent, and the entropy of its levels."""
    values = torch.randn(num_values, generator=torch.Generator().manual_seed(0))
    encoded = Int8().encode({"a": values})
    counts = torch.bincount(encoded["a"].int() + 128, minlength=256)
    shares = (counts[counts > 0] / num_values).tolist()
    return {
        "sent_bits": 8 * sum(tensor.nbytes for tensor in encoded.values()) / num_values,
        "entropy_bits": -math.fsum(share * math.log2(share) for share in shares),
    }
