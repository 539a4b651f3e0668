"""A training step against a plain loop of transformers and PEFT, and answers against ``generate``.

Both sides read the same examples in the same order, start from the same adapters and take the same
AdamW steps; their losses are compared. They take turns in one process for the times, and are each
alone in a process of their own for the memory.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from orchard.data.encoded import Encoded
from orchard.evaluation.generation import generate_greedily
from orchard.measurements.plain_loop import PlainLoop, Stopwatch, Took
from orchard.measurements.step_memory import measure_alone
from orchard.measurements.step_sides import (
    MIDDLE_SHAPE,
    QWEN_SHAPE,
    OurSide,
    StepCase,
    active_parameters,
    matmul_flops_per_second,
    plain_batches,
    plain_side,
    read_examples,
)
from orchard.models.stored.loading import threads
from orchard.models.stored.random_checkpoint import Shape, write_random_checkpoint
from orchard.models.view.unbinding import unbound_experts
from orchard.process_memory import release_freed_memory
from orchard.trees import Tree

# Never batched_mm on a CPU: it copies an expert for every token.
_CPU_EXPERTS = ("eager", "grouped_mm")


_CHECKED_STEPS = 10


_MOST_DIFFERENT = 1e-3


# Lengths so different that more than a third of the peer's rows is padding, as with Dolly; and few
# enough steps that three repeats of all sides end within some two minutes on two idle cores.
_MIDDLE_CASE = StepCase("", "random", min_tokens=16, max_tokens=384, steps=5)


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
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
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


def _train_peer(
    peer: PlainLoop, values: Tree, batches: Sequence[Sequence[Encoded]]
) -> tuple[list[float], Took]:
    peer.load(values)
    return peer.train(batches)


def _forget_device_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)


def _device_peak(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.max_memory_allocated(device)


def bench_steps(
    *, repeats: int, model: str, data: str, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Compare both sides on a base, and on Qwen1.5-MoE's shape cut to four layers."""
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


def bench_random(
    *,
    repeats: int,
    shape: Shape = MIDDLE_SHAPE,
    case: StepCase = _MIDDLE_CASE,
    num_prompts: int = 16,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare both sides on a random model that is written for it, on random tokens.

    What ``orchard bench step`` does without a model: nothing is downloaded, and the model is large
    enough that training is timed, not calls.

    Args:
        repeats: Runs of each side.
        shape: Of the model, in float32.
        case: What both train; its path is the model's.
        num_prompts: Prompts of the comparison of answers.
        say: Hears of every run that ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), shape, dtype="float32", seed=0)
        middle = replace(case, path=folder)
        return {
            "shape": asdict(shape),
            "middle": bench_step(middle, repeats=repeats, experts=_CPU_EXPERTS, say=say),
            "evaluation": bench_answers(
                middle,
                num_prompts=num_prompts,
                batch_size=num_prompts,
                max_new_tokens=32,
                repeats=repeats,
                say=say,
            ),
        }
