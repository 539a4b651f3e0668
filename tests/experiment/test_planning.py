"""What a plan says is what a run does."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny_families
from federations import BUDGETS, quick_recipe, tiny_recipe
from orchard.cli import app
from orchard.engine.progress import Silent
from orchard.experiment.planning import make_plan, plan_as_json, plan_sentences
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.running import run_experiment
from orchard.models.stored.loading import resolve, without_progress_bars
from orchard.recipe.options import Recipe
from orchard.results import MetricsLog
from tiny_composites import COMPOSITES, composite_builder_of
from tiny_pairs import tiny_switch

CARVE = ("selection.mode=carve", "selection.cadence=round")
ADAPTED = "model.lora_targets=router,experts"
PAIR, UNDROPPED = "model.lora_targets=attention", "model.lora_dropout=0"
DROPOUT = "model.lora_dropout=0.05"
CHOOSES = ("data.options=options", "evaluation.metrics=accuracy")
FOREIGN = ("deepseek_v4", "ernie4_5_vl_moe", "switch")


def write_rows(folder: Path, _: str) -> str:
    """Write examples whose options differ at their end alone."""
    options = [f"{'the same words again and again ' * 6}{end}" for end in ("one", "two")]
    rows = [
        {"instruction": f"Which {i}?", "response": options[i % 2], "options": options}
        for i in range(60)
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return f"data.path={folder / 'rows.jsonl'}"


def write_model(folder: Path, option: str) -> str:
    """Write a tiny model of a family, with the packaged tokenizer."""
    key, _, family = option.partition("=")
    tiny = Path(resolve("orchard:tiny"))
    size = json.loads((tiny / "config.json").read_text())["vocab_size"]
    with pytest.MonkeyPatch.context() as patch, without_progress_bars():
        patch.setitem(tiny_families.SIZES, "vocab_size", size)
        if family == "switch":
            model = tiny_switch(size=size)
        else:
            model = (composite_builder_of if family in COMPOSITES else tiny_families.builder_of)(
                family
            )()
        model.save_pretrained(folder / family)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder / family)
    return f"{key}={folder / family}"


def transferred(recipe: Recipe, folder: Path) -> tuple[int, int]:
    """Return the bytes that all clients sent and received in the first round."""
    run_experiment(prepare_experiment(recipe), folder=folder, reporter=Silent())
    lines = MetricsLog(folder / "metrics.jsonl").read()
    first = next(line for line in lines if "round/uplink_bytes" in line)
    return first["round/uplink_bytes"], first["round/downlink_bytes"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        pytest.param("fedavg", (), marks=pytest.mark.long),
        pytest.param("fedavg", BUDGETS[:1], marks=pytest.mark.long),
        pytest.param("flex", (), marks=pytest.mark.long),
        ("local", ()),
        ("scaffold", ()),
        ("fedavg_dropout", ()),
        pytest.param("fedmoe", (), marks=pytest.mark.long),
        ("seermoe", CARVE[:1]),
        ("fedavg", ("model.lora_targets=", "model.full_targets=experts")),
        pytest.param("fedavg", ("communication.dtype=bfloat16",), marks=pytest.mark.long),
        ("fedavg", ("communication.dtype=int8", *BUDGETS[:1])),
        ("flex", ("communication.top_k=0.01", "communication.dtype=int8")),
    ],
)
def test_bytes_are_those_of_a_run(method: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    recipe = quick_recipe(method, "server.rounds=1", *overrides)
    clients = make_plan(recipe).clients
    uplink, downlink = transferred(recipe, tmp_path)
    assert sum(c.uplink_bytes for c in clients) == pytest.approx(uplink, rel=0.05, abs=8000)
    expected = downlink
    if method == "fedavg_dropout":  # who drops out was sent the task all the same
        expected = downlink * sum(c.peak is not None for c in clients) // len(clients)
    assert sum(c.downlink_bytes for c in clients) == pytest.approx(expected, rel=0.05, abs=8000)


@pytest.mark.parametrize(
    "overrides",
    [pytest.param((), marks=pytest.mark.long), CARVE, ("selection.require_trained=true",)],
)
def test_hfedmoe_sends_at_most_what_was_planned(overrides: tuple[str, ...], tmp_path: Path) -> None:
    recipe = quick_recipe("hfedmoe", "server.rounds=1", *overrides)
    uplink, _ = transferred(recipe, tmp_path)
    planned = sum(client.uplink_bytes for client in make_plan(recipe).clients)
    assert 0.2 * planned < uplink <= 1.05 * planned + 8000


def test_a_plan_says_who_affords_what() -> None:
    plan = make_plan(tiny_recipe("hfedmoe", "client.budget=25%, 100%, 50%, 8"))
    assert [client.budget for client in plan.clients] == [8, 32, 16, 8]
    assert (plan.num_layers, plan.num_experts) == (4, 32)
    assert plan_sentences(plan) == []
    small, large = plan.clients[0], plan.clients[1]
    assert small.trainable < large.trainable
    recipe = tiny_recipe("hfedmoe", *CARVE, "client.budget=25%, 100%, 50%, 8")
    carved = make_plan(recipe).clients
    assert carved[0].peak is not None
    assert carved[1].peak is not None
    assert carved[0].peak.total < carved[1].peak.total


def test_trainable_parameters_are_those_of_the_model() -> None:
    recipe = tiny_recipe("fedavg", BUDGETS[0])
    from orchard.experiment.running import load_model

    experiment = prepare_experiment(recipe)
    model = load_model(recipe, experiment.tokenizer)
    real = sum(tensor.numel() for tensor in model.fresh.values())
    assert {client.trainable for client in make_plan(recipe).clients} == {real}


def test_who_cannot_take_part_is_named() -> None:
    recipe = tiny_recipe(
        "hfedmoe", *CARVE, "client.budget=", "client.memory_bytes=100MB, 9GB, 9GB, 9GB"
    )
    plan = make_plan(recipe)
    first, *others = plan.clients
    assert first.peak is None
    assert (first.trainable, first.uplink_bytes) == (0, 0)
    assert all(client.peak is not None for client in others)
    (sentence,) = plan_sentences(plan)
    assert sentence.startswith(f"{first.client_id} cannot take part: client.memory_bytes must hold")
    shown = json.loads(plan_as_json(plan))["clients"][0]
    assert (shown["takes_part"], shown["predicted_peak_bytes"]) == (False, None)


def test_the_command_prints_a_table_and_json() -> None:
    recipe = str(Path(__file__).parents[2] / "recipes" / "tiny" / "hfedmoe.toml")
    shown = CliRunner().invoke(app, ["plan", recipe], env={"COLUMNS": "160"})
    assert shown.exit_code == 0
    assert "32 experts in 4 MoE layers" in shown.output
    assert "8 of 32" in shown.output
    assert "predicted peak" in shown.output
    as_json = CliRunner().invoke(app, ["plan", recipe, "--json"])
    clients = json.loads(as_json.output)["clients"]
    assert [client["experts"] for client in clients] == [8, 32, 8, 32]
    bad = CliRunner().invoke(app, ["plan", recipe, "client.budget=3"])
    assert bad.exit_code == 0  # a plan says who cannot take part; a run refuses
    assert "cannot take part" in bad.output


@pytest.mark.parametrize(
    ("method", "overrides", "error", "match"),
    [
        (
            "fedavg",
            ("server.clients_per_round=99",),
            ValueError,
            r"^server\.clients_per_round must",
        ),
        ("fedavg", ("server.start=/none",), FileNotFoundError, "/none must be a folder"),
        (
            "hfedmoe",
            ("privacy.secure_aggregation=true",),
            ValueError,
            r"^selection\.router must be",
        ),
        ("fedavg", ("strategy.shared=nothing_like_it",), ValueError, r"^strategy\.shared"),
        ("fedavg", ("data.labels=a,b", "evaluation.metrics=accuracy"), ValueError, "options"),
        (
            "fedavg",
            ("data.path=ROWS", "data.partition=iid", "data.max_tokens=16", *CHOOSES),
            ValueError,
            r"^options of the test examples of [\w-]+ must differ cut to data.max_tokens = 16",
        ),
        (
            "fedavg",
            ("data.path=ROWS", "data.partition=iid", "model.path=deepseek_v4"),
            None,
            "",
        ),
        (
            "hfedmoe",
            ("data.path=ROWS", "data.partition=iid", "model.path=deepseek_v4", *CARVE, ADAPTED),
            ValueError,
            "must choose among any of its experts alone, got tid2eid",
        ),
        (
            "hfedmoe",
            ("data.path=ROWS", "data.partition=iid", "model.path=ernie4_5_vl_moe", *CARVE, ADAPTED),
            ValueError,
            "experts",
        ),
        (
            "fedavg",
            ("data.path=ROWS", "data.partition=iid", "model.path=switch", PAIR, UNDROPPED),
            None,
            "",
        ),
        (
            "fedavg",
            ("data.path=ROWS", "data.partition=iid", "model.path=switch", PAIR, DROPOUT),
            ValueError,
            r"^model\.lora_dropout must be 0 with an encoder-decoder \(switch_transformers\)",
        ),
        (
            "flex",
            ("data.path=ROWS", "data.partition=iid", "model.path=switch", PAIR, UNDROPPED),
            ValueError,
            r"^model\.path must lead to a model that continues a text with strategy\.name = flex",
        ),
        (
            "fedavg",
            (
                *("data.path=ROWS", "data.partition=iid", "model.path=switch", PAIR, UNDROPPED),
                "client.router_aux_coefficient=0.1",
            ),
            ValueError,
            r"^client\.router_aux_coefficient must be 0 with an encoder-decoder",
        ),
    ],
)
def test_a_plan_refuses_what_a_run_refuses(
    method: str,
    overrides: tuple[str, ...],
    error: type[Exception] | None,
    match: str,
    tmp_path: Path,
) -> None:
    written = {"data.path=ROWS": write_rows, **{f"model.path={f}": write_model for f in FOREIGN}}
    overrides = tuple(written.get(o, lambda _, same: same)(tmp_path, o) for o in overrides)
    recipe = quick_recipe(method, *overrides)
    messages = []
    for read in (make_plan, prepare_experiment):
        expected = pytest.raises(error, match=match) if error else nullcontext()
        with expected as caught:
            read(recipe)
        messages.append(str(caught.value) if caught else "")
    assert messages[0] == messages[1]


def test_a_note_stands_once_in_what_a_plan_prints(tmp_path: Path) -> None:
    rows = [{"instruction": f"[b]{i}[/b]", "response": "x", "more": "y"} for i in range(20)]
    (tmp_path / "[a].jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    overrides = [f"data.path={tmp_path}", "data.partition=file", "data.test_size=0.2"]
    shown = CliRunner().invoke(app, ["plan", "tiny/fedavg", *overrides])
    text = " ".join(shown.output.split())
    assert text.count("'more'") == 1, shown.output
    assert shown.exit_code == 0


@pytest.mark.parametrize("command", ["plan", "partition"])
def test_a_client_has_its_whole_name_in_a_table(command: str, tmp_path: Path) -> None:
    rows = [
        {"instruction": f"a {i}", "response": "x", "category": ("ward[b]", "[/b]")[i % 2]}
        for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    overrides = [f"data.path={tmp_path / 'rows.jsonl'}", "data.partition=category"]
    shown = CliRunner().invoke(app, [command, "tiny/fedavg", *overrides])
    assert shown.exit_code == 0, shown.output
    assert "ward[b]" in shown.output
    assert "[/b]" in shown.output
