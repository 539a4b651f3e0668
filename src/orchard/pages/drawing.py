"""What the charts of all pages are made with: frames, axes, tooltips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import altair as alt

Row: TypeAlias = dict[str, Any]

VERSION = alt.SCHEMA_VERSION.removeprefix("v")
"""Of Vega-Lite, in which the charts are written."""

_BAND = 26  # pixels; a page multiplies it by how many there are
ROWS = alt.NamedData("rows")
"""What a page fills in: the rows that its filters leave."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a8a8a", "#e69f00", "#56b4e9")
"""Of lines beside each other, also where red and green look the same; after Okabe and Ito."""

# A page sets it with the metric: losses are numbers, everything else is a share.
_IS_SHARE = alt.param(name="isShare", value=False)
_VALUE_LABEL = "isShare ? format(datum.value, '.0%') : format(datum.value, '.3~f')"


@dataclass(frozen=True)
class Chart:
    """One chart, and the numbers in it.

    Attributes:
        name: Of its element in the page.
        title: Above it.
        about: What it shows and how to read it, in a sentence or two.
        spec: In Vega-Lite, over the named data ``rows``.
        rows: What it shows.
        columns: Of the table that says the same in numbers.
        bands: The field whose values are below each other, each in a band of its own; empty where
            the chart has a fixed height.
    """

    name: str
    title: str
    about: str
    spec: Mapping[str, Any]
    rows: Sequence[Row]
    columns: Sequence[str]
    bands: str = ""


def value_axis() -> alt.Axis:
    """Return the axis of a metric: percent of a share, a number of a loss."""
    return alt.Axis(labelExpr=_VALUE_LABEL, title=None, tickCount=8)


def in_order(rows: Sequence[Row]) -> list[str]:
    """Return the bands of rows as they come."""
    return list(dict.fromkeys(row["band"] for row in rows))


_NUMBERS = {
    "value": "~g",
    "mean": "~g",
    "p": ".2~g",
    "private": ",d",
    "low": "~g",
    "high": "~g",
    "worst": "~g",
    "megabytes": ".3f",
    "restored": ".1%",
    "gate": ".2%",
    "share": ".1%",
    "loss": ".4f",
    "second": ".4f",
    "none": ".4f",
    "seconds": ".2f",
    "round": "d",
    "times": "d",
}


def tips(*fields: str) -> list[alt.Tooltip]:
    """Return what a tooltip says; names of clients come from elsewhere and are shown as text."""
    return [
        alt.Tooltip(f"{field}:Q", format=form)
        if (form := _NUMBERS.get(field))
        else alt.Tooltip(f"{field}:N")
        for field in fields
    ]


def as_spec(chart: Any, *, height: int = 0) -> dict[str, Any]:
    """Return the chart for validation and drawing; without a height it is that of its bands."""
    made = chart.properties(
        width="container",
        height=height or _BAND,
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
    ).add_params(_IS_SHARE)
    spec: dict[str, Any] = made.to_dict(validate=True)
    del spec["config"]  # the page has one for light and one for dark
    return spec
