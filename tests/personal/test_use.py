"""Whoever has a run's folder asks its models, talks to them and measures them, or reads why not."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import orchard
from federations import quick_recipe, run_quickly, short_model
from orchard.cli import app
from orchard.data.world import offices
from orchard.demo import side_by_side
from orchard.experiment.run_folder import recipe_digest
from orchard.personal.chatting import chat
from orchard.personal.choosing import best_round, choose_state
from orchard.personal.opening import OpenedModel, open_model
from orchard.personal.state import read_state
from orchard.personal.writing import StopTexts
from orchard.recipe.options import Recipe
from orchard.recipe.reading import option_value, read_recipe, to_toml
from orchard.results import MetricsLog
from sites import LocalPost, make_coordinator, make_workers, site_recipe, write_sites

KEPT = 4
METRICS = ("evaluation.metrics=loss", "evaluation.models=base,global,personal")
RECIPE = quick_recipe(
    "flex",
    "server.rounds=5",
    "client.steps=1",
    f"server.keep_rounds={KEPT}",
    "evaluation.every=1",
    "evaluation.max_examples=2",
    "strategy.calibration_blocks=1",
    *METRICS,
)
PROMPT = "Greet Mila"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("use") / "run"
    run_quickly(folder, RECIPE)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def command(*words: object, typed: str | None = None) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, [str(word) for word in words], input=typed)
    return found.exit_code, found.stdout, found.stderr


def test_command_and_python_ask_the_same_model_by_argument_and_by_pipe(run: Path) -> None:
    with orchard.load(run, client="harbor") as opened:
        expected = opened.generate(PROMPT)
        assert opened.model is opened.adapted.model
        assert opened.tokenizer.decode(opened.tokenizer("Mila")["input_ids"]).strip() == "Mila"
    assert expected
    own = ("generate", run, "--client", "harbor")
    assert command(*own, PROMPT) == (0, f"{expected}\n", "")
    assert command(*own, typed=f"{PROMPT}\n")[1] == f"{expected}\n"
    assert isinstance(orchard.load(run), orchard.Run)


def test_another_wording_than_the_runs_is_another_question(run: Path) -> None:
    own = ("generate", run, "--client", "harbor", PROMPT)
    with orchard.load(run, client="harbor") as opened:
        other = opened.generate(PROMPT, template="alpaca")
        assert other != opened.generate(PROMPT)
    assert command(*own, "--template", "alpaca") == (0, f"{other}\n", "")
    typed = f"{PROMPT}\n"
    spoken = command("chat", run, "--client", "harbor", "--template", "alpaca", typed=typed)
    assert spoken == (0, f"{other}\n", "")
    code, _, error = command(*own, "--template", "verse")
    assert code == 2
    assert "--template must be one of alpaca, chat, plain, got verse" in error


def test_greedy_answers_are_those_of_the_base_that_the_run_measures(run: Path) -> None:
    with orchard.load(run, model="base") as opened:
        from orchard.data.examples import Example
        from orchard.data.templates import encode_prompt
        from orchard.evaluation.generation import generate_greedily
        from orchard.experiment.encoding import end_ids, make_wording

        wording = make_wording(RECIPE, opened.tokenizer)
        prompts = [example.instruction for example in offices(0)[0].test[::20]]
        expected = generate_greedily(
            opened.adapted,
            [encode_prompt(Example(prompt, ""), wording) for prompt in prompts],
            max_new_tokens=12,
            batch_size=4,
            end_ids=end_ids(RECIPE, wording),
        )
        assert [opened.generate(prompt, max_new_tokens=12) for prompt in prompts] == expected
        assert len(set(expected)) > 1


def test_draws_repeat_with_their_seed_and_pieces_join_to_the_answer(run: Path) -> None:
    with orchard.load(run, model="global") as opened:

        def drawn(seed: int) -> str:
            return opened.generate(PROMPT, temperature=3.0, seed=seed, max_new_tokens=8)

        assert drawn(1) == drawn(1)
        assert len({drawn(seed) for seed in range(4)}) > 1
        # The fewest tokens that reach next to nothing are the most probable one.
        assert opened.generate(PROMPT, temperature=3.0, top_p=1e-9) == opened.generate(PROMPT)
        whole = opened.generate(PROMPT)
        pieces = list(opened.stream(PROMPT))
        assert len(pieces) > 1
        assert "".join(pieces).strip() == whole
        assert opened.generate(PROMPT, stop=[whole[3:5]]) == whole[:3].strip()


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abc", ("b",), (True, "a")),
        ("abab", ("abc",), (False, "ab")),
        ("ab\n", ("\n\n",), (False, "ab")),
        ("abc", (), (False, "abc")),
        ("xyz", ("yz", "xy"), (True, "")),
    ],
)
def test_what_may_begin_a_stop_text_is_held_back(
    text: str, stops: tuple[str, ...], expected: tuple[bool, str]
) -> None:
    assert StopTexts(stops).sure(text) == expected


def test_a_model_without_a_cache_writes_the_same(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with orchard.load(run, client="hill") as opened:
        with_cache = opened.generate(PROMPT)
        monkeypatch.setattr("orchard.personal.writing.can_decode", lambda model: False)
        assert opened.generate(PROMPT) == with_cache != ""


def test_a_conversation_remembers_until_it_is_told_to_forget(run: Path) -> None:
    said: list[list[str]] = []

    class Echo(OpenedModel):
        def stream(self, prompt: str, **options: object):  # type: ignore[no-untyped-def, override]
            history = options["history"]
            said.append([turn.text for turn in history])  # type: ignore[attr-defined]
            if prompt == "bad":
                raise ValueError("prompt must be good, got bad; better it")
            yield from (prompt.upper(), "!")

    echo = Echo.__new__(Echo)
    out = io.StringIO()
    lines = ["one\n", "bad\n", "\n", "two\n", "/reset\n", "three\n", "/quit\n", "four\n"]
    assert chat(echo, lines, out) == 3
    assert said == [[], ["one", "ONE!"], ["one", "ONE!"], []]
    assert out.getvalue().splitlines() == [
        "ONE!",
        "error: prompt must be good, got bad; better it",
        "TWO!",
        "(forgotten)",
        "THREE!",
    ]
    code, shown, _ = command("chat", run, "--client", "harbor", typed=f"{PROMPT}\n/quit\n")
    with orchard.load(run, client="harbor") as opened:
        assert (code, shown.strip()) == (0, opened.generate(PROMPT))


def test_the_demo_asks_base_averaged_and_personal_model_the_same(run: Path, tmp_path: Path) -> None:
    for method in ("fedavg", "flex"):
        (tmp_path / method).symlink_to(run)
    answers = side_by_side(tmp_path, PROMPT, client="harbor")
    models = {"model": "base"}, {"model": "global"}, {"client": "harbor"}
    assert len(answers) == 3
    for answer, own in zip(answers.values(), models, strict=True):
        with orchard.load(run, **own) as opened:  # type: ignore[call-overload]
            assert answer == opened.generate(PROMPT)


def test_evaluate_measures_what_the_run_measured(run: Path, tmp_path: Path) -> None:
    office = offices(0)[0]
    assert office.name == "harbor"
    data = tmp_path / "new.jsonl"
    rows = [{"instruction": e.instruction, "response": e.response} for e in office.test]
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    recipe = replace(RECIPE, evaluation=replace(RECIPE.evaluation, max_examples=0))
    code, shown, _ = command("evaluate", run, "--data", data, "--client", "harbor", "--json")
    measured = json.loads(shown)
    assert code == 0
    assert measured["base"]["loss"] != measured["personal"]["loss"]
    # The same examples, seen as the run sees them.
    from federations import build
    from orchard.evaluation.quality import evaluate

    _, clients, _, _ = build(recipe, tmp_path / "clients")
    with open_model(read_state(run, client="harbor")) as opened:
        own = evaluate(opened.adapted, clients[0].test, clients[0].evaluation)
    assert measured["personal"] == own


def test_an_exported_folder_is_measured_beside_its_base(run: Path, tmp_path: Path) -> None:
    data = tmp_path / "new.jsonl"
    data.write_text('{"instruction": "Greet Mila", "response": "Hello, Mila"}\n')
    folder = Path(shutil.copytree(short_model(), tmp_path / "out"))
    about = {"recipe": to_toml(RECIPE), "client": None, "round": 5}
    about["base_digest"] = read_state(run).base_digest
    (folder / "orchard.json").write_text(json.dumps(about))

    def losses() -> tuple[float, float]:
        code, shown, error = command("evaluate", folder, "--data", data, "--json")
        assert code == 0, error
        found = json.loads(shown)
        return found["base"]["loss"], found["exported"]["loss"]

    base, same = losses()
    assert base == same
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    changed = {**tensors, name: tensors[name] * 2}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    assert losses()[0] == base != losses()[1]
    code, _, error = command("evaluate", folder, "--data", data, "--client", "harbor")
    assert code == 2
    assert "must be left out with an exported folder" in error
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {}}))
    code, _, error = command("evaluate", folder, "--data", data)
    assert code == 2
    assert "got other code, which is not run" in error


def test_the_best_round_is_the_one_of_the_best_measure(run: Path) -> None:
    lines = [line for line in MetricsLog(run / "metrics.jsonl") if line["kind"] == "evaluation"]
    own = {line["round"]: line["clients"]["hill"].get("personal/loss") for line in lines}
    own = {number: loss for number, loss in own.items() if loss is not None}
    assert len(own) == 5
    best = best_round(run, RECIPE, client="hill")
    assert own[best] == min(own.values())
    last = choose_state(run, client="hill")
    assert last.round_number == 5
    if best > 5 - KEPT:
        assert choose_state(run, client="hill", round_number="best").round_number == best


def test_so_many_rounds_are_kept_as_asked_and_each_opens(run: Path) -> None:
    trees = []
    for number in range(6 - KEPT, 6):
        state = read_state(run, client="marsh", round_number=number)
        assert state.round_number == number
        name = next(name for name in state.own if name.endswith("up_proj.lora_B"))
        trees.append(state.own[name])
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(trees))
    with pytest.raises(ValueError, match=r"finished round 1, got round 2, 3, 4, 5; .*keep_rounds"):
        read_state(run, client="marsh", round_number=1)


def test_what_a_client_lost_of_a_round_is_never_replaced_by_something_older(copy: Path) -> None:
    store = copy / "clients" / "marsh"
    (store / "round_000004.safetensors").unlink()
    assert read_state(copy, client="marsh", round_number=5).round_number == 5
    with pytest.raises(ValueError, match=r"marsh kept in round 4 must still be there, got round"):
        read_state(copy, client="marsh", round_number=4)


LATER = (
    *("placement", "expert_cache", "frozen_precision", "max_train", "validation_size"),
    *("graft_mix", "shared", "kept", "kept_steps", "finetune_rounds", "ditto_lambda"),
    *("holdout", "keep_rounds", "start", "best", "conventions", "other_clients"),
    *("judged_below", "shots", "shots_path"),
    *("sum_seconds", "lora_aggregation", "arriving", "arrival_rounds"),
)


def digest_before(recipe: Recipe) -> str:
    """Return the digest that a recipe had before there were options that came later."""
    text = to_toml(replace(recipe, deployment=type(recipe.deployment)()))
    text = re.sub(r"\[privacy\]\n(.+\n)+\n", "", text)
    older = [line for line in text.splitlines() if line.partition(" = ")[0] not in LATER]
    return hashlib.sha256(("\n".join(older) + "\n").encode()).hexdigest()


def test_new_options_at_their_defaults_leave_the_digests_of_runs_as_they_were() -> None:
    plain = quick_recipe("flex", "model.path=orchard:tiny")
    assert recipe_digest(plain) == digest_before(plain)
    for key in (
        "server.keep_rounds=3",
        "evaluation.best=loss",
        "server.tau=0.5",
        "privacy.noise=1",
    ):
        name, _, value = key.partition("=")
        section, _, option = name.partition(".")
        kind = type(option_value(plain, name))
        other = replace(
            plain, **{section: replace(getattr(plain, section), **{option: kind(value)})}
        )
        assert recipe_digest(other) != recipe_digest(plain)


def test_orchard_is_another_method_than_when_it_judged_every_graft() -> None:
    recipe = quick_recipe("orchard")
    assert recipe_digest(recipe) != digest_before(recipe)


def _without_rounds(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def _truncate(name: str) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        path = run / name
        path.write_bytes(path.read_bytes()[:-1] + b"?")

    return spoil


def _other_base(run: Path) -> None:
    _edit_base(run, "orchard:tiny")


def _no_base(run: Path) -> None:
    _edit_base(run, str(run / "gone"))


def _edit_base(run: Path, path: str) -> None:
    recipe = read_recipe(run / "recipe.toml").recipe
    own = replace(recipe, model=replace(recipe.model, path=path))
    (run / "recipe.toml").write_text(to_toml(own))


HARBOR = ("--client", "harbor")
BAD = {
    "no round": (_without_rounds, HARBOR, "must hold a finished round, got none; .*resume"),
    "unknown": (None, ("--client", "harbour"), "got harbour; did you mean harbor"),
    "two": (None, (*HARBOR, "--base"), "must not both be given"),
    "round": (None, ("--round", "first"), "--round must be a number from 1, or best, got first"),
    "base gone": (_no_base, HARBOR, "gone"),
    "other base": (_other_base, HARBOR, "on which the run was trained, got"),
    "personal": (
        _truncate("clients/harbor/round_000005.safetensors"),
        HARBOR,
        r"round_000005.safetensors must be as this client wrote it, got another checksum",
    ),
    "global": (
        _truncate("checkpoints/round_000005/shared.safetensors"),
        ("--global",),
        "shared.safetensors must be as the run wrote it, got another checksum",
    ),
    "state": (
        _truncate("checkpoints/round_000005/state.json"),
        ("--global",),
        "state.json must be as the run wrote it",
    ),
    "temperature": (None, ("--temperature", "-1"), "temperature must be 0 or more, got -1"),
    "top_p": (None, ("--top-p", "0"), r"top_p must be in \(0, 1\], got 0"),
    "tokens": (None, ("--max-new-tokens", "0"), "max-new-tokens must be at least 1, got 0"),
    "stops": (None, ("--stop", "a") * 65, "stop must be at most 64 texts, got 65"),
    "long": (None, ("--max-new-tokens", "100000"), "fit into the model's 256 tokens"),
    "no run": (lambda run: shutil.rmtree(run), (), "run must be a folder with a recipe.toml"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_opened_is_one_line(what: str, copy: Path) -> None:
    import re

    spoil, options, said = BAD[what]
    if spoil is not None:
        spoil(copy)
    code, shown, error = command("generate", copy, PROMPT, *options)
    assert (code, shown) == (2, "")
    assert len(error.strip().splitlines()) == 1
    assert re.search(said, error), error


def test_a_prompt_must_say_something(run: Path) -> None:
    code, _, error = command("generate", run, typed=" \n")
    assert code == 2
    assert "prompt must say something" in error


def test_a_site_opens_its_own_model_from_its_store_alone(tmp_path: Path) -> None:
    data = write_sites(tmp_path / "data")
    recipe = site_recipe("flex", data, "server.rounds=2", "strategy.calibration_blocks=1", *METRICS)
    workers = make_workers(data, tmp_path / "stores")
    coordinator, begin = make_coordinator(recipe, tmp_path / "run")
    coordinator.run_rounds(LocalPost(workers), begin, num_sites=2)
    (tmp_path / "run" / "recipe.toml").write_text(to_toml(recipe))
    store = tmp_path / "stores" / "harbor"
    shutil.rmtree(data)
    at_site = choose_state(store)
    assert (at_site.client_id, at_site.round_number) == ("harbor", 2)
    assert at_site.recipe.model.path == short_model()
    trained = read_state(tmp_path / "run")
    assert at_site.base_digest == trained.base_digest
    assert at_site.shared.keys() == trained.shared.keys()
    assert all(torch.equal(at_site.shared[name], trained.shared[name]) for name in trained.shared)
    assert at_site.graft_experts.keys() == {"layers.0", "layers.1"}
    code, shown, error = command("generate", "--store", store, PROMPT)
    assert (code, error) == (0, "")
    with open_model(at_site) as opened:
        assert shown.strip() == opened.generate(PROMPT)
    code, _, error = command("generate", tmp_path / "run", PROMPT, "--client", "harbor")
    assert code == 2
    assert "on their own machines" in error
