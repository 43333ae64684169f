"""Charts as PNG files, by Matplotlib."""

from collections.abc import Mapping
from io import BytesIO
from typing import TYPE_CHECKING

from twostroke.bench.charts import Chart, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(chart: Chart, colours: Mapping[str, str], palette: tuple[str, ...]) -> bytes:
    """A chart as a PNG. ``colours`` is by scheme, ``palette`` for series of no scheme."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    rows = len(chart.series[0].y) if chart.kind == "stack" else 0
    figure = Figure(figsize=(8, max(4.0, 1.6 + 0.42 * rows)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    if chart.kind == "stack":
        _stack(axes, chart, palette)
    elif chart.kind == "bars":
        _bars(axes, chart, colours)
    else:
        for number, series in enumerate(chart.series):
            _line(axes, chart, series, colours.get(series.scheme, palette[number % len(palette)]))
    if "x" in chart.log:
        axes.set_xscale("log")
    if "y" in chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    if chart.kind == "lines" and "x" in chart.log:
        ticks = sorted({float(x) for series in chart.series for x in series.x})
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    axes.title.set_fontsize(11)
    axes.grid(alpha=0.25)
    if chart.kind != "bars":
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    written = BytesIO()
    figure.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()


def _line(axes: "Axes", chart: Chart, series: Series, colour: str) -> None:
    style = "--" if series.dashed else "-"
    if chart.kind == "steps":
        axes.step(series.x, series.y, style, where="post", color=colour, label=series.name, linewidth=1.4)
    elif chart.kind == "points":
        axes.scatter(series.x, series.y, color=colour, label=series.name)
    else:
        axes.plot(series.x, series.y, style, marker="o", markersize=4, color=colour, label=series.name)
        if series.low:
            axes.errorbar(series.x, series.y, _whiskers(series), fmt="none", ecolor=colour, alpha=0.6, capsize=3)


def _bars(axes: "Axes", chart: Chart, colours: Mapping[str, str]) -> None:
    for series in chart.series:
        error = _whiskers(series) if series.low else None
        axes.bar(series.x, series.y, color=colours.get(series.scheme), yerr=error, capsize=3)


def _stack(axes: "Axes", chart: Chart, palette: tuple[str, ...]) -> None:
    left = [0.0] * len(chart.series[0].y)
    for number, series in enumerate(chart.series):
        axes.barh(series.x, series.y, left=left, label=series.name, color=palette[number % len(palette)])
        left = [a + b for a, b in zip(left, series.y, strict=True)]
    for row, text in enumerate(chart.series[-1].text):
        if text:
            axes.annotate(f" {text}", (left[row], row), va="center", fontsize=7, annotation_clip=False)
    axes.margins(x=0.6 if any(chart.series[-1].text) else 0.18)  # for what is written behind a bar
    axes.invert_yaxis()


def _whiskers(series: Series) -> list[list[float]]:
    low = [max(0.0, y - low) for y, low in zip(series.y, series.low, strict=True)]
    return [low, [max(0.0, high - y) for y, high in zip(series.y, series.high, strict=True)]]
