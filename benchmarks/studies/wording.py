"""What an interval allows to be said, in words."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.studies.questions import Figure, Row
from orchard.reports import format_score

_NOT_SEEN = "no difference seen"


def signed(value: float, metric: str) -> str:
    """Return a difference: of losses as it is, else in points of a percent."""
    return f"{value:+.4f}" if metric.endswith("loss") else f"{100 * value:+.2f}"


def with_interval(row: Row) -> str:
    """Return a row's difference to the reference, with its 95 % interval."""
    own = row["difference"]
    mean, low, high = (signed(own[key], row["metric"]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def with_spread(row: Row) -> str:
    """Return a row's mean over clients and seeds, with its deviation over seeds."""
    text = format_score(row["mean"], row["metric"])
    spread = row["spread"]
    return text if spread is None else f"{text} ± {format_score(spread, row['metric'])}"


def by_verdict(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return what stands in a line: methods that are better, worse, or not seen to differ.

    What would hold without the correction for many comparisons says so.
    """
    found: dict[str, list[str]] = {"better": [], _NOT_SEEN: [], "worse": []}
    for row in rows:
        if row["difference"] is None:
            continue
        verdict, _, rest = str(row["verdict"]).partition(", ")
        if verdict == _NOT_SEEN:
            found[verdict].append(row["method"])
        else:
            note = f" ({rest})" if rest else ""
            found[verdict].append(f"{row['method']} {with_interval(row)}{note}")
    return found


def as_sentence(rows: Sequence[Row], reference: str) -> str:
    """Return what one table says of its methods beside the reference."""
    found = by_verdict(rows)
    parts = [
        f"{verdict.capitalize()} than {reference}: {'; '.join(found[verdict])}."
        for verdict in ("better", "worse")
        if found[verdict]
    ]
    if found[_NOT_SEEN]:
        parts.append(f"No difference to {reference} seen: {', '.join(found[_NOT_SEEN])}.")
    return " ".join(parts) or f"{reference} stands alone."


def beside_paper(rows: Sequence[Row], figures: Sequence[Figure], reference: str) -> list[str]:
    """Return a sentence for each method whose difference to the reference a paper has too.

    Args:
        rows: Of one table.
        figures: Of the paper, for that table.
        reference: What methods are compared with.
    """
    sentences = []
    base = {figure.model: figure.value for figure in figures if figure.method == reference}
    own = {row["method"]: row for row in rows if row["difference"] is not None}
    for figure in figures:
        row = own.get(figure.method)
        if row is None or figure.model not in base:
            continue
        scale = 1 if figure.metric.endswith("loss") else 100
        paper = (figure.value - base[figure.model]) / scale
        on = f" with {figure.model}" if figure.model else ""
        sentences.append(
            f"The paper has {figure.method} at {signed(paper, figure.metric)} to {reference}{on}; "
            f"here it is {with_interval(row)}: {_beside(row, paper)}."
        )
    return sentences


def _beside(row: Row, paper: float) -> str:
    own = row["difference"]
    low, mean, high = own["low"], own["mean"], own["high"]
    holds_paper = low <= paper <= high
    if low <= 0 <= high:
        said = f"{_NOT_SEEN}, and "
        return said + (
            "the paper's is not ruled out" if holds_paper else "the paper's is ruled out"
        )
    corrected = "" if "," not in row["verdict"] else ", but not after the correction"
    if mean * paper < 0:
        return f"the opposite of the paper's{corrected}"
    size = "as large as the paper's may be" if holds_paper else "of another size than the paper's"
    return f"in the paper's direction{corrected}, and {size}"
