"""Recipes: what is refused, where values come from, and that they read back the same."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchard.recipe.options import Recipe
from orchard.recipe.reading import format_value, known_options, read_recipe, resolve, to_toml, words
from orchard.recipe.run_options import DataOptions, ModelOptions

Write: TypeAlias = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str, name: str = "recipe.toml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def refuse(message: str, *overrides: str) -> None:
    """Demand that overrides of an empty recipe are refused in exactly these words."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resolve({}, overrides)


def test_an_empty_recipe_is_the_defaults(write: Write) -> None:
    resolved = read_recipe(write(""))
    assert resolved.recipe == Recipe()
    assert set(resolved.sources.values()) == {"default"}
    assert resolved.sources.keys() == known_options().keys()


def test_every_option_says_what_it_is_about() -> None:
    for key, (kind, entry) in known_options().items():
        assert entry.metadata["about"].strip(), key
        assert entry.metadata["about"].endswith("."), key
        assert kind in (str, int, float, bool), key


def test_every_default_is_one_of_its_own_values() -> None:
    defaults = {key: (entry.default, "here") for key, (_, entry) in known_options().items()}
    assert resolve(defaults).recipe == Recipe()


def test_every_section_says_what_it_is() -> None:
    for section in dataclasses.fields(Recipe):
        if section.name != "seed":
            assert section.default_factory.__doc__  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("server.round", "server.rounds"),
        ("rounds", "server.rounds"),
        ("sede", "seed"),
        ("model.lora_rnk", "model.lora_rank"),
        ("startegy.name", "strategy.name"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    message = f"recipe key must be a known one, got {key}; did you mean {nearest}?"
    refuse(message, f"{key}=1")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resolve({key: (1, "a file")})


def test_an_unknown_key_in_a_file_is_an_error(write: Write) -> None:
    with pytest.raises(ValueError, match=r"got server\.ruonds; did you mean server\.rounds\?"):
        read_recipe(write("[server]\nruonds = 3\n"))
    with pytest.raises(ValueError, match="recipe key must be a known one, got model; did you"):
        read_recipe(write('model = "orchard:tiny"\n'))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("server.rounds=2.5", "server.rounds must be of type int, got 2.5"),
        ("server.rounds=many", 'server.rounds must be of type int, got "many"'),
        ('server.rounds="3"', 'server.rounds must be of type int, got "3"'),
        ("server.rounds=true", "server.rounds must be of type int, got true"),
        ("server.rounds=", 'server.rounds must be of type int, got ""'),
        ("client.lr=fast", 'client.lr must be of type float, got "fast"'),
        ("client.lr=true", "client.lr must be of type float, got true"),
        ("server.rounds=[1, 2]", "server.rounds must be a single int, got list"),
        ("server.rounds={a = 1}", "server.rounds must be a single int, got dict"),
        ("server.rounds=1979-05-27", "server.rounds must be a single int, got date"),
    ],
)
def test_a_wrong_type_is_an_error(override: str, message: str) -> None:
    refuse(message, override)


def test_a_list_is_refused(write: Write) -> None:
    with pytest.raises(ValueError, match=r"^evaluation\.metrics must be a single str, got list$"):
        read_recipe(write('[evaluation]\nmetrics = ["loss", "rouge_l"]\n'))
    with pytest.raises(ValueError, match=r"^data\.path must be of type str, got 3$"):
        read_recipe(write("[data]\npath = 3\n"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("server.rounds=0", "server.rounds must be at least 1, got 0"),
        ("seed=-1", "seed must be at least 0, got -1"),
        ("client.lr=-1", "client.lr must be at least 0, got -1.0"),
        ("model.lora_dropout=1.0", "model.lora_dropout must be at most 0.99, got 1.0"),
        ("server.dampening=0.0", "server.dampening must be above 0, got 0.0"),
        ("server.dampening=1.5", "server.dampening must be at most 1, got 1.5"),
        ("client.lr=nan", "client.lr must be finite, got nan"),
        ("client.lr=inf", "client.lr must be finite, got inf"),
    ],
)
def test_a_value_out_of_range_is_an_error(override: str, message: str) -> None:
    refuse(message, override)


