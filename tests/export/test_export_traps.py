"""What others were caught by in exports of Mixture-of-Experts models."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from chat_styles import STYLES, styled_tokenizer
from federations import short_model
from orchard.experiment.settings import lora_settings
from orchard.export.folder import export_model
from orchard.export.parts import export_adapter
from orchard.models.stored.conversion import match_checkpoint
from orchard.models.stored.exported_parts import read_adapter, read_part
from orchard.personal.opening import open_model
from orchard.personal.state import ModelState
from tiny_checkpoints import build_one_group
from tiny_exports import FAMILIES, checkpoint, logits_of, recipe_on, state_of
from tiny_models import randomize

RANK = 3  # neither the number of experts nor a width


def trained(family: str, folder: Path) -> ModelState:
    path = checkpoint(family, folder)
    return state_of(recipe_on(path, family, "fedavg", f"model.lora_rank={RANK}"))


def base_of(state: ModelState) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        state.recipe.model.path, experts_implementation="eager"
    )


def with_peft(state: ModelState, adapter: Path) -> torch.Tensor:
    return logits_of(PeftModel.from_pretrained(base_of(state), adapter).eval())


def expected_of(state: ModelState) -> torch.Tensor:
    with open_model(state) as opened:
        return logits_of(opened.model)


# unslothai/unsloth-zoo#647, NVIDIA-NeMo/Automodel#1814
@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(f, marks=pytest.mark.long) for f in FAMILIES[1:])]
)
def test_names_and_shapes_are_those_that_peft_itself_saves(family: str, tmp_path: Path) -> None:
    state = trained(family, tmp_path / "base")
    export_adapter(state, tmp_path / "ours")
    about = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    config = LoraConfig(
        r=RANK,
        target_modules=about["target_modules"],
        target_parameters=about["target_parameters"],
    )
    get_peft_model(base_of(state), config).save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        {n: t.shape for n, t in load_file(tmp_path / own / "adapter_model.safetensors").items()}
        for own in ("ours", "theirs")
    )
    assert ours == theirs
    assert len({*ours.values()}) > 3


# unslothai/unsloth#6930
def test_factors_laid_out_the_other_way_are_another_model(tmp_path: Path) -> None:
    state = trained("qwen2_moe", tmp_path / "base")
    export_adapter(state, tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    expected = expected_of(state)
    torch.testing.assert_close(with_peft(state, tmp_path / "out"), expected, atol=1e-4, rtol=0)
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".experts." in name and "lora_B" in name:
            tensors[name] = tensor.unflatten(1, (RANK, -1)).transpose(1, 2).flatten(1).contiguous()
    save_file(tensors, file)
    assert (with_peft(state, tmp_path / "out") - expected).abs().max() > 1e-2


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[min(tensors)]


def name_each_expert(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".experts." in name]:
        for expert in range(8):
            tensors[name.replace("experts", f"experts.{expert}")] = tensors[name].clone()
        del tensors[name]


def name_as_vllm(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)


# NVIDIA-NeMo/Automodel#1814; PEFT loads such files as none, with a warning at best
@pytest.mark.parametrize("change", [drop_one, name_each_expert, name_as_vllm])
def test_an_adapter_under_other_names_is_never_read_as_a_fresh_one(
    change: Callable[[dict[str, torch.Tensor]], None], tmp_path: Path
) -> None:
    state = trained("qwen2_moe", tmp_path / "base")
    export_adapter(state, tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    view = match_checkpoint(state.recipe.model.path).whole
    with pytest.raises(ValueError, match="must"):
        read_adapter(read_part(tmp_path / "out"), view, lora_settings(state.recipe))


def test_every_one_of_128_experts_is_in_the_adapter_and_in_the_folder(tmp_path: Path) -> None:
    config = copy.deepcopy(build_one_group("qwen3_moe").config)
    config.num_experts = 128
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomize(model)
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(short_model()) / name, tmp_path / "base")
    options = ("model.lora_targets=experts", f"model.lora_rank={RANK}")
    state = state_of(recipe_on(str(tmp_path / "base"), "qwen3_moe", "hfedmoe", *options))
    assert len({name.split(".")[3] for name in state.shared}) == 128
    expected = expected_of(state)
    assert (expected - logits_of(base_of(state))).abs().max() > 1e-2
    export_adapter(state, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # one of a key that is missing
        merged = PeftModel.from_pretrained(base_of(state), tmp_path / "adapter")
    whole: Any = merged.merge_and_unload()
    torch.testing.assert_close(logits_of(whole.eval()), expected, atol=1e-4, rtol=0)
    export_model(state, tmp_path / "out", shard_bytes=200_000)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(loaded.eval()), expected, atol=1e-4, rtol=0)


def test_experts_are_counted_over_all_shards(tmp_path: Path) -> None:
    path = Path(checkpoint("qwen3_moe", tmp_path / "base"))
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    where = {name: f"{1 + ('.experts.' in name and '.experts.0.' not in name)}" for name in tensors}
    for number in ("1", "2"):
        own = {name: tensor for name, tensor in tensors.items() if where[name] == number}
        save_file(own, path / f"model-{number}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f"model-{w}.safetensors" for n, w in where.items()}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    state = state_of(recipe_on(str(path), "qwen3_moe", "fedavg"))
    export_model(state, tmp_path / "out", shard_bytes=2_000)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_local_experts"] == 8
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits_of(loaded), expected_of(state), atol=1e-4, rtol=0)


def test_a_chat_model_knows_where_its_turn_ends_where_its_base_does_not_say(
    tmp_path: Path,
) -> None:
    path = Path(checkpoint("qwen2_moe", tmp_path / "base"))
    (path / "generation_config.json").unlink()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    tokenizer = styled_tokenizer(STYLES["chatml"])
    tokenizer.save_pretrained(path)
    recipe = recipe_on(str(path), "qwen2_moe", "fedavg")
    recipe = replace(recipe, data=replace(recipe.data, template="chat"))
    state = state_of(recipe)
    export_model(state, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_end in loaded.generation_config.eos_token_id
    assert loaded.generation_config.pad_token_id is not None
