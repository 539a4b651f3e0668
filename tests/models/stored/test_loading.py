"""From a path to a base, or to one clear error."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from orchard import trees
from orchard.models.stored.loading import (
    PACKAGED,
    check_model,
    load_base,
    load_config,
    load_tokenizer,
    resolve,
    threads,
    without_progress_bars,
)
from orchard.models.stored.tensors import Checkpoint
from orchard.models.trainable.targets import LoraSettings
from tiny_models import FAMILIES, VOCABULARY, batch_of, dense


def save_tokenizer(folder: Path, **special: str) -> None:
    vocab = {name: index for index, name in enumerate(["<pad>", "<s>", "</s>"])}
    vocab |= {f"w{index}": index for index in range(len(vocab), VOCABULARY)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny model")
    FAMILIES["qwen2_moe"]().save_pretrained(folder)
    save_tokenizer(folder, eos_token="</s>", pad_token="<pad>")
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refuse(path: Path | str, match: str, error: type[Exception] = ValueError) -> None:
    """Demand that both the check and the load refuse a path, in one line."""
    with pytest.raises(error, match=match) as caught:
        check_model(str(path), LoraSettings(4, 8, 0, ("q_proj",)))
    assert len(str(caught.value).splitlines()) == 1


def test_a_saved_model_loads_with_the_same_logits(saved: Path) -> None:
    check_model(str(saved), LoraSettings(4, 8, 0, ("q_proj", "router", "experts")))
    base = load_base(str(saved), dtype="float32")
    model = FAMILIES["qwen2_moe"]()
    with torch.no_grad():
        assert torch.equal(
            base.view.model(**batch_of(model)).logits,  # type: ignore[operator]
            model(**batch_of(model)).logits,
        )
    assert not base.view.model.training
    assert not any(parameter.requires_grad for parameter in base.view.model.parameters())


def test_the_digest_is_that_of_all_tensors(saved: Path) -> None:
    base = load_base(str(saved), dtype="float32")
    model = base.view.model
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert base.digest == trees.digest(state)
    assert base.digest == load_base(str(saved), dtype="float32").digest
    half = load_base(str(saved), dtype="bfloat16")
    assert half.digest != base.digest
    assert {p.dtype for p in half.view.model.parameters()} == {torch.bfloat16}


def test_the_digest_notices_one_changed_weight(copy: Path) -> None:
    before = load_base(str(copy), dtype="float32").digest
    model = FAMILIES["qwen2_moe"]()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[7, 0, 0] += 1
    model.save_pretrained(copy)
    assert load_base(str(copy), dtype="float32").digest != before


def test_a_folder_without_weights_is_an_error(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    refuse(copy, r"^model\.path must hold weights in \*\.safetensors, got .*copy without; ")
    with pytest.raises(ValueError, match=r"must hold weights in \*\.safetensors"):
        load_base(str(copy), dtype="float32")


def test_a_folder_without_config_is_an_error(copy: Path) -> None:
    (copy / "config.json").unlink()
    refuse(copy, r"^model\.path must hold a config\.json, got .*copy without; ")


@pytest.mark.parametrize("text", ["no json", "{}", '{"model_type": "unheard_of"}'])
def test_a_config_that_cannot_be_read_is_an_error(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    refuse(copy, r"^model\.path must lead to a model, got .*copy \(.*\); check")


@pytest.mark.parametrize(
    "family",
    ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "qwen2_moe", "qwen3_moe", "olmoe"],
)
def test_a_folder_without_tokenizer_is_an_error(family: str, tmp_path: Path) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    message = f"model.path must hold a tokenizer, got {tmp_path} without; "
    message += "download the files of its tokenizer too"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_cannot_be_read_is_told_from_one_that_is_not_there(
    name: str, copy: Path
) -> None:
    save_tokenizer(copy)
    (copy / name).write_text('{"version": ')
    match = r"^model\.path must hold a tokenizer that can be read, got .*copy \(.+\); download"
    with pytest.raises(ValueError, match=match) as caught:
        load_tokenizer(str(copy))
    assert len(str(caught.value).splitlines()) == 1


def test_a_tokenizer_without_an_end_is_an_error(copy: Path) -> None:
    save_tokenizer(copy)
    with pytest.raises(ValueError, match=r"^tokenizer must have an end-of-text token, got none in"):
        load_tokenizer(str(copy))


def test_a_tokenizer_without_padding_pads_with_its_end(copy: Path) -> None:
    save_tokenizer(copy, eos_token="</s>")
    tokenizer = load_tokenizer(str(copy))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_a_tokenizer_keeps_its_padding(saved: Path) -> None:
    assert load_tokenizer(str(saved)).pad_token_id == 0


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "~/nowhere/x", "nowhere"])
def test_a_missing_folder_is_an_error(path: str) -> None:
    message = f"model.path must be an existing folder or a hub name, got {path}; check the spelling"
    refuse(path, f"^{re.escape(message)}$", FileNotFoundError)


def test_a_file_is_no_folder(saved: Path) -> None:
    refuse(saved / "model.safetensors", r"^model\.path must hold a config\.json")


def test_an_unknown_packaged_model_names_those_there_are() -> None:
    refuse("orchard:huge", r"^model\.path must be a folder, a hub name or orchard:tiny, got")


def test_a_hub_name_is_left_to_the_hub() -> None:
    assert resolve("Qwen/Qwen1.5-MoE-A2.7B") == "Qwen/Qwen1.5-MoE-A2.7B"


def test_a_dense_model_is_an_error(tmp_path: Path) -> None:
    dense().save_pretrained(tmp_path)
    refuse(tmp_path, r"^model must have at least one MoE layer, got a dense Qwen2ForCausalLM; ")
    with pytest.raises(ValueError, match="got a dense Qwen2ForCausalLM"):
        load_base(str(tmp_path), dtype="float32")


def test_an_unknown_target_is_found_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"got c_attn; this model has k_proj, o_proj, q_proj"):
        check_model(str(copy), LoraSettings(4, 8, 0, ("c_attn",)))


def test_the_check_reads_no_weights(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Checkpoint, "read")
    check_model(str(copy), LoraSettings(4, 8, 0, ("q_proj", "router", "experts")))
    assert load_config(str(copy)).num_experts == 8


def test_weights_that_cannot_be_read_are_an_error_that_names_the_path(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"not weights")
    refuse(copy, r"^model\.path must hold readable weights, got no header in model\.safetensors; ")
    with pytest.raises(ValueError, match=r"^model\.path must hold readable weights, got no header"):
        load_base(str(copy), dtype="float32")


@pytest.mark.skipif(
    not (PACKAGED["orchard:tiny"] / "model.safetensors").is_file(),
    reason="the packaged tiny model is not built",
)
def test_the_packaged_model_loads() -> None:
    assert resolve("orchard:tiny") == str(PACKAGED["orchard:tiny"])
    check_model("orchard:tiny", LoraSettings(4, 8, 0, ("q_proj", "k_proj", "v_proj")))
    tokenizer = load_tokenizer("orchard:tiny")
    assert tokenizer.decode(tokenizer("An apple tree.")["input_ids"]) == "An apple tree."
    base = load_base("orchard:tiny", dtype="float32")
    assert len(base.view.layers) >= 2
    assert len(tokenizer) <= load_config("orchard:tiny").vocab_size


def test_threads_are_limited_for_a_while_only() -> None:
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with threads(0):
        assert torch.get_num_threads() == before


@pytest.mark.parametrize("was_enabled", [True, False])
def test_progress_bars_are_afterwards_as_they_were(was_enabled: bool) -> None:
    before = transformers_logging.is_progress_bar_enabled()
    switch = {
        True: transformers_logging.enable_progress_bar,
        False: transformers_logging.disable_progress_bar,
    }
    try:
        switch[was_enabled]()
        with without_progress_bars():
            assert not transformers_logging.is_progress_bar_enabled()
        assert transformers_logging.is_progress_bar_enabled() == was_enabled
    finally:
        switch[before]()
