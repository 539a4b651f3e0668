"""README's picture: how methods differ from the reference in each design, with intervals."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from benchmarks.studies.questions import Question
from orchard.extras import require

_INK, _GROUND = "#1f2328", "#fefefe"
_DARK_INK, _DARK_GROUND = "#e6edf3", "#0d1117"
# Okabe and Ito's, apart for the color-blind too, and the shape says the same.
_COLORS = {"better": "#009e73", "no difference seen": "#8a8a8a", "worse": "#d55e00"}
_SHAPES = ("triangle-up", "circle", "triangle-down")
_WIDTH, _BAND, _COLUMNS = 300, 20, 2
_MADE_FROM = re.compile(r"<!-- made from ([0-9a-f]{64}) -->")


def panels(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Return for each design and combination of its grid the differences that are drawn."""
    found = []
    for question in questions:
        for (cell, metric), rows in question.main_tables().items() if question.design else ():
            points = [
                {
                    "method": row["method"],
                    "seen": row["verdict"] if row["verdict"] in _COLORS else "no difference seen",
                    **{
                        key: row["difference"][key] * (1 if metric.endswith("loss") else 100)
                        for key in ("mean", "low", "high")
                    },
                }
                for row in rows
                if row["difference"] is not None
            ]
            if points:
                unit = "loss: less is better" if metric.endswith("loss") else f"points of {metric}"
                title = [question.design + (f", {cell}" if cell else ""), unit]
                found.append({"title": title, "points": points})
    return found


def digest(drawn: Sequence[dict[str, Any]]) -> str:
    """Return what tells these panels from others."""
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


def is_fresh(svg: str, drawn: Sequence[dict[str, Any]]) -> bool:
    """Whether a picture shows these panels."""
    match = _MADE_FROM.search(svg)
    return match is not None and match[1] == digest(drawn)


def draw(drawn: Sequence[dict[str, Any]]) -> str:
    """Return the picture as SVG, whose ink and ground are those of a reader's color scheme.

    Raises:
        ValueError: The extra ``report`` is not installed.
    """
    require("report", to="draw the picture of the results")
    import altair as alt
    import vl_convert

    charts = []
    for panel in drawn:
        base = alt.Chart(alt.InlineData(values=panel["points"])).encode(
            y=alt.Y("method:N", sort=None, title=None),
            color=alt.Color(
                "seen:N",
                title=None,
                scale=alt.Scale(domain=list(_COLORS), range=list(_COLORS.values())),
            ),
        )
        axis = alt.Axis(title=None, tickCount=6, format=".3~f")
        zero = alt.Chart(alt.InlineData(values=[{}])).mark_rule(strokeDash=[4, 4], color=_INK)
        layers = alt.layer(
            zero.encode(x=alt.datum(0)),
            base.mark_rule(strokeWidth=3).encode(x=alt.X("low:Q", axis=axis), x2="high:Q"),
            base.mark_point(size=70, filled=True, opacity=1).encode(
                x=alt.X("mean:Q", axis=axis),
                shape=alt.Shape(
                    "seen:N",
                    title=None,
                    scale=alt.Scale(domain=list(_COLORS), range=list(_SHAPES)),
                ),
            ),
        )
        title = alt.TitleParams(panel["title"][0], subtitle=panel["title"][1], anchor="start")
        height = _BAND * len(panel["points"])
        charts.append(layers.properties(title=title, width=_WIDTH, height=height))
    whole = (
        alt.concat(*charts, columns=_COLUMNS)
        .configure(background=_GROUND, padding=12, font="sans-serif")
        .configure_axis(
            labelColor=_INK, titleColor=_INK, domainColor=_INK, tickColor=_INK, gridOpacity=0.25
        )
        .configure_title(color=_INK, subtitleColor=_INK)
        .configure_legend(labelColor=_INK, orient="bottom")
        .configure_view(strokeOpacity=0.25)
    )
    svg = vl_convert.vegalite_to_svg(whole.to_json())
    dark = "".join(
        f'[{name}="{light}"]{{{name}:{night}}}'
        for light, night in ((_INK, _DARK_INK), (_GROUND, _DARK_GROUND))
        for name in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{dark}}}</style>"
    made = f"<!-- made from {digest(drawn)} -->"
    return re.sub(r"(<svg[^>]*>)", rf"\1{made}{style}", svg, count=1) + "\n"
