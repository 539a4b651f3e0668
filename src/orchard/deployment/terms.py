"""How the rows of a site are read, split and chosen: the owner's to say, not the coordinator's.

Whoever chooses columns, wording, labels or the split chooses which rows a measure tells about. So
all of it comes from the owner's own file, or from the first recipe that the site joins, which is
kept in the store: a later one that says otherwise is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from orchard.communication.refusals import Code
from orchard.deployment.consent import Consent, Refusal
from orchard.recipe.describing import Scalar
from orchard.recipe.options import Recipe
from orchard.recipe.reading import format_value, option_value, read_recipe
from orchard.recipe.run_options import DataOptions
from orchard.results import write_json

AGREED_FILE = "agreed.json"
_MAX_EXAMPLES = "evaluation.max_examples"
# What only divides a pool over clients, or finds it: a site has one file.
_OF_POOLS = frozenset(
    {
        *("path", "subset", "split", "partition", "categories", "num_clients", "alpha"),
        *("examples_per_client", "test_per_category"),
    }
)
_TRIES = 10
TaskKind: TypeAlias = Literal["labels", "options", "text"]


def term_keys() -> tuple[str, ...]:
    """Return the options that are the owner's; a new one of the data section is one of them."""
    own = [f"data.{field.name}" for field in fields(DataOptions) if field.name not in _OF_POOLS]
    return (*own, _MAX_EXAMPLES)


@dataclass(frozen=True)
class Terms:
    """What is agreed about a site's data.

    Attributes:
        values: Option to value, of ``term_keys``.
        split_seed: What draws the held-out rows, whatever the seed of a run is.
    """

    values: Mapping[str, Scalar]
    split_seed: int

    def apply(self, recipe: Recipe, *, data: str) -> Recipe:
        """Return a recipe with these terms, reading the file ``data``."""
        own = {
            key.removeprefix("data."): value
            for key, value in self.values.items()
            if key.startswith("data.")
        }
        return replace(
            recipe,
            data=DataOptions(**{**own, "path": data, "partition": "file"}),  # type: ignore[arg-type]
            evaluation=replace(recipe.evaluation, max_examples=int(self.values[_MAX_EXAMPLES])),
        )


def terms_of(recipe: Recipe) -> Terms:
    """Return what a recipe says of the data."""
    return Terms({key: option_value(recipe, key) for key in term_keys()}, recipe.seed)


def read_own_terms(path: str | Path) -> Terms:
    """Read the owner's own data section.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no TOML, or says something that is not about the data.
    """
    resolved = read_recipe(path)
    foreign = [
        key
        for key, source in resolved.sources.items()
        if source != "default" and key not in (*term_keys(), "seed")
    ]
    if foreign:
        raise ValueError(
            f"--data-recipe must say how the site's rows are read and split, got {foreign[0]} in "
            f"{path}; keep the data section, {_MAX_EXAMPLES} and seed"
        )
    return terms_of(resolved.recipe)


def kind_of_task(recipe: Recipe) -> TaskKind:
    """Return what the coordinator has a say in: what kind of task the data is for."""
    if recipe.data.labels:
        return "labels"
    return "options" if recipe.data.options else "text"


@dataclass(frozen=True)
class Agreement:
    """What a site and its first coordinator agreed on, in the site's store.

    Attributes:
        path: Of its file.
    """

    path: Path

    def terms(self, consent: Consent, recipe: Recipe) -> Terms:
        """Return how rows are read for a recipe: the owner's way, or as agreed, or as it says.

        Raises:
            Refusal: It says otherwise than agreed, or its task is of another kind.
        """
        asked = terms_of(recipe)
        if consent.data_recipe:
            own = read_own_terms(consent.data_recipe)
            kinds = kind_of_task(own.apply(recipe, data="")), kind_of_task(recipe)
            if kinds[0] != kinds[1]:
                raise Refusal(
                    Code.TASK_KIND,
                    f"task must be of kind {kinds[0]} with {consent.data_recipe}, got {kinds[1]}",
                    option="data.options" if "options" in kinds else "data.labels",
                )
            return own
        kept = self._read()
        if "values" not in kept:
            if kept.get("tries", 0) >= _TRIES:
                raise Refusal(
                    Code.DATA_TRIES,
                    f"recipes that do not fit the data must be at most {_TRIES}, got as many; look "
                    f"at the audit, then delete {self.path}, or say --data-recipe",
                )
            return asked
        # An option that came with a later version was as it is by default.
        values = {**terms_of(Recipe()).values, **kept["values"]}
        for key in term_keys():
            if values[key] != asked.values[key]:
                raise Refusal(
                    Code.TERMS,
                    f"{key} must be {format_value(values[key])} as agreed with run "
                    f"{kept['run']}, got {format_value(asked.values[key])[:200]}; to agree on "
                    f"another, delete {self.path}, or say --data-recipe",
                    option=key,
                )
        return Terms(values, kept["split_seed"])

    def failed(self) -> None:
        """Count a recipe that did not fit the data: each one that fails says something of it."""
        kept = self._read()
        if "values" not in kept:
            write_json(self.path, {"tries": kept.get("tries", 0) + 1})

    def keep(self, terms: Terms, *, run: str) -> None:
        """Agree, where nothing is agreed yet."""
        if "values" not in self._read():
            write_json(self.path, {**asdict(terms), "run": run, "time": time.time()})

    def _read(self) -> dict[str, Any]:
        kept: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        return kept
