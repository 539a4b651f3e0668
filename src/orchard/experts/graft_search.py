"""Which experts of a layer together come closest to it: an exact search, or one with a bound.

For every MoE layer, by passes of the intact model over the client's calibration tokens:

1. run every expert once on what the block reads and keep inner products, block by block of tokens
   (``subset_losses``); they give the exact loss of any set of experts;
2. where a layer has few enough sets of the wanted size, sum up the loss of each in one pass;
3. where it has more, take the eight best of the largest size that is few enough, add the experts
   that help most, one a pass, then swap one expert for another in each set as long as that helps,
   and bound from below what the best set could reach (``graft_bound``);
4. choose the smallest loss; of equals, the first in the order of combinations.

Between blocks there is one number per set: memory grows neither with tokens nor with the number of
layers whose outputs are compared, which is one at a time.

Source: the loss is that of FLEx (Liu et al., 2025, arXiv:2506.00965), section 3.4 for more than
one expert, after Expert_Sparsity (Lu et al., 2024, arXiv:2402.14800), which run every set.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from orchard.experts.graft_bound import GraftBound
from orchard.experts.reconstruction import RunExpert, read_layers
from orchard.experts.subset_losses import (
    NORM,
    Source,
    Tally,
    all_sets,
    first_smallest,
    one_more,
    token_terms,
    tokens_at_a_time,
)
from orchard.models.view.lone import read_lone
from orchard.models.view.moe import MoELayer, MoEView

MAX_SETS = 50_000  # three of 60 are 34,220, three of 64 are 41,664
BEAM = 8  # sets that are grown side by side: a pass costs much the same for one and for eight


@dataclass(frozen=True)
class SearchSettings:
    """How experts are searched for.

    Attributes:
        loss: ``norm``, the sum over batches of the Frobenius norm of what is missing, or
            ``fitted``, the Frobenius norm over all tokens after the best scaling of each set.
        max_sets: Layers with at most so many sets of a size are searched exhaustively.
    """

    loss: str = NORM
    max_sets: int = MAX_SETS


@dataclass(frozen=True)
class ExpertSet:
    """The experts that were found for one layer.

    Attributes:
        experts: In ascending order.
        loss: Their loss, at least 0, in the units of the layer's output.
        lower_bound: What no set of as many experts can do better than; ``loss`` itself where all
            were tried, 0 where nothing is known.
        second_loss: That of the best other set that was tried; None where there was none.
    """

    experts: tuple[int, ...]
    loss: float
    lower_bound: float
    second_loss: float | None = None

    @property
    def is_exact(self) -> bool:
        """Whether no set of as many experts is better."""
        return self.loss <= self.lower_bound


@dataclass(frozen=True)
class LayerSearch:
    """What was found for one layer.

    Attributes:
        output_norm: The loss of no expert at all: the norm of the layer's routed output, summed
            over batches, or with ``fitted`` over all tokens.
        sets: Number of experts to the best set found.
    """

    output_norm: float
    sets: Mapping[int, ExpertSet]


@torch.inference_mode()
def search_grafts(
    view: MoEView,
    batches: Sequence[Tensor],
    *,
    sizes: Sequence[int],
    settings: SearchSettings | None = None,
    run_expert: RunExpert | None = None,
) -> tuple[LayerSearch, ...]:
    """Search every layer for the experts that together come closest to it.

    Args:
        view: The model, without adapters in effect.
        batches: Token ids (B, S) without padding; read once for each pass. The loss ``norm`` is a
            sum of norms per batch, so equal batches are needed for equal weight.
        sizes: How many experts; for each of these the best set is returned.
        settings: How.
        run_expert: How one expert is run; None = as the model holds it. Every pass runs each once
            on every block of tokens.

    Returns:
        One entry per MoE layer, in forward order.

    Raises:
        ValueError: There is no batch, a size is not in 1..E, or a loss is not finite.
    """
    if not batches:
        raise ValueError(
            "calibration must have at least one batch, got none; "
            "give the client training data or set strategy.calibration"
        )
    chosen = settings or SearchSettings()
    searches = [
        _Search(
            index,
            layer,
            check_sizes(sizes, layer),
            chosen,
            partial(run_expert, index) if run_expert else layer.run_expert,
        )
        for index, layer in enumerate(view.layers)
    ]
    while unfinished := [search for search in searches if search.result is None]:
        read_layers(view, [(search.layer, search.count) for search in unfinished], batches)
        for search in unfinished:
            search.end_pass()
    return tuple(search.result for search in searches if search.result is not None)


def check_sizes(sizes: Sequence[int], layer: MoELayer) -> tuple[int, ...]:
    """Return the sizes in ascending order.

    Raises:
        ValueError: The layer has fewer experts than one of them, or one is below 1.
    """
    for size in sizes:
        if not 1 <= size <= layer.num_experts:
            raise ValueError(
                f"strategy.graft_experts must be in 1..{layer.num_experts}, got {size}; "
                f"{layer.name} has {layer.num_experts} routed experts"
            )
    return tuple(sorted(set(sizes)))


_Found: TypeAlias = tuple[float, tuple[int, ...]]
"""A loss and the set that has it."""
_Count: TypeAlias = Tally | GraftBound
_Steps: TypeAlias = Generator[list[_Count], None, dict[int, ExpertSet]]
"""Asks for something to be counted in a pass, is resumed after it, and returns what it found."""


@dataclass
class _Search:
    """Searches one layer; each pass over the batches answers what its steps ask for."""

    index: int
    layer: MoELayer
    sizes: tuple[int, ...]
    settings: SearchSettings
    run: Callable[[int, Tensor], Tensor]
    result: LayerSearch | None = None
    output_norm: float = 0.0
    is_first_pass: bool = True
    counts: list[_Count] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lone = read_lone(self.layer)
        self.steps = self._steps()
        self.counts = next(self.steps)

    def count(self, x_TD: Tensor, routed_TD: Tensor) -> None:
        """Count one batch of what the block read and its routed experts answered."""
        step = tokens_at_a_time(self.layer, element_bytes=x_TD.element_size())
        square = 0.0
        for start in range(0, len(x_TD), step):
            block = slice(start, start + step)
            terms = token_terms(
                self.layer, x_TD[block], routed_TD[block], run=self.run, lone=self.lone
            )
            square += float(terms.output_T.sum())
            for count in self.counts:
                if isinstance(count, GraftBound):
                    count.add(terms.weight_ET, terms.gram_EET)
                else:
                    count.add(terms)
        for count in self.counts:
            count.end_batch()
        if self.is_first_pass and self.settings.loss == NORM:
            self.output_norm += math.sqrt(square)
        elif self.is_first_pass:
            self.output_norm = math.hypot(self.output_norm, math.sqrt(square))

    def end_pass(self) -> None:
        """Take the next step of the search, or end it."""
        self.is_first_pass = False
        try:
            self.counts = next(self.steps)
        except StopIteration as end:
            self.result = LayerSearch(self.output_norm, end.value)

    def _steps(self) -> _Steps:
        num_experts = self.layer.num_experts
        num_sets = {s: math.comb(num_experts, s) for s in range(1, max(self.sizes) + 1)}
        few = [s for s, number in num_sets.items() if s == 1 or number <= self.settings.max_sets]
        # A size that is few again, beyond half of the experts, is tried like any other.
        tried = {s for s in self.sizes if s in few}
        hard = [s for s in self.sizes if s not in few]
        starts = {max(s for s in few if s < size) for size in hard}
        tallies = {s: self._tally(all_sets(s), num_sets[s]) for s in sorted(tried | starts)}
        is_bounded = self.settings.loss == NORM
        bounds = {
            size: GraftBound(size=size, num_experts=num_experts) for size in hard if is_bounded
        }
        yield [*tallies.values(), *bounds.values()]

        found = {}
        beams: dict[int, list[_Found]] = {}
        for size, tally in tallies.items():
            losses_N = self._losses(tally)
            chosen = first_smallest(losses_N, rounding=tally.rounding)
            loss = float(losses_N[chosen])
            order = losses_N.sort(stable=True).indices[:BEAM].tolist()
            every = enumerate(itertools.combinations(range(num_experts), size))
            sets = {index: experts for index, experts in every if index in {chosen, *order}}
            second = next((float(losses_N[index]) for index in order if index != chosen), None)
            found[size] = ExpertSet(sets[chosen], loss, loss, second)
            beams[size] = [(float(losses_N[index]), sets[index]) for index in order]
        for size in hard:
            start = max(s for s in beams if s < size)
            beams[size] = yield from self._grow(beams[start], size)
            loss, experts = beams[size][0]
            lower_bound = bounds[size].value() if size in bounds else 0.0
            second = beams[size][1][0] if len(beams[size]) > 1 else None
            found[size] = ExpertSet(experts, loss, min(lower_bound, loss), second)
        return {size: found[size] for size in self.sizes}

    def _grow(self, beam: list[_Found], size: int) -> Generator[list[_Count], None, list[_Found]]:
        """Add the experts that help most, one a pass, then swap each set's while that helps.

        Returns:
            The sets, the best first.
        """
        while len(beam[0][1]) < size:
            ((rows, _),) = yield from self._add_one([[experts for _, experts in beam]])
            # The last of equal keys stays: a set that several bases lead to stands once.
            once = {experts: loss for row in rows for loss, experts in row}
            beam = sorted((loss, experts) for experts, loss in once.items())[:BEAM]
        done: list[_Found] = []
        seen = {experts for _, experts in beam}
        while beam:
            groups = [
                [tuple(e for e in experts if e != out) for out in experts] for _, experts in beam
            ]
            following = []
            answers = yield from self._add_one(groups)
            for (loss, experts), (rows, rounding) in zip(beam, answers, strict=True):
                swapped = min(pair for row in rows for pair in row if pair[1] != experts)
                is_better = swapped[0] ** 2 < loss**2 - rounding
                if is_better and swapped[1] not in seen:
                    following.append(swapped)
                    seen.add(swapped[1])
                elif not is_better:
                    done.append((loss, experts))
            beam = following
        return sorted(done)

    def _add_one(
        self, groups: list[list[tuple[int, ...]]]
    ) -> Generator[list[_Count], None, list[tuple[list[list[_Found]], float]]]:
        """Add every expert to every base; return, for each group and base, losses with sets."""
        num_experts = self.layer.num_experts
        bases = [base for group in groups for base in group]
        tally = self._tally(one_more(bases), len(bases) * num_experts)
        yield [tally]
        others = [[e for e in range(num_experts) if e not in base] for base in bases]
        wanted = [row * num_experts + e for row, own in enumerate(others) for e in own]
        losses = iter(self._losses(tally, wanted).tolist())
        rows = iter(
            [(next(losses), tuple(sorted((*base, expert)))) for expert in own]
            for base, own in zip(bases, others, strict=True)
        )
        return [([next(rows) for _ in group], tally.rounding) for group in groups]

    def _tally(self, source: Source, num_sets: int) -> Tally:
        return Tally(source, num_sets, loss=self.settings.loss)

    def _losses(self, tally: Tally, wanted: Sequence[int] | None = None) -> Tensor:
        losses_N = tally.losses()
        if wanted is not None:
            losses_N = losses_N[list(wanted)]
        if not bool(torch.isfinite(losses_N).all()):
            raise ValueError(
                "reconstruction losses must be finite, got NaN or infinity in MoE layer "
                f"{self.index}; check the base model and its dtype"
            )
        return losses_N
