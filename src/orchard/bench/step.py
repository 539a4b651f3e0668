"""A training step against a plain loop of transformers and PEFT, and answers against ``generate``.

Both sides read the same examples in the same order, start from the same adapters and take the same
AdamW steps; their losses are compared. They take turns in one process for the times, and are each
alone in a process of their own for the memory.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from orchard.bench.plain_loop import PlainLoop, PlainSettings, Stopwatch, Took
from orchard.client.objectives import causal_lm
from orchard.client.training import TrainingSettings, draw_batches, train
from orchard.communication.messages import LocalSettings
from orchard.data.datasets import load_examples
from orchard.data.examples import Fields
from orchard.data.templates import Encoded, encode
from orchard.data.world import facts
from orchard.evaluation.generation import generate_greedily
from orchard.memory import forget_peak_memory, peak_memory_bytes, release_freed_memory
from orchard.models.adapters import AdaptedModel
from orchard.models.loading import DTYPES, load_base, load_config, load_tokenizer, resolve, threads
from orchard.models.random_checkpoint import Shape, write_random_checkpoint
from orchard.models.targets import LoraSettings
from orchard.models.unbinding import unbound_experts
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
# Of Dolly, those that the recipes of this project train on.
_CATEGORIES = ("closed_qa", "information_extraction", "classification", "summarization")
# Never batched_mm on a CPU: it copies an expert for every token.
_CPU_EXPERTS = ("eager", "grouped_mm")
_CHECKED_STEPS = 10
_MOST_DIFFERENT = 1e-3


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


def read_examples(case: StepCase, tokenizer: Any) -> list[Encoded]:
    """Return as many examples as one repeat reads, each once."""
    needed = case.steps * case.batch_size
    generator = np.random.default_rng(0)
    if case.data == "random":
        vocabulary = load_config(case.path).get_text_config().vocab_size
        examples = []
        for _ in range(needed):
            length = int(generator.integers(case.max_tokens // 2, case.max_tokens))
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
    return [
        encode(found[i], template="alpaca", tokenizer=tokenizer, max_tokens=case.max_tokens)
        for i in order
    ]


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
        _wait_for(self.case.device)
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


def measure_alone(case: StepCase, side: str) -> dict[str, float]:
    """Train one side in a process of its own and return its memory; see ``train_alone``.

    Raises:
        RuntimeError: The process failed; with the end of what it wrote.
    """
    about = json.dumps({"side": side, **asdict(case)})
    command = [sys.executable, "-m", "orchard.bench.step", about]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a measured side failed: {done.stderr.strip()[-500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def train_alone(case: StepCase, side: str) -> dict[str, float]:
    """Train one side in this process and return its memory.

    Returns:
        ``imported_bytes`` before anything is loaded, ``loaded_bytes`` with the model,
        ``peak_bytes`` of the whole process, and ``training_bytes``, the peak while it trains beyond
        what was resident with the model loaded.
    """
    imported = peak_memory_bytes()
    with threads(case.num_threads):
        if side.startswith("ours"):
            ours = OurSide(case)
            values = ours.model.read(ours.model.adapter_names)
            examples = read_examples(case, ours.model.tokenizer)
        else:
            plain = plain_side(case, side)
            tokenizer = None if case.data == "random" else load_tokenizer(case.path)
            batches = plain_batches(case, read_examples(case, tokenizer))
        loading_peak = peak_memory_bytes()
        forget_peak_memory()
        loaded = peak_memory_bytes()
        if side.startswith("ours"):
            ours.train(examples, values, packed=side == "ours")
        else:
            plain.train(batches)
    training_peak = peak_memory_bytes()
    return {
        "imported_bytes": imported,
        "loaded_bytes": loaded,
        "peak_bytes": max(loading_peak, training_peak),
        "training_bytes": training_peak - loaded,
    }


def bench_step(
    case: StepCase,
    *,
    repeats: int = 3,
    experts: Sequence[str] = ("eager",),
    memory_case: StepCase | None = None,
    warm_up: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare ``train`` with a plain loop of transformers and PEFT.

    Args:
        case: What both train.
        repeats: Runs of each side, in turn; times are medians.
        experts: The peer's implementations of experts; the fastest one is the peer.
        memory_case: What both train alone for their memory; None = ``case``.
        warm_up: Whether each side runs once before, which is not timed.
        say: Hears of every run that ended.

    Returns:
        ``tokens_per_second`` of each side, padding not counted; ``speedup`` of ours over the peer,
        ``speedup_padded`` with the peer's padding on our side, and ``cpu_speedup`` by CPU time;
        ``same_losses`` and ``largest_loss_difference`` of the first ten steps; on a CPU the memory
        of each in a process of its own, as ``train_alone`` says, and ratios of that; on a GPU its
        peak memory, and the share of the matrix-product limit.
    """
    timed = _train_in_turn(case, repeats=repeats, experts=experts, warm_up=warm_up, say=say)
    # A mapped checkpoint that this process held too would count as the measured processes' own.
    gc.collect()
    release_freed_memory()
    runs, losses, batches, limit = timed.runs, timed.losses, timed.batches, timed.limit
    num_tokens = sum(len(example.input_ids) for batch in batches for example in batch)
    seconds = {name: median(took.seconds for took in all_) for name, all_ in runs.items()}
    cpu = {name: median(took.cpu_seconds for took in all_) for name, all_ in runs.items()}
    best = min((name for name in seconds if name.startswith("peer_")), key=seconds.__getitem__)
    differences = [
        abs(one - other) for one, other in zip(losses["ours"], losses[best], strict=True)
    ][:_CHECKED_STEPS]
    rows = sum(len(batch) * max(len(e.input_ids) for e in batch) for batch in batches)
    num_labels = sum(example.num_labels for batch in batches for example in batch)
    # Forward and backward through frozen products: two and two operations for each parameter.
    flops = 4 * (timed.parameters["body"] * num_tokens + timed.parameters["head"] * num_labels)
    result: dict[str, Any] = {
        "num_tokens": num_tokens,
        "num_labels": num_labels,
        "padding_share": 1 - num_tokens / rows,
        "peer": best,
        "tokens_per_second": {name: num_tokens / took for name, took in seconds.items()},
        "speedup": seconds[best] / seconds["ours"],
        "speedup_padded": seconds[best] / seconds["ours_padded"],
        "cpu_speedup": cpu[best] / cpu["ours"],
        "same_losses": max(differences) <= _MOST_DIFFERENT,
        "largest_loss_difference": max(differences),
        "matmul_gflops": {name: rate / 1e9 for name, rate in limit.items()},
        "floor_seconds": flops / max(limit.values()),
        "share_of_matmul_limit": flops / max(limit.values()) / seconds["ours"],
        "peer_share_of_matmul_limit": flops / max(limit.values()) / seconds[best],
    }
    if case.device == "cpu":
        alone = memory_case or case
        kind = best.removeprefix("peer_")
        memory = {
            "ours": measure_alone(alone, "ours"),
            "ours_padded": measure_alone(alone, "ours_padded"),
            "peer": measure_alone(alone, kind),
        }
        say("measured memory")
        result["memory"] = memory
        for key in ("peak_bytes", "training_bytes"):
            result[f"{key}_ratio"] = memory["ours"][key] / memory["peer"][key]
    else:
        result["device_peak_bytes"] = timed.peaks
    return result


