"""Only the largest values of each tensor, and where they stand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from orchard.communication.stages import Size
from orchard.trees import Tree

_SHAPES, _POSITIONS = "#shapes", "#positions"
_SMALLEST_SHARE = 1e-4
_MOST_DIMENSIONS = 8  # of a tensor; none that is trained has more than four


@dataclass(frozen=True)
class TopK:
    """Send the values of largest magnitude of each floating tensor, receive zeros for the others.

    Of n values the first ``ceil(share * n)`` by magnitude are sent, of equal ones those that stand
    first. They arrive exactly. A value that is not sent has an error of its own size, which is at
    most that of any that is sent; so the squared error of a tensor is at most ``1 - share`` of its
    squared norm.

    On the wire: each tensor's values, one after another, under its name; the shapes of all tensors
    and the positions of all values, in the order of sorted names, as two tensors. Positions are a
    bit for each value or integers of 1, 2, 4 or 8 bytes, whichever is shorter.

    Attributes:
        share: Of the values, in [0.0001, 1]: what a tensor takes once it is read is bounded by
            what was sent over this.
        shapes: What the receiver expects, by name; None = anything within that bound. Nothing is
            taken for a tensor of another shape.
    """

    share: float
    shapes: Mapping[str, tuple[int, ...]] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check the share.

        Raises:
            ValueError: It is out of range.
        """
        if not _SMALLEST_SHARE <= self.share <= 1:
            raise ValueError(
                f"communication.top_k must be 0 or in {_SMALLEST_SHARE}..1, got {self.share}; "
                "send at least one value of ten thousand"
            )

    def expecting(self, shapes: Mapping[str, tuple[int, ...]]) -> TopK:
        """Return a stage that decodes tensors of these shapes alone."""
        return replace(self, shapes=shapes)

    def count(self, num_values: int) -> int:
        """Return how many of so many values are sent."""
        # A product such as 0.1 * 30 is a little above 3.
        least = math.ceil((self.share - 1e-9) * num_values)
        return min(num_values, max(1, least))

    def encode(self, tree: Tree) -> Tree:
        """Keep the largest."""
        sent, shapes, positions = {}, [], []
        for name in sorted(tree):
            tensor = tree[name]
            if not tensor.is_floating_point():
                sent[name] = tensor
                continue
            flat = tensor.detach().cpu().float().reshape(-1).numpy()
            is_kept = _largest(flat, self.count(flat.size))
            sent[name] = torch.from_numpy(flat[is_kept])
            shapes += [tensor.ndim, *tensor.shape]
            positions.append(_write_positions(is_kept))
        if not positions:
            return sent
        found = torch.from_numpy(np.concatenate(positions))
        return {**sent, _SHAPES: torch.tensor(shapes, dtype=torch.int64), _POSITIONS: found}

    def decode(self, tree: Tree) -> Tree:
        """Put values where they stood, among zeros.

        Raises:
            ValueError: Shapes, positions and values do not belong together.
        """
        beside = (_SHAPES, _POSITIONS)
        names = [n for n in sorted(tree) if tree[n].is_floating_point() and n not in beside]
        received = {n: t for n, t in tree.items() if n not in (*names, *beside)}
        shapes = _read_shapes(tree.get(_SHAPES), len(names))
        blob = tree.get(_POSITIONS, torch.zeros(0, dtype=torch.uint8))
        if blob.dtype != torch.uint8 or blob.ndim != 1:
            raise ValueError(f"positions must be a row of bytes, got {blob.dtype}; {_RESEND}")
        unread = blob.numpy()
        for name, shape in zip(names, shapes, strict=True):
            values, num_values = tree[name], math.prod(shape)
            if self.shapes is not None and self.shapes.get(name) != shape:
                raise ValueError(
                    f"shape of {name} must be {self.shapes.get(name)}, got {shape}; {_RESEND}"
                )
            # The number that is sent bounds the shape that a message can claim.
            if values.shape != (self.count(num_values),):
                raise ValueError(
                    f"{name} must have {self.count(num_values)} of the values of its shape "
                    f"{shape}, got {tuple(values.shape)}; {_RESEND}"
                )
            length, width = _position_bytes(values.numel(), num_values)
            kept = _read_positions(unread[:length], values.numel(), num_values, width=width)
            if kept is None:
                raise ValueError(
                    f"positions of {name} must be {values.numel()} ascending numbers below "
                    f"{num_values}, got others; {_RESEND}"
                )
            unread = unread[length:]
            dense = torch.zeros(num_values, dtype=torch.float32)
            dense[kept] = values.float()
            received[name] = dense.view(shape)
        if len(unread):
            raise ValueError(f"positions must end with the last, got {len(unread)} more; {_RESEND}")
        return received

    def size(self, size: Size) -> Size:
        """Fewer values, and beside them positions and a shape of two dimensions."""
        kept = self.count(size.values)
        length, _ = _position_bytes(kept, size.values)
        return replace(size, values=kept, beside=size.beside + length + 3 * 8)


