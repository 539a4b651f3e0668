"""What stands in for a GPU: copies that are late, and places that are spoiled before they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class LateCarrier:
    """Copies nothing before it is waited for, and says what it was asked for.

    A place is filled with ones as soon as a copy to it begins, so that whoever still reads what was
    there, or reads what is not yet there, gets NaN.

    Attributes:
        copies: Which copies were begun, by the source of their first tensor.
        waits: Which were waited for, in order.
        reserved: Bytes of each place.
    """

    def __init__(self) -> None:
        self.copies: list[int] = []
        self.waits: list[int] = []
        self.reserved: list[int] = []
        self._open: dict[int, Sequence[tuple[Tensor, Tensor]]] = {}
        self._marks = 0

    def hold(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def reserve(self, num_bytes: int) -> Tensor:
        self.reserved.append(num_bytes)
        return torch.full((num_bytes,), 255, dtype=torch.uint8)

    def mark(self) -> int:
        self._marks += 1
        return self._marks

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], *, after: Any) -> int:
        assert after == self._marks  # behind all that was computed before this layer
        for _, target in pairs:
            target.view(torch.uint8).fill_(255)
        number = len(self.copies)
        self.copies.append(pairs[0][0].data_ptr())
        self._open[number] = pairs
        return number

    def wait(self, copied: int) -> None:
        self.waits.append(copied)
        for source, target in self._open.pop(copied, ()):
            target.copy_(source)
