"""A round of FLEx and one of HFedMoE on a model of Qwen1.5-MoE-A2.7B's shape, larger than memory.

Writes a random checkpoint in the published layout, a tensor for each expert and projection, in
shards of 5 GB; trains a round of each method in a process of its own with experts where --cache
says; samples that process's anonymous memory and what it read; removes the checkpoint.

python -m benchmarks.placement.true_shape FOLDER --layers 24
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from orchard.measurements.placement import COMMON, METHODS, predict_round, run_round
from orchard.models.stored.loading import resolve
from orchard.process_memory import machine_memory_bytes, release_freed_memory
from orchard.results import environment, write_json

HERE = Path(__file__).parent
INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 5_000_000_000
_POOL = 1 << 26  # random values, of which every tensor takes some from a place of its own
_SAMPLE_SECONDS = 0.05


def shape(num_layers: int) -> Any:
    """Return the configuration of Qwen1.5-MoE-A2.7B with so many layers."""
    return Qwen2MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        norm_topk_prob=False,
        tie_word_embeddings=False,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        architectures=["Qwen2MoeForCausalLM"],
        eos_token_id=0,
        pad_token_id=1,
        dtype="bfloat16",
    )


def write_checkpoint(folder: Path, num_layers: int) -> None:
    """Write a random model in the published layout."""
    folder.mkdir(parents=True)
    config = shape(num_layers)
    config.save_pretrained(folder)
    tiny = Path(resolve("orchard:tiny"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    total = size = 0
    place = 0
    for name, dimensions in _published(config):
        count = torch.Size(dimensions).numel()
        if name.endswith("norm.weight"):
            tensor = torch.ones(dimensions, dtype=torch.bfloat16)
        else:
            # A step that shares no factor with the pool's size, so that no two are the same.
            place = (place + 7_919_003) % _POOL
            parts, begin = [], place
            while count:
                part = pool[begin : begin + count]
                parts.append(part)
                count -= len(part)
                begin = 0
            tensor = torch.cat(parts).view(dimensions)
        num_bytes = tensor.numel() * 2
        if size + num_bytes > _SHARD_BYTES:
            _save(folder, shard, weight_map)
            shard, size = {}, 0
        shard[name] = tensor
        size += num_bytes
        total += num_bytes
    _save(folder, shard, weight_map)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def _published(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of the published layout, layer by layer."""
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(config)
    for name, tensor in model.state_dict().items():
        dimensions = tuple(tensor.shape)
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            yield name, dimensions
            continue
        prefix, _, local = name.rpartition(".")
        number, rows, columns = dimensions
        for expert in range(number):
            if local == "down_proj":
                yield f"{prefix}.{expert}.down_proj.weight", (rows, columns)
            else:
                yield f"{prefix}.{expert}.gate_proj.weight", (rows // 2, columns)
                yield f"{prefix}.{expert}.up_proj.weight", (rows // 2, columns)


def _save(folder: Path, shard: dict[str, torch.Tensor], weight_map: dict[str, str]) -> None:
    name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
    save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(shard, name))


def train(model: Path, method: str, out: Path, *, cache: str, limit: int) -> dict[str, Any]:
    """Train one round in a process of its own, and return what it took.

    Args:
        model: The checkpoint.
        method: Of ``METHODS``.
        out: The run's folder.
        cache: As ``model.expert_cache``.
        limit: Bytes of private memory that the process may have (RLIMIT_DATA); 0 = any.
    """
    where = [f"model.path={model}", "model.placement=mapped", f"model.expert_cache={cache}"]
    overrides = ["model.num_threads=2", *COMMON, *METHODS[method], *where]
    predicted = predict_round(overrides)
    run = run_round(overrides, out, limit=limit)
    result = json.loads((out / "result.json").read_text())
    return {
        **{key: run[key] for key in ("seconds", "peak_anonymous_bytes", "bytes_read")},
        "predicted_anonymous_bytes": predicted,
        "predicted_over_measured": predicted / run["peak_anonymous_bytes"],
        "limit_bytes": limit or None,
        "base_is_unchanged": result.get("base_is_unchanged"),
        "base_digest": result.get("base_digest"),
        "shared_digest": result.get("shared_digest"),
        "overrides": [option for option in overrides if not option.startswith("model.path")],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write, train, remove, and keep a record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for the checkpoint and the runs")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--cache", default="none", help="as model.expert_cache")
    parser.add_argument("--limit-gb", type=float, default=0.0, help="RLIMIT_DATA of a run")
    parser.add_argument("--keep", action="store_true", help="the checkpoint, which is used again")
    parser.add_argument("--out", type=Path, default=None, help="the record")
    given = parser.parse_args(arguments)
    model = given.folder / "model"
    record: dict[str, Any] = {**environment(), "layers": given.layers, "cache": given.cache}
    out = given.out or HERE / "results" / f"true_shape_{given.layers}_layers.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        record = json.loads(out.read_text())
    try:
        if not model.exists():
            start = time.perf_counter()
            write_checkpoint(model, given.layers)
            release_freed_memory()
            os.sync()
            record["write_seconds"] = time.perf_counter() - start
        index = json.loads((model / INDEX).read_text())
        record["model_bytes"] = index["metadata"]["total_size"]
        record["machine_bytes"] = machine_memory_bytes()
        record["num_threads"] = os.environ.get("OMP_NUM_THREADS", "")
        for method in given.only:
            limit = int(given.limit_gb * 1e9)
            run = train(model, method, given.folder / method, cache=given.cache, limit=limit)
            record[method] = run
            print(method, json.dumps(run, indent=1), flush=True)
            write_json(out, record)
    finally:
        if not given.keep:
            shutil.rmtree(model, ignore_errors=True)


if __name__ == "__main__":
    main()
