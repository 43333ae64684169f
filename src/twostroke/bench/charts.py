"""The charts of a report, as plain data: what is drawn, not how. Pure."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import numpy as np
from msgspec import Struct

from twostroke.bench import analysis
from twostroke.bench.analysis import PHASES, Group
from twostroke.bench.results import Result

Kind = Literal["lines", "steps", "bars", "stack", "points"]
_MODES = {"pd": "", "prefill-only": ", prefill only", "decode-only": ", decode only"}
_MIB = 1 << 20
_PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
_ITL_BINS = 40


class Series(Struct):
    """One line, or one colour of bars. ``scheme`` decides the colour where it is set; ``low`` and ``high`` are a
    confidence interval.
    """

    name: str
    x: list[float] | list[str]
    y: list[float]
    scheme: str = ""
    low: list[float] = []
    high: list[float] = []
    dashed: bool = False
    text: list[str] = []  # of each point


class Chart(Struct):
    """``bars`` stand side by side; ``stack`` lies and adds up. ``name`` is that of its file."""

    name: str
    title: str
    x: str
    y: str
    kind: Kind
    series: list[Series]
    log: str = ""  # axes with a logarithmic scale: "x", "xy"
    note: str = ""


def charts(found: Sequence[Group]) -> list[Chart]:
    """Every chart for which there is something to draw, the most telling first."""
    made: list[Chart] = []
    for mode, some in groupby(found, lambda group: group.key.mode):
        made += _of_mode(mode, list(some))
    return [chart for chart in made if any(series.y for series in chart.series)]


def _of_mode(mode: str, found: list[Group]) -> list[Chart]:
    made = []
    lowest = min(group.key.rate for group in found)
    over_length = [group for group in found if group.key.rate == lowest or _alone(group, found)]
    for figure, title, unit in (
        ("ttft", "Time to first token", "ms, median"),
        ("tpot", "Time per output token", "ms, median"),
        ("total_token_throughput", "Throughput", "tokens / s, in and out"),
    ):
        made.append(_over_length(mode, over_length, figure, title, unit))
    widest = _widest(found)
    shown = f"{_workload(widest[0])}{_MODES[mode]}" if widest else ""
    made += [
        _waterfall(mode, widest, shown),
        _percentiles(mode, widest, shown),
        _itl(mode, widest, shown),
        _goodput(mode, found),
        _pareto(mode, found),
        *(draw(mode, group, shown) for group in widest for draw in (_requests, _traffic)),
    ]
    return made


def _alone(group: Group, found: Sequence[Group]) -> bool:
    """Is there no other rate of this scheme and workload?"""
    same = [g for g in found if (g.key.scheme, g.key.workload) == (group.key.scheme, group.key.workload)]
    return len(same) == 1


def _widest(found: Sequence[Group]) -> list[Group]:
    """One group a scheme, of the longest prompts that most schemes have, at the rate they were asked at first."""
    at_lowest = [group for group in found if group.key.rate == min(g.key.rate for g in found)] or list(found)
    workloads = {group.key.workload: group.length for group in at_lowest}
    most = max(sum(g.key.workload == name for g in at_lowest) for name in workloads)
    common = [name for name in workloads if sum(g.key.workload == name for g in at_lowest) == most]
    name = max(common, key=lambda one: workloads[one])
    return [group for group in at_lowest if group.key.workload == name]


def _workload(group: Group) -> str:
    name = group.key.workload
    return f"{int(name):,} tokens" if name.isdigit() else name


def _by_scheme(found: Sequence[Group]) -> dict[str, list[Group]]:
    schemes = dict.fromkeys(group.key.scheme for group in found)
    return {name: [group for group in found if group.key.scheme == name] for name in schemes}


def _over_length(mode: str, found: Sequence[Group], figure: str, title: str, unit: str) -> Chart:
    series = []
    for scheme, own in _by_scheme(found).items():
        drawn = [(group, value) for group in own if (value := group.median(figure)) is not None]
        interval = [group.interval(figure) for group, _ in drawn] if figure in ("ttft", "tpot") else []
        known = [one for one in interval if one is not None]
        series.append(
            Series(
                scheme,
                [group.length for group, _ in drawn],
                [value for _, value in drawn],
                scheme,
                [low for low, _ in known] if len(known) == len(drawn) else [],
                [high for _, high in known] if len(known) == len(drawn) else [],
            )
        )
    if len({x for one in series for x in one.x}) == 1:
        series = [replace_x(one) for one in series]
        return Chart(f"{mode}-{figure}", f"{title}{_MODES[mode]}", "", unit, "bars", series)
    note = "" if figure.startswith("total") else "Whiskers: 95 % confidence interval of the median over all requests."
    return Chart(f"{mode}-{figure}", f"{title}{_MODES[mode]}", "prompt, tokens", unit, "lines", series, "xy", note)


def replace_x(series: Series) -> Series:
    """A series of one point as a bar under its name."""
    return Series(series.name, [series.name] * len(series.y), series.y, series.scheme, series.low, series.high)


def _waterfall(mode: str, found: Sequence[Group], shown: str) -> Chart:
    rows: list[str] = []
    ways = []
    for group in found:
        for name, way in analysis.typical(group.runs[0]).items():
            rows.append(f"{group.key.scheme}, {name}")
            ways.append(way)
    series = [Series(phase, list(rows), [1e3 * way.phases[phase] for way in ways]) for phase in PHASES]
    series = [one for one in series if any(value > 0 for value in one.y)]
    if any(way.hidden for way in ways):
        hidden = [f"hand-over beside prefill: {1e3 * way.hidden:,.0f} ms" if way.hidden else "" for way in ways]
        series[-1].text = hidden
    title = f"Where the time of the median and of the p99 request went: {shown}"
    note = "Ranked by time to the last token. What of the hand-over went on beside prefill is no part of a bar."
    return Chart(f"{mode}-waterfall", title, "ms", "", "stack", series if rows else [], note=note)


def _percentiles(mode: str, found: Sequence[Group], shown: str) -> Chart:
    series = []
    for group in found:
        if not group.records:  # a summary of another tool
            continue
        values = np.percentile([1e3 * record.ttft for record in group.records], _PERCENTILES)
        series.append(Series(group.key.scheme, [float(p) for p in _PERCENTILES], values.tolist(), group.key.scheme))
    title = f"Time to first token by percentile: {shown}"
    return Chart(f"{mode}-percentiles", title, "percentile of requests", "ms", "lines", series)


def _itl(mode: str, found: Sequence[Group], shown: str) -> Chart:
    gaps = {group.key.scheme: [1e3 * gap for record in group.records for gap in record.itl] for group in found}
    gaps = {scheme: own for scheme, own in gaps.items() if own}
    if not gaps:
        return Chart(f"{mode}-itl", "", "", "", "lines", [])
    largest = max(max(own) for own in gaps.values())
    smallest = max(0.05, min(min(own) for own in gaps.values()))
    edges = np.geomspace(smallest, max(largest, smallest * 2) * 1.001, _ITL_BINS + 1)
    series = []
    for scheme, own in gaps.items():
        counts, _ = np.histogram(np.clip(own, smallest, None), edges)
        series.append(Series(scheme, edges[:-1].tolist(), (100 * counts / len(own)).tolist(), scheme))
    note = "Gaps between chunks. Chunks that arrived together are in the first bin."
    return Chart(f"{mode}-itl", f"Inter-token latency: {shown}", "ms", "% of gaps", "steps", series, log="x", note=note)


def _requests(mode: str, group: Group, shown: str) -> Chart:
    run, scheme = group.runs[0], group.key.scheme
    times, waiting, running = analysis.concurrency(run)
    series = [
        Series("no token yet", list(times), [float(n) for n in waiting], dashed=True),
        Series("gets tokens", list(times), [float(n) for n in running]),
    ]
    series += [Series(f"{server}, {state}", at, n, dashed=state == "waiting") for server, state, at, n in _states(run)]
    note = "Seen by the client, and what each worker's metrics said. First repeat."
    name = f"{mode}-requests-{_file(scheme)}"
    return Chart(name, f"Requests over time, {scheme}: {shown}", "seconds", "requests", "steps", series, note=note)


def _states(run: Result) -> list[tuple[str, str, list[float], list[float]]]:
    """Without servers that had nothing to do."""
    return [one for one in analysis.states(run) if any(one[3])]


def _traffic(mode: str, group: Group, shown: str) -> Chart:
    scheme = group.key.scheme
    times, moved = analysis.traffic(group.runs[0])
    series = [Series(name, list(times), [one / _MIB for one in rate]) for name, rate in moved.items()]
    note = "From the workers' metrics, all together; read is what came from there. First repeat."
    name = f"{mode}-traffic-{_file(scheme)}"
    return Chart(name, f"KV on links and tiers, {scheme}: {shown}", "seconds", "MiB / s", "steps", series, note=note)


def _file(scheme: str) -> str:
    """A scheme's name for a file: those of several folders have colons and spaces."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in scheme)


