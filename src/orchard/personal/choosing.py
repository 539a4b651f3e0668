"""Which of a run's models is meant, in the words of the command."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Literal, TypeAlias

from orchard.evaluation.quality import METRICS
from orchard.personal.state import ModelState, find_clients, read_recipe_of, read_state
from orchard.recipe.options import Recipe
from orchard.recipe.reading import words
from orchard.results import MetricsLog

Kind: TypeAlias = Literal["base", "global", "personal"]
BEST = "best"


def choose_state(
    folder: Path,
    *,
    client: str | None = None,
    model: Kind | None = None,
    round_number: int | str | None = None,
) -> ModelState:
    """Read one model of a run, or of a site's store.

    Args:
        folder: The run's, or the store.
        client: Whose personal model.
        model: ``base``, ``global`` or ``personal``; None = ``personal`` where ``client`` is given
            or ``folder`` is a site's, else ``global``.
        round_number: After which round; ``best`` = the one that was measured best, None = the last.

    Raises:
        FileNotFoundError: ``folder`` holds no run.
        ValueError: See ``read_state``; or the choice contradicts itself.
    """
    if client is not None and model not in (None, "personal"):
        raise ValueError(f"--client and --{model} must not both be given, got both; drop one")
    clients = find_clients(folder)
    is_store = not (folder / "recipe.toml").is_file()
    kind = model or ("personal" if client is not None or is_store else "global")
    if kind == "personal" and client is None:
        if len(clients) != 1:
            raise ValueError(
                f"--client must name one of {', '.join(clients) or 'no client'}, got none"
            )
        (client,) = clients
    if round_number == BEST:
        recipe = read_recipe_of(folder)
        round_number = best_round(folder, recipe, client=client if kind == "personal" else None)
    number = None if round_number is None else _number(round_number)
    if kind == "base":
        return read_state(folder, round_number=number).as_base()
    state = read_state(folder, client=client if kind == "personal" else None, round_number=number)
    if kind == "global" and not state.shared:
        raise ValueError(
            f"{folder} must hold a global model, got a run in which nothing is shared; choose "
            "--client or --base"
        )
    return state


def _number(round_number: int | str) -> int:
    try:
        number = int(round_number)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"--round must be a number from 1, or best, got {round_number}")
    return number


def best_round(folder: Path, recipe: Recipe, *, client: str | None) -> int:
    """Return the round after which a model was measured best; of equal ones the first.

    Args:
        folder: The run's.
        recipe: Says by which metric, ``evaluation.best``.
        client: Whose personal model; None = the global one, by the mean over clients.

    Raises:
        ValueError: It was not measured.
    """
    metric = recipe.evaluation.best or next(iter(words(recipe.evaluation.metrics)), "loss")
    key = f"{'personal' if client else 'global'}/{metric}"
    found: dict[int, float] = {}
    for line in MetricsLog(folder / "metrics.jsonl"):
        if line["kind"] != "evaluation":
            continue
        measured = line["clients"]
        own = [measured.get(client, {})] if client else list(measured.values())
        values = [values[key] for values in own if key in values]
        if values and line["round"] > 0:
            found[line["round"]] = fmean(values)
    if not found:
        raise ValueError(
            f"--round best must have {key} to go by, got a run in which it was not measured; give "
            "a number"
        )
    sign = -1 if METRICS[metric] else 1
    return min(found, key=lambda number: (sign * found[number], number))
