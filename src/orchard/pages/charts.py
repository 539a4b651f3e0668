"""The charts of a page, as Vega-Lite specifications over named rows.

Colors are those of Okabe and Ito (2008) or of the viridis scale, which people with any common color
blindness tell apart, and shape or text says the same again.
"""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from orchard.pages import gathering
from orchard.pages.drawing import COLORS, ROWS, Chart, as_spec, in_order, tips, value_axis
from orchard.pages.gathering import Gathered, Row

_MODEL_COLORS = {
    "base": "#8a8a8a",
    "global": "#0072b2",
    "local": "#d55e00",
    "personal": "#009e73",
    "in training": "#aa4499",
}
_PHASE_COLORS = {
    "prepare": "#e69f00",
    "train": "#009e73",
    "evaluation": "#0072b2",
    "overhead": "#8a8a8a",
}


def make_charts(gathered: Gathered) -> list[Chart]:
    """Return the charts that have something to show."""
    runs = gathered.runs
    several = len(runs) > 1
    charts = [
        _quality(gathered),
        _curves(gathering.curve_rows(runs), several=several),
        _cost(gathering.cost_rows(runs), several=several),
        _grafts(gathering.graft_rows(runs)),
        _gates(gathering.gate_rows(runs)),
        _moved(gathering.moved_rows(runs)),
        _active(gathering.active_rows(runs)),
        _phases(gathering.phase_rows(runs)),
        _events(gathering.event_rows(runs)),
    ]
    return [chart for chart in charts if chart.rows]


def _quality(gathered: Gathered) -> Chart:
    rows = gathering.quality_rows(gathered)
    several = len(gathered.comparison.rows) > 1
    for row in rows:
        row["band"] = f"{row['method']}, {row['model']}" if several else row["model"]
    at = alt.Y("band:N", sort=in_order(rows), title=None)
    color = _model_color(rows)
    drawn = alt.Chart(ROWS).encode(y=at)
    means = drawn.transform_filter("datum.kind == 'mean'")
    chart = alt.layer(
        drawn.transform_filter("datum.kind == 'client'")
        .mark_circle(size=45, opacity=0.45)
        .encode(x=_value("value"), color=color, tooltip=tips("method", "model", "client", "value")),
        means.mark_rule(strokeWidth=3).encode(x=_value("low"), x2="high:Q", color=color),
        means.mark_tick(thickness=2, size=16).encode(
            x=_value("worst"), color=color, tooltip=tips("method", "model", "worst")
        ),
        means.mark_point(shape="diamond", size=140, filled=True, opacity=1).encode(
            x=_value("value"),
            color=color,
            tooltip=tips("method", "model", "value", "low", "high", "worst"),
        ),
    )
    return Chart(
        "quality",
        "How good each model is",
        "Diamond: the mean over clients, with its 95 % interval over seeds where there are "
        "several. Circle: one client. Bar: the worst client.",
        as_spec(chart),
        rows,
        ("method", "model", "metric", "kind", "client", "value", "low", "high", "worst", "seeds"),
        bands="band",
    )


def _curves(rows: list[Row], *, several: bool) -> Chart:
    line = alt.Chart(ROWS).encode(
        x=_round(),
        y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=value_axis()),
        detail=["client:N", "run:N", "model:N"],
        color=_run_color() if several else _model_color(rows),
        tooltip=tips("run", "client", "model", "round", "value"),
    )
    chart = alt.layer(line.mark_line(opacity=0.6), line.mark_circle(size=30, opacity=0.8))
    return Chart(
        "curves",
        "Over the rounds",
        "A line for each client and model that was measured then. Round 0 is before any training.",
        as_spec(chart, height=280),
        rows,
        ("run", "client", "model", "metric", "round", "value"),
    )


def _cost(rows: list[Row], *, several: bool) -> Chart:
    base = alt.Chart(ROWS).encode(
        x=alt.X("megabytes:Q", title="megabytes, both ways, all clients"),
        y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=value_axis()),
        detail=["run:N", "model:N"],
        color=_run_color() if several else _model_color(rows),
        tooltip=tips("run", "model", "round", "megabytes", "value"),
    )
    shape = alt.Shape("model:N", scale=alt.Scale(domain=_models(rows)), title="model")
    chart = alt.layer(base.mark_line(), base.mark_point(filled=True, size=60).encode(shape=shape))
    return Chart(
        "cost",
        "Bytes against quality",
        "The mean over clients, and what had crossed the network by then.",
        as_spec(chart, height=260),
        rows,
        ("run", "model", "metric", "round", "megabytes", "value"),
    )


def _grafts(rows: list[Row]) -> Chart:
    cell = _cells(rows, x="layer")
    color = alt.Color(
        "restored:Q",
        title="restored",
        scale=alt.Scale(scheme="viridis", domain=[0, 1], clamp=True),
        legend=alt.Legend(format=".0%"),
    )
    said = tips("client", "layer", "expert", "restored", "loss", "second", "none", "gate")
    text = alt.condition("datum.restored > 0.6", alt.value("black"), alt.value("white"))
    chart = alt.layer(
        cell.mark_rect().encode(color=color, tooltip=said),
        cell.mark_text(fontSize=11).encode(text="expert:N", color=text, tooltip=said),
    )
    return Chart(
        "grafts",
        "Which expert each client grafted",
        "The number is the expert; the color, how much of the layer's output it restores alone "
        "(0 and below: no better than no expert).",
        as_spec(chart),
        rows,
        ("run", "client", "layer", "expert", "restored", "loss", "second", "none", "gate"),
        bands="band",
    )