_RESEND = "check that both sides run the same recipe"


def _largest(flat: np.ndarray, number: int) -> np.ndarray:
    """Mark so many values of largest magnitude."""
    if number == flat.size:
        return np.ones(number, dtype=bool)
    magnitudes = np.abs(flat)
    smallest = np.partition(magnitudes, -number)[-number]
    is_kept: np.ndarray = magnitudes > smallest
    ties = np.flatnonzero(magnitudes == smallest)
    is_kept[ties[: number - np.count_nonzero(is_kept)]] = True
    return is_kept


def _position_bytes(kept: int, num_values: int) -> tuple[int, int]:
    """Return the bytes of the positions, and of one of them; 0 for a bit for each value."""
    width = next(w for w in (1, 2, 4, 8) if num_values <= 2 ** (8 * w))
    bits = -(-num_values // 8)
    return (bits, 0) if bits <= kept * width else (kept * width, width)


def _write_positions(is_kept: np.ndarray) -> np.ndarray:
    _, width = _position_bytes(int(np.count_nonzero(is_kept)), is_kept.size)
    if width:
        return np.flatnonzero(is_kept).astype(f"<u{width}").view(np.uint8)
    return np.packbits(is_kept, bitorder="little")


def _read_positions(blob: np.ndarray, kept: int, num_values: int, *, width: int) -> Tensor | None:
    """Return positions as they were written, None where ``_write_positions`` writes no such."""
    if width:
        if len(blob) != kept * width:
            return None
        found = np.ascontiguousarray(blob).view(f"<u{width}").astype(np.int64)
        in_order = bool((np.diff(found) > 0).all()) and bool((found >= 0).all())
        if not in_order or (kept and int(found[-1]) >= num_values):
            return None
        return torch.from_numpy(found)
    if len(blob) != -(-num_values // 8):
        return None
    bits = np.unpackbits(blob, bitorder="little")
    found = bits.nonzero()[0]
    if len(found) != kept or (kept and int(found[-1]) >= num_values):
        return None
    return torch.from_numpy(found)


def _read_shapes(tensor: Tensor | None, number: int) -> list[tuple[int, ...]]:
    """Return so many shapes, written as their number of dimensions and these."""
    found = [] if tensor is None else tensor.reshape(-1).tolist()
    shapes: list[tuple[int, ...]] = []
    start = 0
    while start < len(found):
        ndim = found[start]
        if not isinstance(ndim, int) or not 0 <= ndim <= _MOST_DIMENSIONS:
            break
        shapes.append(tuple(found[start + 1 : start + 1 + ndim]))
        start += 1 + ndim
    has_all = start == len(found) and len(shapes) == number
    if not has_all or any(size < 0 for shape in shapes for size in shape):
        raise ValueError(
            f"message must have a shape for each of its {number} tensors, got others; {_RESEND}"
        )
    return shapes
