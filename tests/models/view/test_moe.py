"""The view itself: errors, names, records, adapters, and storages that agree."""

import copy
import re

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orchard.models.view.detection import view_config, view_moe
from orchard.models.view.moe import MoELayer
from orchard.models.view.routers import read_router_output
from orchard.models.view.routing import record_routing
from tiny_models import (
    EXPERT_WIDTH,
    EXPERTS,
    FAMILIES,
    WIDTH,
    ListedConfig,
    ListedMoE,
    batch_of,
    dense,
    randomize,
)

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def x_TD() -> Tensor:
    return torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(3))


def wrap(block: nn.Module) -> MoELayer:
    (layer,) = view_moe(nn.ModuleDict({"layers": nn.ModuleList([block])})).layers
    return layer


class LinearRoutedMoE(nn.Module):
    """A block in the style of transformers 4: the router is a linear layer, the block chooses."""

    def __init__(self, *, is_normalized: bool) -> None:
        super().__init__()
        listed = ListedMoE(ListedConfig())
        self.top_k = 2
        self.norm_topk_prob = is_normalized
        self.experts = listed.experts
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, WIDTH)
        weights, choices = self.gate(x).softmax(-1).topk(self.top_k)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        mixed = torch.zeros(len(x), EXPERTS).scatter(1, choices, weights)
        y = sum(mixed[:, e, None] * expert(x) for e, expert in enumerate(self.experts))
        return y.view(hidden.shape)


def copy_experts(source: MoELayer, target: MoELayer) -> None:
    with torch.no_grad():
        for expert in range(source.num_experts):
            theirs = target.expert_tensors(expert)
            for local, tensor in source.expert_tensors(expert).items():
                theirs[local].copy_(tensor)
        target.router_tensors()["weight"].copy_(source.router_tensors()["weight"])


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_listed_and_fused_storage_agree(family: str, x_TD: Tensor) -> None:
    fused = view_moe(FAMILIES[family]()).layers[0]
    listed = wrap(ListedMoE(ListedConfig(norm_topk_prob=family == "qwen3_moe")))
    assert fused.is_fused
    assert not listed.is_fused
    copy_experts(fused, listed)
    for expert in range(EXPERTS):
        torch.testing.assert_close(fused.run_expert(expert, x_TD), listed.run_expert(expert, x_TD))
    torch.testing.assert_close(fused.routed_output(x_TD), listed.routed_output(x_TD))


def test_interleaved_transposed_and_plain_storage_agree(x_TD: Tensor) -> None:
    interleaved = view_moe(FAMILIES["gpt_oss"]()).layers[0]
    transposed = view_moe(FAMILIES["aria"]()).layers[0]
    plain = view_moe(FAMILIES["mixtral"]()).layers[0]
    copy_experts(plain, transposed)
    copy_experts(plain, interleaved)
    for expert in range(EXPERTS):
        expected = plain.expert_tensors(expert)
        for layer in (transposed, interleaved):
            got = layer.expert_tensors(expert)
            assert all(torch.equal(expected[local], got[local]) for local in expected)
    torch.testing.assert_close(plain.run_expert(5, x_TD), transposed.run_expert(5, x_TD))


def test_gpt_oss_expert_is_its_formula(x_TD: Tensor) -> None:
    layer = view_moe(FAMILIES["gpt_oss"]()).layers[0]
    t = layer.expert_tensors(4)
    gate = (x_TD @ t["gate_proj"].T + t["gate_proj_bias"]).clamp(max=7.0)
    up = (x_TD @ t["up_proj"].T + t["up_proj_bias"]).clamp(-7.0, 7.0)
    expected = ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ t["down_proj"].T
    expected = expected + t["down_proj_bias"]
    torch.testing.assert_close(layer.run_expert(4, x_TD), expected)


