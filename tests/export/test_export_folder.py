"""An exported folder, loaded without Orchard, is the model that the run measured."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from federations import quick_recipe, run_quickly
from orchard.export.folder import export_model
from orchard.export.layouts import Layout
from orchard.models.view.detection import view_moe
from orchard.personal.opening import open_model
from orchard.personal.state import ModelState, find_models, read_state
from tiny_exports import FAMILIES, IDS, MASK, checkpoint, logits_of, recipe_on, state_of

UNEVEN = {"layers.0": (1, 4), "layers.1": (0, 3, 6)}


def written(model: Any) -> list[list[int]]:
    return model.generate(
        input_ids=IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False, pad_token_id=0
    ).tolist()


def check(state: ModelState, out: Path, *, close: float = 1e-5, layout: Layout = "auto") -> Any:
    done = export_model(state, out, layout=layout, shard_bytes=20_000)
    loaded, found = transformers.AutoModelForCausalLM.from_pretrained(
        out,
        dtype=torch.float32,
        experts_implementation="eager",
        trust_remote_code=not done.is_stock,
        output_loading_info=True,
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded.eval()
    with open_model(state) as opened:
        expected = logits_of(opened.model)
        largest = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(logits_of(loaded), expected, atol=close * largest, rtol=0)
        assert written(loaded) == written(opened.model)
    base = transformers.AutoModelForCausalLM.from_pretrained(state.recipe.model.path)
    assert not torch.allclose(logits_of(loaded), logits_of(base), atol=1e-2)
    return loaded


@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(f, marks=pytest.mark.long) for f in FAMILIES[1:])]
)
def test_a_shared_model_loads_as_its_family(family: str, tmp_path: Path) -> None:
    recipe = recipe_on(checkpoint(family, tmp_path / "base"), family, "fedavg")
    loaded = check(state_of(recipe), tmp_path / "out")
    assert type(loaded).__module__.startswith("transformers.models.")


@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(f, marks=pytest.mark.long) for f in FAMILIES[1:])]
)
@pytest.mark.parametrize("grafts", [(3,), (3, 5)])
def test_a_grafted_model_loads_by_its_own_file(
    family: str, grafts: tuple[int, ...], tmp_path: Path
) -> None:
    recipe = recipe_on(checkpoint(family, tmp_path / "base"), family, "flex")
    loaded = check(state_of(recipe, grafts=grafts), tmp_path / "out", layout="family")
    assert type(loaded).__name__ == "GraftedForCausalLM"


def test_a_carved_model_is_its_family_with_fewer_experts(tmp_path: Path) -> None:
    recipe = recipe_on(checkpoint("qwen2_moe", tmp_path / "base"), "qwen2_moe", "hfedmoe")
    loaded = check(state_of(recipe, held=(1, 4, 6)), tmp_path / "out")
    assert loaded.config.num_experts == 3
    assert type(loaded).__module__.startswith("transformers.models.")


ALONE = """
import sys
sys.modules["orchard"] = None
import torch
from transformers import AutoModelForCausalLM

folder, ids, mask = sys.argv[1], *torch.load(sys.argv[2])
about = {"trust_remote_code": True, "experts_implementation": "eager"}
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, device_map="auto", **about
)
with torch.no_grad():
    logits = model(input_ids=ids, attention_mask=mask).logits
    steps = model(input_ids=ids[:1, :3], use_cache=True)
    rest = model(input_ids=ids[:1, 3:], past_key_values=steps.past_key_values)
torch.testing.assert_close(rest.logits, logits[:1, 3:], atol=1e-4, rtol=1e-4)
how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
text = model.generate(input_ids=ids, attention_mask=mask, **how)
model.train()
grads = []
for checkpointed in (False, True):
    if checkpointed:
        model.gradient_checkpointing_enable()
    model.zero_grad()
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    grads.append([p.grad.clone() for n, p in model.named_parameters() if ".graft." in n])
assert all(torch.equal(*pair) for pair in zip(*grads, strict=True)) and grads[0]
narrow = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **about)
kept = {n: p.dtype for n, p in narrow.named_parameters() if ".graft." in n}
assert {d for n, d in kept.items() if "opening" in n or "mixer" in n} == {torch.float32}
assert {d for n, d in kept.items() if "members" in n} == {torch.bfloat16}
with torch.no_grad():
    close = narrow(input_ids=ids, attention_mask=mask).logits.float()
