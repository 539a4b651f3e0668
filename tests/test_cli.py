from __future__ import annotations

import json
import logging
import os
import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from federations import QUICK
from orchard.catalog import find_recipe, recipe_name
from orchard.cli import app
from orchard.cli.sites import log_to_stderr
from orchard.recipe.reading import known_options, option_value, read_recipe

ROWS = [
    {"instruction": f"Repeat word{i}", "response": f"word{i}", "category": "ab"[i % 2]}
    for i in range(20)
]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def check_refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default output goes to runs/ of the working folder; recipes are found from anywhere."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


@pytest.fixture(autouse=True)
def _no_model_is_loaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input must be refused before weights are read; good input may load them."""
    if "refused" in request.node.name:

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("weights were read")

        monkeypatch.setattr("orchard.experiment.running.open_base", refuse)


def test_unknown_key_is_refused_and_names_the_nearest() -> None:
    check_refused(
        call("run", "recipes/tiny/flex.toml", "strategy.graft_rnak=4"), "strategy.graft_rank"
    )


def test_wrong_type_is_refused() -> None:
    check_refused(
        call("run", "recipes/tiny/flex.toml", "server.rounds=many"), "server.rounds", "int"
    )


def test_missing_recipe_is_refused() -> None:
    check_refused(call("run", "recipes/tiny/nothing.toml"), "recipe must be an existing file")


def test_missing_data_file_is_refused(tmp_path: Path) -> None:
    check_refused(
        call(
            "run",
            "recipes/dolly/flex.toml",
            "model.path=orchard:tiny",
            f"data.path={tmp_path}/no.jsonl",
        ),
        "no.jsonl",
    )


def test_empty_client_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "clients" / "first.jsonl", ROWS)
    write_rows(tmp_path / "clients" / "second.jsonl", [])
    check_refused(
        call("run", "recipes/tiny/flex.toml", f"data.path={tmp_path / 'clients'}"), "second"
    )


def test_line_that_does_not_parse_is_refused_with_its_number(data: Path) -> None:
    lines = data.read_text().splitlines()
    lines[6] = "{broken"
    data.write_text("\n".join(lines))
    check_refused(
        call("run", "recipes/tiny/flex.toml", f"data.path={data}", "data.partition=iid"),
        "rows.jsonl",
        "line 7",
    )


def test_category_that_does_not_exist_is_refused(data: Path) -> None:
    check_refused(
        call(
            "run",
            "recipes/tiny/flex.toml",
            f"data.path={data}",
            "data.partition=category",
            "data.categories=a,c",
        ),
        "'c'",
        "'a', 'b'",
    )


def test_dense_model_is_refused(tmp_path: Path) -> None:
    from tiny_models import dense

    dense().save_pretrained(tmp_path / "dense")
    check_refused(
        call("run", "recipes/tiny/flex.toml", f"model.path={tmp_path / 'dense'}"),
        "at least one MoE layer",
    )


def test_model_path_without_weights_is_refused(tmp_path: Path) -> None:
    from tiny_models import FAMILIES

    FAMILIES["qwen2_moe"]().config.save_pretrained(tmp_path / "model")
    check_refused(
        call("run", "recipes/tiny/flex.toml", f"model.path={tmp_path / 'model'}"), "safetensors"
    )


def test_dirichlet_alpha_zero_is_refused(data: Path) -> None:
    check_refused(
        call(
            "run",
            "recipes/tiny/flex.toml",
            f"data.path={data}",
            "data.partition=dirichlet",
            "data.alpha=0",
        ),
        "data.alpha",
        "above 0",
    )


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_more_clients_than_rows_is_refused(data: Path, partition: str) -> None:
    check_refused(
        call(
            "run",
            "recipes/tiny/flex.toml",
            f"data.path={data}",
            f"data.partition={partition}",
            "data.num_clients=21",
        ),
        "21",
        "num_clients",
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("strategy.name=flux", ("strategy.name", "flux")),
        ("strategy.name=fedadam+fedyogi", ("one server optimizer",)),
        ("strategy.name=local+fedprox", ("local",)),
        ("server.clients_per_round=5", ("server.clients_per_round", "5")),
        ("model.path=", ("model.path",)),
        ("model.path=/no/such/model", ("model.path",)),
        ("model.lora_targets=q_proj,w_proj", ("w_proj", "q_proj")),
        ("evaluation.metrics=bleu", ("evaluation.metrics", "bleu")),
        ("model.device=tpu9", ("model.device", "tpu9")),
    ],
)
def test_other_bad_values_are_refused(override: str, words: tuple[str, ...]) -> None:
    check_refused(call("run", "recipes/tiny/flex.toml", override), *words)


def test_an_unknown_tracker_is_refused() -> None:
    check_refused(call("run", "tiny/flex", "--track", "tensorbord"), "did you mean tensorboard")


def test_a_folder_that_holds_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("seed = 0\n")
    result = call("run", "recipes/tiny/flex.toml", "--out", tmp_path)
    check_refused(result, "--resume")
    assert (tmp_path / "recipe.toml").read_text() == "seed = 0\n"


def test_run_writes_a_result_and_compare_shows_it(tmp_path: Path) -> None:
    for method in ("fedavg", "flex"):
        result = call(
            "run",
            f"recipes/tiny/{method}.toml",
            *QUICK,
            "client.steps=1",
            "evaluation.max_examples=2",
            "evaluation.models=global,personal",
            "evaluation.metrics=loss",
            "--out",
            tmp_path / method,
        )
        assert result.exit_code == 0, result.output
        assert "round 2/2" in result.output
    compared = call("compare", tmp_path / "fedavg", tmp_path / "flex")
    assert compared.exit_code == 0
    assert "personal" in compared.output
    assert "flex" in compared.output
    check_refused(call("compare", tmp_path), "result.json")


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    arguments = ("run", "recipes/tiny/fedavg.toml", *QUICK, "--out", tmp_path / "run")
    assert call(*arguments).exit_code == 0
    before = json.loads((tmp_path / "run" / "result.json").read_text())
    assert call(*arguments, "--resume").exit_code == 0
    after = json.loads((tmp_path / "run" / "result.json").read_text())
    assert before["shared_digest"] == after["shared_digest"]
    assert before["num_rounds"] == after["num_rounds"] == 2
    check_refused(call(*arguments, "server.rounds=3", "--resume"), "server.rounds must be 2")


def test_run_on_json_lines_and_on_a_folder_of_clients(data: Path, tmp_path: Path) -> None:
    drawn = ["data.num_clients=2"]
    for number, (path, partition, more) in enumerate(
        [
            (data, "dirichlet", drawn),
            (data, "category", []),
            (data, "iid", drawn),
            (tmp_path / "clients", "file", []),
        ]
    ):
        for client in ("east", "west"):
            write_rows(tmp_path / "clients" / f"{client}.jsonl", ROWS)
        result = call(
            "run",
            "recipes/tiny/fedavg.toml",
            *QUICK,
            f"data.path={path}",
            f"data.partition={partition}",
            *more,
            "--out",
            tmp_path / str(number),
        )
        assert result.exit_code == 0, result.output


def show(*words: str, columns: int = 250) -> str:
    result = CliRunner().invoke(app, ["show", *words], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    return result.output


def test_show_tells_where_each_value_comes_from() -> None:
    shown = show("recipes/tiny/flex.toml", "server.rounds=3", "--all")
    lines = {line.split("│")[1].strip(): line for line in shown.splitlines() if "│" in line}
    assert set(lines) - {""} == set(known_options())
    assert "command line" in lines["server.rounds"]
    assert "_base.toml" in lines["model.path"]
    assert "flex.toml" in lines["strategy.name"]
    assert "default" in lines["server.tau"]


def test_show_has_what_differs_from_the_defaults_alone_or_with_all_the_rest() -> None:
    words = ("recipes/tiny/flex.toml", "server.rounds=3", "--json")
    some, every = json.loads(show(*words)), json.loads(show(*words, "--all"))
    assert list(every) == list(known_options())
    assert some == {key: one for key, one in every.items() if one["value"] != one["default"]}
    assert some["server.rounds"]["from"] == "command line"
    recipe = read_recipe(find_recipe(Path("tiny/flex")), ["server.rounds=3"]).recipe
    assert {key: one["value"] for key, one in every.items()} == {
        key: option_value(recipe, key) for key in every
    }


@pytest.mark.parametrize("columns", [60, 120])
def test_show_fits_its_terminal_and_says_what_it_leaves_out(columns: int) -> None:
    shown = show("recipes/tiny/flex.toml", columns=columns)
    assert max(map(len, shown.splitlines())) <= columns
    for key in ("strategy.graft_experts", "server.tau"):
        assert (key in shown) == (key in json.loads(show("recipes/tiny/flex.toml", "--json")))
    assert "more are as by default; --all shows them" in shown


def test_partition_shows_sizes_and_label_mix(data: Path) -> None:
    result = call(
        "partition",
        "recipes/dolly/fedavg.toml",
        f"data.path={data}",
        "data.categories=a,b",
        "data.test_size=2",
    )
    assert result.exit_code == 0, result.output
    rows = [line for line in result.output.splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in rows[0].split("│")[1:-1]] == ["a", "8", "0", "8", "2"]


def test_ls_names_every_method_and_recipe() -> None:
    from orchard.catalog import list_recipes
    from orchard.experiment.methods import METHODS

    result = CliRunner().invoke(app, ["ls"], env={"COLUMNS": "250"})
    assert result.exit_code == 0
    assert all(name in result.output for name in METHODS)
    assert len(list_recipes()) > 20
    for path in list_recipes():
        assert f" {recipe_name(path)} " in result.output
        assert find_recipe(Path(recipe_name(path))) == path


def test_ls_fits_60_columns_with_whole_names_and_loads_no_torch() -> None:
    from orchard.catalog import list_recipes
    from orchard.recipe.method_options import BUILT_IN

    code = "import sys; from orchard.catalog import print_catalog; print_catalog()\n"
    code += "assert not {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)"
    environment = {**os.environ, "COLUMNS": "60"}
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    ).stdout
    assert max(map(len, shown.splitlines())) <= 60
    for name in (*BUILT_IN, *map(recipe_name, list_recipes())):
        assert f" {name} " in shown


def test_import_loads_neither_torch_nor_transformers_and_help_is_quick() -> None:
    code = (
        "import sys, orchard, orchard.cli\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    seconds = []
    for _ in range(3):
        started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run(
            [sys.executable, "-c", "from orchard.cli import main; main()", "--help"],
            check=True,
            capture_output=True,
        )
        seconds.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - started)
    # Half a second is the promise, in CPU time: what else runs here is nobody's fault.
    assert min(seconds) < 0.5


def test_the_version_is_that_of_the_package_also_by_python_m() -> None:
    said = call("--version")
    assert (said.exit_code, said.output) == (0, f"orchard {metadata.version('orchard-moe')}\n")
    module = subprocess.run(
        [sys.executable, "-m", "orchard", "--version"], check=True, capture_output=True, text=True
    )
    assert module.stdout == said.output


def test_h_is_help_everywhere() -> None:
    for command in ((), *((name,) for name in typer.main.get_command(app).commands)):  # type: ignore[attr-defined]
        short, long = call(*command, "-h"), call(*command, "--help")
        assert short.exit_code == 0
        assert short.output == long.output


def test_help_says_what_arguments_are() -> None:
    assert "What to measure" in call("bench", "--help").output


def test_a_shell_completes_commands() -> None:
    asked = {"_ORCHARD_COMPLETE": "complete_bash", "COMP_WORDS": "orchard co", "COMP_CWORD": "1"}
    answer = subprocess.run(
        [Path(sys.executable).parent / "orchard"],
        env=os.environ | asked,
        check=True,
        capture_output=True,
        text=True,
    )
    assert answer.stdout.split() == ["coordinate", "compare"]


def test_traceback_is_shown_when_asked_for() -> None:
    result = call("run", "recipes/tiny/flex.toml", "server.rounds=0", "--traceback")
    assert isinstance(result.exception, ValueError)


def test_processes_of_a_federation_log_to_stderr_with_the_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = logging.getLogger("orchard")
    before, level = list(own.handlers), own.level
    try:
        log_to_stderr()
        logging.getLogger("orchard.engine").info("site north joined")
        assert re.fullmatch(r"\d\d:\d\d:\d\d site north joined\n", capsys.readouterr().err)
    finally:
        own.handlers[:] = before
        own.setLevel(level)
