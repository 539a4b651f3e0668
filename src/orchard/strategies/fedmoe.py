"""FedMoE: Personalized Federated Learning via Heterogeneous Mixture of Experts.

Mei et al., 2024, arXiv:2408.11304. In words:

1. Once, a client runs the model on its own data and takes the experts that are activated most as
   its submodel, as many as it affords.
2. In each round it trains its submodel: its experts, their rows of the routers, and all else.
3. The server puts modules together: an expert that nobody holds stays as it is, one that several
   hold is averaged over them, and a router's row goes with its expert.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from orchard.client.client import Client
from orchard.communication.messages import Task
from orchard.data.encoded import Encoded
from orchard.strategies.expert_names import expert_of, router_row_of
from orchard.strategies.session import SubsetSettings
from orchard.strategies.strategy import Contribution, Plan, Strategy, Trained
from orchard.strategies.subset import layer_values, marked, send_only, with_subset


def fedmoe(strategy: Strategy, subset: SubsetSettings) -> Strategy:
    """Give every client of ``strategy`` a submodel for the run."""
    chosen = with_subset(strategy, replace(subset, rank_by="frequency", cadence="run"))

    @contextmanager
    def prepare(client: Client, task: Task) -> Iterator[Plan]:
        with chosen.prepare(client, task) as plan:
            is_own = _submodel(plan)
            others = [name for name in plan.shared if not is_own(name)]

            def hold_still(batches: Sequence[Sequence[Encoded]]) -> Collection[str]:
                assert plan.hold_still is not None
                return {*plan.hold_still(batches), *others}

            yield replace(plan, hold_still=hold_still)

    def weigh(client: Client, task: Task, trained: Trained) -> Contribution:
        return send_only(strategy.weigh(client, task, trained), _submodel(trained.plan))

    return replace(chosen, prepare=prepare, weigh=weigh)


def _submodel(plan: Plan) -> Callable[[str], bool]:
    """Return what tells names of the submodel: of its experts, of their rows, of no expert."""
    own = {None, *marked(layer_values(plan.memory, "subset"))}
    return lambda name: (expert_of(name) or router_row_of(name)) in own
