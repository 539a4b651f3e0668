"""Skeletons: forward passes with one expert in memory at a time."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from orchard.models.stored.streaming import checkpoint_reader, streamed_experts
from orchard.models.stored.submodel import load_skeleton
from orchard.models.view.detection import view_moe
from orchard.models.view.routing import record_routing
from tiny_checkpoints import LISTED, load_whole, logits_of, save
from tiny_models import FAMILIES, batch_of


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_streamed_through_a_skeleton(family: str, tmp_path: Path) -> None:
    if family in LISTED:
        with (
            pytest.raises(ValueError, match="must be fused parameters to be read one by one"),
            streamed_experts(view_moe(FAMILIES[family]()), lambda layer, expert: {}),
        ):
            pass
        return
    # With groups, where a family has them: a skeleton's routers are whole.
    FAMILIES[family]().save_pretrained(tmp_path)
    whole, view = view_moe(load_whole(str(tmp_path))), load_skeleton(str(tmp_path), dtype="float32")
    batch = batch_of(whole.model)
    with record_routing(whole) as expected, torch.no_grad():
        logits = whole.model(**batch).logits
    read = checkpoint_reader(str(tmp_path), "float32")
    with streamed_experts(view, read), record_routing(view) as record:
        streamed = view.model(**batch).logits
    assert not streamed.requires_grad
    torch.testing.assert_close(streamed, logits, rtol=0, atol=1e-5)
    for got, want in zip(record.layers, expected.layers, strict=True):
        assert torch.equal(got.choices_TK, want.choices_TK)
        torch.testing.assert_close(got.weights_TK, want.weights_TK)
        torch.testing.assert_close(got.probabilities_TE, want.probabilities_TE)
    assert view.names() == whole.names()
    assert all(not vars(layer.experts).get("forward") for layer in view.layers)


def test_each_chosen_expert_is_read_once_and_may_be_another(tmp_path: Path) -> None:
    path = save("qwen2_moe", tmp_path)
    view, whole = load_skeleton(path, dtype="float32"), view_moe(load_whole(path))
    read, seen = checkpoint_reader(path, "float32"), []

    def trained(layer: int, expert: int) -> dict[str, Tensor]:
        seen.append((layer, expert))
        tensors = dict(read(layer, expert))
        return {**tensors, "down_proj": tensors["down_proj"] * 2} if expert == 3 else tensors

    for layer in whole.layers:
        layer.expert_tensors(3)["down_proj"].detach().mul_(2)
    with streamed_experts(view, trained), record_routing(view) as record:
        streamed = logits_of(view.model)
    torch.testing.assert_close(streamed, logits_of(whole.model), rtol=0, atol=1e-5)
    chosen = [
        (layer, expert)
        for layer in (0, 1)
        for expert in record.expert_counts(layer).nonzero().flatten().tolist()
    ]
    assert seen == chosen


def test_an_expert_of_another_dtype_is_an_error(tmp_path: Path) -> None:
    path = save("qwen2_moe", tmp_path)
    view = load_skeleton(path, dtype="float32")
    with (
        pytest.raises(ValueError, match=r"must return tensors of torch\.float32, got torch\.bf"),
        streamed_experts(view, checkpoint_reader(path, "bfloat16")),
    ):
        logits_of(view.model)
    assert all(not vars(layer.experts).get("forward") for layer in view.layers)
