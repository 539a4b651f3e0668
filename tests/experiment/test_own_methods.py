"""Methods of one's own: found, joined, recorded, and the only ones that their runs go on with."""

from __future__ import annotations

import importlib
import linecache
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import orchard
from federations import quick_recipe, run_quickly
from orchard.cli import app
from orchard.engine.progress import Silent
from orchard.experiment.methods import METHODS, build_strategy, check_strategy
from orchard.experiment.own_methods import own_digests, passed_digest, passed_name
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.run_folder import begin_folder, check_folder, recorded_as
from orchard.experiment.running import run_experiment
from orchard.recipe.method_options import BUILT_IN
from orchard.recipe.reading import read_recipe
from orchard.strategies.fedprox import fedprox
from orchard.strategies.strategy import Strategy
from own_module import PULLED, forget, offer, written

BROKEN = {
    "mine_raises": "1 / 0",
    "mine_leaves": "raise SystemExit('two\\nlines')",
    "mine_lacks": "import nothing_of_this_name",
    "mine_odd": "number = 3\ndef two(a, b): ...\nclass Kind:\n    def __init__(self, a): ...\n",
    "mine_other": "from orchard.experiment.parts import Method\nm = Method('', '', 'no', print)",
}


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    with written(tmp_path / "own", mine=PULLED, **BROKEN):
        yield tmp_path / "own"


def test_the_names_that_recipes_know_are_those_of_the_table() -> None:
    assert set(BUILT_IN) == set(METHODS)
    assert len(BUILT_IN) == len(METHODS)


def test_an_own_fedprox_gives_the_tensors_of_fedprox(own: Path, tmp_path: Path) -> None:
    options = ("server.rounds=1", "server.clients_per_round=1", "strategy.prox_mu=5.0")
    theirs = run_quickly(tmp_path / "a", quick_recipe("flex+fedprox", *options))
    by_name = run_quickly(tmp_path / "b", quick_recipe("mine:pulled+flex", *options))
    plain = run_quickly(tmp_path / "c", quick_recipe("flex", *options[:2]))
    assert theirs["shared_digest"] == by_name["shared_digest"] != plain["shared_digest"]
    assert by_name["strategy"] == "mine:pulled+flex"
    assert by_name["own_methods"] == own_digests(["mine:pulled"])
    assert "own_methods" not in theirs


class Interrupted(Exception):
    pass


class StopsAfterOne(Silent):
    def completed(self, round_number: int, **about: Any) -> None:
        raise Interrupted


def test_a_run_with_a_passed_function_goes_on_with_it_alone(own: Path, tmp_path: Path) -> None:
    mine = importlib.import_module("mine").pulled_hard
    few = "server.clients_per_round=1"
    recipe, named = quick_recipe("fedavg", few), quick_recipe("fedavg+mine:pulled_hard", few)
    whole = run_quickly(tmp_path / "whole", named)
    experiment, folder = prepare_experiment(recipe), tmp_path / "run"

    def run(**options: Any) -> dict[str, Any]:
        options = {"reporter": Silent(), **options}
        return run_experiment(experiment, folder=folder, **options)

    with pytest.raises(Interrupted):
        run(strategy=mine, reporter=StopsAfterOne())
    for other in (None, Strategy(), partial(mine), fedprox(Strategy(), mu=5.0)):
        with pytest.raises(
            ValueError, match=r"strategy\.name must be .*mine:pulled_hard.* to resum"
        ):
            run(strategy=other)
    with pytest.raises(ValueError, match=r"strategy\.name must be .*mine:pulled_hard"):
        orchard.run(recipe, out=folder, resume=True, progress=False)
    with pytest.raises(Interrupted):
        orchard.run(recipe, out=folder, resume=True, progress=StopsAfterOne(), strategy=mine)
    result = run_quickly(folder, named)
    assert result["shared_digest"] == whole["shared_digest"]
    assert result["strategy"] == whole["strategy"] == "fedavg+mine:pulled_hard"
    assert run(strategy=mine)["shared_digest"] == whole["shared_digest"]


def test_a_method_whose_source_changed_does_not_go_on(own: Path, tmp_path: Path) -> None:
    recipe = quick_recipe("mine:pulled")
    begin_folder(tmp_path / "run", recorded_as(recipe))
    check_folder(tmp_path / "run", recipe, resume=True)
    (own / "mine.py").write_text(f"{PULLED}\n# and more\n")
    check_folder(tmp_path / "run", recipe, resume=True)  # what runs is what was imported
    forget("mine")
    with pytest.raises(ValueError, match="source of mine:pulled must have SHA-256"):
        check_folder(tmp_path / "run", recipe, resume=True)


def test_a_function_of_a_notebook_is_known_by_its_lines() -> None:
    def passed(lines: str) -> str:
        cell = f"<cell of {len(lines)}>"
        linecache.cache[cell] = (len(lines), None, lines.splitlines(keepends=True), cell)
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(lines, cell, "exec"), names)
        return passed_digest(names["mine"])

    same, other = "def mine(s):\n    return s\n", "def mine(s):\n    return s or s\n"
    assert passed(same) == passed(same) != passed(other) != ""


