"""Charts and tables as one HTML file that opens without network: Plotly and the figures are in it, compressed."""

import gzip
import html
from base64 import b85encode
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from twostroke.bench.charts import Chart, Series

_SAFE = bytes.maketrans(b"<&", b".,")  # base 85's letters that mean something in HTML, as others that it lacks


class Page:
    """A page that grows from top to bottom. All text is escaped here."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._body: list[str] = []
        self._figures: list[dict[str, Any]] = []

    def heading(self, text: str) -> None:
        """Of a section."""
        self._body.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._body.append(f"<p>{html.escape(text)}</p>")

    def points(self, rows: Sequence[tuple[str, str]]) -> None:
        """A list: what, and what of it."""
        items = (f"<li><b>{html.escape(what)}</b>: {html.escape(why)}</li>" for what, why in rows)
        self._body.append(f"<ul>{''.join(items)}</ul>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> None:
        """Columns from ``numbers_from`` on are numbers."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)

        def cell(i: int, text: str) -> str:
            return f"<td{' class=n' if i >= numbers_from else ''}>{html.escape(text)}</td>"

        body = "".join(f"<tr>{''.join(cell(i, text) for i, text in enumerate(row))}</tr>" for row in rows)
        self._body.append(f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")

    def chart(self, chart: Chart, colours: Mapping[str, str], palette: tuple[str, ...]) -> None:
        """A chart, which Plotly draws."""
        note = f"<figcaption>{html.escape(chart.note)}</figcaption>" if chart.note else ""
        label = html.escape(chart.title, quote=True)
        height = f" style='height:{150 + 44 * len(chart.series[0].y)}px'" if chart.kind == "stack" else ""
        wide = " class=full" if chart.kind == "stack" else ""
        plot = f"<div class=plot id=plot-{len(self._figures)} role=img aria-label='{label}'{height}></div>"
        self._body.append(f"<figure{wide}><h3>{html.escape(chart.title)}</h3>{plot}{note}</figure>")
        self._figures.append(_figure(chart, colours, palette))

    def details(self, summary: str, text: str) -> None:
        """Text that is shown when asked for."""
        self._body.append(f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>")

    def write(self, plotly: str) -> bytes:
        """The whole page, with Plotly's source in it."""
        return _PAGE.format(
            title=html.escape(self._title), style=_STYLE, body="\n".join(self._body), plotly=_pack(plotly.encode()),
            figures=_pack(msgspec.json.encode(self._figures)), script=_SCRIPT,
        ).encode()  # fmt: skip


def _pack(data: bytes) -> str:
    """Compressed, in letters that HTML leaves alone."""
    return b85encode(gzip.compress(data, 9, mtime=0)).translate(_SAFE).decode()


def _figure(chart: Chart, colours: Mapping[str, str], palette: tuple[str, ...]) -> dict[str, Any]:
    """A chart as Plotly wants it. Colours of text and grid follow the theme, in the page's script."""
    traces = [
        _trace(chart, series, colours.get(series.scheme, palette[number % len(palette)]))
        for number, series in enumerate(chart.series)
    ]
    x: dict[str, Any] = {"title": {"text": chart.x}, "automargin": True}
    y: dict[str, Any] = {"title": {"text": chart.y}, "automargin": True, "rangemode": "tozero"}
    if "x" in chart.log:
        x["type"] = "log"
        if chart.kind == "lines":
            x |= {"tickmode": "array", "tickvals": sorted({float(v) for series in chart.series for v in series.x})}
            x["tickformat"] = ",d"
    if "y" in chart.log:
        y |= {"type": "log", "rangemode": "normal"}
    layout: dict[str, Any] = {"xaxis": x, "yaxis": y, "showlegend": chart.kind != "bars"}
    if chart.kind == "stack":
        layout["barmode"] = "stack"
        y["autorange"] = "reversed"
    return {"data": traces, "layout": layout}


def _trace(chart: Chart, series: Series, colour: str) -> dict[str, Any]:
    trace: dict[str, Any] = {"name": series.name, "x": series.x, "y": series.y}
    if chart.kind == "stack":
        return {
            **trace, "type": "bar", "orientation": "h", "x": series.y, "y": series.x, "marker": {"color": colour},
            "hovertemplate": "%{x:,.1f} ms<extra>%{fullData.name}</extra>",
            **({"text": series.text, "textposition": "outside", "cliponaxis": False} if series.text else {}),
        }  # fmt: skip
    if series.low:
        above = [high - y for high, y in zip(series.high, series.y, strict=True)]
        below = [y - low for low, y in zip(series.low, series.y, strict=True)]
        trace["error_y"] = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1}
    if chart.kind == "bars":
        return {**trace, "type": "bar", "marker": {"color": colour}}
    line = {"color": colour, "dash": "dot" if series.dashed else "solid", "width": 2}
    if chart.kind == "steps":
        return {**trace, "type": "scatter", "mode": "lines", "line": {**line, "shape": "hv", "width": 1.6}}
    mode = "markers" if chart.kind == "points" else "lines+markers"
    if series.text:
        trace |= {
            "text": series.text,
            "hovertemplate": "%{text}<br>%{x:,.4g}, %{y:,.4g}<extra>%{fullData.name}</extra>",
        }
    return {**trace, "type": "scatter", "mode": mode, "line": line, "marker": {"color": colour, "size": 8}}


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>{style}</style></head>
<body><main><h1>{title}</h1>
<noscript><p>The charts are drawn by a script; the PNG files beside this page need none.</p></noscript>
{body}
</main>
<script type="text/plain" id="plotly">{plotly}</script>
<script type="text/plain" id="figures">{figures}</script>
<script>{script}</script></body></html>
"""

_STYLE = """
:root { --ink: #1d2733; --soft: #5b6675; --line: #d9dee5; --paper: #ffffff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ef; --soft: #9aa6b4; --line: #333d49; --paper: #14191f; --card: #1b222a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px; display: grid; grid-template-columns: 1fr 1fr; gap: 0 20px;
  grid-auto-flow: row dense; }
main > * { grid-column: 1 / -1; min-width: 0; }
main > figure { grid-column: span 1; } main > figure.full { grid-column: 1 / -1; }
h1 { margin: 0 0 4px; font-size: 26px; } h2 { margin: 28px 0 6px; font-size: 19px; } p { margin: 4px 0; }
h3 { margin: 0; font-size: 14px; } figcaption { color: var(--soft); font-size: 12px; }
figure { margin: 10px 0; padding: 12px; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.plot { height: 350px; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 12px 3px 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } td.n { text-align: right; }
ul { margin: 4px 0; padding-left: 20px; } pre { overflow-x: auto; font-size: 12px; } summary { cursor: pointer; }
@media (max-width: 800px) { main > figure { grid-column: 1 / -1; } }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --card: #fff; }
  main { display: block; max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""

_SCRIPT = r"""
"use strict";
function decode(text) {
  const letters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%,()*+-;.=>?@^_`{|}~";
  const values = new Uint8Array(128);
  for (let i = 0; i < 85; i++) values[letters.charCodeAt(i)] = i;
  const padding = (5 - text.length % 5) % 5, bytes = new Uint8Array((text.length + padding) / 5 * 4);
  for (let i = 0, at = 0; i < text.length; i += 5, at += 4) {
    let word = 0;
    for (let j = 0; j < 5; j++) word = word * 85 + (i + j < text.length ? values[text.charCodeAt(i + j)] : 84);
    bytes[at] = word >>> 24; bytes[at + 1] = word >>> 16; bytes[at + 2] = word >>> 8; bytes[at + 3] = word;
  }
  return bytes.subarray(0, bytes.length - padding);
}
function unpack(id) {
  const packed = decode(document.getElementById(id).textContent);
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}
function themed(layout, light) {
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = light ? ["#000", "#ccc"] : ["--ink", "--line"].map(name => style.getPropertyValue(name).trim());
  const copy = structuredClone(layout);
  Object.assign(copy, { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12 },
    margin: { l: 60, r: 16, t: 12, b: 84 }, hovermode: "closest",
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", traceorder: "normal" } });
  const lines = { gridcolor: line, zerolinecolor: line, linecolor: line };
  for (const axis of [copy.xaxis, copy.yaxis]) Object.assign(axis, lines);
  return copy;
}
(async () => {
  const script = document.createElement("script");
  script.textContent = await unpack("plotly");
  document.head.append(script);
  const figures = JSON.parse(await unpack("figures"));
  const draw = light => Promise.all(figures.map((figure, i) =>
    Plotly.react("plot-" + i, figure.data, themed(figure.layout, light), { responsive: true, displayModeBar: false })));
  await draw(false);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(false));
  addEventListener("beforeprint", () => draw(true));
  addEventListener("afterprint", () => draw(false));
  document.documentElement.dataset.drawn = figures.length;
})().catch(error => {
  document.documentElement.dataset.failed = error;
  for (const plot of document.querySelectorAll(".plot")) plot.textContent = "This browser cannot draw: " + error;
});
"""
