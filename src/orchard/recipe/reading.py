"""Reading, checking and writing recipes.

A value comes from the command line or a call, else from the recipe, else from the recipe that it
extends, else it is the default; ``sources`` remembers which. Whatever can be checked without
reading data or a model is checked here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import operator
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from orchard.recipe.describing import Scalar
from orchard.recipe.effects import check_is_used
from orchard.recipe.options import Recipe

_COMMAND_LINE, _ARGUMENT = "command line", "argument"


@dataclass(frozen=True)
class Resolved:
    """A recipe, and where each of its values came from.

    Attributes:
        recipe: The values.
        sources: Dotted key to ``default``, a file, ``command line`` or ``argument``.
    """

    recipe: Recipe
    sources: Mapping[str, str]


def words(text: str) -> tuple[str, ...]:
    """Split a comma-separated value; blanks around a word do not count."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def known_options() -> dict[str, tuple[type, dataclasses.Field[Any]]]:
    """Return every dotted key with its type and its description."""
    known: dict[str, tuple[type, dataclasses.Field[Any]]] = {}
    sections = get_type_hints(Recipe)
    for section in dataclasses.fields(Recipe):
        kind = sections[section.name]
        if not dataclasses.is_dataclass(kind):
            known[section.name] = (kind, section)
            continue
        hints = get_type_hints(kind)
        for entry in dataclasses.fields(kind):
            known[f"{section.name}.{entry.name}"] = (hints[entry.name], entry)
    return known


def option_value(recipe: Recipe, key: str) -> Scalar:
    """Return the value of a dotted key."""
    section, _, name = key.rpartition(".")
    value: Scalar = getattr(getattr(recipe, section) if section else recipe, name)
    return value


def read_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    changes: Mapping[str, Any] | None = None,
    common: Mapping[str, Any] | None = None,
    source: str = "",
) -> Resolved:
    """Read, merge and check a recipe.

    Args:
        path: TOML file. Its ``extends`` names another, relative to it, that it builds on.
        overrides: ``key=value`` from the command line.
        changes: Dotted key to value, or section to its keys and values, from a call.
        common: The same for several recipes, under ``changes``; need not have an effect in each.
        source: Where ``common`` comes from.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no TOML, or a key or value is wrong.
    """
    values: dict[str, tuple[Any, str]] = {}
    for file in reversed(_chain(Path(path))):
        values |= {key: (value, str(file)) for key, value in flatten(_parse(file)).items()}
    values.pop("extends", None)
    values |= {key: (value, source) for key, value in flatten(common or {}).items()}
    for key, value in flatten(changes or {}).items():
        values[key] = os.fspath(value) if isinstance(value, os.PathLike) else value, _ARGUMENT
    return resolve(values, overrides)