@pytest.mark.parametrize("is_normalized", [True, False])
def test_a_linear_router_leaves_the_choice_to_its_block(is_normalized: bool, x_TD: Tensor) -> None:
    block = LinearRoutedMoE(is_normalized=is_normalized)
    randomize(block)
    torch.testing.assert_close(wrap(block).routed_output(x_TD), block(x_TD[None])[0])


def test_a_linear_router_of_a_silent_block_is_an_error(x_TD: Tensor) -> None:
    block = LinearRoutedMoE(is_normalized=True)
    layer = wrap(block)
    del block.norm_topk_prob
    with pytest.raises(ValueError, match="must have top_k and norm_topk_prob"):
        layer.routed_output(x_TD)


def test_tokens_beyond_capacity_choose_no_expert(x_TD: Tensor) -> None:
    layer = view_moe(FAMILIES["switch"]()).layers[0]
    layer.router.expert_capacity = 1
    if layer.router(x_TD)[1].ndim == 3:
        pytest.skip("these transformers count over a dimension of 1: no token is beyond capacity")
    choices_TK, weights_TK = layer.route(x_TD)
    is_dropped_T = (choices_TK == EXPERTS).squeeze(1)
    assert 0 < is_dropped_T.sum() < len(x_TD)
    assert not weights_TK[is_dropped_T].any()
    y_TD = layer.routed_output(x_TD)
    assert not y_TD[is_dropped_T].any()
    torch.testing.assert_close(y_TD, layer.block(x_TD[None])[0])


def test_dense_model_is_an_error() -> None:
    message = (
        "model must have at least one MoE layer, got a dense Qwen2ForCausalLM; "
        "choose a Mixture-of-Experts checkpoint"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        view_moe(dense())


def test_unknown_storage_is_an_error() -> None:
    class StackedExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(EXPERTS, WIDTH, 2 * EXPERT_WIDTH))

    with pytest.raises(ValueError, match=r"experts at layers\.0 must be .*got StackedExperts"):
        view_moe(nn.ModuleDict({"layers": nn.ModuleList([StackedExperts()])}))


def test_experts_without_a_router_are_an_error() -> None:
    model = FAMILIES["mixtral"]()
    model.model.layers[0].mlp.gate = None
    with pytest.raises(ValueError, match="must have a router with one row for each of its 8"):
        view_moe(model)


@pytest.mark.parametrize("family", ["qwen2_moe", "switch"])
def test_a_config_is_enough_to_check(family: str) -> None:
    used = FAMILIES[family]().config
    config = type(used).from_dict(used.to_dict())
    before = copy.deepcopy(vars(config))
    view_config(config)
    assert repr(vars(config)) == repr(before)


def test_a_dense_config_is_an_error() -> None:
    config = dense().config
    with pytest.raises(ValueError, match="got a dense Qwen2ForCausalLM"):
        view_config(config)


def test_names_are_the_documented_ones() -> None:
    names = view_moe(FAMILIES["deepseek_v3"]()).names()
    assert names[0] == "layers.1.experts.0.gate_proj"
    assert "layers.2.experts.7.down_proj" in names
    assert "layers.2.router.7" in names
    assert "layers.2.router_correction_bias.7" in names
    assert len(names) == 2 * EXPERTS * (3 + 2)
    view = view_moe(FAMILIES["gpt_oss"]())
    assert view.read("layers.1.router.3").shape == (WIDTH,)
    assert view.read("layers.1.router_bias.3").shape == (1,)
    bias = view.model.model.layers[1].mlp.router.bias
    assert view.read("layers.1.router_bias.3").item() == bias[3].item()


def test_encoder_and_decoder_layers_have_different_names() -> None:
    view = view_moe(FAMILIES["switch"]())
    assert [layer.name for layer in view.layers] == ["encoder.layers.1", "decoder.layers.1"]
    assert view.layers[1].path == "decoder.block.1.layer.2.mlp"


def test_blocks_of_one_layer_keep_their_paths() -> None:
    block = nn.ModuleDict({"first": ListedMoE(ListedConfig()), "second": ListedMoE(ListedConfig())})
    view = view_moe(nn.ModuleDict({"layers": nn.ModuleList([block])}))
    assert [layer.name for layer in view.layers] == ["layers.0.first", "layers.0.second"]


