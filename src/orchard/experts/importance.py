"""How much each expert matters to a client, read from its router alone.

HFedMoE: Resource-aware Heterogeneous Federated Learning with Mixture-of-Experts. For every MoE
layer, from the routing probabilities of a batch:

1. cumulative: an expert's mean probability, high for what all tokens use;
2. specific: its largest probability, high for what few tokens need badly;
3. importance: the two, weighted;
4. divergence: how much the probability of an expert tells about the token, in nats;
5. information: importance minus a little of the divergence. By this the experts are ranked.

Labels, gradients and outputs of experts are not used. Scores of all layers are on one scale, as
in the paper, without normalizing a layer.

Over a round, ``UsageMeter`` and ``MeanImportance`` keep what the aggregation needs of a client:
how much each expert was used, and how much it mattered on average.

Source: HFedMoE (Fang et al., 2026, arXiv:2601.00583), Eqs. 3-5, 10-14 and 16. The paper leaves
open whether its x_i is a token or a sample, and whether G is masked to the chosen experts: both
are settings here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = ("token", "sample")
SOFTMAXES = ("full", "top_k")
RANKS = ("information", "importance", "cumulative", "specific")
USAGE_MODES = ("softmax_mean", "hit_rate", "relative")

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class ImportanceSettings:
    """How probabilities become scores; the defaults are the paper's.

    Attributes:
        cumulative_weight: Weight in [0, 1] of the mean against the maximum; the paper's lambda.
        beta: Weight of the divergence, at least 0.
        level: What the mean and the maximum go over: every ``token``, or every ``sample``, which
            then stands for the mean of its tokens.
        softmax: ``full`` takes probabilities as they are; under ``top_k`` those outside a token's
            choices count 0, and the others are not normalized again.
    """

    cumulative_weight: float = 0.9
    beta: float = 0.1
    level: str = "token"
    softmax: str = "full"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is out of its range.
        """
        if not 0 <= self.cumulative_weight <= 1:
            raise ValueError(f"cumulative_weight must be in [0, 1], got {self.cumulative_weight}")
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta must be a finite number of at least 0, got {self.beta}")
        _check_choice("level", self.level, LEVELS)
        _check_choice("softmax", self.softmax, SOFTMAXES)


@dataclass(frozen=True)
class LayerImportance:
    """Scores of the E experts of one layer in one batch, each (E,) in float32."""

    cumulative_E: Tensor
    """Mean probability (Eq. 3)."""
    specific_E: Tensor
    """Largest probability (Eq. 4)."""
    combined_E: Tensor
    """Both, weighted by ``cumulative_weight`` (Eq. 5): the paper's s."""
    divergence_E: Tensor
    """Divergence of p(z|x) from its mean, in nats, at least 0 (Eqs. 10-11). Over the experts of a
    layer under the full softmax it sums to the mutual information of expert and token."""
    information_E: Tensor
    """``combined_E - beta * divergence_E`` (Eq. 14): the paper's I."""

    def ranked_by(self, kind: str) -> Tensor:
        """Return the scores (E,) that a selection ranks by.

        Args:
            kind: ``information``, ``importance`` (``combined_E``), ``cumulative`` or ``specific``.

        Raises:
            ValueError: There is no such kind.
        """
        _check_choice("rank", kind, RANKS)
        return {
            "information": self.information_E,
            "importance": self.combined_E,
            "cumulative": self.cumulative_E,
            "specific": self.specific_E,
        }[kind]


