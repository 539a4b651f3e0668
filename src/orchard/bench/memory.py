"""Measurements of this machine: what carving saves, in memory and in time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from orchard.client.objectives import causal_lm
from orchard.client.training import TrainingSettings, train
from orchard.communication.messages import LocalSettings
from orchard.data.templates import Encoded
from orchard.experts.submodel import SubmodelSource
from orchard.memory import peak_memory_bytes
from orchard.models.adapters import AdaptedModel
from orchard.models.loading import load_base, threads
from orchard.models.targets import LoraSettings

LORA = LoraSettings(rank=8, alpha=16.0, dropout=0.0, targets=(), full=("all",))
TRAINING = TrainingSettings(
    batch_size=8,
    grad_accumulation=1,
    optimizer="adamw",
    weight_decay=0.0,
    max_grad_norm=1.0,
    router_aux_coefficient=0.0,
)


class _Tokenizer:
    """What training reads of a tokenizer."""

    pad_token_id = 1
    eos_token_id = 0


def train_and_measure(
    path: str, *, experts_per_layer: int, num_tokens: int, steps: int, num_threads: int
) -> dict[str, float]:
    """Train a client on random tokens in this process and return its peak memory and speed.

    All parameters train, in float32 with AdamW. Like a client in a round it holds the global values
    of what it trains, and its delta at the end.

    Args:
        path: Folder of the checkpoint.
        experts_per_layer: To hold of each MoE layer; 0 = load the whole model.
        num_tokens: Of each of the 8 examples of a batch.
        steps: Timed optimizer steps, after one that is not.
        num_threads: CPU threads.
    """
    before = peak_memory_bytes()
    with threads(num_threads):
        if experts_per_layer:
            source = SubmodelSource(path, "float32", "cpu", LORA, _Tokenizer(), "", 0)
            num_layers = json.loads((Path(path) / "config.json").read_text())["num_hidden_layers"]
            model = source.carve([range(experts_per_layer)] * num_layers)
        else:
            base = load_base(path, dtype="float32")
            model = AdaptedModel(
                base.view, LORA, tokenizer=_Tokenizer(), base_digest=base.digest, seed=0
            )
        vocabulary: int = model.model.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
        generator = np.random.default_rng(0)
        examples = []
        for _ in range(8):
            ids = [int(i) for i in generator.integers(2, vocabulary, num_tokens)]
            examples.append(Encoded(ids, ids, 0))
        shared = model.read(model.adapter_names)
        seconds = 0.0
        for number in (1, steps):
            report = train(
                model,
                examples,
                shared=model.adapter_names,
                personal=(),
                objective=causal_lm,
                memory={},
                broadcast=shared,
                settings=TRAINING,
                local=LocalSettings(steps=number, epochs=0, learning_rate=1e-4),
                generator=generator,
                dropout_seed=0,
            )
            seconds = report.seconds
        delta = {n: t.detach() - shared[n] for n, t in model.parameters(shared).items()}
    return {
        "peak_memory_bytes": peak_memory_bytes(),
        "process_bytes": before,
        "tokens_per_second": report.num_tokens / seconds,
        "train_loss": report.loss,
        "trained_elements": sum(tensor.numel() for tensor in delta.values()),
    }