@dataclass(frozen=True)
class _Timed:
    """What sides that train in turn took, and what it takes to judge that."""

    runs: dict[str, list[Took]]
    losses: dict[str, list[float]]
    peaks: dict[str, int]
    batches: Sequence[Sequence[Encoded]]
    parameters: Mapping[str, int]
    limit: Mapping[str, float]


def _train_in_turn(
    case: StepCase,
    *,
    repeats: int,
    experts: Sequence[str],
    warm_up: bool,
    say: Callable[[str], None],
) -> _Timed:
    """Train all sides in this process, one after another; their models are gone afterwards."""
    runs: dict[str, list[Took]] = {}
    losses: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    with threads(case.num_threads):
        ours = OurSide(case)
        examples = read_examples(case, ours.model.tokenizer)
        batches = plain_batches(case, examples)
        values = ours.model.read(ours.model.adapter_names)
        num_parameters = active_parameters(ours.model)
        sides: dict[str, Callable[[], tuple[list[float], Took]]] = {
            "ours": lambda: ours.train(examples, values),
            "ours_padded": lambda: ours.train(examples, values, packed=False),
        }
        for name in experts:
            peer = plain_side(case, name)
            sides[f"peer_{name}"] = partial(_train_peer, peer, values, batches)
        num_tokens = sum(len(example.input_ids) for batch in batches for example in batch)
        for number in range(0 if warm_up else 1, repeats + 1):
            for name, run in sides.items():
                _forget_device_peak(case.device)
                losses[name], took = run()
                peaks[name] = _device_peak(case.device)
                if number:
                    runs.setdefault(name, []).append(took)
                    say(f"{name} {number}/{repeats}: {num_tokens / took.seconds:.0f} tokens/s")
        limit = matmul_flops_per_second(case.dtype, case.device)
    return _Timed(runs, losses, peaks, batches, num_parameters, limit)