@torch.no_grad()
def layer_importance(
    probabilities_TE: Tensor,
    settings: ImportanceSettings,
    *,
    choices_TK: Tensor | None = None,
    sample_T: Tensor | None = None,
) -> LayerImportance:
    """Score the experts of one layer on one batch.

    The divergence is taken as mean(p log p) - m log m with m the mean of p, which needs one
    logarithm per probability and no second pass; 0 log 0 counts 0. Means are float64, so that the
    difference is right to float32 and the order of the tokens does not show.

    Args:
        probabilities_TE: Softmax of the router over the experts, for the batch's tokens without
            padding; (T, E), T at least 1.
        settings: See ``ImportanceSettings``.
        choices_TK: Each token's experts, int64; E stands for none. Needed for ``top_k``.
        sample_T: Which sample a token belongs to, int64; needed for level ``sample``. The numbers
            need not follow each other.

    Raises:
        ValueError: There is no token, a shape does not fit, or what a setting needs is missing.

    Source: HFedMoE (Fang et al., 2026, arXiv:2601.00583), Eqs. 3-5, 10-11 and 14.
    """
    _check_shapes(probabilities_TE, choices_TK=choices_TK, sample_T=sample_T)
    rows = probabilities_TE.float()
    if settings.softmax == "top_k":
        if choices_TK is None:
            raise ValueError("choices_TK must be given for softmax = top_k, got None")
        rows = rows.where(_is_chosen_TE(choices_TK, rows.shape[1]), 0.0)
    if settings.level == "sample":
        if sample_T is None:
            raise ValueError("sample_T must be given for level = sample, got None")
        rows = _mean_by_sample_BE(rows, sample_T)
    mean_E = rows.mean(dim=0, dtype=torch.float64)
    # Several times faster than xlogy on a CPU, and 0 where a probability is 0.
    mean_log_E = rows.clamp_min(_TINY).log_().mul_(rows).mean(dim=0, dtype=torch.float64)
    # By Jensen's inequality only rounding can make the difference negative.
    divergence_E = (mean_log_E - torch.xlogy(mean_E, mean_E)).clamp_min(0.0)
    specific_E = rows.amax(dim=0)
    weight = settings.cumulative_weight
    combined_E = weight * mean_E + (1 - weight) * specific_E
    return LayerImportance(
        cumulative_E=mean_E.float(),
        specific_E=specific_E,
        combined_E=combined_E.float(),
        divergence_E=divergence_E.float(),
        information_E=(combined_E - settings.beta * divergence_E).float(),
    )


class MeanImportance:
    """The mean of importance over the batches of a client's round; every batch counts the same.

    Source: HFedMoE (Fang et al., 2026, arXiv:2601.00583), the s of Eq. 19. It is defined per batch
    only; a client's is taken to be this mean.
    """

    def __init__(self) -> None:
        """Start with no batch."""
        self._sums: list[Tensor] = []
        self._num_batches = 0

    def add(self, layers: Sequence[LayerImportance]) -> None:
        """Add one batch: the scores of every MoE layer, in the order of the layers.

        Raises:
            ValueError: The number of layers differs from that of an earlier batch.
        """
        combined = [layer.combined_E.double() for layer in layers]
        if self._num_batches == 0:
            self._sums = combined
        elif len(combined) != len(self._sums):
            raise ValueError(
                f"importance must cover {len(self._sums)} MoE layers as in earlier batches, got "
                f"{len(combined)}; add all layers of a batch at once"
            )
        else:
            self._sums = [s + c for s, c in zip(self._sums, combined, strict=True)]
        self._num_batches += 1

    def mean(self) -> tuple[Tensor, ...]:
        """Return the mean of ``combined_E`` per layer, (E,) in float32.

        Raises:
            ValueError: There was no batch.
        """
        if self._num_batches == 0:
            raise ValueError("importance must be of at least one batch, got none; add a batch")
        return tuple((total / self._num_batches).float() for total in self._sums)


@dataclass
class _Seen:
    """Sums of one layer; float64 and int64, where the probabilities are."""

    num_experts: int
    num_tokens: int = 0
    num_samples: int = 0
    probability_sum_E: Tensor | None = None
    num_hits_E: Tensor | None = None


