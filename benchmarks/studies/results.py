"""README's results and docs/results.md, from the studies that were run.

In README stands a block between marks; docs/results.md is made as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.blocks import Page, paragraph, table
from benchmarks.records import Record, origins
from benchmarks.studies import picture
from benchmarks.studies.questions import Figure, Question, Row, read_questions
from benchmarks.studies.wording import (
    as_sentence,
    beside_paper,
    by_verdict,
    with_interval,
    with_spread,
)
from orchard.reports import format_rounds, format_score

ROOT = Path(__file__).parent.parent.parent
PICTURE = Path("docs") / "pictures" / "results.svg"
RESULTS_PAGE = Path("docs") / "results.md"
BLOCK = "results"
NOT_RUN = "not run"
_NONE = "none"
_LONG_SEARCH = 0.1  # seconds of a client over all rounds


def contents(root: Path = ROOT, questions: Sequence[Question] | None = None) -> dict[Path, str]:
    """Return README and docs/results.md as they must be.

    Args:
        root: The checkout.
        questions: What was asked; None = the questions here and their results.

    Raises:
        ValueError: README has no block for the results.
    """
    asked = read_questions() if questions is None else questions
    page = Page(root, {BLOCK: readme_block(asked)}, {str(RESULTS_PAGE): results_page(asked)})
    return page.contents()


def stale(root: Path = ROOT, questions: Sequence[Question] | None = None) -> list[Path]:
    """Return which of README, docs/results.md and the picture are not as the results make them."""
    asked = read_questions() if questions is None else questions
    found = [
        path
        for path, text in contents(root, asked).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    drawn, path = picture.panels(asked), root / PICTURE
    if drawn and not (path.exists() and picture.is_fresh(path.read_text("utf-8"), drawn)):
        found.append(path)
    return found


def write(root: Path = ROOT, questions: Sequence[Question] | None = None) -> list[Path]:
    """Write what is stale, and return it."""
    asked = read_questions() if questions is None else questions
    files, written = contents(root, asked), stale(root, asked)
    for path in written:
        text = files[path] if path in files else picture.draw(picture.panels(asked))
        path.write_text(text, encoding="utf-8")
    return written


def readme_block(questions: Sequence[Question]) -> str:
    """Return README's results: a row for each design, a picture, and where the rest is."""
    head = ("design", "by", "the reference", "better", "no difference seen", "worse")
    rows: list[tuple[str, ...]] = []
    for question in (question for question in questions if question.design):
        if question.record is None:
            rows.append((question.design, question.by, NOT_RUN, "", "", ""))
            continue
        reference = question.record["reference"]
        for (cell, metric), own in question.main_tables().items():
            name = f"{question.design}, {cell}" if cell else question.design
            verdicts = by_verdict(own)
            first = next(row for row in own if row["method"] == reference)
            rows.append(
                (
                    f"[{name}]({_report(question)}){_progress(question)}",
                    metric,
                    f"{reference} {with_spread(first)}",
                    *("<br>".join(verdicts[verdict]) or _NONE for verdict in verdicts),
                )
            )
    made = sum(question.record is not None for question in questions)
    parts = [
        paragraph(
            f"Personal models on each client's held-out rows; {made} of {len(questions)} studies "
            "were run. A difference is the method's value less the reference's, paired by row, "
            "client and seed, with a 95 % bootstrap interval over all three; of a loss less is "
            "better, everything else is in points of a percent. Better and worse hold after Holm's "
            "correction for all comparisons of a study, or say that they do not. Where it says "
            "older orchard, every graft was judged, and difference is orchard as it is today. The "
            f"rest, beside the papers' figures: [results]({RESULTS_PAGE.as_posix()})."
        ),
        table(head, rows, num_words=len(head)),
    ]
    if picture.panels(questions):
        alt = "How each method differs from the reference in each design, with 95 % intervals"
        parts.append(f"![{alt}]({PICTURE.as_posix()})")
    return "\n\n".join(parts)


def results_page(questions: Sequence[Question]) -> str:
    """Return docs/results.md: each question with what a paper has, ours, and what follows."""
    parts = [
        "# Results",
        paragraph(
            "What the studies of `benchmarks/studies` found, beside what the papers report. "
            "`orchard study` runs a study, `python scripts/make_results.py` writes this page from "
            "`study.json` of each; nothing here is typed by hand. A study that was not run says "
            "so. The papers fine-tuned models of billions of parameters and show no spread; ours "
            "are of a base that is named below each table, so values are not comparable, only the "
            "direction and the size of differences are."
        ),
    ]
    for question in questions:
        parts += _section(question)
    return "\n\n".join(parts) + "\n"


