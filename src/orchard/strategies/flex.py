"""FLEx: Personalized Federated Learning for Mixture-of-Experts LLMs via Expert Grafting.

Liu et al., 2025, arXiv:2506.00965. In words:

1. Every client gets the same pretrained model; its experts and routers stay frozen everywhere.
2. Once, each client chooses in every MoE layer the expert that alone comes closest to the whole
   layer on its own data, or the few that do so together, and grafts trainable versions of them
   beside the layer, behind a small sigmoid gate.
3. In a round, a client trains the shared adapters (attention) together with its grafts and gates.
4. It sends the shared adapters and keeps grafts and gates on its own disk.
5. The server averages what was sent, with any server optimizer.

Joined with a method whose clients have budgets (neither paper has that), shared experts and routers
train as that method says, and grafts and gates whatever the budget: a graft is no expert of the
federation. The choice is the same in both of that method's modes, and is made once, on the base:
a client that holds a few experts only reads all of them from its checkpoint, one at a time, which
is how it ranks them too. An expert that was chosen and is not held in a round is read in addition,
so that a graft does not depend on what else a round holds: up to one frozen expert for each graft
that the budget does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from orchard.client.client import Client
from orchard.communication.messages import Task
from orchard.data.encoded import Encoded, blocks
from orchard.experts.allocation import allocate
from orchard.experts.graft_search import LayerSearch, SearchSettings, search_grafts
from orchard.experts.grafting import GraftSettings, grafted
from orchard.experts.reconstruction import (
    RunExpert,
    batch_blocks,
    choose_at_random,
    choose_by_reconstruction,
    reconstruction_losses,
)
from orchard.experts.subset_losses import NORM
from orchard.models.view.moe import MoEView
from orchard.results import Metrics
from orchard.strategies.strategy import Plan, Strategy
from orchard.trees import Tree

_EXPERT = "graft.expert"  # a number, or several


@dataclass(frozen=True)
class FlexSettings:
    """What FLEx leaves open.

    Attributes:
        graft: What a graft is made of.
        num_experts: Grafts in every MoE layer; with a budget, the most that a layer may have.
        budget: At most so many grafts over all layers, at least one in each; 0 = ``num_experts``
            in each.
        choice: ``reconstruction``; or the controls ``random``, and ``fresh``, for which the expert
            that is drawn says what shape a graft has and no more.
        search: How ``reconstruction`` compares sets of experts, and which it tries.
        calibration: ``own`` training data, a ``corpus`` that the recipe gives, or the client's
            own data of its ``majority_category``.
        calibration_blocks: At most so many blocks of tokens.
        calibration_tokens: Tokens per block.
        holds_all: Whether clients hold the whole model; those that do not choose by reading experts
            one at a time.
    """

    graft: GraftSettings
    num_experts: int = 1
    budget: int = 0
    choice: str = "reconstruction"
    search: SearchSettings = field(default_factory=SearchSettings)
    calibration: str = "own"
    calibration_blocks: int = 128
    calibration_tokens: int = 512
    holds_all: bool = True


def flex(strategy: Strategy, settings: FlexSettings) -> Strategy:
    """Give every client of ``strategy`` its grafts; everything else stays as it is."""

    @contextmanager
    def prepare(client: Client, task: Task) -> Iterator[Plan]:
        layers = [layer.name for layer in client.model.view.layers]
        # Before the rest is ready: a client that reads experts one at a time holds none then.
        experts, chosen, found = known_experts(client, task, settings)
        seed = client.seeds.integer("graft", client.client_id)
        with strategy.prepare(client, task) as plan:
            model, read = client.model, None
            if plan.model is not None:
                assert client.submodels is not None, "a submodel comes from a checkpoint"
                model, read = plan.model, client.submodels.origin_reader()
            with grafted(model, experts, settings.graft, seed=seed, read=read) as grafts:
                yield replace(
                    plan,
                    personal=(*plan.personal, *grafts.names),
                    memory={**plan.memory, **chosen},
                    measure=lambda: {
                        **plan.measure(),
                        **found,
                        **{
                            f"client/gate_mean_{layer}": openness
                            for layer, openness in zip(layers, grafts.mean_openness(), strict=True)
                        },
                    },
                )

    return replace(strategy, prepare=prepare)


def known_experts(
    client: Client, task: Task, settings: FlexSettings
) -> tuple[tuple[tuple[int, ...], ...], Tree, Metrics]:
    """Return the experts that a client grafts, as it chose them once or chooses them now.

    Returns:
        For each layer, its experts; the same as tensors that the client keeps; and as metrics, see
        ``choose_experts``, where they are chosen now.
    """
    kept = client.store.load(before_round=task.round_number)
    names = [f"{layer.name}.{_EXPERT}" for layer in client.model.view.layers]
    found: Metrics = {}
    if kept is not None and names[0] in kept.tensors:
        experts = tuple(_numbers(kept.tensors[name]) for name in names)
    else:
        experts, found = choose_experts(client, settings)
    chosen = {
        name: torch.tensor(own if len(own) > 1 else own[0])
        for name, own in zip(names, experts, strict=True)
    }
    return experts, chosen, found


def choose_experts(
    client: Client, settings: FlexSettings
) -> tuple[tuple[tuple[int, ...], ...], Metrics]:
    """Return the experts to graft in each MoE layer, chosen on the base without adapters.

    Deterministic for a client and its data: chosen again, they are the same.

    Returns:
        For each layer, its experts in ascending order; and as metrics ``client/graft_expert_LAYER``
        (of several ``client/graft_expert_LAYER_0`` and so on). Where experts were compared also the
        share of the layer's output that they miss, which of no expert at all is 1:
        ``client/graft_loss_LAYER``, of the second best ``client/graft_loss_second_LAYER``, and for
        sets ``client/graft_loss_bound_LAYER``, what no set of as many is below. Beside them stand
        ``client/graft_loss_none_LAYER``, that 1, and ``client/graft_output_norm_LAYER``, what all
        are shares of, in the units of the layer's output.
    """
    view, number = client.model.view, settings.num_experts
    if settings.choice in ("random", "fresh"):
        generator = client.seeds.generator("random expert", client.client_id)
        drawn = choose_at_random(view, generator, num_experts=number)
        return drawn, _numbered(view, drawn)
    calibration = blocks(
        _calibration_examples(client, settings),
        block_tokens=settings.calibration_tokens,
        max_blocks=settings.calibration_blocks,
    )
    with _base(client, settings) as (base, run_expert):
        device = next(base.model.parameters()).device
        batches = batch_blocks(calibration, batch_size=8, device=device)
        if number == 1 and settings.search.loss == NORM:
            norms: list[float] = []
            losses = reconstruction_losses(base, batches, run_expert=run_expert, output_norms=norms)
            alone = tuple((expert,) for expert in choose_by_reconstruction(losses))
            metrics = _numbered(view, alone)
            for layer, loss_E, (expert,), norm in zip(
                view.layers, losses, alone, norms, strict=True
            ):
                others = sorted(loss_E[torch.arange(len(loss_E)) != expert].tolist())
                second = others[0] if others else None
                metrics |= _losses(layer.name, float(loss_E[expert]), second, norm)
            return alone, metrics
        sizes = range(1, number + 1) if settings.budget else [number]
        found = search_grafts(
            base, list(batches), sizes=sizes, settings=settings.search, run_expert=run_expert
        )
    numbers = (number,) * len(found)
    if settings.budget:
        shares = [{n: _share(own, best.loss) for n, best in own.sets.items()} for own in found]
        numbers = allocate(shares, budget=settings.budget)
    experts = tuple(own.sets[size].experts for own, size in zip(found, numbers, strict=True))
    metrics = _numbered(view, experts)
    for layer, own, size in zip(view.layers, found, numbers, strict=True):
        best = own.sets[size]
        metrics |= _losses(layer.name, best.loss, best.second_loss, own.output_norm)
        metrics[f"client/graft_loss_bound_{layer.name}"] = _share(own, best.lower_bound)
    return experts, metrics


def _numbered(view: MoEView, experts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the experts of each layer as metrics."""
    metrics: dict[str, float] = {}
    for layer, own in zip(view.layers, experts, strict=True):
        for position, expert in enumerate(own):
            place = f"_{position}" if len(own) > 1 else ""
            metrics[f"client/graft_expert_{layer.name}{place}"] = expert
    return metrics


