"""A client: private data, a shared model, a store of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from orchard.client.store import ClientStore
from orchard.client.training import TrainingSettings
from orchard.data.encoded import Encoded
from orchard.evaluation.quality import EvaluationSettings, TestExample
from orchard.experts.submodel_source import SubmodelSource
from orchard.models.trainable.adapters import AdaptedModel
from orchard.seeding import Seeds


@dataclass(frozen=True)
class Client:
    """One party of the federation.

    Attributes:
        client_id: Its name.
        model: The base with adapters, which simulated clients share one after another.
        train: Its training examples.
        categories: The category of each training example, "" where unknown.
        test: Its held-out examples, which never train.
        retention: Examples of what the base knew before, the same for all clients; often empty.
        calibration_corpus: Examples to choose experts by where a recipe gives a corpus.
        store: Where its personal tensors live.
        training: How it trains.
        evaluation: How it evaluates.
        seeds: The run's randomness.
        budget_experts: How many experts it can afford to train, over all MoE layers; None = all.
        submodels: Where it opens models that hold some experts; None = it has no checkpoint.
        others: Held-out examples of the other clients, which its models are measured on too.
    """

    client_id: str
    model: AdaptedModel
    train: Sequence[Encoded]
    categories: Sequence[str]
    test: Sequence[TestExample]
    retention: Sequence[TestExample]
    calibration_corpus: Sequence[Encoded]
    store: ClientStore
    training: TrainingSettings
    evaluation: EvaluationSettings
    seeds: Seeds
    budget_experts: int | None = None
    submodels: SubmodelSource | None = None
    others: Sequence[TestExample] = ()

    @property
    def num_examples(self) -> int:
        """Training examples, |D_c|."""
        return len(self.train)

    def majority_examples(self) -> list[Encoded]:
        """Return the training examples of the client's most frequent category."""
        (majority, _), *_ = Counter(self.categories).most_common(1)
        return [
            example
            for example, category in zip(self.train, self.categories, strict=True)
            if category == majority
        ]