def _section(question: Question) -> list[str]:
    parts = [f"## {question.name}"]
    if question.asks:
        parts.append(paragraph(question.asks))
    if question.paper:
        parts.append(paragraph(f"{question.paper}. {question.says}".strip()))
    record = question.record
    if question.loads:
        parts += [_loads(question.loads), paragraph(origins(question.loads))]
        if record is None:
            return parts
    if record is None:
        if question.figures:
            parts.append(_paper_table(question.figures))
        return [*parts, f"Ours: {NOT_RUN} (`{question.study}`)."]
    if not record["rows"]:
        return [*parts, f"Ours: no run is there yet (`{question.study}`)."]
    reference = record["reference"]
    for (cell, metric), rows in question.tables().items():
        figures = [f for f in question.figures if (f.cell, f.metric) == (cell, metric)]
        parts.append(f"**{metric}{f', {cell}' if cell else ''}**")
        parts.append(_table(rows, figures))
        sentences = [as_sentence(rows, reference), *beside_paper(rows, figures, reference)]
        parts.append(paragraph(" ".join(sentences)))
    parts += _rounds(record, question.metrics)
    seeds = sorted({seed for row in record["rows"] for seed in row["seeds"]})
    base = f"base {record['base_digest'][:12]}; {origins([record])}"
    parts.append(
        paragraph(
            f"[Report](../{_report(question)}){_progress(question)}: seeds "
            f"{', '.join(map(str, seeds))}; {base}"
        )
    )
    return parts


def _rounds(record: Record, metrics: Sequence[str]) -> list[str]:
    """Return from which round on methods are as good as the reference at its end, if measured."""
    tables: dict[tuple[str, str], list[Row]] = {}
    for curve in record.get("curves", ()):
        if not metrics or curve["metric"] in metrics:
            tables.setdefault((curve["cell"], curve["metric"]), []).append(curve)
    parts = []
    for (cell, metric), curves in tables.items():
        parts.append(
            f"**Rounds until as good as {record['reference']} at its end: {metric}"
            f"{f', {cell}' if cell else ''}**"
        )
        lines = [
            (
                curve["method"],
                format_rounds(curve["rounds"].values()),
                "" if curve["times_as_fast"] is None else f"{curve['times_as_fast']:.2f}",
            )
            for curve in curves
        ]
        parts.append(table(("method", "round by seed", "times as fast"), lines, num_words=2))
    return parts


def _table(rows: Sequence[Row], figures: Sequence[Figure]) -> str:
    head = ("method", *(("the paper",) if figures else ()))
    head += ("ours", "worst client", "difference [95 %]", "verdict", "private", "bytes up", "steps")
    # Worth a column where choosing takes time: grafts, of which there may be several.
    has_search = any(row.get("search_seconds", 0) >= _LONG_SEARCH for row in rows)
    head += ("search, s", "ms a row") if has_search else ()
    lines = []
    for row in rows:
        own = [f for f in figures if f.method == row["method"]]
        lines.append(
            (
                row["method"],
                *((_figures(own),) if figures else ()),
                with_spread(row),
                format_score(row["worst"], row["metric"]),
                with_interval(row) if row["difference"] else "",
                row["verdict"],
                *(f"{row[key]:,.0f}" for key in ("private", "uplink_bytes", "steps")),
                *(
                    (f"{row['search_seconds']:,.1f}", f"{1000 * row['row_seconds']:,.0f}")
                    if has_search
                    else ()
                ),
            )
        )
    return table(head, lines)


def _loads(loads: Sequence[Record]) -> str:
    """Return how much the tokens per expert deviate, by method and model, beside the base's."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for own in loads:
        base = own["models"]["base"]["deviation"]
        for model, counted in own["models"].items():
            name = "any" if model == "base" else own["method"]
            found.setdefault((name, model), []).append(
                (counted["deviation"], counted["deviation"] / base)
            )
    head = ("method", "model", "deviation of tokens per expert", "of the base's", "counted")
    lines = [
        (
            *key,
            f"{fmean(value for value, _ in own):,.2f}",
            f"{fmean(ratio for _, ratio in own):.4f}"
            + (f" ± {stdev(ratio for _, ratio in own):.4f}" if len(own) > 1 else ""),
            str(len(own)),
        )
        for key, own in found.items()
    ]
    return table(head, lines, num_words=2)


def _paper_table(figures: Sequence[Figure]) -> str:
    keys = list(dict.fromkeys((f.method, f.metric, f.cell) for f in figures))
    lines = [
        (
            *(method, metric, cell),
            _figures(
                [f for f in figures if (f.method, f.metric, f.cell) == (method, metric, cell)]
            ),
        )
        for method, metric, cell in keys
    ]
    return table(("method", "metric", "of", "the paper"), lines, num_words=3)


def _figures(figures: Sequence[Figure]) -> str:
    return "; ".join(f"{f.value:.2f}{f' ({f.model})' if f.model else ''}" for f in figures)


def _report(question: Question) -> str:
    """Return where a study's report is in the checkout."""
    return f"benchmarks/studies/results/{question.study}/report.md"


def _progress(question: Question) -> str:
    record = question.record
    if record is None or record["num_done"] >= record["num_runs"]:
        return ""
    return f" ({record['num_done']} of {record['num_runs']} runs)"
