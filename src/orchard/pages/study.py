"""A page about a study: its rows, drawn; read from its ``study.json`` alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from orchard.pages import document
from orchard.pages.document import Filter, number_cell, text_cell
from orchard.pages.drawing import COLORS, ROWS, Chart, Row, as_spec, in_order, tips, value_axis
from orchard.reports import format_rounds, format_score

STUDY_FILE = "study.json"
_VERDICTS = {"better": "#009e73", "no difference seen": "#8a8a8a", "worse": "#d55e00"}
_SHAPES = ("triangle-up", "circle", "triangle-down")
_SIGNED = "isShare ? format(datum.value, '+.1%') : format(datum.value, '+.3~f')"


def is_study(folder: str | Path) -> bool:
    """Whether a folder holds a study."""
    return (Path(folder) / STUDY_FILE).is_file()


def page_of_study(folder: str | Path) -> str:
    """Return the page as text.

    Raises:
        ValueError: The study's file does not parse, or has no run yet.
    """
    path = Path(folder) / STUDY_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = record["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be a study's record, got {error!r}; repeat orchard study, which makes it "
            "anew of the runs that are there"
        ) from error
    if not rows:
        raise ValueError(f"{path} must hold a run, got none yet; wait for the first two methods")
    charts = [chart for chart in _charts(rows, record) if chart.rows]
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    return document.document(
        title=record["title"],
        notes=_notes(record),
        filters=[
            Filter("metric", list(dict.fromkeys(row["metric"] for row in rows)), has_all=False),
            *([Filter("grid", cells)] if len(cells) > 1 else []),
            Filter("method", list(dict.fromkeys(row["method"] for row in rows))),
        ],
        charts=charts,
        parts=[
            *(document.chart_section(chart, is_wide=True) for chart in charts),
            _levels(record.get("curves", ()), str(record["reference"])),
            _table(rows),
            _tuning(record["columns"]),
            _facts(record),
        ],
    )


def _notes(record: Mapping[str, Any]) -> list[str]:
    missing = record["num_runs"] - record["num_done"]
    return [
        f"Beside {record['reference']}: differences are paired by row, client and seed, and their "
        "95 % intervals a bootstrap over all three. Better and worse hold at 5 % after Holm's "
        "correction for all comparisons here.",
        *([f"{missing} of {record['num_runs']} runs are not there yet."] if missing else []),
    ]


def _charts(rows: Sequence[Row], record: Mapping[str, Any]) -> list[Chart]:
    several = len({row["cell"] for row in rows}) > 1
    shown = []
    for row in rows:
        common = {key: row[key] for key in ("method", "metric", "verdict")}
        common["grid"] = row["cell"]
        common["band"] = f"{row['method']}, {row['cell']}" if several else row["method"]
        # After Holm's correction; what would hold without it is drawn as not seen.
        common["seen"] = row["verdict"] if row["verdict"] in _VERDICTS else "no difference seen"
        shown.append((row, common))
    return [
        _differences(
            [{**common, **row["difference"]} for row, common in shown if row["difference"]],
            str(record["reference"]),
        ),
        _values(
            [
                {**common, "kind": "mean", "value": row["mean"], "worst": row["worst"]}
                for row, common in shown
            ]
            + [
                {**common, "kind": "client", "client": client, "value": value}
                for row, common in shown
                for client, value in row["clients"].items()
            ]
        ),
        _costs(
            [
                {
                    **common,
                    "value": row["mean"],
                    "private": row["private"],
                    "megabytes": (row["uplink_bytes"] + row["downlink_bytes"]) / 1e6,
                }
                for row, common in shown
            ]
        ),
        _learning(record.get("curves", ())),
    ]


def _differences(rows: list[Row], reference: str) -> Chart:
    drawn = alt.Chart(ROWS).encode(
        y=alt.Y("band:N", sort=in_order(rows), title=None),
        color=alt.Color(
            "seen:N",
            title="verdict",
            scale=alt.Scale(domain=list(_VERDICTS), range=list(_VERDICTS.values())),
        ),
        tooltip=tips("method", "grid", "mean", "low", "high", "p", "verdict"),
    )
    axis = alt.Axis(labelExpr=_SIGNED, title=None, tickCount=8)
    chart = alt.layer(
        alt.Chart(ROWS).mark_rule(strokeDash=[4, 4]).encode(x=alt.datum(0)),
        drawn.mark_rule(strokeWidth=3).encode(x=alt.X("low:Q", axis=axis), x2="high:Q"),
        drawn.mark_point(size=120, filled=True, opacity=1).encode(
            x=alt.X("mean:Q", axis=axis),
            shape=alt.Shape(
                "seen:N",
                title="verdict",
                scale=alt.Scale(domain=list(_VERDICTS), range=list(_SHAPES)),
            ),
        ),
    )
    return Chart(
        "differences",
        f"How each method differs from {reference}",
        "The method's mean less the reference's, with its 95 % interval. Whether more is better is "
        "the metric's own affair: of a loss less is.",
        as_spec(chart),
        rows,
        ("grid", "method", "metric", "mean", "low", "high", "p", "verdict"),
        bands="band",
    )


def _values(rows: list[Row]) -> Chart:
    drawn = alt.Chart(ROWS).encode(y=alt.Y("band:N", sort=in_order(rows), title=None))
    means = drawn.transform_filter("datum.kind == 'mean'")

    def at(field: str) -> alt.X:
        return alt.X(f"{field}:Q", title=None, scale=alt.Scale(zero=False), axis=value_axis())

    chart = alt.layer(
        drawn.transform_filter("datum.kind == 'client'")
        .mark_circle(size=45, opacity=0.5, color="#0072b2")
        .encode(x=at("value"), tooltip=tips("method", "grid", "client", "value")),
        means.mark_tick(thickness=2, size=16, color="#d55e00").encode(
            x=at("worst"), tooltip=tips("method", "grid", "worst")
        ),
        means.mark_point(shape="diamond", size=140, filled=True, opacity=1, color="#0072b2").encode(
            x=at("value"), tooltip=tips("method", "grid", "value", "worst")
        ),
    )
    return Chart(
        "values",
        "How good each method's personal models are",
        "Diamond: the mean over clients and seeds. Circle: one client. Bar: the worst client.",
        as_spec(chart),
        rows,
        ("grid", "method", "metric", "kind", "client", "value", "worst"),
        bands="band",
    )


def _costs(rows: list[Row]) -> Chart:
    drawn = alt.Chart(ROWS).encode(
        x=alt.X("megabytes:Q", title="megabytes a client and round"),
        y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=value_axis()),
        tooltip=tips("method", "grid", "megabytes", "private", "value"),
    )
    size = alt.Size("private:Q", title="private parameters", legend=alt.Legend(format="~s"))
    chart = alt.layer(
        drawn.mark_point(filled=True, color="#0072b2").encode(size=size),
        drawn.mark_text(align="left", dx=9, color="#8a8a8a").encode(text="method:N"),
    )
    return Chart(
        "costs",
        "Bytes against quality",
        "The larger the point, the more parameters each client keeps to itself.",
        as_spec(chart, height=300),
        rows,
        ("grid", "method", "metric", "megabytes", "private", "value"),
    )


def _table(rows: Sequence[Row]) -> str:
    head = (
        *("grid", "method", "metric", "mean", "over seeds", "worst", "difference", "95 %"),
        *("verdict", "private", "shared", "up", "down", "steps", "seconds", "search", "ms a row"),
        *("options", "seeds"),
    )
    lines = []
    for row in rows:
        metric, own = row["metric"], row["difference"]
        spread = row["spread"]
        interval = (
            ""
            if own is None
            else f"[{format_score(own['low'], metric)}, {format_score(own['high'], metric)}]"
        )
        options = ", ".join(f"{key} = {value}" for key, value in row["options"].items())
        lines.append(
            "".join(
                [
                    *map(text_cell, (row["cell"], row["method"], metric)),
                    number_cell(row["mean"], format_score(row["mean"], metric)),
                    number_cell(spread, "" if spread is None else format_score(spread, metric)),
                    number_cell(row["worst"], format_score(row["worst"], metric)),
                    number_cell(
                        own and own["mean"], format_score(own["mean"], metric) if own else ""
                    ),
                    text_cell(interval),
                    text_cell(row["verdict"]),
                    *(
                        number_cell(row[key], f"{row[key]:,.0f}")
                        for key in (
                            *("private", "shared", "uplink_bytes", "downlink_bytes"),
                            *("steps", "seconds"),
                        )
                    ),
                    *(_measured(row, key) for key in ("search_seconds", "row_seconds")),
                    text_cell(options),
                    text_cell(" ".join(map(str, row["seeds"]))),
                ]
            )
        )
    about = (
        "Parameters that a client keeps and that are shared; bytes of one client in one round; "
        "steps of one client in the run; seconds of all clients together, and of these what a "
        "client took before it trained, with grafts for their choice; what measuring a row took."
    )
    return document.table_section("rows", "All numbers", about, document.table(head, lines))


def _measured(row: Row, key: str) -> str:
    """Return a cell of seconds, or of milliseconds a row; records of old studies have neither."""
    value = row.get(key)
    if value is None:
        return number_cell(None, "")
    return number_cell(
        value, f"{value:,.1f}" if key == "search_seconds" else f"{1000 * value:,.0f}"
    )


def _learning(curves: Sequence[Mapping[str, Any]]) -> Chart:
    rows: list[Row] = [
        {
            **{key: curve[key] for key in ("method", "metric")},
            "grid": curve["cell"],
            "round": int(number),
            "value": value,
        }
        for curve in curves
        for number, value in curve["values"].items()
    ]
    rounds = sorted({row["round"] for row in rows})
    drawn = alt.Chart(ROWS).encode(
        x=alt.X("round:Q", title="round", axis=alt.Axis(format="d", values=rounds)),
        y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=value_axis()),
        color=alt.Color("method:N", scale=alt.Scale(range=list(COLORS))),
        detail="grid:N",
        tooltip=tips("method", "grid", "round", "value"),
    )
    chart = alt.layer(drawn.mark_line(), drawn.mark_point(filled=True, size=40, opacity=1))
    return Chart(
        "learning",
        "How fast each method learns",
        "The mean over clients and seeds after each round that was measured.",
        as_spec(chart, height=300),
        rows,
        ("grid", "method", "metric", "round", "value"),
    )


def _levels(curves: Sequence[Mapping[str, Any]], reference: str) -> str:
    """Return from which round on each method was as good as the reference at its end."""
    if not curves:
        return ""
    lines = [
        "".join(
            [
                *map(text_cell, (curve["cell"], curve["method"], curve["metric"])),
                *(
                    text_cell(format_rounds(curve["rounds"].values())),
                    number_cell(
                        curve["times_as_fast"],
                        "" if (fast := curve["times_as_fast"]) is None else f"{fast:.2f}",
                    ),
                ),
            ]
        )
        for curve in curves
    ]
    head = ("grid", "method", "metric", "round by seed", "times as fast")
    about = f"The first measured round that is as good as {reference} at its end, for each seed."
    return document.table_section("levels", "Rounds to a level", about, document.table(head, lines))


def _tuning(columns: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "".join(
            [
                *map(text_cell, (column["cell"], column["method"])),
                text_cell(", ".join(f"{key} = {value}" for key, value in tried.items())),
                text_cell(value),
                text_cell("chosen" if tried == column["options"] else ""),
            ]
        )
        for column in columns
        for tried, value in column["tried"]
    ]
    if not lines:
        return ""
    head = ("grid", "method", "tried", "on validation rows", "")
    return document.table_section(
        "tuning", "Tuning", "Each method had the same choices.", document.table(head, lines)
    )


def _facts(record: Mapping[str, Any]) -> str:
    return document.facts_section(
        "Where it comes from",
        {
            "runs": f"{record['num_done']} of {record['num_runs']}",
            "commit": record.get("commit"),
            "base": record.get("base_digest"),
            "all runs": record.get("digest"),
            "processor": (record.get("hardware") or {}).get("cpu"),
            "versions": ", ".join(
                f"{name} {version}" for name, version in (record.get("versions") or {}).items()
            ),
        },
    )
