"""The charts' specifications (Vega-Lite, made with altair) and the JavaScript that draws them. Knows no page.

Each has one empty data set named `data`, which the page's script fills: it chooses rows and colours.
"""

from __future__ import annotations

from typing import Any

# Okabe and Ito's colours, as in analysis/style.py: people with any colour vision tell them apart; line and marker say
# the same again.
COLORS = {
    "edited": "#D55E00",
    "intrinsic": "#0072B2",
    "neighbor": "#009E73",
    "same_subject": "#CC79A7",
    "control": "#777777",
}
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")
DASHES = ((1, 0), (6, 3), (2, 2), (8, 2, 2, 2))


def specs() -> dict[str, dict[str, Any]]:
    """Chart's name -> specification."""
    return {"curve": _curve(), "forest": _forest(), "pareto": _pareto(), "fact": _fact()}


def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed in one module, to stand in a script element."""
    import vl_convert

    found = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    return found.replace("</script", "<\\/script").replace("<!--", "<\\x21--")


def _made(chart: Any, height: int) -> dict[str, Any]:
    spec = chart.properties(width="container", height=height).to_dict()
    spec["data"] = {"name": "data"}
    return spec


def _base() -> Any:
    import altair as alt

    return alt, alt.Chart(alt.NamedData("data"))


def _curve() -> dict[str, Any]:
    """Share right against steps: lines, bands, points. Rows: step, value, low, high, n, line, told."""
    alt, base = _base()
    # Zero is a step, so the axis is linear up to 1 and logarithmic beyond.
    x = alt.X("step:Q").scale(type="symlog", constant=1).axis(title="fine-tuning steps", grid=False)
    y = alt.Y("value:Q").scale(domain=[0, 1]).axis(title=None, format=".1f", tickCount=5)
    look = {"color": alt.Color("line:N", legend=None)}
    tooltip = [
        alt.Tooltip("line:N", title=" "), alt.Tooltip("step:Q", title="step"),
        alt.Tooltip("told:N", title="share [95 %]"), alt.Tooltip("n:Q", title="facts"),
    ]  # fmt: skip
    band = base.mark_area(opacity=0.16).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", **look)
    line = base.mark_line(strokeWidth=2).encode(x=x, y=y, strokeDash=alt.StrokeDash("line:N", legend=None), **look)
    point = base.mark_point(filled=True, size=46, opacity=1).encode(
        x=x, y=y, shape=alt.Shape("line:N", legend=None), tooltip=tooltip, **look
    )
    over = base.mark_circle(size=420, opacity=0).encode(x=x, y=y, tooltip=tooltip)  # what the pointer meets
    return _made(alt.layer(band, line, point, over), 190)


def _forest() -> dict[str, Any]:
    """Differences with intervals, a line a cell. Rows: cell, how, value, low, high, told."""
    alt, base = _base()
    how = ["matched", "regression", "unmatched"]
    y = alt.Y("cell:N", sort=None).axis(title=None, labelLimit=190, grid=False, ticks=False)
    offset = alt.YOffset("how:N", sort=how, scale=alt.Scale(domain=how))
    color = alt.Color("how:N", legend=None).scale(domain=how, range=["#D55E00", "#0072B2", "#777777"])
    shape = alt.Shape("how:N", legend=None).scale(domain=how, range=["circle", "square", "diamond"])
    tooltip = [
        alt.Tooltip("cell:N", title=" "), alt.Tooltip("how:N", title="how"),
        alt.Tooltip("told:N", title="difference [95 %] (n)"),
    ]  # fmt: skip
    rule = base.mark_rule(strokeWidth=1.6).encode(
        x=alt.X("low:Q").axis(title="kept: edited − intrinsic", format="+.1f", tickCount=5), x2="high:Q", y=y,
        yOffset=offset,
        color=color, tooltip=tooltip,
    )  # fmt: skip
    point = base.mark_point(filled=True, size=60, opacity=1).encode(
        x="value:Q", y=y, yOffset=offset, color=color, shape=shape, tooltip=tooltip
    )
    zero = alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(strokeWidth=1, opacity=0.7).encode(x="zero:Q")
    return _made(alt.layer(zero, rule, point), 100)  # the script sets the height: so much for each cell


def _pareto() -> dict[str, Any]:
    """Retention against the task's gain. Rows: cell, group, gain, gain_low, gain_high, value, low, high, told."""
    alt, base = _base()
    x = alt.X("gain:Q").scale(zero=False, nice=True).axis(title="task gain", tickCount=5)
    y = alt.Y("value:Q").scale(domain=[0, 1]).axis(title=None, format=".1f", tickCount=5)
    groups = ["edited", "intrinsic"]
    color = alt.Color("group:N", legend=None).scale(domain=groups, range=[COLORS[g] for g in groups])
    shape = alt.Shape("group:N", legend=None).scale(domain=groups, range=["circle", "square"])
    tooltip = [
        alt.Tooltip("cell:N", title=" "), alt.Tooltip("group:N", title="facts"),
        alt.Tooltip("told:N", title="kept [95 %] (n)"), alt.Tooltip("gain_told:N", title="task gain"),
    ]  # fmt: skip
    up = base.mark_rule(opacity=0.45).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=color)
    across = base.mark_rule(opacity=0.45).encode(x=alt.X("gain_low:Q"), x2="gain_high:Q", y=y, color=color)
    point = base.mark_point(filled=True, size=70, opacity=0.95).encode(
        x=x, y=y, color=color, shape=shape, tooltip=tooltip
    )
    return _made(alt.layer(up, across, point), 320)


def _fact() -> dict[str, Any]:
    """One question's log-probabilities. Rows: at (place of the step), step, value, line."""
    alt, base = _base()
    lines = ["answer", "foil"]
    color = alt.Color("line:N", legend=None).scale(domain=lines, range=["#D55E00", "#777777"])
    x = alt.X("step:O").axis(title="step", labelAngle=0)
    y = alt.Y("value:Q").axis(title=None, tickCount=4)
    tooltip = [alt.Tooltip("line:N", title=" "), alt.Tooltip("step:O"), alt.Tooltip("value:Q", title="nats")]
    dash = alt.StrokeDash("line:N", legend=None).scale(domain=lines, range=[[1, 0], [4, 3]])
    line = base.mark_line(strokeWidth=2).encode(x=x, y=y, color=color, strokeDash=dash)
    point = base.mark_point(filled=True, size=50, opacity=1).encode(x=x, y=y, color=color, tooltip=tooltip)
    return _made(alt.layer(line, point), 150)