@pytest.mark.parametrize("override", ["model.lora_dropout=0.99", "client.weight_decay=0", "seed=0"])
def test_the_ends_of_a_range_are_in_it(override: str) -> None:
    key, _, value = override.partition("=")
    section, _, name = key.rpartition(".")
    recipe = resolve({}, [override]).recipe
    assert getattr(getattr(recipe, section) if section else recipe, name) == float(value)


def test_a_choice_with_a_typo_names_the_nearest() -> None:
    choices = "iid, dirichlet, dirichlet_resample, category, file"
    refuse(
        f"data.partition must be one of {choices}, got dirichelt; did you mean dirichlet?",
        "data.partition=dirichelt",
    )
    refuse(f"data.partition must be one of {choices}, got zzz", "data.partition=zzz")


@pytest.mark.parametrize(("steps", "epochs"), [(5, 1), (0, 0)])
def test_steps_and_epochs_exclude_each_other(steps: int, epochs: int) -> None:
    refuse(
        "exactly one of client.steps and client.epochs must be above 0, "
        f"got {steps} and {epochs}; set the other to 0",
        f"client.steps={steps}",
        f"client.epochs={epochs}",
    )


def test_epochs_instead_of_steps_are_allowed() -> None:
    client = resolve({}, ["client.steps=0", "client.epochs=2"]).recipe.client
    assert (client.steps, client.epochs) == (0, 2)


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["data.partition=dirichlet_resample"], "data.test_per_category must be above 0 with"),
        (["strategy.calibration=corpus"], "strategy.calibration_path must be given with"),
        (["strategy.graft_experts=0"], "strategy.graft_experts must be at least 1, got 0"),
        (["strategy.graft_max_sets=0"], "strategy.graft_max_sets must be at least 1, got 0"),
        (["strategy.graft_loss=l2"], "strategy.graft_loss must be one of norm, fitted, got l2"),
        (
            [
                "strategy.name=flex",
                "strategy.graft_experts=2",
                "strategy.graft_budget=30",
                "strategy.graft_choice=random",
            ],
            "strategy.graft_budget must be 0 with strategy.graft_choice = random, got 30; ",
        ),
        (["evaluation.models=base,glbal"], "evaluation.models must be of base, global, local"),
        (
            ["evaluation.metrics=accuracy"],
            "data.labels or data.options must be given with accuracy",
        ),
        (["evaluation.metrics=loss,bleu"], "evaluation.metrics must be of loss, rouge_l"),
    ],
)
def test_values_that_do_not_go_together_are_an_error(overrides: list[str], start: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(start)}"):
        resolve({}, overrides)


def test_an_override_without_equals_is_an_error() -> None:
    refuse(
        "an override must be key=value, got server.rounds; for example server.rounds=5",
        "server.rounds",
    )


def test_an_override_may_hold_equals_and_spaces() -> None:
    recipe = resolve({}, ["data.path=/a b/c=d.jsonl", "data.context="]).recipe
    assert recipe.data.path == "/a b/c=d.jsonl"
    assert recipe.data.context == ""


def test_the_last_override_wins() -> None:
    assert resolve({}, ["server.rounds=3", "server.rounds=4"]).recipe.server.rounds == 4


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    with pytest.raises(FileNotFoundError, match=r"^recipe must be an existing file, got .*miss"):
        read_recipe(missing)
    with pytest.raises(FileNotFoundError, match=r"^recipe must be an existing file"):
        read_recipe(tmp_path)


def test_a_missing_parent_is_an_error(write: Write) -> None:
    with pytest.raises(FileNotFoundError, match=r"got .*nowhere\.toml; orchard ls shows"):
        read_recipe(write('extends = "nowhere.toml"\n'))


@pytest.mark.parametrize("text", ["[server\nrounds = 3", "rounds 3", "a = 1\na = 2"])
def test_bad_toml_is_an_error_that_names_the_file(write: Write, text: str) -> None:
    with pytest.raises(ValueError, match=r"^recipe must be valid TOML, got .*recipe.toml with: "):
        read_recipe(write(text))


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe\x00seed = 1")
    with pytest.raises(ValueError, match=r"^recipe must be valid TOML, got .*recipe.toml with: "):
        read_recipe(path)


