"""What carving saves: memory and time of a whole and of a carved client, and what was predicted.

Every client is a process of its own, so that its peak is its own, and trains alone on the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from orchard.client.objectives import causal_lm
from orchard.client.requirements import PeakMemory, Requirements, TrainingShape
from orchard.client.training import HoldStill, TrainingSettings, train
from orchard.communication.messages import LocalSettings
from orchard.data.encoded import Encoded
from orchard.experts.masking import detached_experts
from orchard.experts.submodel_source import SubmodelSource
from orchard.models.stored.loading import check_model, load_config, threads
from orchard.models.stored.placing import Placement, open_base
from orchard.models.stored.random_checkpoint import Shape, expert_share, write_random_checkpoint
from orchard.models.stored.tensors import open_checkpoint
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.targets import LoraSettings
from orchard.process_memory import anonymous_peak, peak_memory_bytes, return_memory_at_once
from orchard.strategies.expert_names import expert_of

_WARM_UP = 1  # steps that are not timed


@dataclass(frozen=True)
class Case:
    """One client to measure.

    Attributes:
        path: Of the checkpoint.
        mode: ``whole`` trains all experts, ``mask`` some of those that it holds, ``carve`` those
            that it holds.
        experts: Trained in each MoE layer, where not all are.
        lora_targets: What gets adapters.
        full_targets: What is trained itself.
        lora_rank: R of the adapters.
        dtype: Of the base.
        batch_size: Examples.
        num_tokens: Of each.
        steps: Timed optimizer steps.
        num_threads: CPU threads; 0 = as many as torch takes.
        placement: Of frozen experts, as ``model.placement``.
        precision: Of frozen experts, as ``model.frozen_precision``.
    """

    path: str
    mode: str = "whole"
    experts: int = 0
    lora_targets: tuple[str, ...] = ()
    full_targets: tuple[str, ...] = ("all",)
    lora_rank: int = 8
    dtype: str = "float32"
    batch_size: int = 8
    num_tokens: int = 128
    steps: int = 3
    num_threads: int = 0
    placement: str = "memory"
    precision: str = "bf16"

    @property
    def placed(self) -> Placement:
        """Where frozen experts are."""
        return Placement(self.placement, precision=self.precision)

    @property
    def lora(self) -> LoraSettings:
        """What is trained."""
        return LoraSettings(
            rank=self.lora_rank,
            alpha=2.0 * self.lora_rank,
            dropout=0.0,
            targets=self.lora_targets,
            full=self.full_targets,
        )


class _Tokenizer:
    """What training reads of a tokenizer."""

    pad_token_id = 1
    eos_token_id = 0


def predict(case: Case) -> PeakMemory:
    """Return what the planner says of a case."""
    shape = TrainingShape(
        lora=case.lora,
        dtype=case.dtype,
        batch_size=case.batch_size,
        num_tokens=case.num_tokens,
        optimizer="adamw",
        is_carved=case.mode == "carve",
        num_choices=1,
        placement=case.placed,
    )
    stored = open_checkpoint(case.path).num_bytes
    requirements = Requirements(load_config(case.path), shape, stored_bytes=stored)
    sizes = requirements.footprint.layers.values()
    budget = sum(sizes) if case.mode == "whole" else case.experts * len(sizes)
    return requirements.peak(budget)


def measure(case: Case) -> dict[str, float]:
    """Train a client on random tokens in a process of its own; see ``train_and_measure``.

    Raises:
        RuntimeError: The process failed; with the end of what it wrote.
    """
    command = [sys.executable, "-m", "orchard.measurements.client_memory", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a measured client failed: {done.stderr.strip()[-500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def train_and_measure(case: Case) -> dict[str, float]:
    """Train a client on random tokens in this process and return its peak memory and speed.

    AdamW, in a process that returns freed memory at once. Like a client in a round it holds the
    global values of what it trains, and at the end its delta.
    """
    return_memory_at_once()
    before = peak_memory_bytes()
    with threads(case.num_threads), anonymous_peak() as anonymous:
        model = _open(case)
        vocabulary = load_config(case.path).get_text_config().vocab_size
        generator = np.random.default_rng(0)
        examples = []
        for _ in range(case.batch_size):
            ids = [int(i) for i in generator.integers(2, vocabulary, case.num_tokens)]
            examples.append(Encoded(ids, ids, 0))
        shared = model.read(model.adapter_names)
        settings = TrainingSettings(
            batch_size=case.batch_size,
            grad_accumulation=1,
            optimizer="adamw",
            weight_decay=0.0,
            max_grad_norm=1.0,
            router_aux_coefficient=0.0,
        )
        for steps in (_WARM_UP, case.steps):
            with _masked(case, model) as hold_still:
                report = train(
                    model,
                    examples,
                    shared=model.adapter_names,
                    personal=(),
                    objective=causal_lm,
                    memory={},
                    broadcast=shared,
                    settings=settings,
                    local=LocalSettings(steps=steps, epochs=0, learning_rate=1e-4),
                    generator=generator,
                    dropout_seed=0,
                    hold_still=hold_still,
                )
        delta = {n: t.detach() - shared[n] for n, t in model.parameters(shared).items()}
        own = anonymous()
    return {
        "peak_anonymous_bytes": own,
        "peak_memory_bytes": peak_memory_bytes(),
        "process_bytes": before,
        "tokens_per_second": report.num_tokens / report.seconds,
        "train_loss": report.loss,
        "trainable_parameters": sum(tensor.numel() for tensor in delta.values()),
        "moved_tensors": sum(bool(tensor.any()) for tensor in delta.values()),
    }


def _open(case: Case) -> AdaptedModel:
    if case.mode == "carve":
        source = SubmodelSource(case.path, case.dtype, "cpu", case.lora, _Tokenizer(), "", 0)
        view = check_model(case.path, case.lora)
        return source.carve([range(case.experts)] * len(view.layers))
    base = open_base(case.path, dtype=case.dtype, placement=case.placed)
    return AdaptedModel(
        base.view, case.lora, tokenizer=_Tokenizer(), base_digest=base.digest, seed=0
    )


@contextmanager
def _masked(case: Case, model: AdaptedModel) -> Iterator[HoldStill | None]:
    if case.mode != "mask":
        yield None
        return
    still = [
        name
        for name in model.adapter_names
        if (expert := expert_of(name)) and expert[1] >= case.experts
    ]
    with detached_experts(model.view) as switch:
        switch.learning = tuple(
            torch.arange(layer.num_experts) < case.experts for layer in model.view.layers
        )
        yield lambda batches: still


def bench_memory(
    *,
    shape: Shape | None = None,
    share: float = 0.25,
    repeats: int = 3,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare full fine-tuning of a whole model with that of a carved one.

    AdamW, float32, 8 examples of 128 tokens. Runs of both take turns.

    Args:
        shape: Of the random model.
        share: Of the experts that the carved client holds.
        repeats: Processes of each; memory and speed are medians.
        say: Hears of every process that ended.

    Raises:
        ValueError: Fewer than 85 % of the model would be experts, or no whole number of them the
            share.
    """
    shape = shape or Shape()
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), shape, dtype="bfloat16", seed=0)
        whole = Case(folder)
        experts = round(share * shape.experts)
        carved = replace(whole, mode="carve", experts=experts)
        view = check_model(folder, whole.lora)
        of_experts = expert_share(view)
        if of_experts < 0.85 or experts != share * shape.experts:
            raise ValueError(
                f"experts must be at least 85 % of the weights and {share:.0%} of them a whole "
                f"number, got {of_experts:.1%} and {share * shape.experts:g} of {shape.experts}; "
                "choose another shape"
            )
        found: dict[str, list[dict[str, float]]] = {"whole": [], "carved": []}
        for number in range(repeats):
            for name, case in (("whole", whole), ("carved", carved)):
                found[name].append(measure(case))
                last = found[name][-1]
                say(
                    f"{name} {number + 1}/{repeats}: {last['peak_memory_bytes'] / 1e9:.2f} GB, "
                    f"{last['tokens_per_second']:.0f} tokens/s"
                )
        predicted = {"whole": predict(whole), "carved": predict(carved)}
    return _summarize(found, predicted) | {
        "shape": asdict(shape),
        "experts_share_of_parameters": of_experts,
        "carved_experts_per_layer": experts,
        "batch": [whole.batch_size, whole.num_tokens],
        "repeats": repeats,
    }


def _summarize(
    found: dict[str, list[dict[str, float]]], predicted: dict[str, PeakMemory]
) -> dict[str, Any]:
    sides: dict[str, Any] = {}
    for name, runs in found.items():
        medians = {key: median(run[key] for run in runs) for key in runs[0]}
        total = predicted[name].total
        sides[name] = {
            **medians,
            "predicted_peak_bytes": total,
            "predicted_over_measured": total / medians["peak_memory_bytes"],
            "predicted_parts_bytes": asdict(predicted[name]),
            "tokens_per_second_of_runs": [run["tokens_per_second"] for run in runs],
        }
    whole, carved = sides["whole"], sides["carved"]
    return {
        **sides,
        "memory_ratio": carved["peak_memory_bytes"] / whole["peak_memory_bytes"],
        "speedup": carved["tokens_per_second"] / whole["tokens_per_second"],
    }


def main(arguments: Sequence[str]) -> None:
    """Measure the one case that is given as JSON, and print what was found as JSON."""
    about = json.loads(arguments[0])
    for key in ("lora_targets", "full_targets"):
        about[key] = tuple(about[key])
    print(json.dumps(train_and_measure(Case(**about))))


if __name__ == "__main__":
    main(sys.argv[1:])
