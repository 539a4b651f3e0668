"""Tensors of a model's layers that are in the host's memory and on a device around their use.

A device has room for two layers. While one computes, the one that will be asked for next is copied
to the other place, behind what has last read there. Which is next is what came next the last time
that the same two layers followed each other: forward, back, and forward once more where activations
are computed again. A wrong guess costs a copy and changes no result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

_ALIGNED_BYTES = 256
"""Tensors begin at multiples of this in a place: what allocators of devices do."""
NUM_PLACES = 2
"""Layers on the device at a time."""


class Carrier(Protocol):
    """Copies from the host to a device, beside what computes there."""

    def hold(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory of the host, without values, from which copies are made."""
        ...

    def reserve(self, num_bytes: int) -> Tensor:
        """Return so many bytes of the device."""
        ...

    def mark(self) -> Any:
        """Return the point that what was asked to compute ends at."""
        ...

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], *, after: Any) -> Any:
        """Begin to copy, for each pair from the first to the second.

        Args:
            pairs: Tensors of the host and their places on the device.
            after: A mark: of what has to be computed before places are written.

        Returns:
            What ``wait`` takes.
        """
        ...

    def wait(self, copied: Any) -> None:
        """Let what computes from now on begin when a copy is there."""
        ...


class CudaCarrier:
    """Copies on a stream of their own, from memory that the system may not move.

    From memory that is not pinned, such as a mapped file, the host waits for each copy, and the
    device computes meanwhile what it was asked to before.
    """

    def __init__(self, device: str) -> None:
        """Make a stream on a device."""
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def hold(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return pinned memory."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def reserve(self, num_bytes: int) -> Tensor:
        """Return so many bytes of the device."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def mark(self) -> Any:
        """Return an event of the stream that computes."""
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], *, after: Any) -> Any:
        """Begin to copy on the second stream, once it has seen an event."""
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, copied: Any) -> None:
        """Let the stream that computes wait for an event; the host does not."""
        torch.cuda.current_stream(self._device).wait_event(copied)


def check_carried_to(device: str) -> None:
    """Check that layers can be brought to a device.

    Raises:
        ValueError: It is no GPU.
    """
    if torch.device(device).type != "cuda":
        raise ValueError(
            f"model.device must be a GPU with model.placement = offload, got {device}; "
            "set model.placement to mapped"
        )


def carrier_of(device: str) -> Carrier:
    """Return what copies to a device.

    Raises:
        ValueError: It is no GPU.
    """
    check_carried_to(device)
    return CudaCarrier(device)


def place_bytes(layer: Mapping[str, Tensor]) -> int:
    """Return what a layer's tensors take of a device."""
    return sum(_padded(tensor.nbytes) for tensor in layer.values())


class LayersInTurn:
    """Layers of which two are on a device at a time."""

    def __init__(self, layers: Sequence[Mapping[str, Tensor]], carrier: Carrier) -> None:
        """Reserve two places on the device.

        Args:
            layers: The tensors of each layer in the host's memory, by name, contiguous.
            carrier: What copies them.
        """
        self._layers, self._carrier = layers, carrier
        size = max(map(place_bytes, layers))
        memory = [carrier.reserve(size) for _ in range(NUM_PLACES)]
        self._views = [[_laid_out(layer, own) for layer in layers] for own in memory]
        self._held: list[int | None] = [None] * NUM_PLACES
        self._copies: list[Any] = [None] * NUM_PLACES
        self._path: tuple[int | None, int | None] = (None, None)
        self._next: dict[tuple[int | None, int | None], int] = {}

    @contextmanager
    def opened(self, layer: int) -> Iterator[Mapping[str, Tensor]]:
        """Have a layer on the device while the context lasts; then begin to bring the next.

        What is read after the context has to be read before another layer is opened.

        Yields:
            Its tensors on the device, by name.
        """
        reached = self._carrier.mark()
        self._step(layer)
        if layer not in self._held:
            # In the other place is the layer before, which comes first on the way back.
            self._bring(layer, self._other(self._path[0]), after=reached)
        place = self._held.index(layer)
        self._carrier.wait(self._copies[place])
        yield self._views[place][layer]
        following = self._guess()
        if following not in self._held:
            self._bring(following, self._other(layer), after=reached)

    def _bring(self, layer: int, place: int, *, after: Any) -> None:
        targets = self._views[place][layer]
        pairs = [(source, targets[name]) for name, source in self._layers[layer].items()]
        self._copies[place] = self._carrier.copy(pairs, after=after)
        self._held[place] = layer

    def _other(self, layer: int | None) -> int:
        """Return a place where a layer is not."""
        return 1 if self._held[0] == layer else 0

    def _step(self, layer: int) -> None:
        now = self._path[1]
        if layer == now:
            return
        if now is not None:
            self._next[self._path] = layer
        self._path = (now, layer)

    def _guess(self) -> int:
        """Return the layer that is asked for after this one."""
        if self._path in self._next:
            return self._next[self._path]
        before, now = self._path
        assert now is not None
        step = -1 if before is not None and before > now else 1
        last = len(self._layers) - 1
        onward = now + step
        return onward if 0 <= onward <= last else min(max(now - step, 0), last)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES


def _laid_out(layer: Mapping[str, Tensor], memory: Tensor) -> dict[str, Tensor]:
    """Return tensors of a layer's dtypes and shapes in bytes of a device, one behind the other."""
    found, start = {}, 0
    for name, tensor in layer.items():
        own = memory[start : start + tensor.nbytes]
        found[name] = own.view(tensor.dtype).view(tensor.shape)
        start += _padded(tensor.nbytes)
    return found