def test_write_refuses_another_shape_or_dtype() -> None:
    view = view_moe(FAMILIES["olmoe"]())
    name = "layers.0.experts.1.up_proj"
    before = view.read(name).clone()
    with pytest.raises(ValueError, match=r"must be torch.float32 of shape \(12, 16\), got"):
        view.write(name, before.T)
    with pytest.raises(ValueError, match=r"got torch.float64 of shape"):
        view.write(name, before.double())
    assert torch.equal(view.read(name), before)


@pytest.mark.parametrize("name", ["layers.0.experts.8.up_proj", "layers.9.router.0", ""])
def test_unknown_names_are_errors(name: str) -> None:
    view = view_moe(FAMILIES["olmoe"]())
    with pytest.raises(KeyError, match="must be an expert tensor or router row"):
        view.read(name)
    with pytest.raises(KeyError, match="must be an expert tensor or router row"):
        view.write(name, torch.zeros(1))


@pytest.mark.parametrize("expert", [-1, EXPERTS])
def test_an_expert_out_of_range_is_an_error(expert: int, x_TD: Tensor) -> None:
    layer = view_moe(FAMILIES["olmoe"]()).layers[0]
    with pytest.raises(IndexError, match=r"expert must be in 0\.\.7"):
        layer.expert_tensors(expert)
    with pytest.raises(IndexError, match=r"expert must be in 0\.\.7"):
        layer.run_expert(expert, x_TD)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_moe_16b"])
def test_gradients_flow_through_expert_tensors(family: str, x_TD: Tensor) -> None:
    view = view_moe(FAMILIES[family]())
    view.layers[0].expert_tensors(3)["down_proj"].sum().backward()
    named = dict(view.model.named_parameters())
    touched = {name for name, p in named.items() if p.grad is not None}
    assert touched
    assert touched <= view.routed_parameters()
    assert sum(float(named[name].grad.sum()) for name in touched) == WIDTH * EXPERT_WIDTH


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_moe_16b"])
def test_lora_on_attention_changes_neither_names_nor_values(family: str) -> None:
    model = FAMILIES[family]()
    view = view_moe(model)
    values = {name: view.read(name).clone() for name in view.names()}
    routed, routers = view.routed_parameters(), view.router_parameters()
    peft.inject_adapter_in_model(peft.LoraConfig(**LORA), model)
    after = view_moe(model)
    assert after.names() == view.names()
    assert all(torch.equal(values[name], after.read(name)) for name in values)
    assert (after.routed_parameters(), after.router_parameters()) == (routed, routers)


def test_a_wrapped_model_keeps_its_names() -> None:
    names = view_moe(FAMILIES["qwen2_moe"]()).names()
    wrapped = peft.get_peft_model(FAMILIES["qwen2_moe"](), peft.LoraConfig(**LORA))
    view = view_moe(wrapped)
    assert view.names() == names
    assert view.layers[0].path == "base_model.model.model.layers.0.mlp"
    assert view.routed_parameters() <= dict(wrapped.named_parameters()).keys()


def test_lora_on_experts_changes_neither_names_nor_values() -> None:
    model = FAMILIES["qwen2_moe"]()
    names = view_moe(model).names()
    expected = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets, lora_dropout=0.0)
    peft.inject_adapter_in_model(config, model)
    view = view_moe(model)
    assert view.names() == names
    assert torch.equal(view.read("layers.0.experts.6.down_proj"), expected[6])
    assert not any("lora" in name for name in view.routed_parameters())
    with record_routing(view) as record:
        model(**batch_of(model))
    assert record.expert_counts(1).sum() == 14 * 2


