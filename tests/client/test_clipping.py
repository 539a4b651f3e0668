"""Clipped gradients of a whole pass are those of each row in a pass of its own."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from orchard.client.clipping import Clipper
from orchard.data.encoded import IGNORED, Encoded
from orchard.experts.grafting import GraftSettings, grafted
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.dropout import dropout_by_row
from orchard.models.view.unbinding import unbound_experts
from tiny_adapted import adapt, examples, stir
from tiny_checkpoints import LISTED
from tiny_grafts import CHOICE, stir_grafts
from tiny_models import FAMILIES

CLIP = 0.3
# Of fused experts, with biases and interleaved, and of listed ones.
QUICK = ("qwen2_moe", "gpt_oss", "deepseek_moe_16b")
# An encoder-decoder, and one that draws its routing at random in training.
NOT = ("switch", "phimoe")


def both_ways(
    model: AdaptedModel,
    rows: Sequence[Encoded],
    *,
    names: Sequence[str] = (),
    clip: float = CLIP,
    pass_tokens: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """Return the sums of one pass, those row by row, and whether the first was one pass."""
    names = names or model.adapter_names
    model.set_trainable(names)
    leaves = model.leaves(names)
    found = []
    model.model.train()
    for is_row_by_row in (False, True):
        with unbound_experts(model.view), dropout_by_row(model.model, seed=3):
            clipper = Clipper(
                model, leaves, clip=clip, pass_tokens=pass_tokens, is_row_by_row=is_row_by_row
            )
            found.append((clipper.sum_of(rows), clipper.is_row_by_row))
        model.drop_gradients()
    model.model.eval()
    model.set_trainable(())
    ((together, loss, labels), was_each), ((each, loss_each, labels_each), _) = found
    assert labels == labels_each
    # Products in bfloat16 keep 8 bits, and not every CPU rounds those of many rows as those of one.
    is_half = model.model.dtype == torch.bfloat16
    assert loss == pytest.approx(loss_each, rel=2e-3 if is_half else 1e-5)
    return together, each, not was_each


def test_nothing_of_a_pass_stays_in_memory() -> None:
    model = adapt(extra=("router", "experts"))
    stir(model)
    _, _, was_one = both_ways(model, examples(5), pass_tokens=12)
    assert was_one
    gc.collect()
    assert not [own for own in gc.get_objects() if type(own).__name__ == "_Watch"]


def assert_same(together: dict[str, Tensor], each: dict[str, Tensor]) -> None:
    assert together.keys() == each.keys()
    longest = max(float(tensor.norm()) for tensor in each.values())
    assert longest > 0
    for name, tensor in each.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=2e-6 * longest)


@pytest.mark.parametrize("clip", [1e-3, CLIP, 1e6])
@pytest.mark.parametrize("pass_tokens", [0, 12])
def test_one_pass_gives_the_sums_of_many(clip: float, pass_tokens: int) -> None:
    model = adapt(extra=("router", "experts"))
    stir(model)
    together, each, was_one = both_ways(model, examples(5), clip=clip, pass_tokens=pass_tokens)
    assert was_one
    assert_same(together, each)


@pytest.mark.parametrize(
    "family",
    [
        f if f in QUICK else pytest.param(f, marks=pytest.mark.long)
        for f in FAMILIES
        if f not in NOT
    ],
)
def test_every_family_has_the_sums_of_rows_alone(family: str) -> None:
    model = adapt(family, targets=("attention", "experts", "router"))
    stir(model)
    together, each, _ = both_ways(model, examples(3))
    assert_same(together, each)


def test_listed_experts_are_read_row_by_row_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = adapt(LISTED[1], targets=("experts",))
    stir(model)
    _, _, was_one = both_ways(model, examples(2))
    assert not was_one
    (said,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "its experts are modules of their own" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_experts_of_a_layer_are_clipped_without_the_others(dtype: torch.dtype) -> None:
    model = adapt(extra=("router", "experts"), dtype=dtype)
    stir(model)
    some = [n for n in model.adapter_names if ".experts.1." in n or ".experts.2.down" in n]
    together, each, was_one = both_ways(model, examples(4), names=some)
    assert was_one
    if dtype == torch.float32:
        assert_same(together, each)
    for name, tensor in each.items():  # products in bfloat16 keep 8 bits
        assert float((together[name] - tensor).norm()) <= 0.05 * float(tensor.norm()) + 1e-4


def test_dropout_draws_the_same_for_a_row_either_way() -> None:
    model = adapt(dropout=0.3)
    stir(model)
    together, each, was_one = both_ways(model, examples(4))
    assert was_one
    assert_same(together, each)


@pytest.mark.parametrize("gate", ["router_row", "closed", "none"])
@pytest.mark.parametrize("kind", ["lora", "dense"])
@pytest.mark.parametrize("choice", [CHOICE, ((1, 2), (0, 3))], ids=["one", "several"])
def test_grafts_and_their_gates_have_the_sums_of_rows_alone(
    gate: str, kind: str, choice: tuple[int | tuple[int, int], ...]
) -> None:
    model = adapt(extra=("router",))
    stir(model)
    settings = GraftSettings(kind, rank=2, alpha=4.0, dropout=0.0, gate=gate)
    with ExitStack() as undo:
        grafts = undo.enter_context(grafted(model, choice, settings, seed=1))
        stir_grafts(model, grafts)
        names = (*model.adapter_names, *grafts.names)
        together, each, was_one = both_ways(model, examples(4), names=names)
    assert was_one
    assert {*grafts.names} <= {*together}
    assert_same(together, each)


def test_what_is_trained_otherwise_than_by_products_goes_row_by_row(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A norm before a product scales what it reads: no product tells its gradient."""
    model = adapt()
    stir(model)
    norm = next(m for m in model.model.modules() if "RMSNorm" in type(m).__name__)
    projection = next(m for m in model.model.modules() if hasattr(m, "lora_A") and len(m.lora_A))
    lora_A = projection.lora_A["default"].weight

    def scaled(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return output * (1 + 0.01 * lora_A.sum())

    handle = norm.register_forward_hook(scaled)
    together, each, was_one = both_ways(model, examples(3))
    handle.remove()
    assert not was_one
    assert_same(together, each)
    assert "otherwise than in linear products" in caplog.text


def test_a_row_without_a_gradient_is_not_in_the_sum_and_spoils_no_other() -> None:
    model = adapt(extra=("router", "experts"))
    stir(model)
    rows = examples(3)
    unseen = next(t for t in range(3, 60) if all(t not in row.input_ids for row in rows[:2]))
    ids = [unseen, *rows[2].input_ids[1:]]
    bad = Encoded(ids, [IGNORED, *ids[1:]], prompt_length=1, is_ended=True)
    with torch.no_grad():
        model.model.get_input_embeddings().weight[unseen] = float("inf")
    model.set_trainable(model.adapter_names)
    leaves = model.leaves(model.adapter_names)
    with unbound_experts(model.view):
        clipper = Clipper(model, leaves, clip=CLIP)
        spoiled, loss, _ = clipper.sum_of([*rows[:2], bad])
        alone, _, _ = clipper.sum_of(rows[:2])
    assert not clipper.is_row_by_row
    assert not math.isfinite(loss)
    assert_same(spoiled, alone)
