"""Which updates are let in: checked against what was asked, before anything is allocated.

Whoever sends an update may be broken or hostile. An update that fails a check is refused whole,
with a reason, and the round goes on as if its client had not answered.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from orchard.communication import door
from orchard.communication.messages import Update
from orchard.communication.stages import RESERVED
from orchard.server.metric_names import KNOWN, KNOWN_OF_LAYERS, SHAPED, SHAPED_OF_LAYERS
from orchard.trees import Tree

MAX_METRICS = 64
"""Metrics of a client that are of no layer, and metrics of each layer of the global tree."""
_FEWEST_LAYERS = 8
"""A tree with adapters in few layers may belong to a model of more, which metrics name too."""
_MAX_WIDTH = 4  # bytes of a value
_LAYER = re.compile(r".*?\.\d+(?=\.)")
SMALLEST_WEIGHT = 1e-24
"""A weight is 0 or at least this: what is smaller is 0 in float32, and a mean over it NaN."""


class RefusedUpdate(ValueError):
    """An update that must not be aggregated; its message says why."""


@dataclass(frozen=True)
class Admission:
    """What an update may be.

    Attributes:
        max_update_norm: Largest L2 norm of a whole update; 0 = any finite one.
        max_weight: Largest weight of a name.
        has_own_metrics: Whether a method of one's own measures what nobody here knows the names of.
    """

    max_update_norm: float = 0.0
    max_weight: float = 1e12
    has_own_metrics: bool = False

    def max_bytes(self, shared: Tree) -> int:
        """Return how long a message may be: the tree in float32, and a header of its names."""
        return sum(4 * tensor.numel() for tensor in shared.values()) + _header_bytes(shared)

    def check_header(self, message: bytes, shared: Tree) -> None:
        """Check what a message claims to hold, without decoding a tensor.

        Args:
            message: As it came.
            shared: The global tree that the update must fit.

        Raises:
            RefusedUpdate: It claims something else than tensors of this tree.
        """
        if not isinstance(message, bytes | bytearray):
            raise RefusedUpdate("message must be bytes, got another type")
        if len(message) > self.max_bytes(shared):
            raise RefusedUpdate(
                f"message must have at most {self.max_bytes(shared)} bytes, got {len(message)}"
            )
        size = int.from_bytes(message[:8], "little")
        if len(message) < 8 or size > len(message) - 8:
            raise RefusedUpdate(
                f"message must be a safetensors buffer, got {len(message)} bytes that claim a "
                f"header of {size}"
            )
        try:
            layout = door.read_layout(message, max_bytes=_header_bytes(shared))
            layout.pop("__metadata__", None)
            tensors = door.read_tensors(layout)
        except door.MalformedError as error:
            raise RefusedUpdate(
                "message must have a safetensors header, of names with shapes and places in whole "
                f"numbers, got another: {error}"
            ) from error
        for name in tensors:
            if not name.startswith(RESERVED):
                _check_name(name, shared)

    def check_no_tensors(self, message: bytes) -> None:
        """Check that a message claims to hold none: what is added in secret is sent to nobody.

        Raises:
            RefusedUpdate: It claims one, or is no message.
        """
        try:
            layout = door.read_layout(message)
        except door.MalformedError as error:
            raise RefusedUpdate(f"message must have a safetensors header: {error}") from error
        if names := sorted(layout.keys() - {"__metadata__"}):
            raise RefusedUpdate(
                f"an update must hold no tensor where sums are secret, got {names[0][:80]!r}; "
                "check that both sides run the same version"
            )

    def check(
        self,
        update: Update,
        *,
        client_id: str,
        round_number: int,
        shared: Tree,
        local: Mapping[str, tuple[float, float]] | None = None,
        most: Mapping[str, float] | None = None,
    ) -> float:
        """Check a decoded update, and return its L2 norm.

        Args:
            update: What was decoded.
            client_id: Who was asked.
            round_number: What for.
            shared: The global tree that the task held.
            local: What the task asked to be measured after training, to its range; None = anything.
            most: Name to the largest weight that this client can have for it; None = ``max_weight``
                for all.

        Raises:
            RefusedUpdate: It is for another round, from another client, of other names or shapes,
                not finite, too large, has a weight that is none, or a metric that nobody asked for.
        """
        if update.client_id != client_id:
            raise RefusedUpdate(
                f"client_id must be {client_id}, who was asked, got {update.client_id}"
            )
        if update.round_number != round_number:
            raise RefusedUpdate(f"round must be {round_number}, got {update.round_number}")
        squares = 0.0
        for name, tensor in update.delta.items():
            _check_name(name, shared)
            expected = shared[name].shape
            if tensor.shape != expected:
                raise RefusedUpdate(
                    f"shape of {name} must be {tuple(expected)}, got {tuple(tensor.shape)}"
                )
            if not tensor.is_floating_point() or tensor.itemsize > _MAX_WIDTH:
                raise RefusedUpdate(
                    f"{name} must be of floating point of at most {8 * _MAX_WIDTH} bits, got "
                    f"{tensor.dtype}"
                )
            square = float(tensor.double().square().sum())
            if not math.isfinite(square):
                raise RefusedUpdate(f"{name} must be finite, got NaN or infinity in it")
            squares += square
        norm = math.sqrt(squares)
        if self.max_update_norm and norm > self.max_update_norm:
            raise RefusedUpdate(
                f"norm of the update must be at most {self.max_update_norm:g}, got {norm:g}"
            )
        if norm > torch.finfo(torch.float32).max:
            raise RefusedUpdate(f"norm of the update must fit float32, got {norm:g}")
        self._check_weights(update.weight, most)
        _check_metric_names(update.metrics, shared, is_own=self.has_own_metrics)
        _check_metrics(update.metrics, local)
        return norm

    def _check_weights(
        self, weights: Mapping[str, float], most: Mapping[str, float] | None
    ) -> None:
        for name, weight in weights.items():
            limit, why = self.max_weight, ""
            if most is not None and most.get(name, limit) < limit:
                limit, why = most[name], "; a site weighs at most the examples that it joined with"
            if not math.isfinite(weight) or not 0 <= weight <= limit:
                raise RefusedUpdate(f"weight of {name} must be in 0..{limit:g}, got {weight}{why}")
            if 0 < weight < SMALLEST_WEIGHT:
                raise RefusedUpdate(
                    f"weight of {name} must be 0 or at least {SMALLEST_WEIGHT:g}, got {weight}"
                )


def check_measured(
    values: Mapping[str, float],
    *,
    models: Collection[str],
    metrics: Mapping[str, tuple[float, float]],
) -> None:
    """Check what a client measured of models.

    Args:
        values: ``model/metric`` to value.
        models: Which models it was asked to measure.
        metrics: Which metrics, to the range that a value is in.

    Raises:
        RefusedUpdate: It is of another model, another metric, or out of range.
    """
    for key, value in values.items():
        model, _, metric = key.partition("/")
        if model not in models or metric not in metrics:
            raise RefusedUpdate(
                f"{key} must be a metric that was asked for, of a model that was, got another"
            )
        low, high = metrics[metric]
        if not low <= value <= high:  # false for NaN
            raise RefusedUpdate(f"{key} must be in {low:g}..{high:g}, got {value}")


def _header_bytes(shared: Tree) -> int:
    return 65536 + sum(512 + 4 * len(name) for name in shared)


def _check_name(name: str, shared: Tree) -> None:
    if name not in shared:
        raise RefusedUpdate(f"{name} must be a name of the global tree, got another")


def _check_metrics(
    metrics: Mapping[str, float], local: Mapping[str, tuple[float, float]] | None
) -> None:
    for name, value in metrics.items():
        low, high = -door.MAX_VALUE, door.MAX_VALUE
        if name.endswith("_seconds"):
            low, high = 0.0, door.MAX_SECONDS
        if name.startswith("local/") and local is not None:
            check_measured({name: value}, models=("local",), metrics=local)
        if not low <= value <= high:  # false for NaN
            raise RefusedUpdate(f"metric {name} must be in {low:g}..{high:g}, got {value}")


def _check_metric_names(names: Collection[str], shared: Tree, *, is_own: bool) -> None:
    """Check what metrics are called, and how many there are."""
    num_layers = len({match[0] for match in map(_LAYER.match, shared) if match})
    plain, of_layer = (SHAPED, SHAPED_OF_LAYERS) if is_own else (KNOWN, KNOWN_OF_LAYERS)
    limits = {plain: MAX_METRICS, of_layer: MAX_METRICS * max(num_layers, _FEWEST_LAYERS)}
    found = dict.fromkeys(limits, 0)
    for name in names:
        kind = next((shape for shape in limits if shape.fullmatch(name)), None)
        if kind is None:
            which = "client/name or local/name" if is_own else "one that a method here measures"
            raise RefusedUpdate(f"metric must be {which}, got {name[:80]!r}")
        found[kind] += 1
    for kind, limit in limits.items():
        if found[kind] > limit:
            of = "no layer" if kind is plain else "layers"
            raise RefusedUpdate(f"metrics of {of} must be at most {limit}, got {found[kind]}")
