"""The two sides of ``step``: what both train, ours, and a plain loop of transformers and PEFT."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from orchard.client.objectives import causal_lm
from orchard.client.training import TrainingSettings, draw_batches, train
from orchard.communication.messages import LocalSettings
from orchard.data.datasets import load_examples
from orchard.data.encoded import Encoded
from orchard.data.examples import Fields
from orchard.data.templates import Wording, encode
from orchard.data.world import facts
from orchard.measurements.plain_loop import PlainLoop, PlainSettings, Stopwatch, Took
from orchard.models.stored.loading import DTYPES, load_base, load_config, load_tokenizer, resolve
from orchard.models.stored.random_checkpoint import Shape
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.targets import LoraSettings
from orchard.trees import Tree

# Qwen1.5-MoE-A2.7B's, cut to a few layers.
QWEN_SHAPE = Shape(
    layers=4,
    width=2048,
    heads=16,
    experts=60,
    top_k=4,
    expert_width=1408,
    shared_width=5632,
    vocabulary=151936,
)


# Between the packaged base, whose step is mostly calls, and Qwen1.5-MoE's: a token meets 13 of 60
# million parameters beside the output layer.
MIDDLE_SHAPE = Shape(
    layers=4,
    width=384,
    heads=6,
    experts=16,
    top_k=2,
    expert_width=768,
    shared_width=768,
    vocabulary=4096,
)


# Of Dolly, those that the recipes of this project train on.
_CATEGORIES = ("closed_qa", "information_extraction", "classification", "summarization")


@dataclass(frozen=True)
class StepCase:
    """What both sides train.

    Attributes:
        path: Of the checkpoint, a folder or ``orchard:tiny``.
        data: Examples, JSON Lines; "" = facts of the packaged world; "random" = random tokens, for
            a model without tokenizer.
        dtype: Of the base.
        device: Where both sides run.
        targets: What gets LoRA adapters.
        rank: Of the adapters.
        alpha: Their scale times the rank.
        batch_size: Examples per optimizer step.
        max_tokens: Longest example.
        min_tokens: Shortest random example; 0 = half of the longest.
        steps: Optimizer steps of each repeat.
        learning_rate: Of AdamW.
        num_threads: CPU threads of both sides.
    """

    path: str
    data: str = ""
    dtype: str = "float32"
    device: str = "cpu"
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    rank: int = 32
    alpha: float = 64.0
    batch_size: int = 4
    max_tokens: int = 512
    min_tokens: int = 0
    steps: int = 20
    learning_rate: float = 1e-3
    num_threads: int = 2

    @property
    def settings(self) -> TrainingSettings:
        """How our side trains."""
        return TrainingSettings(
            batch_size=self.batch_size,
            grad_accumulation=1,
            optimizer="adamw",
            weight_decay=0.0,
            max_grad_norm=1.0,
            router_aux_coefficient=0.0,
        )

    @property
    def local(self) -> LocalSettings:
        """How many steps our side takes."""
        return LocalSettings(steps=self.steps, epochs=0, learning_rate=self.learning_rate)


class _Tokenizer:
    """What training reads of a tokenizer, for a random model that has none."""

    pad_token_id = 1
    eos_token_id = 0

    def batch_decode(
        self, rows: Iterable[Iterable[int]], *, skip_special_tokens: bool
    ) -> list[str]:
        """Return the numbers of the tokens, up to the first that is special."""
        special = {self.pad_token_id, self.eos_token_id} if skip_special_tokens else set()
        return [
            " ".join(str(int(i)) for i in itertools.takewhile(lambda i: int(i) not in special, row))
            for row in rows
        ]


def read_examples(case: StepCase, tokenizer: Any) -> list[Encoded]:
    """Return as many examples as one repeat reads, each once."""
    needed = case.steps * case.batch_size
    generator = np.random.default_rng(0)
    if case.data == "random":
        vocabulary = load_config(case.path).get_text_config().vocab_size
        examples = []
        for _ in range(needed):
            shortest = case.min_tokens or case.max_tokens // 2
            length = int(generator.integers(shortest, case.max_tokens))
            ids = [int(i) for i in generator.integers(2, vocabulary, length)]
            half = length // 2
            examples.append(Encoded(ids, [-100] * half + ids[half:], half))
        return examples
    if case.data:
        found = load_examples(case.data, Fields())
        found = [example for example in found if example.category in _CATEGORIES] or found
    else:
        found = facts()
    order = generator.permutation(len(found))[:needed]
    wording = Wording("alpaca", tokenizer)
    return [encode(found[i], wording, max_tokens=case.max_tokens) for i in order]


class OurSide:
    """``train`` and ``generate_greedily``, called as a client calls them."""

    def __init__(self, case: StepCase) -> None:
        """Load the model and put fresh adapters in."""
        self.case = case
        tokenizer = _Tokenizer() if case.data == "random" else load_tokenizer(case.path)
        lora = LoraSettings(case.rank, case.alpha, 0.0, case.targets)
        base = load_base(case.path, dtype=case.dtype, device=case.device)
        self.model = AdaptedModel(
            base.view, lora, tokenizer=tokenizer, base_digest=base.digest, seed=0
        )

    def train(
        self, examples: Sequence[Encoded], values: Tree, *, packed: bool = True
    ) -> tuple[list[float], Took]:
        """Train from ``values``; return the loss of each step, and what all of them took."""
        self.model.load(values)
        watch = Stopwatch()
        report = train(
            self.model,
            examples,
            shared=self.model.adapter_names,
            personal=(),
            objective=causal_lm,
            memory={},
            broadcast={},
            settings=replace(self.case.settings, packed=packed),
            local=self.case.local,
            generator=np.random.default_rng(1),
            dropout_seed=0,
        )
        wait_for(self.case.device)
        return list(report.losses), watch.read()


def plain_side(case: StepCase, experts: str) -> PlainLoop:
    """Return the peer, which transformers and PEFT load by themselves."""
    tokenizer = _Tokenizer() if case.data == "random" else load_tokenizer(case.path)
    settings = PlainSettings(
        experts=experts,
        dtype=case.dtype,
        device=case.device,
        targets=case.targets,
        rank=case.rank,
        alpha=case.alpha,
        learning_rate=case.learning_rate,
        max_grad_norm=case.settings.max_grad_norm,
        pad_id=tokenizer.pad_token_id,
        end_id=tokenizer.eos_token_id,
    )
    return PlainLoop(resolve(case.path), settings)


def plain_batches(case: StepCase, examples: Sequence[Encoded]) -> list[list[Encoded]]:
    """Return the batches that our side draws, in their order."""
    drawn = draw_batches(len(examples), case.settings, case.local, np.random.default_rng(1))
    return [[examples[index] for index in batch] for (batch,) in drawn]


def active_parameters(model: AdaptedModel) -> dict[str, int]:
    """Return the parameters that a token is multiplied with, in the output layer and elsewhere."""
    network: Any = model.model
    head = network.get_output_embeddings().weight.numel()
    routed = sum(p.numel() for layer in model.view.layers for p in layer.storage.parameters())
    used = sum(
        p.numel() * layer.top_k // layer.num_experts
        for layer in model.view.layers
        for p in layer.storage.parameters()
    )
    matrices = sum(p.numel() for p in network.parameters() if p.ndim > 1)
    embedding = network.get_input_embeddings().weight
    is_tied = embedding is network.get_output_embeddings().weight
    return {
        "head": head,
        "body": matrices - routed + used - head - (0 if is_tied else embedding.numel()),
    }


def matmul_flops_per_second(dtype: str, device: str, *, size: int = 2048) -> dict[str, float]:
    """Return the rate of a large product, in ``dtype`` and on a CPU in float32 too."""
    rates = {}
    for name in {dtype, "float32"} if device == "cpu" else {dtype}:
        a = torch.randn(size, size, device=device).to(DTYPES[name])
        seconds = []
        for _ in range(4):
            wait_for(device)
            watch = Stopwatch()
            torch.matmul(a, a)
            wait_for(device)
            seconds.append(watch.read().seconds)
        rates[name] = 2 * size**3 / min(seconds)
    return rates


def wait_for(device: str) -> None:
    """Return when a device has done what it was asked; a CPU always has."""
    if device != "cpu":
        torch.cuda.synchronize(device)
