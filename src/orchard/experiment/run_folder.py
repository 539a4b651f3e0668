"""What makes a folder the folder of one run, and what two runs must share to be one."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from orchard.engine.processes import check_free, only_one
from orchard.experiment.methods import own_names
from orchard.experiment.own_methods import Transform, own_digests, passed_digest, passed_name
from orchard.recipe.method_options import method_names
from orchard.recipe.options import Recipe
from orchard.recipe.reading import format_value, known_options, option_value, read_recipe, to_toml
from orchard.recipe.run_options import DeploymentOptions, PrivacyOptions
from orchard.results import environment, write_atomically, write_json
from orchard.strategies.strategy import Strategy

# An id that is safe as a name: it holds no ~, which sets all other names apart from it.
_PLAIN = re.compile(r"[a-z0-9_][a-z0-9_-]{0,63}")
_DEVICE = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]")

_LATER: Mapping[str, Any] = MappingProxyType(
    {
        "model.placement": "memory",
        "model.expert_cache": "",
        "model.frozen_precision": "bf16",
        "data.max_train": 0,
        "data.validation_size": 0.0,
        "data.conventions": "",
        "data.arriving": 0,
        "strategy.arrival_rounds": 5,
        "strategy.graft_mix": "additive",
        "strategy.shared": "",
        "strategy.kept": "",
        "strategy.kept_steps": 0,
        "strategy.finetune_rounds": 1,
        "strategy.ditto_lambda": 0.1,
        "strategy.holdout": 0.25,
        "strategy.judged_below": 32,
        "server.lora_aggregation": "factors",
        "server.keep_rounds": 0,
        "server.start": "",
        "evaluation.best": "",
        "evaluation.other_clients": 0,
        "evaluation.shots": 0,
        "evaluation.shots_path": "",
        "privacy.secure_aggregation": False,
        "privacy.secure_least": 3,
        "privacy.secure_neighbors": 0,
        "privacy.secure_bound": 16.0,
        "deployment.sum_seconds": 120.0,
    }
)

RECIPE_FILE, METHODS_FILE = "recipe.toml", "methods.json"
LOCK_FILE = "run.lock"
"""Held by the one process that writes a run's folder, a coordinator's too."""
_WRITER = "writer of a run's folder"


@dataclass(frozen=True)
class Recorded:
    """What a run is recorded under.

    Attributes:
        recipe: Its recipe, with the name of a method that was passed as an object.
        digests: Own methods to the digests of their sources; see ``experiment/own_methods.py``.
    """

    recipe: Recipe
    digests: Mapping[str, str]


def recorded_as(recipe: Recipe, passed: Strategy | Transform | None = None) -> Recorded:
    """Return what a run of ``recipe`` is recorded under, with a method passed as an object.

    Raises:
        ValueError: A method of the recipe's is not there.
    """
    if isinstance(passed, Strategy):
        name, digests = passed_name(passed), {}
    else:
        name, digests = recipe.strategy.name, own_digests(own_names(recipe.strategy.name))
        if passed:
            name = f"{name}+{passed_name(passed)}"
            digests |= {passed_name(passed): passed_digest(passed)}
    return Recorded(replace(recipe, strategy=replace(recipe.strategy, name=name)), digests)


def facts_of(recorded: Recorded) -> dict[str, Any]:
    """Return what the result of a run says of where it comes from, with sites or without."""
    recipe, digests = recorded.recipe, recorded.digests
    return {
        **environment(),
        "seed": recipe.seed,
        "strategy": recipe.strategy.name,
        "recipe_digest": recipe_digest(recipe),
        **({"own_methods": dict(digests)} if digests else {}),
    }


def writing_alone(folder: Path, *, seconds: float = 1.0) -> AbstractContextManager[None]:
    """Be the one process that writes to a run's folder, while the context lasts.

    Args:
        folder: Of the run; made where it is not there.
        seconds: How long to wait for another process to end.

    Raises:
        InUseError: Another process writes there.
    """
    return only_one(folder / LOCK_FILE, seconds=seconds, what=_WRITER)


def check_unused(folder: Path) -> None:
    """Refuse a folder to which another process writes now.

    Raises:
        InUseError: One does.
    """
    check_free(folder / LOCK_FILE, what=_WRITER)


def begin_folder(folder: Path, recorded: Recorded) -> None:
    """Make a folder the folder of a run."""
    if recorded.digests:
        write_json(folder / METHODS_FILE, dict(recorded.digests))
    write_atomically(folder / RECIPE_FILE, to_toml(recorded.recipe).encode())


def check_folder(
    folder: Path, recipe: Recipe, *, resume: bool, passed: Strategy | Transform | None = None
) -> None:
    """Check that a run of ``recipe`` may be written to ``folder``.

    Args:
        folder: Of the run.
        recipe: Every choice.
        resume: Whether a run that is there may be continued.
        passed: The method, where it was passed as an object.

    Raises:
        ValueError: The folder holds a run, and ``resume`` is not set, or the recipe or a method is
            another.
    """
    if not (folder / RECIPE_FILE).exists():
        return
    if not resume:
        raise ValueError(
            f"--out must be a new folder, got {folder}, which holds a run; "
            "add --resume to continue it, or choose another"
        )
    before, now = read_recipe(folder / RECIPE_FILE).recipe, recorded_as(recipe, passed)
    for key in known_options():
        if key.startswith("deployment."):  # how long to wait may change between two starts
            continue
        old, new = option_value(before, key), option_value(now.recipe, key)
        if old != new:
            raise ValueError(
                f"{key} must be {format_value(old)} to resume the run in {folder}, got "
                f"{format_value(new)}; use the same recipe, or another --out"
            )
    path = folder / METHODS_FILE
    known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    for name in [*known, *now.digests]:
        if known.get(name) != now.digests.get(name):
            raise ValueError(
                f"the source of {name} must have SHA-256 {known.get(name)} to resume the run in "
                f"{folder}, got {now.digests.get(name)}; bring back the file as it was, or use "
                "another --out"
            )


def folder_name(client_id: str) -> str:
    """Return the name of a folder for any client id, and for no other id.

    An id of up to 64 lowercase ASCII letters, digits, ``_`` and ``-`` is its own name. Any other
    becomes what is readable of it, ``~`` and a digest of the whole id, so that names differ too
    where a file system ignores case, normalizes Unicode or bounds the length of a name. So do names
    that Windows keeps for devices, such as ``con``.
    """
    if _PLAIN.fullmatch(client_id) and not _DEVICE.fullmatch(client_id):
        return client_id
    ascii_letters = unicodedata.normalize("NFKD", client_id).encode("ascii", "ignore").decode()
    readable = re.sub(r"[^a-z0-9]+", "-", ascii_letters.lower())[:32].strip("-")
    # Half of a surrogate pair stands for a byte of a file's name that is no Unicode.
    whole = hashlib.sha256(client_id.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{readable or 'client'}~{whole[:20]}"


def recipe_digest(recipe: Recipe) -> str:
    """Return what two runs must have in common for one to continue the other."""
    recipe = replace(recipe, deployment=DeploymentOptions())
    # What came later does not make runs others that leave it as it is, but for orchard, which
    # judged every graft before it had a number of rows for it.
    later = dict(_LATER)
    if "orchard" in method_names(recipe.strategy.name):
        del later["strategy.judged_below"]
    section, kept = "", []
    for line in to_toml(recipe).splitlines(keepends=True):
        if line.startswith("["):
            section = line.strip("[]\n")
        if section == "privacy" and recipe.privacy == PrivacyOptions():
            continue
        key = f"{section}.{line.partition(' = ')[0]}"
        if key in later and line.endswith(f" = {format_value(later[key])}\n"):
            continue
        kept.append(line)
    text = "".join(kept)
    return hashlib.sha256(text.encode()).hexdigest()
