"""Expert load is what routers choose, and openness what gates say, token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import orchard
from orchard.cli import app
from orchard.data.world import offices
from orchard.models.view.routing import record_routing
from orchard.personal.observing import LayerLoad, expert_load, gate_openness, read_texts

TEXTS = ["Greet Mila", "The harbor office sells 12 fig, today.", "Mila"]


def call(*words: object) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, [str(word) for word in words])
    return found.exit_code, found.stdout, found.stderr


@pytest.mark.parametrize("batch_size", [1, 3])
def test_load_equals_a_count_of_every_routers_choices(run: Path, batch_size: int) -> None:
    with orchard.load(run, client="harbor") as opened:
        model = opened.adapted
        loads = expert_load(model, TEXTS, max_tokens=6, batch_size=batch_size)
        counted = [dict.fromkeys(layer.expert_ids, 0) for layer in model.view.layers]
        num_tokens = 0
        for text in TEXTS:
            ids = opened.tokenizer(text)["input_ids"][:6]
            num_tokens += len(ids)
            with record_routing(model.view) as seen, torch.inference_mode():
                model.model(input_ids=torch.tensor([ids]))
            for own, layer in zip(counted, seen.layers, strict=True):
                scores = layer.probabilities_TE
                top = scores.topk(layer.choices_TK.shape[1]).indices
                for expert in top.flatten().tolist():
                    own[expert] += 1
        assert [load.counts for load in loads] == counted
        assert {sum(load.counts.values()) for load in loads} == {num_tokens * top.shape[1]}


def test_balance_has_no_deviation_and_the_entropy_of_its_number() -> None:
    even = LayerLoad("a", {0: 5, 1: 5, 2: 5, 3: 5})
    assert even.deviation == 0
    assert even.entropy == pytest.approx(math.log(4))
    one = LayerLoad("a", {0: 20, 1: 0, 2: 0, 3: 0})
    assert one.entropy == 0
    assert one.deviation == pytest.approx(math.sqrt(75))


def test_the_command_counts_base_global_and_personal_on_the_same_text(
    run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "news.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    code, out, error = call("load", run, "--client", "harbor", "--data", path, "--json")
    assert (code, error) == (0, "")
    record = json.loads(out)
    assert list(record["models"]) == ["base", "global", "personal"]
    for name, chosen in (("base", "base"), ("global", "global")):
        with orchard.load(run, model=chosen) as opened:  # type: ignore[arg-type]
            loads = expert_load(opened.adapted, TEXTS, max_tokens=512, batch_size=8)
        assert record["models"][name]["layers"] == [load.as_record() for load in loads]
    with orchard.load(run, client="harbor") as opened:
        own = expert_load(opened.adapted, TEXTS, max_tokens=512, batch_size=8)
    assert record["models"]["personal"]["layers"] == [load.as_record() for load in own]
    assert record["models"]["personal"]["layers"] != record["models"]["base"]["layers"]
    assert {"versions", "hardware", "base_digest", "text_digest"} <= record.keys()
    code, out, _ = call("load", run, "--data", path, "--max-texts", 1)
    assert code == 0
    assert "1 texts of news.jsonl" in out
    assert "global" in out


def test_openness_is_each_tokens_own_by_kind(run: Path) -> None:
    with orchard.load(run, client="harbor") as opened:
        ids = opened.tokenizer("Greet Mila 12 , fig")["input_ids"]
        found = {(own.layer, own.kind): own for own in gate_openness(opened, [(ids, 2)])}
        layer = opened.adapted.view.layers[0]
        states: list[torch.Tensor] = []
        hook = layer.block.register_forward_pre_hook(lambda _, args: states.append(args[0]))
        with torch.inference_mode():
            opened.model(input_ids=torch.tensor([ids]))
        hook.remove()
        names = [f"{layer.name}.graft.gate.{part}" for part in ("weight", "bias")]
        weight, bias = (opened.adapted.read(names)[name] for name in names)
        expected = torch.sigmoid(states[0][0].float() @ weight + bias)
        assert found[layer.name, "prompt"].mean == pytest.approx(float(expected[:2].mean()))
        assert found[layer.name, "response"].mean == pytest.approx(float(expected[2:].mean()))
        kinds = ("words", "digits", "punctuation", "special")
        parted = [found[layer.name, kind] for kind in kinds if (layer.name, kind) in found]
        assert sum(own.num_tokens for own in parted) == len(ids)
        digits = [n for n, i in enumerate(ids) if opened.tokenizer.decode([i]).strip().isdigit()]
        assert digits
        own = found[layer.name, "digits"]
        assert own.mean == pytest.approx(float(expected[digits].mean()))


def test_the_command_shows_gates_and_refuses_a_model_without(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.jsonl"
    rows = [
        {"instruction": own.instruction, "response": own.response, "category": own.category}
        for own in offices(0)[0].test[:3]
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    code, out, error = call("gates", run, "--client", "harbor", "--data", path, "--json")
    assert (code, error) == (0, "")
    found = json.loads(out)
    assert {own["kind"] for own in found} >= {"prompt", "response", "words"}
    assert all(0 < own["mean"] < 1 for own in found)
    code, out, _ = call("gates", run, "--client", "harbor", "--data", path)
    assert "How far the grafts of harbor open" in out
    code, _, error = call("gates", run, "--data", path)
    assert code == 2
    assert "the model must have grafts, got that of the server without" in error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"body": "x"}\n', "must have text in the column text, got body in"),
        ("a.txt", "\n\n", "--data must hold text, got none"),
        ("a.jsonl", "{\n", "must"),
    ],
)
def test_a_file_without_text_is_refused(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(path, column="text", max_texts=5)
    with pytest.raises(FileNotFoundError, match="--data must be a file"):
        read_texts(tmp_path / "none", column="text", max_texts=5)


def test_paragraphs_of_plain_text_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\nthree\n\n\n\nfour\n")
    assert read_texts(path, column="text", max_texts=2) == ["one\ntwo", "three"]
