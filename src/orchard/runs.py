"""A run's folder as objects: its recipe, its result and its metrics as rows."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from rich.table import Table

    from orchard.recipe.options import Recipe

Row: TypeAlias = dict[str, str | int | float]
"""One line of metrics: ``kind``, ``round``, mostly ``client``, and values by their keys."""

_WIDTH = 120  # of a table that is shown where no terminal says how wide it is


@dataclass(frozen=True, repr=False)
class Result:
    """What a finished run found, read from ``result.json``.

    Attributes:
        folder: The run's folder.
        record: The whole content of ``result.json``; the properties are its most used parts.
    """

    folder: Path
    record: Mapping[str, Any]

    @property
    def strategy(self) -> str:
        """The method, as its recipe names it."""
        return str(self.record["strategy"])

    @property
    def seed(self) -> int:
        """Root of the run's randomness."""
        return int(self.record["seed"])

    @property
    def num_rounds(self) -> int:
        """Completed rounds."""
        return int(self.record["num_rounds"])

    @property
    def clients(self) -> tuple[str, ...]:
        """Names of all clients, in the order of the data."""
        return tuple(self.record["clients"])

    @property
    def metrics(self) -> Mapping[str, Mapping[str, Mapping[str, float]]]:
        """Model, metric and client to the value of the last evaluation."""
        found: Mapping[str, Mapping[str, Mapping[str, float]]] = self.record["metrics"]
        return found

    @property
    def summary(self) -> Mapping[str, Mapping[str, Mapping[str, float]]]:
        """Model and metric to ``mean``, ``worst`` and ``spread`` over clients."""
        found: Mapping[str, Mapping[str, Mapping[str, float]]] = self.record["summary"]
        return found

    @property
    def seconds(self) -> Mapping[str, float]:
        """Wall time of ``rounds``, and in it ``training``, ``evaluation`` and ``overhead``."""
        found: Mapping[str, float] = self.record["seconds"]
        return found

    @property
    def uplink_bytes_per_round(self) -> tuple[int, ...]:
        """Bytes that all clients together sent, as encoded, by round."""
        return tuple(self.record["uplink_bytes_per_round"])

    @property
    def shared_digest(self) -> str:
        """SHA-256 of the final global tree: two runs with the same one are the same."""
        return str(self.record["shared_digest"])

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of how the run went, such as a loss that hardly moved."""
        return tuple(self.record.get("notes", ()))

    def table(self) -> Table:
        """Return a row per model, a column per client, then mean, worst client and spread."""
        from orchard.reports import result_table

        return result_table(self.record)

    def __rich__(self) -> Table:
        """Show the table where rich prints."""
        return self.table()

    def __repr__(self) -> str:
        """Say which run it is, and show its table, where it measured anything."""
        about = (
            f"Result({str(self.folder)!r}, {self.strategy}, seed {self.seed}, "
            f"{self.num_rounds} rounds, shared_digest {self.shared_digest[:12]})"
        )
        return f"{about}\n{_as_text(self.table())}" if self.summary else about


@dataclass(frozen=True)
class Run:
    """A run's folder, finished or not.

    Attributes:
        folder: Where it is.
        recipe: What it runs, every choice resolved.
        result: What it found; None until it has finished.
    """

    folder: Path
    recipe: Recipe
    result: Result | None

    @cached_property
    def num_rounds(self) -> int:
        """Rounds that were completed when ``metrics`` was read."""
        return max((int(row["round"]) for row in self.metrics if row["kind"] == "round"), default=0)

    @cached_property
    def metrics(self) -> list[Row]:
        """The lines of ``metrics.jsonl`` as flat rows, such as pandas.DataFrame takes; read once.

        A line of kind ``client`` or ``round`` is a row, an evaluation a row for each client. Values
        that are no numbers, such as the rounds that each expert was not sent in, are left out.
        """
        from orchard.results import MetricsLog, metrics_of

        rows: list[Row] = []
        for line in MetricsLog(self.folder / "metrics.jsonl"):
            per_client = line["clients"] if line["kind"] == "evaluation" else {"": line}
            for client, values in per_client.items():
                row: Row = {"kind": line["kind"], "round": line["round"]}
                if client or "client" in line:
                    row["client"] = client or line["client"]
                rows.append({**row, **metrics_of(values)})
        return rows


def load(folder: str | Path) -> Run:
    """Read a run's folder, whether the run has finished or not.

    Raises:
        FileNotFoundError: No run was started there.
        ValueError: Its recipe or its result do not parse.
    """
    from orchard.experiment.run_folder import RECIPE_FILE
    from orchard.recipe.reading import read_recipe
    from orchard.reports import read_result

    folder = Path(folder)
    path = folder / RECIPE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"run must be a folder with a {RECIPE_FILE}, got {folder}; "
            "name the folder that orchard run was given as --out"
        )
    has_result = (folder / "result.json").is_file()
    result = Result(folder, read_result(folder)) if has_result else None
    return Run(folder, read_recipe(path).recipe, result)


def _as_text(table: Table) -> str:
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=_WIDTH).print(table)
    return file.getvalue().rstrip()
