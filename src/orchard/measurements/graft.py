"""What choosing several grafts costs, against running every set.

One MoE layer with random weights, Qwen1.5-MoE's unless told otherwise, reads random token states.
Three things are timed on it in turn:

- the floor: the output of every expert, once;
- the search: ``search_grafts`` as a client calls it, where the model's own forward is for nothing;
- enumeration: a set's experts run, are mixed and compared, for every set, or for a few of them and
  scaled up to all.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchard.experts.graft_search import SearchSettings, search_grafts
from orchard.experts.subset_losses import Tally, all_sets, token_terms, tokens_at_a_time
from orchard.models.stored.loading import threads
from orchard.models.view.detection import view_moe
from orchard.models.view.moe import MoELayer, MoEView

_SMALL = {"num_experts": 16, "width": 64, "expert_width": 48}


def native_dtype() -> str:
    """Return ``bfloat16`` where this machine's CPU computes in it, else ``float32``."""
    has = torch.cpu.get_capabilities()
    is_native = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if is_native else "float32"


def bench_graft(
    *,
    num_experts: int = 60,
    top_k: int = 4,
    width: int = 2048,
    expert_width: int = 1408,
    num_tokens: int = 1024,
    dtype: str = "bfloat16",
    sizes: Sequence[int] = (1, 2, 3),
    searched_sizes: Sequence[int] = (),
    sampled_sets: int = 4,
    repeats: int = 3,
    num_threads: int = 2,
    seed: int = 0,
) -> dict[str, float | bool]:
    """Time the choice of grafts in one layer, and check it against running sets of experts.

    Args:
        num_experts: E.
        top_k: K.
        width: D.
        expert_width: F.
        num_tokens: T, in one batch of two blocks.
        dtype: Of the layer and its token states.
        sizes: Experts per set, each searched exhaustively.
        searched_sizes: Experts per set, each searched greedily from the best sets of three at most.
        sampled_sets: Sets of each size that are run at the shape above; one is the choice.
        repeats: Of floor and search, in turn.
        num_threads: CPU threads, at the shape above.
        seed: Of all random values.

    Returns:
        ``floor_seconds``; ``search_seconds_rN`` for each size N, medians that include the floor;
        ``enumeration_extrapolated_seconds_rN``, of the sampled sets scaled up to all, and
        ``speedup_rN``, that over the search; ``search_over_floor_rN``;
        ``loss_error_rN``, the largest relative difference of a sampled set's loss to what running
        it gives. ``small_...``: the same at 16 experts of 48 on a width of 64, in float64, where
        every set is run and ``small_same_choice`` says whether all choices are equal.
        ``beam_seconds_rN``, ``beam_loss_rN`` and ``beam_bound_rN`` of ``searched_sizes``, losses as
        shares of the layer's output.
    """
    result: dict[str, float | bool] = {}
    # One thread: such small products would wait for a second one longer than they take.
    with threads(1), torch.inference_mode():
        small = _random_layer(**_SMALL, top_k=top_k, dtype=torch.float64, seed=seed)
        result |= {f"small_{k}": v for k, v in _enumerate(small, num_tokens // 4, sizes).items()}
    with threads(num_threads), torch.inference_mode():
        view = _random_layer(
            num_experts=num_experts,
            width=width,
            expert_width=expert_width,
            top_k=top_k,
            dtype=getattr(torch, dtype),
            seed=seed,
        )
        layer, batch_BS = view.layers[0], torch.arange(num_tokens).view(2, -1)
        x_TD = _states(view, num_tokens)
        floors: list[float] = []
        searches: dict[int, list[float]] = {size: [] for size in sizes}
        chosen = {}
        limit = max(math.comb(num_experts, size) for size in sizes)
        for _ in range(repeats):
            floors.append(_seconds(lambda: _run_all(layer, x_TD)))
            for size in sizes:
                started = time.perf_counter()
                (found,) = search_grafts(
                    view, [batch_BS], sizes=[size], settings=SearchSettings(max_sets=limit)
                )
                searches[size].append(time.perf_counter() - started)
                chosen[size] = found.sets[size]
        result["floor_seconds"] = floor = statistics.median(floors)
        routed_TD = layer.routed_output(x_TD)
        generator = np.random.default_rng(seed)
        for size in sizes:
            seconds = statistics.median(searches[size])
            result[f"search_seconds_r{size}"] = seconds
            result[f"search_over_floor_r{size}"] = seconds / floor
            drawn = [chosen[size].experts] + [
                tuple(sorted(generator.choice(num_experts, size=size, replace=False).tolist()))
                for _ in range(sampled_sets - 1)
            ]
            by_search = _losses_of(layer, x_TD, routed_TD, drawn)
            times, errors = [], []
            for experts, loss in zip(drawn, by_search, strict=True):
                started = time.perf_counter()
                by_running = _run_set(layer, x_TD, routed_TD, experts)
                times.append(time.perf_counter() - started)
                errors.append(abs(loss - by_running) / by_running)
            every = statistics.mean(times) * math.comb(num_experts, size)
            result[f"enumeration_extrapolated_seconds_r{size}"] = every
            result[f"speedup_r{size}"] = every / seconds
            result[f"loss_error_r{size}"] = max(errors)
        few = max(math.comb(num_experts, size) for size in (1, 2, 3))
        for size in searched_sizes:
            started = time.perf_counter()
            (found,) = search_grafts(
                view, [batch_BS], sizes=[size], settings=SearchSettings(max_sets=few)
            )
            result[f"beam_seconds_r{size}"] = time.perf_counter() - started
            result[f"beam_loss_r{size}"] = found.sets[size].loss / found.output_norm
            result[f"beam_bound_r{size}"] = found.sets[size].lower_bound / found.output_norm
    return result


def _enumerate(view: MoEView, num_tokens: int, sizes: Sequence[int]) -> dict[str, float | bool]:
    """Search and enumerate in full, at a shape where that is possible."""
    layer, batch_BS = view.layers[0], torch.arange(num_tokens).view(2, -1)
    x_TD = _states(view, num_tokens)
    routed_TD = layer.routed_output(x_TD)
    result: dict[str, float | bool] = {}
    is_same = []
    for size in sizes:
        started = time.perf_counter()
        (found,) = search_grafts(view, [batch_BS], sizes=[size])
        searched = time.perf_counter() - started
        sets = list(itertools.combinations(range(layer.num_experts), size))
        started = time.perf_counter()
        losses = [_run_set(layer, x_TD, routed_TD, experts) for experts in sets]
        enumerated = time.perf_counter() - started
        smallest = min(losses)
        first = next(i for i, loss in enumerate(losses) if loss <= smallest * (1 + 1e-12))
        is_same.append(sets[first] == found.sets[size].experts)
        result[f"search_seconds_r{size}"] = searched
        result[f"enumeration_seconds_r{size}"] = enumerated
        result[f"speedup_r{size}"] = enumerated / searched
    result["same_choice"] = all(is_same)
    return result


def _run_all(layer: MoELayer, x_TD: Tensor) -> None:
    for expert in range(layer.num_experts):
        layer.run_expert(expert, x_TD)


def _run_set(layer: MoELayer, x_TD: Tensor, routed_TD: Tensor, experts: Sequence[int]) -> float:
    """Return a set's loss as its definition says."""
    rows_KD = layer.router_tensors()["weight"][list(experts)]
    weight_TK = functional.linear(x_TD.double(), rows_KD.double()).softmax(-1)
    missing_TD = routed_TD.to(torch.float64, copy=True)
    for position, expert in enumerate(experts):
        missing_TD -= weight_TK[:, position, None] * layer.run_expert(expert, x_TD)
    return float(missing_TD.norm())


def _losses_of(
    layer: MoELayer, x_TD: Tensor, routed_TD: Tensor, sets: Sequence[tuple[int, ...]]
) -> list[float]:
    """Return what the search makes of these sets, all of one size."""
    size = len(sets[0])
    tally = Tally(all_sets(size), math.comb(layer.num_experts, size), loss="norm")
    step = tokens_at_a_time(layer, element_bytes=x_TD.element_size())
    for start in range(0, len(x_TD), step):
        block = slice(start, start + step)
        tally.add(token_terms(layer, x_TD[block], routed_TD[block]))
    tally.end_batch()
    wanted = {experts: 0.0 for experts in sets}
    losses = tally.losses().tolist()
    for experts, loss in zip(
        itertools.combinations(range(layer.num_experts), size), losses, strict=True
    ):
        if experts in wanted:
            wanted[experts] = loss
    return [wanted[experts] for experts in sets]


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _states(view: MoEView, num_tokens: int) -> Tensor:
    states: Tensor = view.model.get_submodule("states")(torch.arange(num_tokens))
    return states


def _random_layer(
    *, num_experts: int, width: int, expert_width: int, top_k: int, dtype: torch.dtype, seed: int
) -> MoEView:
    """Return a model of one MoE layer; token i reads the i-th of 4096 random states."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = _OneLayer(num_experts, width, expert_width, top_k)
        finally:
            torch.set_default_dtype(before)
    return view_moe(model.eval().requires_grad_(False))


class _Expert(nn.Module):
    """A gated expert."""

    def __init__(self, width: int, expert_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, expert_width, bias=False)
        self.up_proj = nn.Linear(width, expert_width, bias=False)
        self.down_proj = nn.Linear(expert_width, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.down_proj(self.act_fn(self.gate_proj(x_TD)) * self.up_proj(x_TD))
        return y_TD


class _Block(nn.Module):
    """Routed experts whose weights are the softmax over all logits, as Qwen1.5-MoE's."""

    norm_topk_prob = False

    def __init__(self, num_experts: int, width: int, expert_width: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(_Expert(width, expert_width) for _ in range(num_experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class _OneLayer(nn.Module):
    """States by token id, and one block that reads them."""

    def __init__(self, num_experts: int, width: int, expert_width: int, top_k: int) -> None:
        super().__init__()
        self.states = nn.Embedding(4096, width)
        self.layers = nn.ModuleList([_Block(num_experts, width, expert_width, top_k)])

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        output: Tensor = self.layers[0](self.states(input_ids))
        return output