def bench_answers(
    case: StepCase,
    *,
    num_prompts: int = 100,
    batch_size: int = 50,
    max_new_tokens: int = 64,
    repeats: int = 3,
    experts: str = "eager",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare ``generate_greedily`` with ``generate`` on the same prompts, so many rows at a time.

    Args:
        case: The model and its data.
        num_prompts: Prompts, in no order of length.
        batch_size: Rows at a time, of both sides.
        max_new_tokens: Longest answer.
        repeats: Runs of each side, in turn, after one that is not timed; times are medians.
        experts: The peer's implementation of experts.
        say: Hears of every run that ended.

    Returns:
        ``seconds`` of each side, ``speedup``, ``cpu_speedup``, and ``same_share``, the share of
        answers that are equal.
    """
    with threads(case.num_threads):
        ours, peer = OurSide(case), plain_side(case, experts)
        values = ours.model.read(ours.model.adapter_names)
        peer.load(values)
        tokenizer = ours.model.tokenizer
        drawn = replace(case, steps=-(-num_prompts // case.batch_size))
        prompts = [e.prompt_ids for e in read_examples(drawn, tokenizer)][:num_prompts]
        options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        runs: dict[str, list[Took]] = {"ours": [], "peer": []}
        for number in range(repeats + 1):
            watch = Stopwatch()
            with unbound_experts(ours.model.view):
                answers = generate_greedily(ours.model, prompts, **options)
            took = watch.read()
            found, peer_took = peer.answer(prompts, **options)
            if number:
                runs["ours"].append(took)
                runs["peer"].append(peer_took)
                say(f"answers {number}/{repeats}: {peer_took.seconds / took.seconds:.2f} times")
    texts = [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]
    seconds = {name: median(took.seconds for took in all_) for name, all_ in runs.items()}
    cpu = {name: median(took.cpu_seconds for took in all_) for name, all_ in runs.items()}
    same = [text == answer for text, answer in zip(texts, answers, strict=True)]
    return {
        "num_prompts": len(prompts),
        "num_answer_tokens": sum(map(len, found)),
        "seconds": seconds,
        "speedup": seconds["peer"] / seconds["ours"],
        "cpu_speedup": cpu["peer"] / cpu["ours"],
        "same_share": sum(same) / len(same),
    }


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
            _wait_for(device)
            watch = Stopwatch()
            torch.matmul(a, a)
            _wait_for(device)
            seconds.append(watch.read().seconds)
        rates[name] = 2 * size**3 / min(seconds)
    return rates


def _train_peer(
    peer: PlainLoop, values: Tree, batches: Sequence[Sequence[Encoded]]
) -> tuple[list[float], Took]:
    peer.load(values)
    return peer.train(batches)


def _wait_for(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _forget_device_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)


def _device_peak(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.max_memory_allocated(device)


def bench_steps(
    *, repeats: int, model: str, data: str, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Compare both sides on a small base, and on Qwen1.5-MoE's shape cut to four layers."""
    small = StepCase(model, data)
    result = {"small": bench_step(small, repeats=repeats, experts=_CPU_EXPERTS, say=say)}
    result["evaluation"] = bench_answers(small, repeats=repeats, say=say)
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), QWEN_SHAPE, dtype="bfloat16", seed=0)
        large = StepCase(folder, "random", dtype="bfloat16", max_tokens=128, steps=2)
        result["large"] = bench_step(
            large,
            repeats=1,
            memory_case=replace(large, max_tokens=256, steps=1),
            # Seconds of products of gigabytes: a first run is like the others.
            warm_up=False,
            say=say,
        )
    return result


def main(arguments: Sequence[str]) -> None:
    """Measure the one side that is given as JSON, and print what was found as JSON."""
    about = json.loads(arguments[0])
    side = about.pop("side")
    about["targets"] = tuple(about["targets"])
    print(json.dumps(train_alone(StepCase(**about), side)))


if __name__ == "__main__":
    main(sys.argv[1:])