def test_objects_that_no_recipe_can_find_are_recorded_by_their_names(own: Path) -> None:
    def inner(strategy: Strategy) -> Strategy:
        return strategy

    mine = importlib.import_module("mine").pulled_hard
    names = [
        passed_name(inner),
        passed_name(partial(mine, strength=2)),
        passed_name(Strategy()),
        passed_name(fedprox(Strategy(), mu=1.0)),
    ]
    assert names[0].endswith("by_their_names.<locals>.inner")
    assert names[1] == "mine:pulled_hard(strength=2)"
    assert len(set(names)) == len(names)
    for name in names:
        with pytest.raises(ValueError, match=r"strategy\.name must name"):
            check_strategy(name)


def test_own_methods_stand_between_experts_and_control(own: Path) -> None:
    names = check_strategy("scaffold+mine:pulled_hard+flex+mine:pulled")
    assert names == ("mine:pulled", "flex", "mine:pulled_hard", "scaffold")
    for joined in ("local+mine:pulled_hard", "local+mine:pulled"):
        with pytest.raises(ValueError, match="must not join local with mine:pulled"):
            check_strategy(joined)
    with pytest.raises(ValueError, match="a method once"):
        check_strategy("mine:pulled+mine:pulled")


def test_a_method_that_aggregates_in_its_own_way_takes_no_robust_kernel(tmp_path: Path) -> None:
    source = (
        "from dataclasses import replace\n"
        "def sums(strategy):\n    return replace(strategy, aggregate=lambda updates, shared: {})\n"
    )
    with written(tmp_path, mine_sums=source):
        build_strategy(quick_recipe("mine_sums:sums"), num_clients=4)
        with pytest.raises(ValueError, match="aggregation must be mean with mine_sums:sums"):
            build_strategy(
                quick_recipe("mine_sums:sums", "server.aggregation=median"), num_clients=4
            )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere_to_be_found:x", "a module that can be found"),
        ("nowhere.to.be_found:x", "a module that can be found.*folder of nowhere.py"),
        ("mine:lacking", "it has no lacking"),
        ("mine_raises:x", "ZeroDivisionError: division by zero"),
        ("mine_leaves:x", "SystemExit: two lines"),
        ("mine_lacks:x", "ModuleNotFoundError"),
        ("mine_other:m", "part must be of server"),
        ("mine_odd:number", "which is a int"),
        ("mine_odd:two", "one argument"),
        ("mine_odd:Kind", "which is a type"),
        ("mine:pulled.apply", "as module:attribute"),
        ("mine :pulled", "as module:attribute"),
        ("mine:", "as module:attribute"),
        ("../mine:pulled", "as module:attribute"),
        ("", "be of fedavg"),
        ("pulled", "be of fedavg, .* or module:attribute, got pulled"),
    ],
)
def test_a_name_that_means_no_method_is_refused(own: Path, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^strategy.name must .*{said}") as caught:
        check_strategy(f"flex+{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body", ["None", "1 / 0", "strategy.nothing"])
def test_a_function_that_gives_no_strategy_is_refused_before_a_model_is_loaded(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchard.experiment.running.open_base", None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_fails.py").write_text(f"def share(strategy):\n    return {body}\n")
    for command in ("plan", "run"):
        result = CliRunner().invoke(app, [command, "tiny/fedavg", "strategy.name=mine_fails:share"])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: strategy.name must name a method that ")
        assert len(result.stderr.splitlines()) == 1
    forget("mine_fails")


def test_the_command_finds_modules_here_after_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_here.py").write_text(PULLED)
    (tmp_path / "torch.py").write_text("raise AssertionError('shadowed')")
    result = CliRunner().invoke(app, ["plan", "tiny/flex", "strategy.name=flex+mine_here:pulled"])
    assert result.exit_code == 0, result.output
    assert sys.path[-1] == str(tmp_path)
    forget("mine_here")


def test_an_own_method_may_read_any_option() -> None:
    path = Path(__file__).parent.parent.parent / "recipes" / "tiny" / "fedavg.toml"
    override = "strategy.prox_mu=0.5"
    assert read_recipe(path, ["strategy.name=mine:pulled", override]).recipe.strategy.prox_mu == 0.5
    with pytest.raises(ValueError, match=r"fedprox in strategy\.name"):
        read_recipe(path, [override])
    with pytest.raises(ValueError, match="Dirichlet"):
        read_recipe(path, ["strategy.name=mine:pulled", "data.alpha=0.5"])


def test_installed_packages_offer_methods_by_name(own: Path) -> None:
    offer(own, softer="mine:pulled_hard", broken="mine_raises:x", fedavg="mine_raises:x")
    assert check_strategy("softer+flex") == ("flex", "softer")
    assert {*own_digests(["softer"]).values()} == {*own_digests(["mine:pulled"]).values()}
    assert check_strategy("fedavg") == ("fedavg",)  # ours is not replaced
    listed = CliRunner().invoke(app, ["ls"], env={"COLUMNS": "250"})
    assert listed.exit_code == 0, listed.output
    rows = [line.split("│")[1:3] for line in listed.output.splitlines() if line.startswith("│")]
    about = {name.strip(): text.strip() for name, text in rows}
    assert about["fedavg"] == "cannot be used: fedavg comes with Orchard"
    assert about["softer"] == "Clients are pulled hard"
    assert "cannot be used" in about["broken"]
    offer(own / "other", package="another", softer="mine:pulled")
    sys.path.append(str(own / "other"))
    forget()
    with pytest.raises(ValueError, match="must mean one method, got softer for mine:pulled and"):
        check_strategy("softer")