def _losses(layer: str, loss: float, second: float | None, norm: float) -> dict[str, float]:
    """Return the losses of one layer's choice as metrics; ``norm`` is that of no expert."""
    metrics = {
        f"client/graft_loss_{layer}": _over(norm, loss),
        f"client/graft_loss_none_{layer}": _over(norm, norm),
        f"client/graft_output_norm_{layer}": norm,
    }
    if second is not None:
        metrics[f"client/graft_loss_second_{layer}"] = _over(norm, second)
    return metrics


def _share(found: LayerSearch, loss: float) -> float:
    """Return a loss over that of no expert at all."""
    return _over(found.output_norm, loss)


def _over(norm: float, loss: float) -> float:
    return loss / norm if norm else loss


def _numbers(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(number) for number in tensor.reshape(-1))


@contextmanager
def _base(client: Client, settings: FlexSettings) -> Iterator[tuple[MoEView, RunExpert | None]]:
    """Open the base with what runs its experts, None where it holds them."""
    if settings.holds_all:
        with client.model.without_adapters():
            yield client.model.view, None
    else:
        assert client.submodels is not None, "a client that carves needs a checkpoint"
        with client.submodels.base() as opened:
            yield opened


def _calibration_examples(client: Client, settings: FlexSettings) -> list[Encoded]:
    if settings.calibration == "corpus":
        return list(client.calibration_corpus)
    if settings.calibration == "majority_category":
        examples = client.majority_examples()
    else:
        examples = list(client.train)
    order = client.seeds.generator("calibration", client.client_id).permutation(len(examples))
    return [examples[int(index)] for index in order]
