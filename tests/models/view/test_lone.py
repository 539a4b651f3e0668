"""What a router gives a lone expert, read from the family's own router."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from orchard.models.stored.submodel import load_submodel
from orchard.models.view.detection import view_moe
from orchard.models.view.lone import read_lone
from tiny_checkpoints import FUSED, load_whole, save
from tiny_models import EXPERTS, FAMILIES, WIDTH, build

SCALES = {"deepseek_v2": 1.5, "deepseek_v3": 2.5}
SIGMOIDS = {"deepseek_v3", "nemotron_h", "afmoe"}
# Groups of experts take two at a time, and a sparsemixer chooses twice.
UNCARVABLE = {"deepseek_v3", "nemotron_h", "phimoe"}


@pytest.fixture
def x_TD() -> Tensor:
    return torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weight_is_the_familys_own_factor_for_every_token(family: str, x_TD: Tensor) -> None:
    for layer in view_moe(FAMILIES[family]()).layers:
        lone = read_lone(layer)
        weights_ET = lone.weights(x_TD)
        assert weights_ET.shape == (EXPERTS, len(x_TD))
        assert weights_ET.dtype == torch.float64
        expected = torch.full_like(weights_ET, SCALES.get(family, 1.0))
        torch.testing.assert_close(weights_ET, expected, rtol=1e-6, atol=0)
        assert lone.takes_sigmoids == (family in SIGMOIDS)


def test_sigmoids_that_are_not_normalized_stay_sigmoids(x_TD: Tensor) -> None:
    config = FAMILIES["deepseek_v3"]().config.to_dict()  # type: ignore[operator, union-attr]
    view = view_moe(build("DeepseekV3Config", **{**config, "norm_topk_prob": False}))
    for layer in view.layers:
        scores_ET = torch.sigmoid(layer.router_tensors()["weight"] @ x_TD.T)
        torch.testing.assert_close(read_lone(layer).weights(x_TD), 2.5 * scores_ET.double())
        assert read_lone(layer).takes_sigmoids


@pytest.mark.parametrize("family", [f for f in FUSED if f not in UNCARVABLE])
def test_a_model_carved_to_one_expert_gives_it_that_weight(
    family: str, x_TD: Tensor, tmp_path: Path
) -> None:
    path = save(family, tmp_path)
    whole = view_moe(load_whole(path))
    carved = load_submodel(path, [[5] for _ in whole.layers], dtype="float32")
    for layer, own in zip(whole.layers, carved.layers, strict=True):
        expected_TD = (
            read_lone(layer).weights(x_TD)[5, :, None] * layer.run_expert(5, x_TD).double()
        )
        torch.testing.assert_close(own.routed_output(x_TD).double(), expected_TD)


@pytest.mark.parametrize("family", ["deepseek_v3", "afmoe", "qwen2_moe", "deepseek_moe_16b"])
def test_reading_it_changes_nothing_and_leaves_no_hook(family: str, x_TD: Tensor) -> None:
    model = FAMILIES[family]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in view_moe(model).layers:
        read_lone(layer).weights(x_TD)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_router_that_scores_in_another_way_is_refused() -> None:
    view = view_moe(FAMILIES["qwen2_moe"]())
    layer = view.layers[0]

    class Distances(nn.Module):
        def __init__(self, old: nn.Module) -> None:
            super().__init__()
            self.weight, self.top_k = old.weight, 2

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits_TE = -torch.cdist(x.reshape(-1, WIDTH), self.weight)
            weights_TK, choices_TK = logits_TE.softmax(-1).topk(2)
            return logits_TE, weights_TK, choices_TK

    layer.block.gate = Distances(layer.router)
    with pytest.raises(ValueError, match=r"^router of layers\.0 must score experts by a product"):
        read_lone(view_moe(view.model).layers[0])
