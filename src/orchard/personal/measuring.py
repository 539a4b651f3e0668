"""A trained model measured on a new file, the base beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from orchard.data.examples import Example
from orchard.evaluation.quality import (
    METRICS,
    STDERR,
    EvaluationSettings,
    TestExample,
    check_options,
    evaluate,
)
from orchard.experiment.encoding import cut_note, encode_test, end_ids, make_wording
from orchard.experiment.holdings import read_examples
from orchard.models.stored.loading import resolve, threads
from orchard.personal.exported import read_exported
from orchard.personal.opening import OpenedModel, open_model
from orchard.personal.state import ModelState
from orchard.recipe.options import Recipe
from orchard.recipe.reading import words
from orchard.reports import format_score


def measure(
    state: ModelState, data: Path, *, device: str | None = None
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Measure the base and a trained model on the examples of a file.

    Args:
        state: The trained model; its recipe says how rows are read and worded, and the metrics.
        data: The file.
        device: Where models run; None = as the recipe says.

    Returns:
        ``base`` and ``global`` or ``personal`` to metric to value, and what a person should know of
        the data.

    Raises:
        FileNotFoundError: The file or the base is not there.
        ValueError: Something does not fit.
    """
    test = _read_test(state.recipe, data)
    with threads(state.recipe.model.num_threads):
        with open_model(state.as_base(), device=device) as opened:
            if state.held_experts is None:
                _ = opened.adapted.fresh  # while it is
            with opened.adapted.without_adapters():
                measured = {"base": test.of(opened)}
        # A whole model is opened in the place of the base, a submodel after it has gone.
        again = opened.adapted if state.held_experts is None else None
        del opened
        with open_model(state, adapted=again, device=device) as trained:
            measured["global" if state.client_id is None else "personal"] = test.of(trained)
            return measured, test.notes(trained)


def measure_folder(
    folder: Path, data: Path, *, base: str | None = None, device: str | None = None
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Measure an exported folder, and its base where that is here, on the examples of a file.

    Args:
        folder: That ``orchard export`` wrote.
        data: The file.
        base: Where the base is; None = as the recipe says, whose base may be on another machine.
        device: Where models run; None = as the recipe says.

    Returns:
        As ``measure``.

    Raises:
        FileNotFoundError: The file, the folder's model or ``base`` is not there.
        ValueError: Something does not fit, or the folder brings other code than this version
            writes, which is not run.
    """
    found = read_exported(folder)
    recipe = found.recipe
    before = _at(recipe, base or recipe.model.path)
    measured, notes = {}, []
    with threads(recipe.model.num_threads):
        if base is None and not _is_here(recipe.model.path):
            notes = [f"the base {recipe.model.path} is not here; name its place by --model"]
        else:
            with open_model(_fresh(before, found.base_digest), device=device) as opened:
                measured["base"] = _read_test(before, data).of(opened)
            del opened
        # Fresh adapters change nothing: what was trained is in the folder's own tensors.
        own, loaded = found.own_recipe, found.load(device=device)
        exported = _fresh(own, loaded.digest)
        test = _read_test(own, data)
        with open_model(exported, base=loaded, device=device) as trained:
            measured["exported"] = test.of(trained)
            return measured, [*notes, *test.notes(trained)]


def _at(recipe: Recipe, path: str) -> Recipe:
    return replace(recipe, model=replace(recipe.model, path=path))


def _fresh(recipe: Recipe, digest: str) -> ModelState:
    return ModelState(recipe, None, 0, digest, {}, {}, {}, None)


def _is_here(path: str) -> bool:
    try:
        resolve(path)
    except FileNotFoundError:
        return False
    return True


@dataclass(frozen=True)
class _Test:
    """Examples of a file, and how a recipe measures a model on them."""

    recipe: Recipe
    examples: Sequence[Example]

    def encoded(self, model: OpenedModel) -> list[TestExample]:
        return encode_test(
            self.examples,
            make_wording(self.recipe, model.tokenizer),
            max_tokens=self.recipe.data.max_tokens,
            whose="--data",
            chooses="accuracy" in words(self.recipe.evaluation.metrics),
        )

    def of(self, model: OpenedModel) -> dict[str, float]:
        evaluation = self.recipe.evaluation
        settings = EvaluationSettings(
            metrics=words(evaluation.metrics),
            max_new_tokens=evaluation.max_new_tokens,
            batch_size=evaluation.batch_size,
            length_normalization=evaluation.length_normalization,  # type: ignore[arg-type]
            end_ids=end_ids(self.recipe, make_wording(self.recipe, model.tokenizer)),
        )
        return evaluate(model.adapted, self.encoded(model), settings)

    def notes(self, model: OpenedModel) -> list[str]:
        limit = self.recipe.data.max_tokens
        encoded = [example.encoded for example in self.encoded(model)]
        note = cut_note(encoded, max_tokens=limit, whose="examples of --data")
        return [note] if note else []


def _read_test(recipe: Recipe, data: Path) -> _Test:
    examples = read_examples(str(data), recipe.data, option="--data").examples
    if "accuracy" in words(recipe.evaluation.metrics):
        check_options([example.options for example in examples], whose="the examples of --data")
    return _Test(recipe, examples)


def measured_table(measured: Mapping[str, Mapping[str, float]], *, title: str) -> Table:
    """Return metrics as rows and models as columns."""
    table = Table("metric", title=title, title_justify="left")
    for model in measured:
        table.add_column(model, justify="right")
    first = next(iter(measured.values()))
    for metric in METRICS:
        if metric in first:
            own = (
                format_score(values[metric], metric, values.get(metric + STDERR))
                for values in measured.values()
            )
            table.add_row(metric, *own)
    return table
