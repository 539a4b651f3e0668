"""What the studies ask, what the papers report of it, and the records of those that were run."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.records import Record, read

HERE = Path(__file__).parent
QUESTIONS = HERE / "questions.toml"
RESULTS = HERE / "results"
Row: TypeAlias = Mapping[str, Any]
"""A method, in one combination of a study's grid, by one metric; see ``studies.rows.Row``."""


@dataclass(frozen=True)
class Figure:
    """What a paper reports of a method.

    Attributes:
        method: What the study calls it.
        metric: Of the study.
        value: A loss as it is, everything else in percent.
        cell: The combination of the study's grid.
        model: Of which base; empty = the paper has one.
    """

    method: str
    metric: str
    value: float
    cell: str = ""
    model: str = ""


@dataclass(frozen=True)
class Question:
    """One question, and the study that answers it.

    Attributes:
        name: Its heading.
        study: The name of the study.
        asks: In a sentence.
        design: What README's table calls it; empty = it is not there.
        by: The metric that README shows; empty = the study's first.
        metrics: Those that are shown; none = all.
        paper: Which table or figure of a paper it repeats; empty = none.
        says: What that paper reports, beside its figures.
        figures: What the paper reports of each method.
        record: The study's ``study.json``; None = it was not run.
        loads: What ``orchard load --json`` counted, a file ``load*.json`` for each run.
    """

    name: str
    study: str
    asks: str = ""
    design: str = ""
    by: str = ""
    metrics: tuple[str, ...] = ()
    paper: str = ""
    says: str = ""
    figures: tuple[Figure, ...] = ()
    record: Record | None = None
    loads: tuple[Record, ...] = ()

    def tables(self, metrics: Sequence[str] = ()) -> dict[tuple[str, str], list[Row]]:
        """Return the study's rows by combination of its grid and by metric, in its order.

        Args:
            metrics: Those that are wanted; none = all that the question shows.
        """
        found: dict[tuple[str, str], list[Row]] = {}
        wanted = metrics or self.metrics
        for row in self.record["rows"] if self.record else ():
            if not wanted or row["metric"] in wanted:
                found.setdefault((row["cell"], row["metric"]), []).append(row)
        return found

    def main_tables(self) -> dict[tuple[str, str], list[Row]]:
        """Return the rows by the one metric that README shows, or by the first where it lacks."""
        tables = self.tables([self.by]) if self.by else {}
        if tables or not self.record or not self.record["rows"]:
            return tables
        return self.tables([self.record["rows"][0]["metric"]])


def read_questions(path: Path = QUESTIONS, results: Path = RESULTS) -> list[Question]:
    """Return all questions in their order, and then studies with results that no question names.

    Raises:
        ValueError: A key is unknown, or a name stands twice.
    """
    tables = tomllib.loads(path.read_text(encoding="utf-8"))["question"]
    questions = [_question(table, results) for table in tables]
    names = [question.name for question in questions]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"name must be a question's own, got {', '.join(twice)} twice; rename one")
    asked = {question.study for question in questions}
    for folder in sorted(results.glob("*/study.json")):
        if (name := folder.parent.name) not in asked:
            record = _read(results, name)
            assert record is not None
            questions.append(Question(str(record["title"]), name, design=name, record=record))
    return questions


def _question(table: Mapping[str, Any], results: Path) -> Question:
    own = dict(table)
    figures = tuple(Figure(**figure) for figure in own.pop("figure", ()))
    metrics = tuple(own.pop("metrics", ()))
    unknown = own.keys() - {"name", "study", "asks", "design", "by", "paper", "says"}
    if unknown:
        raise ValueError(f"a question must have known keys, got {', '.join(sorted(unknown))}")
    loads = tuple(read(results / own["study"], "load*.json"))
    record = _read(results, own["study"])
    return Question(**own, metrics=metrics, figures=figures, record=record, loads=loads)


def _read(results: Path, study: str) -> Record | None:
    path = results / study / "study.json"
    if not path.is_file():
        return None
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record