assert (close - logits)[mask.bool()].abs().mean() < 0.1 * logits[mask.bool()].abs().mean()
torch.save((logits[mask.bool()], text.tolist()), sys.argv[3])
"""


@pytest.mark.long
@pytest.mark.parametrize("grafts", [(3,), (3, 5)])
def test_a_grafted_folder_needs_transformers_alone(grafts: tuple[int, ...], tmp_path: Path) -> None:
    recipe = recipe_on(checkpoint("qwen3_moe", tmp_path / "base"), "qwen3_moe", "flex")
    state = state_of(recipe, grafts=grafts)
    export_model(state, tmp_path / "out")
    torch.save((IDS, MASK), tmp_path / "in.pt")
    script = [
        sys.executable,
        "-c",
        ALONE,
        tmp_path / "out",
        tmp_path / "in.pt",
        tmp_path / "got.pt",
    ]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits, text = torch.load(tmp_path / "got.pt")
    with open_model(state) as opened:
        expected = logits_of(opened.model)
        assert written(opened.model) == text
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(logits, expected, atol=1e-5 * largest, rtol=0)


def test_a_grafted_folder_is_refused_without_trust(tmp_path: Path) -> None:
    recipe = recipe_on(checkpoint("qwen2_moe", tmp_path / "base"), "qwen2_moe", "flex")
    export_model(state_of(recipe, grafts=(3,)), tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


KINDS = {
    "fedavg": quick_recipe("fedavg", "server.rounds=1"),
    "two grafts": quick_recipe("flex", "server.rounds=1", "strategy.graft_experts=2"),
    "dense": quick_recipe("flex", "server.rounds=1", "strategy.graft_kind=dense"),
    "closed, convex": quick_recipe(
        "flex", "server.rounds=1", "strategy.graft_gate=closed", "strategy.graft_mix=convex"
    ),
    "difference": quick_recipe(
        "flex", "server.rounds=1", "strategy.graft_experts=2", "strategy.graft_mix=difference"
    ),
    "orchard": quick_recipe("orchard", "client.lr=0.01"),
    "ditto": quick_recipe("ditto", "server.rounds=1"),
    "local": quick_recipe("local", "server.rounds=1"),
    "full": quick_recipe(
        "fedavg",
        "server.rounds=1",
        "model.lora_targets=",
        "model.full_targets=experts,router,q_proj",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_trained_is_what_loads(kind: str, tmp_path: Path) -> None:
    run_quickly(tmp_path / "run", KINDS[kind])
    state = read_state(tmp_path / "run", client=find_models(tmp_path / "run")[0])
    done = export_model(state, tmp_path / "out")
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, trust_remote_code=not done.is_stock
    ).eval()
    with open_model(state) as opened:
        expected = logits_of(opened.model)
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(logits_of(loaded), expected, atol=1e-5 * largest, rtol=0)
    assert loaded.generation_config.eos_token_id
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("abc").input_ids == opened.tokenizer("abc").input_ids


def test_a_base_that_changed_is_refused(tmp_path: Path) -> None:
    recipe = recipe_on(checkpoint("qwen2_moe", tmp_path / "base"), "qwen2_moe", "fedavg")
    state = replace(state_of(recipe), base_digest="ab" * 32)
    with pytest.raises(ValueError, match="must be abababababab"):
        export_model(state, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "grafts"),
    [
        ("qwen2_moe", ()),
        *(
            pytest.param(family, grafts, marks=pytest.mark.long)
            for family in ("qwen2_moe", "mixtral", "gpt_oss", "granitemoe")
            for grafts in ((), (3,))
        ),
    ],
)
def test_layers_may_hold_different_numbers_of_experts(
    family: str, grafts: tuple[int, ...], tmp_path: Path
) -> None:
    method = "flex+hfedmoe" if grafts else "hfedmoe"
    recipe = recipe_on(checkpoint(family, tmp_path / "base"), family, method)
    state = replace(state_of(recipe, grafts=grafts), client_id="north", held_experts=UNEVEN)
    loaded = check(state, tmp_path / "out")
    assert [layer.num_experts for layer in view_moe(loaded).layers] == [2, 3]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("layers.0.experts.9.down_proj.lora_A", 1.0, "must have a place"),
        ("layers.0.self_attn.q_proj.lora_B", float("nan"), "q_proj"),
    ],
)
def test_a_merge_that_fails_writes_nothing(
    name: str, value: float, says: str, tmp_path: Path
) -> None:
    recipe = recipe_on(checkpoint("qwen2_moe", tmp_path / "base"), "qwen2_moe", "fedavg")
    state = state_of(recipe)
    like = state.shared.get(name, torch.zeros(2, 12))
    spoiled = replace(state, shared={**state.shared, name: torch.full_like(like, value)})
    with pytest.raises(ValueError, match=says):
        export_model(spoiled, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
