"""Checkpoints of text and images, as published: their text is what trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from family_checks import check_names, check_trained, logits_of
from orchard.models.stored.loading import check_checkpoint, load_base, without_progress_bars
from orchard.models.stored.streaming import checkpoint_reader, streamed_experts
from orchard.models.stored.submodel import load_skeleton, load_submodel
from orchard.models.trainable.targets import LoraSettings
from orchard.models.view.detection import find_auto_class
from tiny_composites import composite_builder_of
from tiny_models import EXPERT_WIDTH, EXPERTS, VOCABULARY, WIDTH, randomize

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "intermediate_size": 24,
    "moe_intermediate_size": EXPERT_WIDTH,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 16,
    "patch_size": 4,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
    "out_hidden_size": WIDTH,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
LINEAR = {
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 20,
}
LORA = LoraSettings(2, 4.0, 0.0, ("attention", "router", "experts"))


def _write(kind: str, folder: Path, **more: Any) -> str:
    # The fields of each config are those of its class; an unknown one would stand in it unused.
    config = getattr(transformers, f"{kind}Config")(
        text_config=TEXT | more, vision_config=dict(VISION)
    )
    with torch.random.fork_rng():
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    randomize(model)
    model.save_pretrained(folder)
    return str(folder)


WRITERS: dict[str, Callable[[Path], str]] = {
    "Qwen3_5Moe": lambda folder: _write("Qwen3_5Moe", folder, **LINEAR),
    "Qwen3VLMoe": lambda folder: _write("Qwen3VLMoe", folder),
}


@pytest.mark.parametrize("kind", WRITERS)
@torch.no_grad()
def test_a_composite_checkpoint_is_checked_loaded_streamed_and_carved(
    kind: str, tmp_path: Path
) -> None:
    path = WRITERS[kind](tmp_path)
    ids_BS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    checked = check_checkpoint(path, LORA)
    assert checked.vocabulary == VOCABULARY
    assert [layer.name for layer in checked.view.layers] == ["layers.0", "layers.1"]
    whole = load_base(path, dtype="float32").view
    expected = whole.model(input_ids=ids_BS).logits
    original = getattr(transformers, f"{kind}ForConditionalGeneration").from_pretrained(path)
    torch.testing.assert_close(original(input_ids=ids_BS).logits, expected)

    skeleton = load_skeleton(path, dtype="float32")
    with streamed_experts(skeleton, checkpoint_reader(path, "float32")):
        torch.testing.assert_close(skeleton.model(input_ids=ids_BS).logits, expected)
    everything = [range(EXPERTS)] * 2
    carved = load_submodel(path, everything, dtype="float32")
    torch.testing.assert_close(carved.model(input_ids=ids_BS).logits, expected)
    some = load_submodel(path, [[1, 4, 5], [0, 7]], dtype="float32")
    assert all(torch.equal(some.read(name), whole.read(name)) for name in some.names())
    assert some.model(input_ids=ids_BS).logits.isfinite().all()


@pytest.mark.parametrize("kind", WRITERS)
def test_the_text_of_a_composite_checkpoint_is_trained(kind: str, tmp_path: Path) -> None:
    model = load_base(WRITERS[kind](tmp_path), dtype="float32").view.model
    check_names(model)
    check_trained(model, logits_of(model))


def test_of_a_model_that_also_speaks_the_part_that_answers_in_text_is_read(tmp_path: Path) -> None:
    model = composite_builder_of("qwen3_omni_moe_thinker")()
    with without_progress_bars():
        model.save_pretrained(tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())
    published = {
        "model_type": "qwen3_omni_moe",
        "thinker_config": own,
        "enable_audio_output": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    file = tmp_path / "model.safetensors"
    tensors = {f"thinker.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors | {"talker.model.codec_embedding.weight": torch.zeros(2, 2)}, file)
    view = load_base(str(tmp_path), dtype="float32").view
    assert torch.equal(logits_of(view.model), logits_of(model))
    some = load_submodel(str(tmp_path), [[0, 3]] * len(view.layers), dtype="float32")
    assert all(torch.equal(some.read(name), view.read(name)) for name in some.names())


def test_a_type_without_a_language_model_is_named_in_one_line() -> None:
    with pytest.raises(ValueError, match="got model_type vit, for which") as caught:
        find_auto_class(transformers.ViTConfig())
    assert len(str(caught.value)) < 160
