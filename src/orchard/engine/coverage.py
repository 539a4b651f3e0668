"""Which experts a round moved, and which nobody has moved for long: seen from names alone."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from orchard.communication.messages import Update
from orchard.strategies.expert_names import expert_of

FROZEN_ROUNDS = 3  # from so many rounds without an update an expert is called frozen


class Coverage:
    """What the updates of one round cover of the experts in the global tree."""

    def __init__(self, shared: Iterable[str], previous: Mapping[str, Sequence[int]]) -> None:
        """Start a round.

        Args:
            shared: Names of the global tree.
            previous: Layer to how many rounds each of its experts had not been sent before, as
                ``rounds_since_sent`` of the round before; empty in the first round.
        """
        experts = {found for found in map(expert_of, shared) if found is not None}
        self._num_experts = {
            layer: 1 + max(expert for other, expert in experts if other == layer)
            for layer in dict.fromkeys(sorted((layer for layer, _ in experts), key=_order))
        }
        self._previous = previous
        self._num_updates = 0
        self._num_sent = dict.fromkeys(self._num_experts, 0)
        self._everyone: set[tuple[str, int]] = set()
        self._metrics: dict[str, array[float]] = {}

    def add(self, update: Update) -> None:
        """Note which experts an update has, and what the client measured of its experts."""
        sent = {e for e in map(expert_of, update.delta) if e is not None}
        self._num_updates += 1
        self._everyone |= sent
        for layer, _ in sent:
            self._num_sent[layer] = self._num_sent.get(layer, 0) + 1
        for name, value in update.metrics.items():
            if name.startswith(("client/active_share", "client/preference")):
                self._metrics.setdefault(name, array("d")).append(value)

    def summary(self) -> dict[str, Any]:
        """Return the round's numbers; empty where no expert is in the global tree.

        By layer and over all: ``experts/pass_rate`` (mean over clients of the share of experts
        that they sent), ``experts/moved_share`` (share that anyone sent), ``experts/frozen`` (how
        many nobody sent for ``FROZEN_ROUNDS`` rounds, this one among them) and
        ``experts/active_share`` (mean over clients of the share that a step trained); and
        ``experts/alpha_sum``, what HFedMoE's router weights sum to before they are normalized
        (Eq. 20). ``rounds_since_sent`` is for the next round.
        """
        if not self._num_experts or not self._num_updates:
            return {}
        everyone = self._everyone
        since = {
            layer: [
                0 if (layer, expert) in everyone else before + 1
                for expert, before in enumerate(self._previous.get(layer, [0] * number))
            ]
            for layer, number in self._num_experts.items()
        }
        total = sum(self._num_experts.values())
        numbers: dict[str, Any] = {}
        for layer, number in self._num_experts.items():
            of_client = self._num_sent[layer] / self._num_updates
            numbers[f"experts/pass_rate_{layer}"] = of_client / number
            numbers[f"experts/moved_share_{layer}"] = sum(s == 0 for s in since[layer]) / number
            numbers[f"experts/frozen_{layer}"] = sum(s >= FROZEN_ROUNDS for s in since[layer])
            self._add_mean(numbers, f"active_share_{layer}")
        numbers["experts/pass_rate"] = sum(self._num_sent.values()) / self._num_updates / total
        numbers["experts/moved_share"] = len(everyone) / total
        numbers["experts/frozen"] = sum(numbers[f"experts/frozen_{layer}"] for layer in since)
        self._add_mean(numbers, "active_share")
        if preferences := self._metrics.get("client/preference"):
            numbers["experts/alpha_sum"] = sum(preferences) / max(len(everyone), 1)
        return {**numbers, "rounds_since_sent": since}

    def _add_mean(self, numbers: dict[str, Any], name: str) -> None:
        if own := self._metrics.get(f"client/{name}"):
            numbers[f"experts/{name}"] = fmean(own)


def _order(layer: str) -> tuple[str, int]:
    stack, _, number = layer.rpartition(".")
    return stack, int(number) if number.isdigit() else 0