def test_forward_passes_append() -> None:
    view = view_moe(FAMILIES["mixtral"]())
    first, second = batch_of(view.model, seed=1), batch_of(view.model, seed=2, num_padding=2)
    with record_routing(view) as record:
        view.model(**first)
        record.token_mask_BS = second["attention_mask"]
        view.model(**second)
        view.model(**second)
    entry = record.layers[1]
    assert entry.choices_TK.shape == (42, 2)
    assert entry.probabilities_TE.shape == (42, EXPERTS)
    assert torch.equal(entry.choices_TK[14:28], entry.choices_TK[28:])
    assert not torch.equal(entry.choices_TK[:14], entry.choices_TK[14:28])
    assert record.expert_counts(1).sum() == (14 + 12 + 12) * 2


def test_encoder_and_decoder_have_their_own_masks() -> None:
    view = view_moe(FAMILIES["switch"]())
    batch = batch_of(view.model, num_padding=3)
    decoder_mask = torch.ones(2, 5)
    decoder_mask[0, 1:] = 0
    with record_routing(
        view, token_mask_BS=batch["attention_mask"], decoder_token_mask_BS=decoder_mask
    ) as record:
        view.model(**batch)
    assert [int(record.expert_counts(layer).sum()) for layer in (0, 1)] == [11, 6]


def test_a_mask_of_another_batch_is_an_error_and_hooks_are_removed() -> None:
    view = view_moe(FAMILIES["olmoe"]())
    with (
        pytest.raises(ValueError, match=r"token_mask_BS must cover the 14 tokens"),
        record_routing(view, token_mask_BS=torch.ones(2, 6)),
    ):
        view.model(**batch_of(view.model))
    for module in view.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    view.model(**batch_of(view.model))


def test_an_empty_record_and_dropped_probabilities_are_errors() -> None:
    view = view_moe(FAMILIES["olmoe"]())
    with record_routing(view, keep_probabilities=False) as record:
        with pytest.raises(ValueError, match="must hold a forward pass"):
            record.expert_counts(0)
        view.model(**batch_of(view.model))
    with pytest.raises(ValueError, match="must hold probabilities"):
        _ = record.layers[0].probabilities_TE
    assert record.expert_counts(0).sum() == 28


def test_checkpointing_records_a_token_once() -> None:
    model = FAMILIES["mixtral"]().train()
    model.gradient_checkpointing_enable()
    view = view_moe(model)
    batch = batch_of(model)
    with record_routing(view) as record:
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    assert model.model.layers[0].mlp.experts.down_proj.grad.any()
    assert [entry.choices_TK.shape for entry in record.layers] == [(14, 2)] * 2


def test_checkpointing_records_a_token_of_a_listed_block_once(x_TD: Tensor) -> None:
    view = view_moe(FAMILIES["deepseek_moe_16b"]())
    x = x_TD[None].requires_grad_()
    with record_routing(view) as record:
        checkpoint(view.layers[0].block, x, use_reentrant=False).sum().backward()
    assert x.grad.any()
    assert record.layers[0].choices_TK.shape == (9, 2)


def test_a_router_that_returns_probabilities_is_not_softmaxed_twice() -> None:
    view = view_moe(FAMILIES["mixtral"]())
    with record_routing(view) as before:
        view.model(**batch_of(view.model))
    for layer in view.layers:
        layer.router.register_forward_hook(
            lambda _, args, output: (output[0].softmax(dim=-1), *output[1:])
        )
    with record_routing(view) as after:
        view.model(**batch_of(view.model))
    torch.testing.assert_close(before.layers[0].probabilities_TE, after.layers[0].probabilities_TE)


def test_an_unreadable_router_output_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"router output must hold .* got \[\(3, 8\)\]"):
        read_router_output((torch.ones(3, 8),), num_experts=8, block=nn.Module())


def test_a_lookalike_without_a_router_is_not_an_moe() -> None:
    listed = ListedMoE(ListedConfig())
    heads = copy.deepcopy(listed.experts)
    model = nn.ModuleDict({"heads": heads, "moe": listed})
    assert [layer.path for layer in view_moe(model).layers] == ["moe"]