class UsageMeter:
    """How much a client used every expert, over the batches of a round.

    Source: HFedMoE (Fang et al., 2026, arXiv:2601.00583), Eq. 16. The paper calls usage normalized
    without saying how, so there are alternatives to the literal mean.
    """

    def __init__(self, num_experts: Sequence[int]) -> None:
        """Start empty.

        Args:
            num_experts: E of each MoE layer.
        """
        self._layers = tuple(_Seen(number) for number in num_experts)

    @torch.no_grad()
    def add(
        self,
        layer_index: int,
        probabilities_TE: Tensor,
        *,
        choices_TK: Tensor,
        sample_T: Tensor,
    ) -> None:
        """Add one layer's routing of one batch.

        Args:
            layer_index: Of the layer.
            probabilities_TE: Softmax of the router, for the tokens without padding; (T, E).
            choices_TK: Each token's experts, int64; E stands for none.
            sample_T: Which sample of this batch a token belongs to, int64. The same number in
                another batch is another sample.

        Raises:
            ValueError: There is no token, or a shape does not fit.
        """
        layer = self._layers[layer_index]
        _check_shapes(probabilities_TE, choices_TK=choices_TK, sample_T=sample_T)
        num_tokens, num_experts = probabilities_TE.shape
        if num_experts != layer.num_experts:
            raise ValueError(
                f"probabilities_TE of MoE layer {layer_index} must have {layer.num_experts} "
                f"columns, got {num_experts}; give each layer its own"
            )
        index_T, num_tokens_B = _number_samples(sample_T)
        num_samples = len(num_tokens_B)
        is_hit = torch.zeros(
            num_samples, num_experts + 1, dtype=torch.bool, device=choices_TK.device
        )
        is_hit[index_T.unsqueeze(1), choices_TK] = True
        sum_E = probabilities_TE.sum(dim=0, dtype=torch.float64)
        hits_E = is_hit[:, :num_experts].sum(dim=0)
        if layer.probability_sum_E is not None and layer.num_hits_E is not None:
            sum_E = layer.probability_sum_E + sum_E
            hits_E = layer.num_hits_E + hits_E
        layer.probability_sum_E, layer.num_hits_E = sum_E, hits_E
        layer.num_tokens += num_tokens
        layer.num_samples += num_samples

    def usage(self, mode: str) -> tuple[Tensor, ...]:
        """Return the usage of every expert, (E,) in float32 per layer.

        Args:
            mode: ``softmax_mean`` is the mean probability over all tokens (Eq. 16 as printed), 1
                in sum over a layer. ``hit_rate`` is the share of samples in which at least one
                token chose the expert. ``relative`` is ``softmax_mean`` over its maximum in the
                layer.

        Raises:
            ValueError: There is no such mode, or a layer has seen nothing.
        """
        _check_choice("usage", mode, USAGE_MODES)
        return tuple(self._usage_E(index, mode) for index in range(len(self._layers)))

    def _usage_E(self, layer_index: int, mode: str) -> Tensor:
        layer = self._layers[layer_index]
        if layer.probability_sum_E is None or layer.num_hits_E is None:
            raise ValueError(
                f"usage of MoE layer {layer_index} must be of at least one batch, got none; "
                "add a batch"
            )
        if mode == "hit_rate":
            return (layer.num_hits_E.double() / layer.num_samples).float()
        mean_E = layer.probability_sum_E / layer.num_tokens
        return (mean_E / mean_E.max() if mode == "relative" else mean_E).float()


def _mean_by_sample_BE(rows_TE: Tensor, sample_T: Tensor) -> Tensor:
    index_T, num_tokens_B = _number_samples(sample_T)
    shape = (len(num_tokens_B), rows_TE.shape[1])
    sums_BE = torch.zeros(shape, dtype=torch.float64, device=rows_TE.device)
    sums_BE.index_add_(0, index_T, rows_TE.double())
    return (sums_BE / num_tokens_B.unsqueeze(1)).float()


def _number_samples(sample_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return samples as 0, 1, 2, ..., and how many tokens each has."""
    _, index_T, num_tokens_B = torch.unique(sample_T, return_inverse=True, return_counts=True)
    return index_T, num_tokens_B


def _is_chosen_TE(choices_TK: Tensor, num_experts: int) -> Tensor:
    shape = (choices_TK.shape[0], num_experts + 1)  # the last column is "none"
    is_chosen = torch.zeros(shape, dtype=torch.bool, device=choices_TK.device)
    return is_chosen.scatter_(1, choices_TK, True)[:, :num_experts]


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value}")


def _check_shapes(
    probabilities_TE: Tensor, *, choices_TK: Tensor | None, sample_T: Tensor | None
) -> None:
    if probabilities_TE.ndim != 2 or 0 in probabilities_TE.shape:
        raise ValueError(
            f"probabilities_TE must have at least one token and one expert, got shape "
            f"{tuple(probabilities_TE.shape)}; leave out batches of padding alone"
        )
    num_tokens = probabilities_TE.shape[0]
    if choices_TK is not None and (choices_TK.ndim != 2 or choices_TK.shape[0] != num_tokens):
        raise ValueError(
            f"choices_TK must have one row for each of the {num_tokens} tokens, got shape "
            f"{tuple(choices_TK.shape)}; take padding out of both"
        )
    if sample_T is not None and sample_T.shape != (num_tokens,):
        raise ValueError(
            f"sample_T must have one number for each of the {num_tokens} tokens, got shape "
            f"{tuple(sample_T.shape)}; take padding out of both"
        )
