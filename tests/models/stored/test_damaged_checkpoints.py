"""A checkpoint that is not whole is refused by name, by whatever reads it, before it trains."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from federations import quick_recipe, short_first, short_model
from orchard.communication.audit import read_audit
from orchard.communication.refusals import Code
from orchard.deployment.consent import Consent, SiteSettings
from orchard.deployment.site_worker import SiteWorker
from orchard.experiment.planning import make_plan, plan_sentences
from orchard.experiment.preparation import data_notes, prepare_experiment
from orchard.models.stored.loading import check_model, load_base
from orchard.models.stored.streaming import checkpoint_reader
from orchard.models.stored.submodel import load_skeleton, load_submodel
from orchard.models.stored.tensors import INDEX, SINGLE
from orchard.models.trainable.targets import LoraSettings
from orchard.recipe.reading import to_toml
from sites import site_recipe, write_sites
from tiny_checkpoints import FUSED, save

Tensors = dict[str, Tensor]
NO_LORA = LoraSettings(1, 1.0, 0.0, ())
EXPERT = "model.layers.1.mlp.experts.2"


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(short_model(), folder / "base"))


def rewrite(base: Path, change: Callable[[Tensors], Mapping[str, Tensor]]) -> None:
    tensors = change(load_file(base / SINGLE))
    save_file(dict(tensors), base / SINGLE, metadata={"format": "pt"})


def without(*parts: str) -> Callable[[Path], None]:
    def damage(base: Path) -> None:
        rewrite(base, lambda own: {k: v for k, v in own.items() if not any(p in k for p in parts)})

    return damage


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return lambda base: rewrite(
        base, lambda own: {name.replace(old, new): tensor for name, tensor in own.items()}
    )


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return lambda base: rewrite(base, lambda own: {**own, name: change(own[name]).contiguous()})


def configured(**fields: Any) -> Callable[[Path], None]:
    def damage(base: Path) -> None:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, **fields}))

    return damage


def twice(base: Path) -> None:
    def add(own: Tensors) -> Tensors:
        fused = [own[f"model.layers.1.mlp.experts.{i}.down_proj.weight"] for i in range(8)]
        return {**own, "model.layers.1.mlp.experts.down_proj": torch.stack(fused)}

    rewrite(base, add)


def shard(base: Path, *, index: bool = True) -> list[Path]:
    """Write the checkpoint as two shards, and return them."""
    tensors = load_file(base / SINGLE)
    (base / SINGLE).unlink()
    names = [sorted(tensors)[0::2], sorted(tensors)[1::2]]
    files = [base / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, own in zip(files, names, strict=True):
        save_file({name: tensors[name] for name in own}, file, metadata={"format": "pt"})
    if index:
        places = {name: f.name for f, own in zip(files, names, strict=True) for name in own}
        (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return files


def edit_index(base: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((base / INDEX).read_text())
    change(index["weight_map"])
    (base / INDEX).write_text(json.dumps(index))


def missing_shard(base: Path) -> None:
    shard(base)[1].unlink()


def truncated_shard(base: Path) -> None:
    file = shard(base)[1]
    file.write_bytes(file.read_bytes()[:-5])


def in_two_shards(base: Path) -> None:
    first, second = shard(base)
    name = "model.norm.weight"
    for file in (first, second):
        save_file({**load_file(file), name: torch.ones(128)}, file, metadata={"format": "pt"})


def listed_twice(base: Path) -> None:
    shard(base)
    text = (base / INDEX).read_text()
    again = '"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors", '
    (base / INDEX).write_text(text.replace('"weight_map": {', again))


def wrong_shard(base: Path) -> None:
    shard(base)
    edit_index(
        base,
        lambda places: places.update(dict(zip(places, reversed(places.values()), strict=True))),
    )


def outside(base: Path) -> None:
    file = shard(base)[0]
    shutil.copy(file, base.parent / file.name)
    edit_index(
        base,
        lambda places: places.update({k: f"../{v}" for k, v in places.items() if v == file.name}),
    )


def unreadable_index(base: Path) -> None:
    shard(base)
    (base / INDEX).write_text('{"weight_map": [1, 2')


def bare_index(base: Path) -> None:
    shard(base)
    index = json.loads((base / INDEX).read_text())
    (base / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))


def lfs_pointer(base: Path) -> None:
    (base / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def quantized(base: Path) -> None:
    configured(quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})(base)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "router": (
        without("layers.1.mlp.gate.weight"),
        r"without a tensor: model\.layers\.1\.mlp\.gat",
    ),
    "q_proj": (without("layers.0.self_attn.q_proj.weight"), r"a tensor: model\.layers\.0\.self_at"),
    "expert": (without(f"{EXPERT}."), rf"without 3 tensors: {EXPERT}\.down_proj\.weight, {EXPERT}"),
    "projection": (without(f"{EXPERT}.up_proj"), rf"without a tensor: {EXPERT}\.up_proj\.weight;"),
    "experts of a layer": (
        without("layers.1.mlp.experts."),
        r"without 2 tensors: model\.layers\.1",
    ),
    "layer": (without("layers.1."), r"without \d+ tensors: model\.layers\.1\.input_layernorm\.wei"),
    "prefix": (
        renamed("model.", "transformer."),
        r"without \d+ tensors: (lm_head|model\.embed_to)",
    ),
    "head": (configured(tie_word_embeddings=False), r"without a tensor: lm_head\.weight; "),
    "numbers": (renamed(f"{EXPERT}.", EXPERT[:-1] + "8."), r"must hold 8 experts for .* got model"),
    "one shape": (
        changed(f"{EXPERT}.down_proj.weight", lambda t: t[:-1]),
        rf"must have one shape, .*{EXPERT}\.down_proj\.weight",
    ),
    "shape": (
        changed("model.norm.weight", lambda t: t[:-1]),
        r"^model\.norm\.weight must have shape \(128,\), as config.json says, got \(127,\)",
    ),
    "wide config": (
        configured(moe_intermediate_size=192),
        r"must have shape .* as config\.json sa",
    ),
    "fewer experts": (
        configured(num_experts=7),
        r"must hold 7 experts for .*, got model\.layers\.",
    ),
    "twice": (twice, r"must hold one tensor for model\.layers\.1\.mlp\.experts\.down_proj, got "),
    "integers": (
        changed("model.norm.weight", lambda t: t.to(torch.int8)),
        r"model\.norm\.weight must hold real numbers, got torch\.int8",
    ),
    "fp8": (
        changed("model.norm.weight", lambda t: t.to(torch.float8_e4m3fn)),
        r"tensors of a plain dtype, got F8_E4M3 for model\.norm\.weight; choose a checkpoint that",
    ),
    "quantized": (quantized, r"weights that are not quantized, got .* quantization_config \(fp8\)"),
    "missing shard": (missing_shard, r"got model-00002-of-00002\.safetensors missing; download"),
    "truncated shard": (truncated_shard, r"got \d+ bytes in model-00002-of-00002\.safetensors; d"),
    "two shards": (
        in_two_shards,
        r"one tensor of each name, got model\.norm\.weight in model-0000",
    ),
    "listed twice": (listed_twice, r"cannot be read \(model\.norm\.weight stands twice\)"),
    "wrong shard": (
        wrong_shard,
        r"must hold .*, as model\.safetensors\.index\.json says, got a fi",
    ),
    "outside": (outside, r"must name files \*\.safetensors beside it, got '\.\./model-00001"),
    "index": (unreadable_index, r"must name the file of each tensor in a weight_map, beside its m"),
    "bare index": (bare_index, r"beside its metadata, got one that cannot be read \('metadata'\)"),
    "layers": (
        configured(num_hidden_layers=7),
        r"must lead to a model, got .*layer.*; check its config\.json",
    ),
    "pointer": (lfs_pointer, r"got a pointer of Git LFS in model\.safetensors; .* git lfs pull$"),
    "padding": (configured(pad_token_id=99_999), r"^pad_token_id must be in 0\.\.767, the rows of"),
    "no number": (
        configured(num_experts="many"),
        r"must lead to a model, got .* \(.*\); check its config",
    ),
    "more than all": (
        configured(num_experts_per_tok=9),
        r"^num_experts_per_tok must be in 1\.\.8, the experts of an MoE layer, got 9; correct conf",
    ),
    "none at all": (configured(num_experts_per_tok=0), r"^num_experts_per_tok must be in 1\.\.8, "),
    "negative": (configured(hidden_size=-128), r"^model\.path must lead to a model, got .*"),
}


@pytest.fixture(params=DAMAGES)
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    damage, match = DAMAGES[request.param]
    base = copied(tmp_path)
    damage(base)
    return str(base), match


def refused(match: str, read: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        read()
    assert len(str(caught.value).splitlines()) == 1


def test_damage_is_refused_by_plan_run_and_check_with_one_message(
    damaged: tuple[str, str],
) -> None:
    path, match = damaged
    recipe = quick_recipe("fedavg", f"model.path={path}")
    refused(match, lambda: make_plan(recipe))
    refused(match, lambda: prepare_experiment(recipe))
    refused(match, lambda: check_model(path, NO_LORA))


@pytest.mark.parametrize(
    ("text", "must"), [('{"eos_token_id": [', "JSON"), ("[1]", "a JSON object")]
)
def test_an_unreadable_generation_config_is_refused_by_plan_as_by_run(
    text: str, must: str, tmp_path: Path
) -> None:
    base = copied(tmp_path)
    (base / "generation_config.json").write_text(text)
    recipe = quick_recipe("fedavg", f"model.path={base}")
    match = rf"^generation_config\.json of model\.path must be {must}, got .*; repair it"
    refused(match, lambda: make_plan(recipe))
    refused(match, lambda: prepare_experiment(recipe))


@pytest.mark.parametrize("turn", ["{{ raise_exception('no') }}", "{% for %}"])
def test_a_chat_template_that_raises_is_refused_by_plan_as_by_run(
    turn: str, tmp_path: Path
) -> None:
    base = copied(tmp_path)
    (base / "chat_template.jinja").write_text(turn)
    recipe = quick_recipe("fedavg", f"model.path={base}", "data.template=chat")
    match = "^the tokenizer's chat template must render the turns user, assistant, got Template"
    refused(match, lambda: make_plan(recipe))
    refused(match, lambda: prepare_experiment(recipe))


@pytest.mark.parametrize(
    "name",
    short_first(
        [("router",), ("expert",), ("twice",), ("integers",), ("quantized",), ("missing shard",)],
        [(name,) for name in DAMAGES],
    ),
)
def test_damage_is_refused_where_a_base_is_loaded_without_a_check(
    name: str, tmp_path: Path
) -> None:
    damage, _ = DAMAGES[name]
    base = copied(tmp_path)
    damage(base)
    refused(".", lambda: load_base(str(base), dtype="float32"))
    refused(".", lambda: load_submodel(str(base), [range(4), range(4)], dtype="float32"))
    refused(".", lambda: load_skeleton(str(base), dtype="float32"))


@pytest.mark.parametrize("name", ["router", "expert", "head", "quantized", "truncated shard"])
def test_damage_is_refused_by_a_site_before_it_loads(name: str, tmp_path: Path) -> None:
    damage, match = DAMAGES[name]
    base = copied(tmp_path)
    damage(base)
    data = write_sites(tmp_path / "data", num_sites=1)
    (file,) = data.glob("*.jsonl")
    site = SiteWorker(
        SiteSettings(
            file.stem, tmp_path / "store", tmp_path / "socket", Consent(str(file), model=str(base))
        )
    )
    recipe = to_toml(site_recipe("fedavg", data))
    answer, _ = site.handle({"kind": "join", "run": "test", "recipe": recipe}, b"")
    assert (answer["refused"], answer["option"]) == (Code.DATA, "model.path")
    (entry,) = read_audit(tmp_path / "store" / "audit.jsonl")
    assert re.search(match, entry["reason"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", f"{EXPERT}.down_proj.weight"])
def test_a_base_that_is_not_finite_is_refused_by_name(
    name: str, value: float, tmp_path: Path
) -> None:
    base = copied(tmp_path)
    changed(name, lambda t: t.index_fill(0, torch.tensor([3]), value))(base)
    match = "^model.path must hold finite weights, got NaN or infinity in .*: model"
    refused(match, lambda: load_base(str(base), dtype="bfloat16"))
    refused(match, lambda: load_submodel(str(base), [[0, 2], [1, 2]], dtype="float32"))
    if "experts" in name:
        read = checkpoint_reader(str(base), "float32")
        assert read(1, 1)
        refused(match, lambda: read(1, 2))
    else:
        refused(match, lambda: load_skeleton(str(base), dtype="float32"))


@pytest.mark.parametrize(
    ("family", "original"),
    short_first(
        [(family, True) for family in FUSED],
        itertools.product(FUSED, [True, False]),
    ),
)
def test_a_whole_checkpoint_of_every_family_is_complete(
    family: str, original: bool, tmp_path: Path
) -> None:
    check_model(save(family, tmp_path, save_original_format=original), NO_LORA)


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_the_same_base_with_an_index_and_without(index: bool, tmp_path: Path) -> None:
    base = copied(tmp_path)
    shard(base, index=index)
    check_model(str(base), NO_LORA)
    loaded = load_base(str(base), dtype="float32")
    assert loaded.digest == load_base(short_model(), dtype="float32").digest


def test_a_shard_that_is_missing_without_an_index_is_told_by_its_tensors(tmp_path: Path) -> None:
    base = copied(tmp_path)
    shard(base, index=False)[1].unlink()
    refused(r"without \d+ tensors: ", lambda: check_model(str(base), NO_LORA))


def test_tensors_that_the_model_does_not_use_are_named_once(tmp_path: Path) -> None:
    base = copied(tmp_path)
    extra = {"model.layers.2.eh_proj.weight": torch.zeros(2, 2), "mtp.fc.weight": torch.zeros(2)}
    rewrite(base, lambda own: {**own, **extra})
    recipe = quick_recipe("fedavg", f"model.path={base}")
    (note,) = [n for n in data_notes(prepare_experiment(recipe)) if "does not use" in n]
    assert "2 tensors" in note
    assert all(name in note for name in extra)
    assert plan_sentences(make_plan(recipe)) == [note]
    loaded = load_base(str(base), dtype="float32")
    assert loaded.digest == load_base(short_model(), dtype="float32").digest


def test_an_output_layer_of_its_own_counts_though_the_configuration_ties_it(tmp_path: Path) -> None:
    base = copied(tmp_path)
    name = "model.embed_tokens.weight"
    rewrite(base, lambda own: {**own, "lm_head.weight": torch.ones_like(own[name])})
    whole = load_base(str(base), dtype="float32").view
    carved = load_submodel(str(base), [(0, 1)] * len(whole.layers), dtype="float32")
    for view in (whole, carved, load_skeleton(str(base), dtype="float32")):
        head, embedding = (view.model.get_parameter(n) for n in ("lm_head.weight", name))
        assert (head == 1).all()
        assert not (embedding == 1).all()


@pytest.mark.parametrize("is_sharded", [True, False])
def test_a_file_that_the_checkpoint_does_not_list_is_named_once(
    is_sharded: bool, tmp_path: Path
) -> None:
    base = copied(tmp_path)
    if is_sharded:
        shard(base)
    save_file({"model.norm.weight": torch.zeros(2)}, base / "model-00003-of-00003.safetensors")
    recipe = quick_recipe("fedavg", f"model.path={base}")
    (note,) = plan_sentences(make_plan(recipe))
    assert "1 safetensors files beside those of its model; they are not read: model-00003" in note
    assert data_notes(prepare_experiment(recipe)).count(note) == 1
    loaded = load_base(str(base), dtype="float32")
    assert loaded.digest == load_base(short_model(), dtype="float32").digest


def test_a_tokenizer_beyond_the_embedding_is_refused_where_a_text_needs_it(tmp_path: Path) -> None:
    base = copied(tmp_path)
    configured(vocab_size=700)(base)
    changed("model.embed_tokens.weight", lambda t: t[:700])(base)
    recipe = quick_recipe("fedavg", f"model.path={base}")
    (sentence,) = plan_sentences(make_plan(recipe, encodes=False))
    assert sentence.endswith("the embedding has 700 rows; text with a token beyond them is refused")
    for refusing in (make_plan, prepare_experiment):
        refused(r"^tokens must be in 0\.\.699, the rows of the embedd", partial(refusing, recipe))


def test_an_end_that_no_answer_can_hold_is_said_by_plan_as_by_run(tmp_path: Path) -> None:
    base = copied(tmp_path)
    (base / "generation_config.json").write_text('{"eos_token_id": [0, 768, 99999]}')
    recipe = quick_recipe("fedavg", f"model.path={base}")
    (note,) = plan_sentences(make_plan(recipe))
    assert note.endswith(
        "answers at token 768 and 99999, and the embedding has 768 rows; no answer can end there"
    )
    assert data_notes(prepare_experiment(recipe)).count(note) == 1


@pytest.mark.parametrize("token", ["pad_token", "eos_token"])
def test_a_special_token_beyond_the_embedding_is_refused(token: str, tmp_path: Path) -> None:
    base = copied(tmp_path)
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), token: "<|beyond|>"}))
    recipe = quick_recipe("fedavg", f"model.path={base}")
    match = rf"^{token} must be in 0\.\.767, the rows of the embedding, got '<\|beyond\|>' with 768"
    refused(match, lambda: make_plan(recipe))
    refused(match, lambda: prepare_experiment(replace(recipe)))
