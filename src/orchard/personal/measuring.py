"""A trained model measured on a new file, the base beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from orchard.evaluation.quality import METRICS, STDERR, EvaluationSettings, check_options, evaluate
from orchard.experiment.encoding import cut_note, encode_test, end_ids, make_wording
from orchard.experiment.holdings import read_examples
from orchard.models.stored.loading import threads
from orchard.personal.opening import OpenedModel, open_model
from orchard.personal.state import ModelState
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
    recipe = state.recipe
    reading = read_examples(str(data), recipe.data, option="--data")
    metrics = words(recipe.evaluation.metrics)
    if "accuracy" in metrics:
        check_options([example.options for example in reading.examples], whose="--data")
    with threads(recipe.model.num_threads):
        with open_model(state.as_base(), device=device) as opened:
            wording = make_wording(recipe, opened.tokenizer)
            examples = encode_test(
                reading.examples,
                wording,
                max_tokens=recipe.data.max_tokens,
                whose="--data",
                chooses="accuracy" in metrics,
            )
            settings = EvaluationSettings(
                metrics=metrics,
                max_new_tokens=recipe.evaluation.max_new_tokens,
                batch_size=recipe.evaluation.batch_size,
                length_normalization=recipe.evaluation.length_normalization,  # type: ignore[arg-type]
                end_ids=end_ids(recipe, wording),
            )

            def of(model: OpenedModel) -> dict[str, float]:
                return evaluate(model.adapted, examples, settings)

            if state.held_experts is None:
                _ = opened.adapted.fresh  # while it is
            with opened.adapted.without_adapters():
                measured = {"base": of(opened)}
        # A whole model is opened in the place of the base, a submodel after it has gone.
        again = opened.adapted if state.held_experts is None else None
        del opened
        with open_model(state, adapted=again, device=device) as trained:
            measured["global" if state.client_id is None else "personal"] = of(trained)
    encoded = [example.encoded for example in examples]
    note = cut_note(encoded, max_tokens=recipe.data.max_tokens, whose="examples of --data")
    return measured, [note] if note else []


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
