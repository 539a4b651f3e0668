"""What a client minimizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from orchard.trees import Tree


@dataclass(frozen=True)
class Situation:
    """What an objective may look at, for one micro-batch.

    Attributes:
        task_loss: Cross-entropy of the micro-batch's response tokens, summed and divided by the
            response tokens of the whole optimizer step, nats per token, scalar.
        share: The micro-batch's part of the optimizer step's tokens, so that a mean over tokens is
            one over the step, and a term that does not depend on data counts once; the shares of a
            step sum to 1.
        shared: Name to live parameter, of the tensors that are trained and sent.
        anchor: Name to the global value that training started from.
        memory: Name to tensor that the client keeps and the strategy's plan gave.
        broadcast: Everything that the server sent, by name.
        watched: What the strategy's plan watched of the micro-batch's forward pass, in its graph.
    """

    task_loss: torch.Tensor
    share: float
    shared: Tree
    anchor: Tree
    memory: Tree
    broadcast: Tree
    watched: Tree = field(default_factory=dict)


Objective: TypeAlias = Callable[[Situation], torch.Tensor]


def causal_lm(situation: Situation) -> torch.Tensor:
    """Return the task loss alone."""
    return situation.task_loss


def pulled(*, strength: float) -> Objective:
    """Return the task loss plus strength / 2 times the squared distance from what was sent.

    Source: Ditto (Li et al., 2021, arXiv:2012.04221), Eq. 3.
    """

    def objective(situation: Situation) -> torch.Tensor:
        distance = torch.stack(
            [
                (parameter - situation.broadcast[name].to(parameter.device)).square().sum()
                for name, parameter in situation.shared.items()
            ]
        ).sum()
        return situation.task_loss + situation.share * strength / 2 * distance

    return objective


def proximal(inner: Objective, *, mu: float) -> Objective:
    """Add mu / 2 times the squared distance from the global values to an objective.

    Only tensors that are sent have a global value; personal ones move freely.

    Source: FedProx (Li et al., 2020, arXiv:1812.06127), Eq. 2.
    """

    def objective(situation: Situation) -> torch.Tensor:
        if not situation.shared:
            return inner(situation)
        distance = torch.stack(
            [
                (parameter - situation.anchor[name]).square().sum()
                for name, parameter in situation.shared.items()
            ]
        ).sum()
        return inner(situation) + situation.share * mu / 2 * distance

    return objective
