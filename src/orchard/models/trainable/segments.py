"""Products over stretches of rows of different lengths, several stretches at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Below so many padded values, all segments are one product: more calls would take longer.
_FEW_VALUES = 1 << 20


@dataclass(frozen=True)
class Segments:
    """Segments of about one length, and where their rows stand when padded.

    Attributes:
        index_S: Which segments, (S,).
        rows_P: The rows that are theirs.
        places_P: The place of each of these among S * L.
        length: L, rows of the longest segment.
    """

    index_S: Tensor
    rows_P: Tensor
    places_P: Tensor
    length: int

    def pad(self, x_NM: Tensor) -> Tensor:
        """Return rows by segments, (S, L, M) in float32, zeros behind the last of each."""
        num_segments, width = len(self.index_S), x_NM.shape[1]
        padded = torch.zeros(num_segments * self.length, width, device=x_NM.device)
        padded[self.places_P] = x_NM[self.rows_P].float()
        return padded.view(num_segments, self.length, width)


def group_segments(segment_N: Tensor, num_segments: int, *, width: int) -> Iterator[Segments]:
    """Yield the segments that have rows, in groups of about one length.

    Args:
        segment_N: The segment of each row, in any order.
        num_segments: How many there may be.
        width: Values of a row. Where padding all segments alike takes few values, they are one
            group; else the longest of a group has less than twice the rows of the shortest.
    """
    if not len(segment_N):
        return
    counts = torch.bincount(segment_N, minlength=num_segments)
    order_N = torch.argsort(segment_N, stable=True)
    sorted_N = segment_N[order_N]
    starts = counts.cumsum(0) - counts
    within_N = torch.arange(len(segment_N), device=segment_N.device) - starts[sorted_N]
    present_S = torch.nonzero(counts)[:, 0]
    longest = int(counts.max())
    if len(present_S) * longest * width <= _FEW_VALUES:
        numbers = torch.zeros_like(counts)
        numbers[present_S] = torch.arange(len(present_S), device=counts.device)
        yield Segments(present_S, order_N, numbers[sorted_N] * longest + within_N, longest)
        return
    kinds = counts.clamp(min=1).double().log2().floor().long()
    for kind in sorted(set(kinds[present_S].tolist())):
        index_S = present_S[kinds[present_S] == kind]
        length = int(counts[index_S].max())
        numbers = torch.zeros_like(counts)
        numbers[index_S] = torch.arange(len(index_S), device=counts.device)
        is_own_N = kinds[sorted_N] == kind
        places_P = numbers[sorted_N[is_own_N]] * length + within_N[is_own_N]
        yield Segments(index_S, order_N[is_own_N], places_P, length)
