"""Listed experts, stacked while they are loaded: carved, streamed, and back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, NllbMoeConfig

from orchard.models.stored.loading import check_checkpoint, load_base
from orchard.models.stored.placing import Placement, open_base
from orchard.models.stored.sources import build_view, is_read_apart
from orchard.models.stored.streaming import checkpoint_reader, streamed_experts
from orchard.models.stored.submodel import load_skeleton, load_submodel
from orchard.models.trainable.targets import LoraSettings
from orchard.models.view.detection import view_moe
from tiny_pairs import EXPERTS, tiny_switch

LORA = LoraSettings(2, 4.0, 0.0, ("attention", "router", "experts"))
IDS_BS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("switch")
    tiny_switch(size=64, capacity=3).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(input_ids=IDS_BS, decoder_input_ids=IDS_BS).logits


def test_names_lead_to_the_tensors_of_the_family_and_back(path: str, tmp_path: Path) -> None:
    stored = load_file(Path(path) / "model.safetensors")
    view = load_base(path, dtype="float32").view
    for expert in range(EXPERTS):
        key = f"decoder.block.1.layer.2.mlp.experts.expert_{expert}"
        for local, own in (("up_proj", "wi"), ("down_proj", "wo")):
            read = view.read(f"decoder.layers.1.experts.{expert}.{local}")
            assert torch.equal(read, stored[f"{key}.{own}.weight"])
    view.model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in stored.items())


def test_wherever_experts_are_the_model_says_what_the_family_says(path: str) -> None:
    assert len(check_checkpoint(path, LORA).view.layers) == 2
    own = AutoModelForSeq2SeqLM.from_pretrained(path)  # which its own class still loads
    assert not view_moe(own).layers[0].is_fused
    expected = logits_of(own.eval())
    whole = load_base(path, dtype="float32")
    torch.testing.assert_close(logits_of(whole.view.model), expected, rtol=0, atol=1e-5)
    skeleton = load_skeleton(path, dtype="float32")
    with streamed_experts(skeleton, checkpoint_reader(path, "float32")):
        torch.testing.assert_close(logits_of(skeleton.model), expected, rtol=0, atol=1e-5)
    mapped = open_base(path, dtype="float32", placement=Placement("mapped"))
    assert mapped.digest == whole.digest
    assert torch.equal(logits_of(mapped.view.model), logits_of(whole.view.model))


def test_experts_that_cannot_be_stacked_are_refused_in_one_line() -> None:
    own: Any = NllbMoeConfig
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 2}
    config = own(vocab_size=64, d_model=16, num_experts=4, **sizes)
    with pytest.raises(ValueError, match=r"^experts that are listed must be .* NllbMoeExperts; \w"):
        build_view(config, "nllb")


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [1, 3], [2]])
def test_a_carved_model_is_the_family_with_these_experts(path: str, kept: list[int]) -> None:
    some = load_submodel(path, [kept, kept], dtype="float32")
    whole = load_base(path, dtype="float32").view
    own = tiny_switch(size=64, capacity=3)
    for layer in view_moe(own).layers:
        listed: Any = layer.experts
        experts = [listed[f"expert_{expert}"] for expert in kept]
        listed.clear()
        listed.update({f"expert_{place}": expert for place, expert in enumerate(experts)})
        listed.num_experts = len(kept)
        router: Any = layer.router
        router.num_experts = len(kept)
        router.classifier.weight = torch.nn.Parameter(router.classifier.weight[kept])
    torch.testing.assert_close(logits_of(some.model), logits_of(own), rtol=0, atol=1e-5)
    assert all(torch.equal(some.read(name), whole.read(name)) for name in some.names())


@pytest.mark.parametrize("placement", ["memory", "mapped"])
def test_what_experts_drop_in_training_is_in_their_gradient(path: str, placement: str) -> None:
    view = open_base(path, dtype="float32", placement=Placement(placement)).view
    layer = view.layers[0]
    storage: Any = layer.storage
    layer.experts.dropout.p = 0.5  # type: ignore[union-attr]
    layer.experts.train()
    x_TD = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).expand(200, 16)
    x_TD = x_TD.clone().requires_grad_()
    choice_T1 = torch.zeros(200, 1, dtype=torch.long)
    y_TD = storage.run_routed(x_TD, choice_T1, torch.ones(200, 1))
    assert len(y_TD.detach().unique(dim=0)) > 20, "tokens lose values of their own"
    # ReLU behind a linear layer without biases: the output is its gradient times what was read.
    (gradient_TD,) = torch.autograd.grad(y_TD.sum(), x_TD)
    torch.testing.assert_close((gradient_TD * x_TD).sum(-1), y_TD.sum(-1), rtol=1e-4, atol=1e-4)


def test_a_folder_with_code_of_its_own_is_no_pair(path: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "grafted_mixtral", "auto_map": {}}')
    (tmp_path / "model.safetensors").touch()
    assert not is_read_apart(str(tmp_path))
    assert is_read_apart(path)
