"""Experts that are brought layer by layer give what they give in memory, and are not there else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from carriers import LateCarrier
from federations import build, quick_recipe
from orchard.communication.messages import LocalSettings, Task
from orchard.experiment.preparation import prepare_experiment
from orchard.models.stored import placing
from orchard.models.stored.loading import Base, load_base
from orchard.models.stored.placing import Placement, open_base
from orchard.models.view.moe import MoELayer
from orchard.models.view.offloaded import OffloadedExperts
from orchard.models.view.unbinding import unbound_experts
from orchard.strategies.strategy import evaluate_client, start_server, train_client
from orchard.trees import digest

TINY = "orchard:tiny"  # four layers


def offloaded(path: str, carrier: LateCarrier, *, precision: str = "bf16", cache: str = "") -> Base:
    placement = Placement("offload", cache, precision)
    return open_base(path, dtype="bfloat16", placement=placement, carrier=carrier)


def step(base: Base, *, recomputes: bool = False) -> tuple[Tensor, Tensor]:
    """Return logits, and the gradient of what the first layer reads."""
    model = base.view.model
    if recomputes:
        for block in model.get_submodule("model.layers").children():
            own = block.forward
            block.forward = lambda *args, _own=own, **options: checkpoint(
                _own, *args, use_reentrant=False, **options
            )
    table = model.get_input_embeddings()
    states_BSD = table(torch.arange(2, 34)[None]).detach().requires_grad_()
    with unbound_experts(base.view):
        logits_BSV = model(inputs_embeds=states_BSD, use_cache=False).logits
        logits_BSV.float().square().mean().backward()
    assert states_BSD.grad is not None
    return logits_BSV.detach(), states_BSD.grad


def host_of(layer: MoELayer) -> list[Tensor]:
    assert isinstance(layer.storage, OffloadedExperts)
    return [tensor for tensor in layer.storage._host.values() if isinstance(tensor, Tensor)]


def layers_of(base: Base, carrier: LateCarrier, begun: list[int]) -> list[int]:
    """Return which layers copies are of."""
    first = {}
    for index, layer in enumerate(base.view.layers):
        for tensor in host_of(layer):
            first[tensor.data_ptr()] = index
    return [first[carrier.copies[number]] for number in begun]


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_a_step_is_that_in_memory_bit_for_bit(
    precision: str, recomputes: bool, tmp_path: Path
) -> None:
    expected = step(open_base(TINY, dtype="bfloat16", placement=Placement(precision=precision)))
    carriers = [LateCarrier(), LateCarrier()]
    for carrier, cache in zip(carriers, ("", str(tmp_path)), strict=True):
        base = offloaded(TINY, carrier, precision=precision, cache=cache)
        found = step(base, recomputes=recomputes)
        assert all(map(torch.equal, found, expected))
        assert base.digest == (
            load_base(TINY, dtype="bfloat16").digest
            if precision == "bf16"
            else open_base(TINY, dtype="bfloat16", placement=Placement(precision=precision)).digest
        )


def test_the_next_layer_is_begun_while_one_computes_and_two_are_there_at_most() -> None:
    carrier = LateCarrier()
    base = offloaded(TINY, carrier)
    own = [sum(t.nbytes for t in host_of(layer)) for layer in base.view.layers]
    assert len(own) == 4
    assert len(carrier.reserved) == 2
    assert max(carrier.reserved) < max(own) + 4096
    assert carrier.copies == []  # nothing is on the device before it is used
    step(base)
    # Forward 0 1 2 3 and back 2 1 0: layer 3 and the one before it are still there at the turn.
    assert layers_of(base, carrier, [*range(len(carrier.copies))]) == [0, 1, 2, 3, 1, 0]
    begun = len(carrier.copies)
    step(base)
    # Again, with what the last step left: the first two, and what follows was learned.
    assert layers_of(base, carrier, [*range(begun, len(carrier.copies))]) == [2, 3, 1, 0]


def test_passes_without_gradients_go_round_and_what_follows_is_learned() -> None:
    carrier = LateCarrier()
    base = offloaded(TINY, carrier)
    ids_BS = torch.arange(2, 34)[None]
    with torch.no_grad(), unbound_experts(base.view):
        for _ in range(3):
            base.view.model(input_ids=ids_BS, use_cache=False)
    copied = layers_of(base, carrier, [*range(len(carrier.copies))])
    # At the end of the first pass the way back is guessed, which layer 2 is there for.
    assert copied == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_what_is_read_late_is_seen() -> None:
    """The stand-in shows NaN to whoever keeps a layer's weights for longer than it may."""
    carrier = LateCarrier()
    base = offloaded(TINY, carrier)
    first = base.view.layers[0].storage
    assert isinstance(first, OffloadedExperts)
    with first.opened() as weights:
        kept = weights.down_EDF
        assert isinstance(kept, Tensor)
        assert kept.isfinite().all()
    second = base.view.layers[1].storage
    assert isinstance(second, OffloadedExperts)
    with second.opened():
        assert kept.isfinite().all()  # it is the layer before, which comes first on the way back
    assert not kept.isfinite().any()


def test_experts_with_a_norm_behind_them_are_brought_again() -> None:
    ends = []
    for base in (load_base(TINY, dtype="bfloat16"), offloaded(TINY, LateCarrier())):
        for layer in base.view.layers:
            layer.experts.add_module("post_expert_norm", torch.nn.RMSNorm(layer.width).bfloat16())
            layer.storage.has_post_norm = True  # type: ignore[attr-defined]
        base.view.model.requires_grad_(False)
        ends.append(step(base))
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("method", ["fedavg", "flex"])
def test_a_round_is_the_round_in_memory(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carriers: list[LateCarrier] = []

    def stand_in(device: str) -> LateCarrier:
        carriers.append(LateCarrier())
        return carriers[-1]

    monkeypatch.setattr(placing, "check_carried_to", lambda device: None)
    monkeypatch.setattr(placing, "carrier_of", stand_in)
    ends = []
    for where in ("memory", "offload"):
        recipe = quick_recipe(method, f"model.placement={where}", f"model.path={TINY}")
        strategy, clients, model, _ = build(recipe, tmp_path / where)
        state = start_server(strategy, model.fresh)
        task = Task(1, state.shared, LocalSettings(2, 0, 1e-3))
        update = train_client(strategy, clients[0], task)
        later = Task(2, state.shared, LocalSettings(2, 0, 1e-3))
        measured = evaluate_client(strategy, clients[0], later, ("personal",))
        assert digest(model.base_state) == model.base_digest
        ends.append((model.base_digest, digest(update.delta), measured))
    assert ends[0] == ends[1]
    (carrier,) = carriers
    assert len(carrier.copies) > 4


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("model.placement=offload",),
            r"^model.device must be a GPU with model.placement = offload, got cpu; "
            r"set model.placement to mapped$",
        ),
        (
            ("model.placement=offload", "model.expert_cache=none"),
            "model.expert_cache must be a folder or empty with model.placement = offload, got none",
        ),
        (
            ("model.placement=offload", "model.lora_targets=q_proj,experts"),
            "model.placement must be memory or mapped with experts in model.lora_targets, got off",
        ),
    ],
)
def test_what_cannot_be_offloaded_is_said_in_one_line(
    overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        prepare_experiment(quick_recipe("fedavg", *overrides))
    assert "\n" not in str(caught.value)
