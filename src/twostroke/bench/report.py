"""Writes the report of one or more result folders: one page, and its charts as PNG files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from twostroke.bench import analysis, png, results, sources
from twostroke.bench.analysis import Group
from twostroke.bench.charts import charts, limits, ratios
from twostroke.bench.folder import METADATA, Metadata, plain, read_metadata
from twostroke.bench.html import Page
from twostroke.bench.plan import Settings
from twostroke.bench.results import Result
from twostroke.bench.workload import MAX_TRACE
from twostroke.errors import StartupError

PALETTE = ("#4c8dd6", "#e08a3c", "#3aa57a", "#c75b9b", "#8e7cc3", "#b8a031", "#6aa5b5", "#b0645a", "#7d8793", "#58a83c")
INSTALL = "pip install 'twostroke[bench]'"
REPORT = "report.html"


def write_report(folders: Sequence[Path], where: Path, base: str | None) -> Iterator[Path]:
    """Write ``report.html`` and ``charts/``, replacing earlier ones. Yields the files as they are written.

    Raises:
        StartupError: there is nothing to report, the base is unknown, or a library is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise StartupError(f"reports need Plotly and Matplotlib: {INSTALL}") from error
    runs = [run for folder in folders for run in _named(folder, len(folders) > 1)]
    found = analysis.groups(runs)
    if not found:
        raise StartupError("no run has completed a request: there is nothing to report")
    schemes = list(dict.fromkeys(run.point.scheme for run in runs))
    found.sort(key=lambda group: schemes.index(group.key.scheme))  # stable: within a mode and length, as they were run
    found.sort(key=lambda group: group.place)
    if base is not None and base not in schemes:
        raise StartupError(f"there is no scheme {base!r}; there are {', '.join(schemes)}")
    colours = {scheme: PALETTE[i % len(PALETTE)] for i, scheme in enumerate(schemes)}
    page = Page("twostroke bench")
    metadata = {folder: read_metadata(folder) for folder in folders if (folder / METADATA).is_file()}
    _introduce(page, metadata)
    page.heading("What limits each scheme")
    page.points(limits(found))
    _ratio_table(page, found, base or found[0].key.scheme)
    page.heading("Charts")
    (where / "charts").mkdir(parents=True, exist_ok=True)
    for chart in charts(found):
        page.chart(chart, colours, PALETTE)
        file = where / "charts" / f"{chart.name}.png"
        results.write(file, png.draw(chart, colours, PALETTE))
        yield file
    _run_table(page, found)
    _failures(page, runs)
    for folder, one in metadata.items():
        page.details(
            f"Settings and machine of {folder.name}", msgspec.json.format(msgspec.json.encode(plain(one))).decode()
        )
    results.write(where / REPORT, page.write(get_plotlyjs()))
    yield where / REPORT


def _named(folder: Path, several: bool) -> list[Result]:
    """A folder's runs, whose schemes are called after it where there are several folders."""
    runs = sources.read(folder)
    if (folder / METADATA).is_file():
        order = list(read_metadata(folder).schemes)
        runs.sort(key=lambda run: order.index(run.point.scheme) if run.point.scheme in order else len(order))
    if not several:
        return runs
    return [replace(run, point=replace(run.point, scheme=_within(folder, run.point.scheme))) for run in runs]


def _within(folder: Path, scheme: str) -> str:
    """Runs of other tools are called after their file already."""
    return scheme if scheme in (folder.name, folder.stem) else f"{folder.name}: {scheme}"


def _introduce(page: Page, metadata: dict[Path, Metadata]) -> None:
    for folder, one in metadata.items():
        machine, settings = one.machine, one.settings
        gpus = ", ".join(machine.get("gpus", [])) or "no GPU"
        page.text(
            f"{folder.name}: {one.model.get('name')} on {machine.get('cores')} cores of {machine.get('cpu')}, {gpus}; "
            f"commit {machine.get('commit') or 'unknown'}, {machine.get('date')}."
        )
        caches = "cold caches" if settings.cold else "every prompt sent once before"
        goal = ", ".join(f"{metric} up to {limit:g} ms" for metric, limit in settings.goal.items())
        page.text(
            f"{_sent(settings)}, seed {settings.grid.seed}, {caches}, {settings.repeats} repeats"
            + (f"; a good request has {goal}." if goal else ".")
        )
        page.points([(name, f"{scheme.about} (up {scheme.up})") for name, scheme in one.schemes.items()])
        if one.skipped:
            page.text("Could not run here:")
            page.points(list(one.skipped.items()))


