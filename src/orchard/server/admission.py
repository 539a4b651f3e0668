"""Which updates are let in: checked against what was asked, before anything is allocated.

Whoever sends an update may be broken or hostile. An update that fails a check is refused whole,
with a reason, and the round goes on as if its client had not answered.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from orchard.communication.messages import Update
from orchard.trees import Tree

_MAX_METRICS = 10_000
_METRIC = re.compile(r"(client|local)/[\w.,-]{1,200}")


class RefusedUpdate(ValueError):
    """An update that must not be aggregated; its message says why."""


@dataclass(frozen=True)
class Admission:
    """What an update may be.

    Attributes:
        max_update_norm: Largest L2 norm of a whole update; 0 = any finite one.
        max_weight: Largest weight of a name.
    """

    max_update_norm: float = 0.0
    max_weight: float = 1e12

    def max_bytes(self, shared: Tree) -> int:
        """Return how long a message may be: the tree in float32, and a header of its names."""
        values = sum(4 * tensor.numel() for tensor in shared.values())
        return values + 65536 + sum(512 + 4 * len(name) for name in shared)

    def check_header(self, message: bytes, shared: Tree) -> None:
        """Check what a message claims to hold, without decoding a tensor.

        Args:
            message: As it came.
            shared: The global tree that the update must fit.

        Raises:
            RefusedUpdate: It claims something else than tensors of this tree.
        """
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
            header = json.loads(message[8 : 8 + size])
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            claimed = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RefusedUpdate("message must have a safetensors header, got none") from error
        for name, shape in claimed.items():
            if not all(isinstance(n, int) and n >= 0 for n in shape):
                raise RefusedUpdate(f"shape of {name} must be of whole numbers, got {shape}")

    def check(self, update: Update, *, client_id: str, round_number: int, shared: Tree) -> None:
        """Check a decoded update.

        Args:
            update: What was decoded.
            client_id: Who was asked.
            round_number: What for.
            shared: The global tree that the task held.

        Raises:
            RefusedUpdate: It is for another round, from another client, of other names or shapes,
                not finite, too large, or has a weight that is none.
        """
        if update.client_id != client_id:
            raise RefusedUpdate(
                f"client_id must be {client_id}, who was asked, got {update.client_id}"
            )
        if update.round_number != round_number:
            raise RefusedUpdate(f"round must be {round_number}, got {update.round_number}")
        squares = 0.0
        for name, tensor in update.delta.items():
            if name not in shared:
                raise RefusedUpdate(f"{name} must be a name of the global tree, got another")
            expected = shared[name].shape
            if tensor.shape != expected:
                raise RefusedUpdate(
                    f"shape of {name} must be {tuple(expected)}, got {tuple(tensor.shape)}"
                )
            if not tensor.is_floating_point():
                raise RefusedUpdate(f"{name} must be of floating point, got {tensor.dtype}")
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
        self._check_weights(update.weight)
        if len(update.metrics) > _MAX_METRICS:
            raise RefusedUpdate(
                f"metrics must be at most {_MAX_METRICS}, got {len(update.metrics)}"
            )
        for name, value in update.metrics.items():
            if not _METRIC.fullmatch(name):
                raise RefusedUpdate(f"metric must be client/name or local/name, got {name[:80]!r}")
            if not math.isfinite(value):
                raise RefusedUpdate(f"metric {name} must be finite, got {value}")

    def _check_weights(self, weights: Mapping[str, float]) -> None:
        for name, weight in weights.items():
            if not math.isfinite(weight) or not 0 <= weight <= self.max_weight:
                raise RefusedUpdate(
                    f"weight of {name} must be in 0..{self.max_weight:g}, got {weight}"
                )