def _gates(rows: list[Row]) -> Chart:
    last: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        last[row["run"], row["client"], row["layer"]] = row
    shown = list(last.values())
    color = alt.Color(
        "gate:Q", title="open", scale=alt.Scale(scheme="viridis"), legend=alt.Legend(format=".1%")
    )
    chart = (
        _cells(shown, x="layer")
        .mark_rect()
        .encode(color=color, tooltip=tips("client", "layer", "round", "gate"))
    )
    return Chart(
        "gates",
        "How far each gate opens",
        "Mean over tokens in the client's last round: 0 % shuts the graft off, 100 % adds all of "
        "it. Of a carved or open graft there is none.",
        as_spec(chart),
        shown,
        ("run", "client", "layer", "round", "gate"),
        bands="band",
    )


def _moved(rows: list[Row]) -> Chart:
    color = alt.Color(
        "share:Q",
        title="of rounds",
        scale=alt.Scale(scheme="viridis", domain=[0, 1]),
        legend=alt.Legend(format=".0%"),
    )
    experts = sorted({row["expert"] for row in rows})
    chart = (
        alt.Chart(ROWS)
        .mark_rect()
        .encode(
            x=alt.X("expert:O", sort=experts, axis=alt.Axis(labelOverlap=True)),
            y=_bands(rows, "layer", order=_layers(rows)),
            color=color,
            tooltip=tips("layer", "expert", "times", "share"),
        )
    )
    return Chart(
        "moved",
        "Which experts were trained",
        "In how many rounds any client sent the expert, so that it was aggregated.",
        as_spec(chart),
        rows,
        ("run", "layer", "expert", "times", "share"),
        bands="band",
    )


def _active(rows: list[Row]) -> Chart:
    color = alt.Color(
        "share:Q",
        title="of experts",
        scale=alt.Scale(scheme="viridis", domainMin=0),
        legend=alt.Legend(format=".0%"),
    )
    chart = (
        _cells(rows, x="layer")
        .mark_rect()
        .encode(color=color, tooltip=tips("client", "layer", "share"))
    )
    return Chart(
        "active",
        "Who trained how many experts",
        "The share of a layer's experts that a step of the client trained; mean over rounds.",
        as_spec(chart),
        rows,
        ("run", "client", "layer", "share"),
        bands="band",
    )


def _phases(rows: list[Row]) -> Chart:
    chart = (
        alt.Chart(ROWS)
        .mark_bar()
        .encode(
            x=alt.X("round:O", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("sum(seconds):Q", title="seconds"),
            color=alt.Color(
                "phase:N",
                scale=alt.Scale(domain=list(_PHASE_COLORS), range=list(_PHASE_COLORS.values())),
                sort=list(_PHASE_COLORS),
            ),
            xOffset="run:N",
            order="order:Q",
            tooltip=tips("run", "round", "phase", "seconds"),
        )
    )
    return Chart(
        "phases",
        "Where the time went",
        "Seconds of each round.",
        as_spec(chart, height=220),
        rows,
        ("run", "round", "phase", "seconds"),
    )


def _events(rows: list[Row]) -> Chart:
    chart = (
        alt.Chart(ROWS)
        .mark_point(size=90, filled=True)
        .encode(
            x=_round(),
            y=_bands(rows, "client"),
            color=alt.Color("what:N", scale=alt.Scale(range=["#d55e00", "#0072b2"])),
            shape="what:N",
            tooltip=tips("run", "round", "client", "what", "reason"),
        )
    )
    return Chart(
        "events",
        "Failures and refusals",
        "Who left a round, and what was refused.",
        as_spec(chart),
        rows,
        ("run", "round", "client", "what", "reason"),
        bands="band",
    )


def _cells(rows: Sequence[Row], *, x: str) -> alt.Chart:
    return alt.Chart(ROWS).encode(
        x=alt.X(f"{x}:N", sort=_layers(rows), title=None, axis=alt.Axis(labelAngle=-45)),
        y=_bands(rows, "client"),
    )


def _bands(rows: Sequence[Row], field: str, *, order: Sequence[str] = ()) -> alt.Y:
    """Name each row's band by a field, and by its run where there are several."""
    several = len({row["run"] for row in rows}) > 1
    for row in rows:
        row["band"] = f"{row[field]}, {row['run']}" if several else row[field]
    ordered = sorted(rows, key=lambda row: order.index(row[field])) if order else rows
    return alt.Y("band:N", sort=in_order(ordered), title=None)


def _layers(rows: Sequence[Row]) -> list[str]:
    def order(layer: str) -> tuple[str, int]:
        stack, _, number = layer.rpartition(".")
        return stack, int(number) if number.isdigit() else 0

    return sorted({row["layer"] for row in rows}, key=order)


def _round() -> alt.X:
    return alt.X("round:Q", axis=alt.Axis(tickMinStep=1, format="d"))


def _value(field: str) -> alt.X:
    return alt.X(f"{field}:Q", title=None, scale=alt.Scale(zero=False), axis=value_axis())


def _model_color(rows: Sequence[Row]) -> alt.Color:
    present = _models(rows)
    colors = [_MODEL_COLORS[model] for model in present]
    return alt.Color("model:N", scale=alt.Scale(domain=present, range=colors), title="model")


def _models(rows: Sequence[Row]) -> list[str]:
    return [model for model in _MODEL_COLORS if any(row["model"] == model for row in rows)]


def _run_color() -> alt.Color:
    scale = alt.Scale(range=list(COLORS))
    return alt.Color("run:N", scale=scale, title="run")
