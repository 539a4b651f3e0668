"""Submodels: what they hold, and what they compute."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from orchard.models.stored.streaming import checkpoint_reader, streamed_experts
from orchard.models.stored.submodel import load_skeleton, load_submodel
from orchard.models.view.detection import view_moe
from orchard.models.view.moe import MoELayer, MoEView
from orchard.models.view.routing import record_routing
from tiny_checkpoints import FUSED, GROUPED, load_whole, logits_of, save
from tiny_models import EXPERT_WIDTH, EXPERTS, FAMILIES, WIDTH, batch_of

Kept = Sequence[Sequence[int]]
ALL = [range(EXPERTS), range(EXPERTS)]
# Other numbers in other layers, in one of them less than top-k where the family can.
SOME: Kept = [[2, 5, 6], [0, 1, 3, 4, 7]]
FEW: Kept = [[4], [1, 6]]
# Two experts at the least: their routers always choose two, or rank groups by their best two.
NEEDS_TWO = ("phimoe", "nemotron_h", *GROUPED[1:])


@contextmanager
def restricted(view: MoEView, kept: Kept) -> Iterator[None]:
    """Force the logits of all other experts down in a whole model, wherever a router forms them."""
    plain = functional.linear
    handles: list[Any] = []

    def enter(others: list[int]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            def lowered(*args: Any, **kwargs: Any) -> Tensor:
                logits = plain(*args, **kwargs).clone()
                logits[..., others] = -1e9
                return logits

            functional.linear = lowered

        return hook

    def leave(*_: Any) -> None:
        functional.linear = plain

    for layer, experts in zip(view.layers, kept, strict=True):
        others = [expert for expert in range(EXPERTS) if expert not in experts]
        handles.append(layer.router.register_forward_pre_hook(enter(others)))
        handles.append(layer.router.register_forward_hook(leave))
        # A sigmoid makes 0 of such a logit, and a correction could still choose it.
        correction = layer.router_tensors().get("correction_bias")
        if correction is not None:
            correction.detach()[others] = -1e9
    try:
        yield
    finally:
        functional.linear = plain
        for handle in handles:
            handle.remove()


def assert_same_model(got: Any, expected: Any) -> None:
    left, right = (
        {**dict(m.named_parameters(remove_duplicate=False)), **dict(m.named_buffers())}
        for m in (got, expected)
    )
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name
    assert got.state_dict().keys() == expected.state_dict().keys()
    assert type(got) is type(expected)
    # Weights are the same bits. What a product makes of them may depend on where in memory they
    # lie: some CPUs choose another kernel for another alignment, and nothing promises otherwise.
    torch.testing.assert_close(logits_of(got), logits_of(expected))


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("family", FUSED)
def test_all_experts_are_the_whole_model(family: str, original: bool, tmp_path: Path) -> None:
    path = save(family, tmp_path, save_original_format=original)
    view = load_submodel(path, ALL, dtype="float32")
    whole = load_whole(path)
    assert_same_model(view.model, whole)
    assert view.names() == view_moe(whole).names()
    assert not view.model.training
    assert not any(parameter.requires_grad for parameter in view.model.parameters())
    assert view.model.generation_config.to_dict() == whole.generation_config.to_dict()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_cast_as_from_pretrained_casts_them(
    dtype: str, stored: torch.dtype, tmp_path: Path
) -> None:
    for family in ("qwen2_moe", "gpt_oss", "deepseek_v3"):
        path = save(family, tmp_path / family)
        if stored is torch.bfloat16:
            load_whole(path, stored).save_pretrained(path)
        view = load_submodel(path, ALL, dtype=dtype)
        assert_same_model(view.model, load_whole(path, getattr(torch, dtype)))


def test_groups_are_no_obstacle_where_all_experts_are_kept(tmp_path: Path) -> None:
    FAMILIES["deepseek_v3"]().save_pretrained(tmp_path)
    view = load_submodel(str(tmp_path), ALL, dtype="float32")
    assert_same_model(view.model, load_whole(str(tmp_path)))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model: Any = FAMILIES["qwen2_moe"]()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    tied: Any = load_submodel(str(tmp_path), SOME, dtype="float32").model
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert torch.equal(tied.lm_head.weight, model.lm_head.weight)


def assert_holds(layer: MoELayer, whole: MoELayer, experts: Sequence[int]) -> None:
    assert layer.expert_ids == tuple(experts)
    assert layer.num_experts == len(experts)
    assert layer.top_k == min(whole.top_k, len(experts))
    for local, rows in whole.router_tensors().items():
        assert torch.equal(layer.router_tensors()[local], rows[list(experts)])
    for index, expert in enumerate(experts):
        for local, tensor in whole.expert_tensors(expert).items():
            assert torch.equal(layer.expert_tensors(index)[local], tensor)


@pytest.mark.parametrize("kept", [SOME, FEW], ids=["some", "few"])
@pytest.mark.parametrize("family", FUSED)
def test_a_submodel_routes_among_its_experts(family: str, kept: Kept, tmp_path: Path) -> None:
    if family in NEEDS_TWO and kept is FEW:
        kept = [[3, 4], [1, 6]]
    path = save(family, tmp_path)
    view, whole = load_submodel(path, kept, dtype="float32"), view_moe(load_whole(path))
    for layer, full, experts in zip(view.layers, whole.layers, kept, strict=True):
        assert_holds(layer, full, experts)
    with restricted(whole, kept):
        expected = logits_of(whole.model)
    torch.testing.assert_close(logits_of(view.model), expected, rtol=0, atol=1e-5)
    # The restriction is one: the whole model answers otherwise.
    assert not torch.allclose(logits_of(load_whole(path)), expected, atol=1e-3)


@pytest.mark.parametrize("family", NEEDS_TWO)
def test_a_router_that_needs_two_experts_is_refused_one(family: str, tmp_path: Path) -> None:
    path = save(family, tmp_path)
    with pytest.raises(ValueError, match=r"router of layers\.\d must choose among any of its exp"):
        load_submodel(path, FEW, dtype="float32")


@pytest.mark.parametrize("family", GROUPED)
def test_groups_of_experts_are_refused(family: str, tmp_path: Path) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_group 2: it chooses among groups of experts"):
        load_submodel(str(tmp_path), SOME, dtype="float32")


def test_an_unknown_tensor_per_expert_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

    plain = Qwen2MoeTopKRouter.__init__

    def with_scale(self: Any, config: Any) -> None:
        plain(self, config)
        self.per_expert_warmth = nn.Parameter(torch.ones(config.num_experts))

    path = save("qwen2_moe", tmp_path)
    monkeypatch.setattr(Qwen2MoeTopKRouter, "__init__", with_scale)
    with pytest.raises(ValueError, match=r"got per_expert_warmth of shape \(8,\) beside its rows"):
        load_submodel(path, SOME, dtype="float32")


def test_names_carry_the_checkpoints_ids(tmp_path: Path) -> None:
    path = save("deepseek_v3", tmp_path)
    view, whole = load_submodel(path, SOME, dtype="float32"), view_moe(load_whole(path))
    names = view.names()
    assert names[0] == "layers.1.experts.2.gate_proj"
    assert "layers.1.router.5" in names
    assert "layers.1.router_correction_bias.6" in names
    assert "layers.1.experts.0.down_proj" not in names
    assert set(names) < set(whole.names())
    for name in names:
        assert torch.equal(view.read(name), whole.read(name))
    view.write("layers.2.experts.7.up_proj", torch.ones(EXPERT_WIDTH, WIDTH))
    assert view.layers[1].expert_tensors(4)["up_proj"].eq(1).all()


def test_a_submodel_holds_nothing_of_other_experts(tmp_path: Path) -> None:
    path = save("qwen2_moe", tmp_path / "whole")
    view = load_submodel(path, [[2, 5], [1, 3]], dtype="float32")
    model: Any = view.model
    model.save_pretrained(tmp_path / "part")
    saved = load_file(tmp_path / "part" / "model.safetensors")
    others = load_file(tmp_path / "whole" / "model.safetensors")
    routed = sum(t.numel() for name, t in others.items() if ".experts." in name)
    assert sum(t.numel() for name, t in saved.items() if ".experts." in name) == routed // 4
    rows = {name: t for name, t in saved.items() if name.endswith("mlp.gate.weight")}
    assert {tuple(t.shape) for t in rows.values()} == {(2, WIDTH)}


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "mixtral"])
def test_gradients_have_the_shape_of_the_kept(family: str, tmp_path: Path) -> None:
    view = load_submodel(save(family, tmp_path), SOME, dtype="float32")
    model: Any = view.model.train()
    routed = view.routed_parameters()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in routed)
    batch = batch_of(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for layer, experts in zip(view.layers, SOME, strict=True):
        for parameter in layer.storage.parameters():
            assert parameter.grad is not None
            assert parameter.grad.shape == parameter.shape
            assert len(parameter.grad) == len(experts)
            assert parameter.grad.abs().sum() > 0


def test_a_submodel_moves_and_records_like_any_model(tmp_path: Path) -> None:
    view = load_submodel(save("olmoe", tmp_path), SOME, dtype="bfloat16", device="cpu")
    assert {p.dtype for p in view.model.parameters()} == {torch.bfloat16}
    with record_routing(view) as record:
        logits_of(view.model)
    assert [len(record.expert_counts(layer)) for layer in (0, 1)] == [3, 5]
    assert [int(record.expert_counts(layer).sum()) for layer in (0, 1)] == [28, 28]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([[0]], "kept must have one entry for each of the 2 MoE layers, got 1"),
        ([[0], []], r"kept experts of layers.1 must be one or more .* got \[\]"),
        ([[0], [8]], r"distinct numbers in 0\.\.7, ascending, got \[8\]"),
        ([[-1], [0]], r"kept experts of layers.0 .* got \[-1\]"),
        ([[1, 1], [0]], r"got \[1, 1\]; correct the list"),
        ([[2, 1], [0]], r"got \[2, 1\]"),
    ],
)
def test_a_wrong_choice_is_an_error(kept: Kept, message: str, tmp_path: Path) -> None:
    path = save("qwen2_moe", tmp_path)
    with pytest.raises(ValueError, match=message):
        load_submodel(path, kept, dtype="float32")


def test_shards_are_one_model(tmp_path: Path) -> None:
    path = save("qwen2_moe", tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    whole = load_whole(path)
    assert_same_model(load_submodel(path, ALL, dtype="float32").model, whole)
    view = load_skeleton(path, dtype="float32")
    with streamed_experts(view, checkpoint_reader(path, "float32")):
        torch.testing.assert_close(logits_of(view.model), logits_of(whole), rtol=0, atol=1e-5)


def test_the_packaged_model_is_carved() -> None:
    view = load_submodel("orchard:tiny", [[0, 2, 7]] * 4, dtype="float32")
    assert [layer.expert_ids for layer in view.layers] == [(0, 2, 7)] * 4
