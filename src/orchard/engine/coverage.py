"""Which experts a round moved, and which nobody has moved for long: seen from names alone."""

from __future__ import annotations

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
        self._sent: list[set[tuple[str, int]]] = []
        self._metrics: list[Mapping[str, float]] = []

    def add(self, update: Update) -> None:
        """Note which experts an update has, and the client's metrics."""
        self._sent.append({e for e in map(expert_of, update.delta) if e is not None})
        self._metrics.append(update.metrics)

    def summary(self) -> dict[str, Any]:
        """Return the round's numbers; empty where no expert is in the global tree.

        By layer and over all: ``experts/pass_rate`` (mean over clients of the share of experts
        that they sent), ``experts/moved_share`` (share that anyone sent), ``experts/frozen`` (how
        many nobody sent for ``FROZEN_ROUNDS`` rounds, this one among them) and
        ``experts/active_share`` (mean over clients of the share that a step trained); and
        ``experts/alpha_sum``, what HFedMoE's router weights sum to before they are normalized
        (Eq. 20). ``rounds_since_sent`` is for the next round.
        """
        if not self._num_experts or not self._sent:
            return {}
        everyone = set().union(*self._sent)
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
            in_layer = [sum(own == layer for own, _ in sent) for sent in self._sent]
            numbers[f"experts/pass_rate_{layer}"] = fmean(in_layer) / number
            numbers[f"experts/moved_share_{layer}"] = sum(s == 0 for s in since[layer]) / number
            numbers[f"experts/frozen_{layer}"] = sum(s >= FROZEN_ROUNDS for s in since[layer])
            self._add_mean(numbers, f"active_share_{layer}")
        numbers["experts/pass_rate"] = fmean(len(sent) for sent in self._sent) / total
        numbers["experts/moved_share"] = len(everyone) / total
        numbers["experts/frozen"] = sum(numbers[f"experts/frozen_{layer}"] for layer in since)
        self._add_mean(numbers, "active_share")
        preferences = [m["client/preference"] for m in self._metrics if "client/preference" in m]
        if preferences:
            numbers["experts/alpha_sum"] = sum(preferences) / max(len(everyone), 1)
        return {**numbers, "rounds_since_sent": since}

    def _add_mean(self, numbers: dict[str, Any], name: str) -> None:
        own = [m[f"client/{name}"] for m in self._metrics if f"client/{name}" in m]
        if own:
            numbers[f"experts/{name}"] = fmean(own)


def _order(layer: str) -> tuple[str, int]:
    stack, _, number = layer.rpartition(".")
    return stack, int(number) if number.isdigit() else 0
