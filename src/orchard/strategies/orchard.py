"""Orchard: FLEx with a graft that counts as far as it has moved, judged where rows are few.

Ours. In words:

1. Each client chooses an expert in every MoE layer as in FLEx and grafts a *difference* beside the
   layer (``experts/grafting.py``): a fresh one changes nothing, so its gate may start open.
2. In a round it trains the shared adapters together with its grafts and gates, sends the adapters
   and keeps the rest.
3. A client of few rows would overfit its graft. It trains and sends the adapters as in FedAvg, with
   no graft in the model, and apart from that its graft, on a part of its rows. The others judge: of
   the whole move of that training, a half, a quarter, none of it, and no graft at all, it keeps
   what gives them the smallest loss. A client whose graft does not help has the shared model.
4. Grafts and gates never leave the client.

Judging rows are never trained on by the graft; the shared adapters see all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from orchard.client.client import Client
from orchard.communication.messages import Task
from orchard.data.encoded import Encoded
from orchard.evaluation.loss import mean_loss
from orchard.experts.grafting import grafted
from orchard.models.trainable.adapters import AdaptedModel
from orchard.results import Metrics
from orchard.strategies.flex import FlexSettings, flex, known_experts
from orchard.strategies.strategy import OwnPart, Plan, Strategy
from orchard.trees import Tree

SHARES = (0.0, 0.25, 0.5, 1.0)  # of a round's move, that are tried
_LEAST = 2  # rows: one to train on, one to judge by


def orchard(
    strategy: Strategy, settings: FlexSettings, *, judged_below: int, holdout: float
) -> Strategy:
    """Give every client of ``strategy`` a graft, judged where it has few rows to train on.

    Args:
        strategy: What the shared part is.
        settings: Of the grafts.
        judged_below: Clients of fewer rows have their graft judged by rows that it has not seen.
        holdout: Share of such a client's rows that judge.
    """
    together, apart = flex(strategy, settings), _judged(strategy, settings, holdout=holdout)

    @contextmanager
    def prepare(client: Client, task: Task) -> Iterator[Plan]:
        own = apart if len(client.train) < judged_below else together
        with own.prepare(client, task) as plan:
            yield plan

    return replace(strategy, prepare=prepare)


def _judged(strategy: Strategy, settings: FlexSettings, *, holdout: float) -> Strategy:
    """Give every client of ``strategy`` a graft that is judged by rows it has not seen."""

    @contextmanager
    def prepare(client: Client, task: Task) -> Iterator[Plan]:
        with strategy.prepare(client, task) as plan:

            @contextmanager
            def own() -> Iterator[OwnPart]:
                experts, chosen, found = known_experts(client, task, settings)
                seed = client.seeds.integer("graft", client.client_id)
                fit, judges = divide(client, holdout)
                with grafted(client.model, experts, settings.graft, seed=seed) as grafts:
                    settle = _judge(
                        client.model, grafts.names, judges, batch_size=client.evaluation.batch_size
                    )
                    yield OwnPart(
                        grafts.names,
                        fit,
                        memory=chosen,
                        settle=lambda before: {**found, **settle(before)},
                    )

            yield replace(plan, own=own)

    return replace(strategy, prepare=prepare)


def divide(client: Client, holdout: float) -> tuple[list[Encoded], list[Encoded]]:
    """Return the rows that a client's graft trains on, and those that judge it.

    A client with one row has no graft to train.
    """
    number = len(client.train)
    if number < _LEAST:
        return [], list(client.train)
    num_judges = min(number - 1, max(1, round(holdout * number)))
    order = client.seeds.generator("judging rows", client.client_id).permutation(number)
    judging = {int(index) for index in order[:num_judges]}
    rows = list(enumerate(client.train))
    return [row for i, row in rows if i not in judging], [row for i, row in rows if i in judging]


def _judge(
    model: AdaptedModel, names: Sequence[str], judges: Sequence[Encoded], *, batch_size: int
) -> Callable[[Tree], Metrics]:
    """Return what leaves in a model the candidate with the smallest loss; of equals, the least.

    Called with the values before training. The graft as it was attached is the base.
    """
    begun = model.read(names)

    def settle(before: Tree) -> Metrics:
        after = model.read(names)
        candidates = [(0.0, begun)] + [
            (share, {n: torch.lerp(before[n], after[n], share) for n in names}) for share in SHARES
        ]
        losses = []
        for _, values in candidates:
            model.load(values)
            losses.append(mean_loss(model, judges, batch_size=batch_size))
        best = losses.index(min(losses))
        model.load(candidates[best][1])
        return {
            "client/own_share": candidates[best][0],
            "client/own_is_trusted": float(best > 0 and losses[best] < losses[0]),
            "client/own_judged_loss": losses[best],
            "client/shared_judged_loss": losses[0],
        }

    return settle