def resolve(values: Mapping[str, tuple[Any, str]], overrides: Sequence[str] = ()) -> Resolved:
    """Check values with their sources and fill in the defaults.

    Args:
        values: Dotted key to value and source.
        overrides: ``key=value`` from the command line, which win.

    Raises:
        ValueError: A key or value is wrong.
    """
    known = known_options()
    merged = {key: _check(key, value, known) for key, (value, _) in values.items()}
    sources = dict.fromkeys(known, "default")
    sources |= {key: source for key, (_, source) in values.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(
                f"an override must be key=value, got {override}; for example server.rounds=5"
            )
        _check_key(key, known)
        merged[key] = _check(key, _from_text(text, kind=known[key][0]), known)
        sources[key] = _COMMAND_LINE
    hints = get_type_hints(Recipe)
    sections: dict[str, Any] = {}
    for name, kind in hints.items():
        if dataclasses.is_dataclass(kind):
            prefix = f"{name}."
            chosen = {k.removeprefix(prefix): v for k, v in merged.items() if k.startswith(prefix)}
            sections[name] = kind(**chosen)  # type: ignore[operator]
        elif name in merged:
            sections[name] = merged[name]
    recipe = Recipe(**sections)
    _check_combinations(recipe)
    asked_for = [key for key, source in sources.items() if source in (_COMMAND_LINE, _ARGUMENT)]
    check_is_used(recipe, asked_for)
    return Resolved(recipe, sources)


def parse_recipe(text: str) -> Recipe:
    """Read a whole recipe from text, as ``to_toml`` writes it; no file is opened.

    Raises:
        ValueError: It is no recipe.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"recipe must be TOML, got something else ({error}); send it again"
        ) from None
    if "extends" in table:
        raise ValueError("recipe must be whole, got extends; send what orchard show prints")
    return resolve({key: (value, "text") for key, value in flatten(table).items()}).recipe


def to_toml(recipe: Recipe) -> str:
    """Return a recipe as TOML that reads back to the same."""
    lines = [f"seed = {recipe.seed}"]
    for section in dataclasses.fields(Recipe):
        options = getattr(recipe, section.name)
        if dataclasses.is_dataclass(options) and not isinstance(options, type):
            lines += ["", f"[{section.name}]"]
            lines += [
                f"{key} = {format_value(v)}" for key, v in dataclasses.asdict(options).items()
            ]
    return "\n".join(lines) + "\n"


def format_value(value: Scalar) -> str:
    """Return a scalar as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON escapes what TOML must, except for the delete character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _chain(path: Path) -> list[Path]:
    """Return a recipe and those it extends, the most particular first."""
    chain: list[Path] = []
    following: Path | None = path
    while following is not None:
        if following.resolve() in [file.resolve() for file in chain]:
            raise ValueError(f"extends must not lead back to {following}; remove one extends")
        chain.append(following)
        parent = _parse(following).get("extends")
        following = (following.parent / str(parent)) if parent is not None else None
    return chain


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"recipe must be an existing file, got {path}; orchard ls shows the recipes"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe must be valid TOML, got {path} with: {error}; mend it") from error


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _check_key(key: str, known: Mapping[str, Any]) -> None:
    if key in known:
        return
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    raise ValueError(f"recipe key must be a known one, got {key}; did you mean {nearest[0]}?")


def _from_text(text: str, *, kind: type) -> Any:
    if kind is str:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _check(key: str, value: Any, known: Mapping[str, tuple[type, Any]]) -> Any:
    _check_key(key, known)
    kind, entry = known[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ValueError(
            f"{key} must be of type {kind.__name__}, got {format_value(value)}"
            if isinstance(value, str | int | float | bool)
            else f"{key} must be a single {kind.__name__}, got {type(value).__name__}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} must be finite, got {value}")
    limits = entry.metadata
    if limits["choices"] and value not in limits["choices"]:
        nearest = difflib.get_close_matches(str(value), limits["choices"], n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"{key} must be one of {', '.join(limits['choices'])}, got {value}{hint}")
    rules: tuple[tuple[str, str, Callable[[Any, Any], bool]], ...] = (
        ("minimum", "at least", operator.ge),
        ("maximum", "at most", operator.le),
        ("above", "above", operator.gt),
    )
    for name, rule, is_kept in rules:
        limit = limits[name]
        if limit is not None and not is_kept(value, limit):
            raise ValueError(f"{key} must be {rule} {limit}, got {value}")
    return value


def _check_combinations(recipe: Recipe) -> None:
    client, data, evaluation = recipe.client, recipe.data, recipe.evaluation
    if (client.steps > 0) == (client.epochs > 0):
        raise ValueError(
            f"exactly one of client.steps and client.epochs must be above 0, got {client.steps} "
            f"and {client.epochs}; set the other to 0"
        )
    if data.partition == "dirichlet_resample" and data.test_per_category == 0:
        raise ValueError(
            "data.test_per_category must be above 0 with data.partition = dirichlet_resample, got "
            "0; clients may share examples there, so the test set has to leave the pool first"
        )
    if recipe.strategy.calibration == "corpus" and not recipe.strategy.calibration_path:
        raise ValueError(
            "strategy.calibration_path must be given with strategy.calibration = corpus, got "
            "nothing; name a JSON Lines file"
        )
    s = recipe.strategy
    if s.graft_budget and s.graft_choice != "reconstruction":
        raise ValueError(
            f"strategy.graft_budget must be 0 with strategy.graft_choice = {s.graft_choice}, got "
            f"{s.graft_budget}; {s.graft_choice} experts have no losses to share it by"
        )
    if s.graft_choice == "fresh":
        rules: tuple[tuple[str, Scalar, tuple[Scalar, ...]], ...] = (
            ("kind", s.graft_kind, ("dense",)),
            ("gate", s.graft_gate, ("closed", "none")),
            ("experts", s.graft_experts, (1,)),
            ("mix", "difference" if "orchard" in s.name else s.graft_mix, ("additive", "convex")),
        )
        for key, given, choices in rules:
            if given not in choices:
                raise ValueError(
                    f"strategy.graft_{key} must be {' or '.join(map(str, choices))} with "
                    f"strategy.graft_choice = fresh, got {given}; there is no expert of the base "
                    "to start as, or to compare with"
                )
    _check_conventions(recipe)
    has_central_test = data.test_per_category and data.partition != "file" and not data.conventions
    if evaluation.other_clients and has_central_test:
        raise ValueError(
            "evaluation.other_clients must be 0 with data.test_per_category, got "
            f"{evaluation.other_clients}; all clients are tested on the same rows already"
        )
    if evaluation.shots and not evaluation.shots_path:
        raise ValueError(
            f"evaluation.shots_path must be given with evaluation.shots = {evaluation.shots}, got "
            "nothing; name a file of examples, such as MMLU's dev split"
        )
    if evaluation.shots and data.conventions:
        raise ValueError(
            f"evaluation.shots must be 0 with data.conventions = {data.conventions}, got "
            f"{evaluation.shots}; what is shown would answer otherwise than the client"
        )
    if "accuracy" in words(evaluation.metrics) and not (data.labels or data.options):
        raise ValueError(
            "data.labels or data.options must be given with accuracy in evaluation.metrics, got "
            "neither; name the labels, or the columns of the options"
        )
    allowed = {
        "evaluation.models": (evaluation.models, ("base", "global", "local", "personal")),
        "evaluation.metrics": (evaluation.metrics, _METRICS),
        "evaluation.best": (evaluation.best, words(evaluation.metrics)),
    }
    for key, (text, choices) in allowed.items():
        for word in words(text):
            if word not in choices:
                raise ValueError(f"{key} must be of {', '.join(choices)}, got {word}")


def _check_conventions(recipe: Recipe) -> None:
    data = recipe.data
    if data.conventions == "label_names" and (not data.labels or data.letters):
        raise ValueError(
            "data.labels must be given, and data.letters be false, with data.conventions = "
            f"label_names, got labels {format_value(data.labels)} and letters "
            f"{format_value(data.letters)}; name the labels"
        )
    if data.conventions == "answer_form" and (data.labels or data.options):
        raise ValueError(
            "data.conventions must be label_names with data.labels, and empty with data.options, "
            "got answer_form; an answer in another form is none of the options"
        )
    if data.conventions and data.path == "orchard:world":
        raise ValueError(
            f"data.conventions must be empty with data.path = orchard:world, got "
            f"{data.conventions}; its offices have conventions of their own"
        )


_METRICS = ("loss", "rouge_l", "chrf", "exact_match", "last_number", "accuracy")