def test_the_more_particular_recipe_wins(write: Write) -> None:
    base = write("seed = 1\n[server]\nrounds = 10\nlr = 0.5\n[client]\nsteps = 2\n", "base.toml")
    middle = write('extends = "base.toml"\n[server]\nrounds = 20\n', "middle.toml")
    top = write('extends = "../middle.toml"\n[client]\nsteps = 7\n', "deep/top.toml")
    resolved = read_recipe(top, ["server.lr=0.25"])
    recipe, sources = resolved.recipe, resolved.sources
    assert recipe.seed == 1
    assert Path(sources["seed"]).samefile(base)
    assert recipe.server.rounds == 20
    assert Path(sources["server.rounds"]).samefile(middle)
    assert recipe.client.steps == 7
    assert sources["client.steps"] == str(top)
    assert recipe.server.lr == 0.25
    assert sources["server.lr"] == "command line"
    assert sources["client.lr"] == "default"


@pytest.mark.parametrize("name", ["a.toml", "../loop/a.toml", "b.toml"])
def test_extends_that_lead_back_are_an_error(write: Write, name: str) -> None:
    path = write(f'extends = "{name}"\n', "loop/a.toml")
    write('extends = "a.toml"\n', "loop/b.toml")
    with pytest.raises(ValueError, match=r"^extends must not lead back to .*a\.toml; remove one"):
        read_recipe(path)


def test_a_relative_path_that_leads_back_is_an_error(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(f'extends = "{tmp_path / "a.toml"}"\n', "a.toml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^extends must not lead back"):
        read_recipe("a.toml")


def test_a_whole_number_is_a_float_where_one_is_asked_for() -> None:
    lr = resolve({}, ["server.lr=1"]).recipe.server.lr
    assert isinstance(lr, float)
    assert lr == 1.0


def test_words_drops_blanks_and_empty_parts() -> None:
    assert words(" a, b ,,c ,") == ("a", "b", "c")
    assert words("") == ()


TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


@settings(deadline=None, max_examples=60)
@given(path=TEXT, categories=TEXT, subset=TEXT)
@example(path='a"b\\c\\\\', categories="line\r\nfeed\n\ttab", subset="\x00\x08\x1f\x7f\x80")
@example(path="\\u0041", categories='"""', subset="é\u2028😀\ufeff")
def test_toml_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, path: str, categories: str, subset: str
) -> None:
    recipe = Recipe(
        seed=2**63 - 1,
        data=DataOptions(path=path, categories=categories, subset=subset),
        model=ModelOptions(path=path, lora_alpha=1e16, lora_dropout=5e-324),
    )
    file = tmp_path_factory.getbasetemp() / "round_trip.toml"
    file.write_text(to_toml(recipe), encoding="utf-8")
    assert read_recipe(file).recipe == recipe


@given(value=st.floats(allow_nan=False) | st.integers() | st.booleans() | TEXT)
def test_a_scalar_reads_back_with_its_type(value: str | float | bool) -> None:
    found = tomllib.loads(f"value = {format_value(value)}")["value"]
    assert type(found) is type(value)
    assert found == value
    assert not isinstance(value, float) or math.copysign(1, found) == math.copysign(1, value)


def test_toml_has_every_option_of_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "full.toml"
    file.write_text(to_toml(Recipe()))
    assert set(read_recipe(file).sources.values()) == {os.fspath(file)}


@pytest.mark.parametrize(
    ("override", "need"),
    [
        ("strategy.graft_rank=4", "flex or orchard in strategy.name"),
        ("strategy.calibration=own", "flex or orchard in strategy.name"),
        ("strategy.prox_mu=0.1", "fedprox in strategy.name"),
        ("server.beta1=0.5", "fedadam or fedyogi"),
        ("server.momentum=0.5", "fedavgm"),
        ("data.alpha=2.0", "Dirichlet"),
        ("data.examples_per_client=9", "dirichlet_resample"),
        ("data.test_size=0.2", "data.test_per_category = 0"),
        ("evaluation.length_normalization=tokens", "accuracy in evaluation.metrics"),
        ("client.budget=25%", "hfedmoe, .* or fedavg_dropout in strategy.name"),
        ("client.memory_bytes=12GB", "hfedmoe, .* or fedavg_dropout in strategy.name"),
        ("strategy.entropy_coefficient=0.1", "seermoe in strategy.name"),
        ("selection.mode=carve", "one of hfedmoe, .*seermoe in strategy.name"),
        ("selection.scoring_batches=2", "one of hfedmoe, .*seermoe in strategy.name"),
        ("selection.rank_by=random", "hfedmoe in strategy.name"),
        ("selection.threshold=0.0", "hfedmoe in strategy.name"),
    ],
)
def test_an_override_without_effect_is_refused(override: str, need: str) -> None:
    values = {"data.partition": ("category", "x"), "data.test_per_category": (5, "x")}
    with pytest.raises(ValueError, match=need):
        resolve(values, [override])