def _goodput(mode: str, found: Sequence[Group]) -> Chart:
    series = []
    rates: set[float] = set()
    for workload in dict.fromkeys(group.key.workload for group in found):
        for scheme, own in _by_scheme([group for group in found if group.key.workload == workload]).items():
            finite = [group for group in own if math.isfinite(group.key.rate)]
            drawn = [(group.key.rate, share) for group in finite if (share := group.median("attained")) is not None]
            rates |= {rate for rate, _ in drawn}
            name = f"{scheme}, {workload}"
            series.append(Series(name, [r for r, _ in drawn], [100 * v for _, v in drawn], scheme))
    title = f"Rate against good requests{_MODES[mode]}"
    return Chart(
        f"{mode}-goodput", title, "requests / s", "% within the goal", "lines", series if len(rates) > 1 else []
    )


def _pareto(mode: str, found: Sequence[Group]) -> Chart:
    series = []
    for scheme, own in _by_scheme(found).items():
        drawn = [(group, tpot) for group in own if (tpot := group.median("tpot"))]
        through = [(group.median("total_token_throughput") or 0.0) / group.runs[0].workers for group, _ in drawn]
        labels = [f"{_workload(group)}, {group.key.rate:g}/s" for group, _ in drawn]
        series.append(Series(scheme, [1e3 / tpot for _, tpot in drawn], through, scheme, text=labels))
    title = f"Throughput of a worker against interactivity{_MODES[mode]}"
    x, y = "tokens / s that one user sees (1 / TPOT)", "tokens / s and worker"
    return Chart(f"{mode}-pareto", title, x, y, "points", series, note="Up and to the right is better.")


def ratios(found: Sequence[Group], base: str) -> list[tuple[Group, dict[str, float | None]]]:
    """Each group's figures over those of the base scheme at the same point."""
    at: dict[tuple[str, str, float], Group] = {
        (g.key.mode, g.key.workload, g.key.rate): g for g in found if g.key.scheme == base
    }
    figures = ("ttft", "tpot", "e2el", "total_token_throughput")
    rows = []
    for group in found:
        other = at.get((group.key.mode, group.key.workload, group.key.rate))
        rows.append((group, {figure: _ratio(group, other, figure) for figure in figures}))
    return rows


def _ratio(group: Group, base: Group | None, figure: str) -> float | None:
    ours, theirs = group.median(figure), base.median(figure) if base else None
    return ours / theirs if ours is not None and theirs else None


def limits(found: Sequence[Group]) -> list[tuple[str, str]]:
    """What limits each scheme, by mode, at the longest prompts: where, and why."""
    said = []
    for mode, some in groupby(found, lambda group: group.key.mode):
        for group in _widest(list(some)):
            run: Result = group.runs[0]
            said.append((f"{group.key.scheme} ({mode}, {_workload(group)})", analysis.verdict(run)))
    return said