def _sent(settings: Settings) -> str:
    """What a run sends, in words."""
    grid, chat = settings.grid, settings.chat
    if settings.trace is not None:
        most = f"at most {grid.num_prompts:,} requests" if grid.num_prompts < MAX_TRACE else "all requests"
        return f"{most} of the trace {Path(settings.trace).name}, lengths times {settings.trace_scale:g}"
    if chat is not None:
        return f"{chat.conversations} conversations of {chat.turns} turns, {chat.output_len} tokens an answer"
    most = f" (of at most {grid.prompt_tokens:,} tokens together)" if grid.prompt_tokens else ""
    return f"{grid.num_prompts} random prompts{most} a run, {grid.output_len} tokens an answer"


def _ratio_table(page: Page, found: Sequence[Group], base: str) -> None:
    page.heading(f"Against {base}")
    page.text("Ratios of medians: below 1 is better for times, above 1 for throughput.")
    rows = [
        [group.key.scheme, group.key.mode, group.key.workload, f"{group.key.rate:g}", *map(_times, ratio.values())]
        for group, ratio in ratios(found, base)
        if group.key.scheme != base
    ]
    page.table(["scheme", "mode", "input", "rate", "TTFT", "TPOT", "E2EL", "throughput"], rows, 3)


def _run_table(page: Page, found: Sequence[Group]) -> None:
    page.heading("All figures")
    page.text("Medians over the repeats, in brackets the lowest and the highest. Failed requests are in no average.")
    columns = ["scheme", "mode", "input", "rate", "repeats", "ok", "failed", "TTFT p50 ms", "TTFT p99", "TPOT p50 ms"]
    columns += ["TPOT p99", "ITL p99", "E2EL p50", "tokens / s", "good", "generator late p99 ms"]
    rows = []
    for group in found:
        ok = sum(run.completed for run in group.runs)
        late = max((run.generator.late_ms_p99 for run in group.runs if run.generator), default=None)
        limited = any(run.generator and run.generator.limited for run in group.runs)
        good = group.median("attained")
        rows.append(
            [
                group.key.scheme, group.key.mode, group.key.workload, f"{group.key.rate:g}", str(len(group.runs)),
                str(ok), str(group.failed), _spread(group, "ttft"), _p99(group, "ttft"), _spread(group, "tpot"),
                _p99(group, "tpot"), _p99(group, "itl"), _spread(group, "e2el"),
                _spread(group, "total_token_throughput"), "" if good is None else f"{100 * good:.0f} %",
                _number(late) + (" (the limit?)" if limited else ""),
            ]
        )  # fmt: skip
    page.table(columns, rows, 3)


def _failures(page: Page, runs: Sequence[Result]) -> None:
    died = [(run.point.name, run.error) for run in runs if run.error]
    errors: dict[str, int] = {}
    for run in runs:
        for record in run.records:
            if record.error:
                errors[f"{run.point.scheme}: {record.error}"] = errors.get(f"{run.point.scheme}: {record.error}", 0) + 1
    if died or errors:
        page.heading("Failures")
        page.points([*died, *((error, f"{count} requests") for error, count in errors.items())])


def _spread(group: Group, figure: str) -> str:
    values = group.values(figure)
    if not values:
        return "-"
    middle = _number(group.median(figure))
    return middle if len(values) == 1 else f"{middle} [{_number(min(values))} - {_number(max(values))}]"


def _p99(group: Group, metric: str) -> str:
    found = [value for run in group.runs if metric in run.stats and (value := run.stats[metric].p99) is not None]
    return _number(max(found, default=None))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"