@pytest.mark.parametrize(
    ("method", "override", "need"),
    [
        ("fedavg_dropout", "selection.mode=carve", "one of hfedmoe"),
        ("fedmoe", "selection.rank_by=random", "hfedmoe in strategy.name"),
        ("pflmoe", "selection.cadence=run", "hfedmoe in strategy.name"),
        ("seermoe", "selection.usage_mode=relative", "hfedmoe in strategy.name"),
        ("hfedmoe", "selection.every=4", "selection.cadence = steps"),
        ("hfedmoe", "selection.scoring_batches=2", "selection.cadence = round or run"),
        ("flex + hfedmoe", "selection.scoring_batches=2", "selection.cadence = round or run"),
        ("fedavg_random", "strategy.entropy_coefficient=1.0", "seermoe in strategy.name"),
    ],
)
def test_an_option_that_a_method_decides_itself_is_refused(
    method: str, override: str, need: str
) -> None:
    with pytest.raises(ValueError, match=f"{override.partition('=')[0]} must come with .*{need}"):
        resolve({"strategy.name": (method, "x")}, [override])


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("fedavg_dropout", ["client.budget=25%"]),
        ("flex + hfedmoe", ["client.budget=25%", "selection.threshold=0.5"]),
        ("hfedmoe", ["selection.rank_by=random", "selection.cadence=steps", "selection.every=4"]),
        ("hfedmoe", ["selection.cadence=round", "selection.scoring_batches=2"]),
        ("fedmoe", ["selection.mode=carve", "selection.scoring_batches=2"]),
        ("seermoe", ["strategy.entropy_coefficient=1.0", "client.memory_bytes=12GB"]),
    ],
)
def test_options_of_budgets_have_an_effect(method: str, overrides: list[str]) -> None:
    assert resolve({"strategy.name": (method, "x")}, overrides)


def test_a_rank_without_redundancy_has_no_use_for_its_weight() -> None:
    values = {"strategy.name": ("hfedmoe", "x"), "selection.rank_by": ("specific", "x")}
    with pytest.raises(ValueError, match=r"selection\.rank_by = information"):
        resolve(values, ["selection.beta=0.2"])


@pytest.mark.parametrize(
    ("values", "override", "need"),
    [
        ({}, "strategy.graft_budget=30", "strategy.graft_experts above 1"),
        ({}, "strategy.graft_max_sets=30", "strategy.graft_experts above 1"),
        ({"choice": "random"}, "strategy.graft_loss=fitted", "graft_choice = reconstruction"),
        (
            {"choice": "random", "experts": 2},
            "strategy.graft_max_sets=30",
            "graft_choice = reconstruction",
        ),
    ],
)
def test_an_option_of_a_search_that_is_not_made_is_refused(
    values: dict[str, str | int], override: str, need: str
) -> None:
    given = {f"strategy.graft_{key}": (value, "x") for key, value in values.items()}
    with pytest.raises(ValueError, match=need):
        resolve({"strategy.name": ("flex", "x"), **given}, [override])


def test_a_lora_option_of_a_dense_graft_is_refused() -> None:
    values = {"strategy.name": ("flex", "x"), "strategy.graft_kind": ("dense", "x")}
    with pytest.raises(ValueError, match="graft_kind = lora"):
        resolve(values, ["strategy.graft_rank=4"])
    assert resolve({**values, "strategy.graft_rank": (4, "x")}).recipe.strategy.graft_rank == 4
