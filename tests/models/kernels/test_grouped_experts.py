"""All experts in one product, and a training step in which the host waits for nothing."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_frozen_experts import FUSED, draw, fused_layer, run
from torch.utils._python_dispatch import TorchDispatchMode

from federations import build, quick_recipe
from orchard.communication.messages import LocalSettings, Task
from orchard.models.kernels import waiting
from orchard.models.kernels.frozen_experts import run_frozen
from orchard.models.kernels.grouped_experts import can_group, run_grouped
from orchard.models.view.storage import FusedExperts
from orchard.strategies.strategy import start_server, train_client

# What makes the host wait for a device: it reads a number, or the size of what is found.
WAITS = frozenset(
    ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select")
)

INDEXES = frozenset(("aten::index", "aten::index_put", "aten::index_put_"))


def frozen_of(storage: Any) -> Any:
    names = dict.fromkeys(storage._places().values())
    return storage._frozen({name: storage._parameter(name) for name in names})


@pytest.mark.parametrize("family", FUSED)
def test_one_product_gives_what_one_for_each_expert_gives(family: str) -> None:
    layer = fused_layer(family)
    assert isinstance(layer.storage, FusedExperts)
    if layer.storage.has_post_norm:
        pytest.skip("a norm behind the experts is run expert by expert")
    weights, inputs = frozen_of(layer.storage), draw(layer)
    inputs[1][5:9, 1:] = layer.num_experts  # who chose fewer
    expected = run(lambda *own: run_frozen(weights, *own), inputs)
    found = run(lambda *own: run_grouped(weights, *own), inputs)
    for own, other in zip(found, expected, strict=True):
        assert float(other.abs().max()) > 1e-3
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_nothing_of_what_no_expert_wrote_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch._grouped_mm

    def spoiled(x: torch.Tensor, matrix: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        found = real(x, matrix, offs=offs)
        found[int(offs[-1]) :] = float("nan")
        return found

    layer = fused_layer("qwen2_moe")
    weights, inputs = frozen_of(layer.storage), draw(layer)
    inputs[1][:, 1:] = layer.num_experts
    expected = run(lambda *own: run_frozen(weights, *own), inputs)
    monkeypatch.setattr(torch, "_grouped_mm", spoiled)
    found = run(lambda *own: run_grouped(weights, *own), inputs)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_experts_are_grouped_where_the_device_can_and_else_run_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = replace(
        frozen_of(fused_layer("qwen2_moe").storage),
        first_EGD=torch.randn(3, 32, 24),
        down_EDF=torch.randn(3, 24, 16),
    )
    narrow = replace(
        weights, first_EGD=weights.first_EGD.bfloat16(), down_EDF=weights.down_EDF.bfloat16()
    )
    x_TD = torch.randn(4, 24).bfloat16()
    assert not can_group(narrow, x_TD)  # a CPU is faster expert by expert
    monkeypatch.setattr(waiting, "may_wait", lambda device: False)
    assert can_group(narrow, x_TD)
    assert can_group(replace(narrow, first_EGD=narrow.first_EGD.mT.contiguous().mT), x_TD)
    assert not can_group(weights, x_TD.float())  # another dtype
    assert not can_group(weights, x_TD)  # dtypes that differ
    odd = narrow.down_EDF[:, :, :-1]  # a width, and then a stride, that is not aligned
    assert not can_group(replace(narrow, down_EDF=odd), x_TD)
    assert not can_group(replace(narrow, down_EDF=odd.contiguous()), x_TD)
    assert not can_group(replace(narrow, down_EDF=object()), x_TD)  # read one at a time


def _has_mask(args: Any) -> bool:
    """Say whether places are picked by a mask, whose number must be known."""
    masks = (torch.bool, torch.uint8)
    return any(isinstance(one, torch.Tensor) and one.dtype in masks for one in args[1])


class CountsWaits(TorchDispatchMode):
    """Counts the operations that make a host wait.

    Two kinds do not count: on a CPU the grouped product itself reads where the pairs of each expert
    end, which a GPU does not; and torch's optimizers keep their counts of steps on the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        if name in WAITS or (name in INDEXES and _has_mask(args)):
            frames = [frame.filename for frame in traceback.extract_stack()]
            if not any("/torch/optim/" in filename for filename in frames):
                self.found[name] += 1
        return func(*args, **(kwargs or {}))


def waits_of(tmp_path: Path, *overrides: str, num_steps: int) -> Counter[str]:
    """Count what makes the host wait in one client's training."""
    recipe = quick_recipe("fedavg", "model.dtype=bfloat16", *overrides)
    strategy, clients, model, _ = build(recipe, tmp_path)
    task = Task(1, start_server(strategy, model.fresh).shared, LocalSettings(num_steps, 0, 1e-3))
    with CountsWaits() as seen:
        train_client(strategy, clients[0], task)
    return seen.found


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_training_step_waits_for_nothing(
    dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: list[tuple[int, ...]] = []
    real = torch._grouped_mm

    def counted(x: torch.Tensor, matrix: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        products.append(tuple(matrix.shape))
        return real(x, matrix, offs=offs)

    own = f"model.lora_dropout={dropout}"
    alone = waits_of(tmp_path / "cpu", own, num_steps=2)
    more = waits_of(tmp_path / "more", own, num_steps=6)
    key = "aten::_local_scalar_dense"
    assert more[key] >= alone[key] + 4  # they are counted: a CPU has no reason not to wait
    monkeypatch.setattr(waiting, "may_wait", lambda device: False)
    monkeypatch.setattr(torch, "_grouped_mm", counted)
    two = waits_of(tmp_path / "two", own, num_steps=2)
    six = waits_of(tmp_path / "six", own, num_steps=6)
    # What is read once a round does not count: the losses, and whether values are finite.
    assert two == six
    # Two MoE layers, two products forward and two back, in each of eight steps.
    assert len(products) == 8 * 2 * 4


def test_losses_that_are_read_at_the_end_are_those_of_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(folder: str) -> tuple[float, dict[str, float]]:
        recipe = quick_recipe("fedavg")
        strategy, clients, model, _ = build(recipe, tmp_path / folder)
        task = Task(1, start_server(strategy, model.fresh).shared, LocalSettings(3, 0, 1e-3))
        update = train_client(strategy, clients[0], task)
        return update.metrics["client/train_loss"], dict(update.metrics)

    read_each, _ = losses("each")
    monkeypatch.setattr(waiting, "may_wait", lambda device: False)
    read_last, _ = losses("last")
    assert read_last == pytest.approx(read_each, rel=1e-4)


def test_a_loss_that_is_not_finite_is_found_at_the_end_with_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchard.client import training

    real, calls = training.forward_losses, []

    def overflow(*args: Any, **options: Any) -> Any:
        calls.append(args)
        losses_T, router_loss = real(*args, **options)
        return losses_T * (float("inf") if len(calls) == 2 else 1.0), router_loss

    monkeypatch.setattr(training, "forward_losses", overflow)
    monkeypatch.setattr(waiting, "may_wait", lambda device: False)
    strategy, clients, model, _ = build(quick_recipe("fedavg"), tmp_path)
    task = Task(1, start_server(strategy, model.fresh).shared, LocalSettings(3, 0, 1e-3))
    with pytest.raises(FloatingPointError, match=r"^loss must be finite, got inf in step 2; lower"):
        train_client(strategy, clients[0], task)
