"""The verbs of ``twostroke bench`` as a person runs them: what is printed, what is asked, what is written."""

import asyncio
import signal
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import msgspec
import uvloop
from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from twostroke import models
from twostroke.bench import results, sources, workload
from twostroke.bench import schemes as known
from twostroke.bench.checks import read_model
from twostroke.bench.client import Client
from twostroke.bench.dialect import Asking
from twostroke.bench.folder import Folder, Metadata
from twostroke.bench.machine import describe, machine
from twostroke.bench.plan import Settings, Workloads
from twostroke.bench.results import Point, Result
from twostroke.bench.runner import Bench, prepare, timelines
from twostroke.bench.watch import watching
from twostroke.errors import StartupError

_ASK = aiohttp.ClientTimeout(total=10)
_TABLE_WIDTH = 120  # characters, at least


def run(settings: Settings, output: Path, names: Sequence[str] | None, file: Path | None, *, refuse: bool) -> int:
    """``bench run``: 0 when every run is there, 1 when some failed.

    Raises:
        StartupError: nothing can be measured, or it was asked to refuse what cannot; the disk is full.
    """
    from twostroke.cli import explain

    console = Console(highlight=False)
    available = known.SCHEMES | (known.read_schemes(file) if file else {})
    chosen = known.select(names if names is not None else list(available), available)
    load_format = "dummy" if "--load-format dummy" in settings.up else "auto"
    directory = models.resolve(settings.model, console.print, "dummy" if load_format == "dummy" else "auto")
    facts = read_model(directory, models.default_name(settings.model))
    workloads = Workloads(settings, facts.vocab, _trace(settings))
    can_report = find_spec("plotly") is not None and find_spec("matplotlib") is not None
    if not can_report:
        console.print("there will be no report: it needs pip install 'twostroke[bench]'", markup=False, style="yellow")
    prepared = prepare(settings, chosen, workloads, facts, machine(), explain)
    for what, why in prepared.skipped.items():
        console.print(f"cannot run here: {what}: {why}", markup=False, style="yellow", soft_wrap=True)
    if not prepared.schemes or (refuse and prepared.skipped):
        raise StartupError(
            "nothing was started: " + ("no scheme can run here" if not refuse else "see the lines above")
        )
    folder = Folder(output)
    metadata = Metadata(settings, prepared.schemes, msgspec.to_builtins(facts), describe(), prepared.skipped)
    folder.open(metadata)
    bar = Bar(console)
    bench = Bench(folder, settings, prepared, workloads, facts.vocab, bar)
    todo = bench.todo()
    console.print(f"{len(todo)} runs to do, {sum(map(len, prepared.points.values())) - len(todo)} are there already")
    try:
        with bar.over(sum(map(bench.weight, todo))):
            uvloop.run(_until_signal(bench))
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM
    missing = bench.todo()
    for point in missing:
        console.print(f"failed: {point.name}", style="red", markup=False)
    show(console, sources.read(output))
    if can_report:
        report([output], None, None)
    return 1 if missing else 0


async def _until_signal(bench: Bench) -> None:
    """SIGTERM ends it in order, as Ctrl-C does: the scheme is stopped, and its scratch directory removed."""
    running = asyncio.current_task()
    assert running is not None, "this is a coroutine"
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    await bench.run()


def load(
    url: str, asking: Asking, settings: Settings, vocab: int, key: Path | None, label: str | None, output: Path | None
) -> int:
    """``bench client``: 0 when every request was answered, 1 otherwise.

    Raises:
        StartupError: the server cannot be asked, or the result not written.
    """
    console = Console(highlight=False)
    if output is not None and output.exists():
        raise StartupError(f"{output} is there already")
    return uvloop.run(_load(console, url.rstrip("/"), asking, settings, vocab, key, label, output))


async def _load(
    console: Console,
    url: str,
    asking: Asking,
    settings: Settings,
    vocab: int,
    key_file: Path | None,
    label: str | None,
    output: Path | None,
) -> int:
    key = _read(key_file).decode().strip() if key_file else None
    workloads = Workloads(settings, vocab, _trace(settings))
    if asking.dialect != "generate" and asking.model is None:
        asking = replace(asking, model=await _first_model(url, key))
    (name,) = workloads.names
    point = Point(label or urlsplit(url).netloc.replace(":", "-"), "pd", name, settings.grid.request_rate)
    items = workloads.items(point)
    client = Client(url, asking, timeout=settings.timeout, key=key)
    warm = await client.load([replace(items[0], prompt=items[0].prompt[::-1], at=0.0)], "warm-up")
    if error := warm.records[0].error:
        raise StartupError(f"{url} does not answer: {error}")
    bar = Bar(console)
    with bar.over(float(len(items))):
        bar.run(point, 0.0)
        async with watching(url) as watched:
            loaded = await client.load(items, point.name, lambda _: bar.advance(1.0))
    result = results.summarize(point, loaded, settings.goal)
    result.timelines, result.watched = await timelines(url, loaded), watched
    show(console, [result])
    for error in sorted({record.error for record in result.records if record.error})[:5]:
        console.print(f"failed: {error}", style="red", markup=False)
    if result.generator is not None:
        console.print(generator_line(result), soft_wrap=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        results.write(output, results.to_json(result))
    return 1 if result.failed else 0


def report(folders: Sequence[Path], base: str | None, output: Path | None) -> int:
    """``bench report``.

    Raises:
        StartupError: there is nothing to report, or nowhere to write it.
    """
    console = Console(highlight=False)
    where = output or (folders[0] if folders[0].is_dir() else None)
    if missing := [folder for folder in folders if not folder.exists()]:
        raise StartupError(f"there is no {missing[0]}")
    if where is None:
        raise StartupError("say with --output where to write the report")
    from twostroke.bench.report import write_report

    for file in write_report(folders, where, base):
        console.print(f"wrote {file}", markup=False, soft_wrap=True)
    return 0


def generator_line(result: Result) -> str:
    """The load generator about itself."""
    own = result.generator
    assert own is not None, "a run of ours has one"
    line = (
        f"generator: late by {own.late_ms_p50:.2f} ms (p99 {own.late_ms_p99:.2f}); "
        f"{own.cpu_us_per_request:.0f} µs of CPU a request, {own.cpu_us_per_token:.0f} a token"
    )
    return line + (" - IT MAY HAVE BEEN THE LIMIT" if own.limited else "")


def show(console: Console, runs: Sequence[Result]) -> None:
    """Print runs as a table, as wide as it is: on a narrow terminal its lines wrap, and lose no figure."""
    ordered = sorted(runs, key=lambda run: (run.point.scheme, run.point.mode, run.point.length or 0, run.point.rate))
    Console(width=max(console.width, _TABLE_WIDTH), highlight=False).print(table(ordered))


def table(runs: Sequence[Result]) -> Table:
    """Runs as they are printed."""
    columns = (
        "scheme",
        "mode",
        "input",
        "rate",
        "ok",
        "failed",
        "TTFT p50",
        "p99",
        "TPOT p50",
        "p99",
        "tok/s",
        "goodput",
    )
    shown = Table(*columns, box=None, pad_edge=False)
    for one in runs:
        if one.error:
            shown.add_row(one.point.scheme, one.point.mode, one.point.workload, f"{one.point.rate:g}", "died")
            continue
        ttft, tpot = one.stats["ttft"], one.stats["tpot"]
        good = "" if one.attained is None else f"{100 * one.attained:.0f} %"
        shown.add_row(
            one.point.scheme, one.point.mode, one.point.workload, f"{one.point.rate:g}", str(one.completed),
            str(one.failed), *(_ms(value).removesuffix(" ms") for value in (ttft.p50, ttft.p99, tpot.p50, tpot.p99)),
            f"{one.total_token_throughput:.0f}", good,
        )  # fmt: skip
    return shown


class Bar:
    """Progress with the time left: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console)
        self._task = self._progress.add_task("")

    def over(self, weight: float) -> Progress:
        """The bar, for so much work; shown while it is entered."""
        self._progress.update(self._task, total=weight)
        return self._progress

    def run(self, point: Point, weight: float) -> None:
        """See ``runner.Progress``."""
        self._progress.update(self._task, description=point.name)

    def advance(self, weight: float) -> None:
        """See ``runner.Progress``."""
        self._progress.advance(self._task, weight)

    def ended(self, result: Result) -> None:
        """See ``runner.Progress``."""
        ttft, tpot = result.stats["ttft"], result.stats["tpot"]
        failed = f", {result.failed} FAILED" if result.failed else ""
        limit = " (the load generator may have been the limit)" if result.generator and result.generator.limited else ""
        self.say(
            f"{result.point.name}: TTFT {_ms(ttft.p50)}, TPOT {_ms(tpot.p50)}, {result.completed} ok{failed}{limit}"
        )

    def say(self, text: str) -> None:
        """See ``runner.Progress``."""
        self._console.print(text, markup=False, soft_wrap=True)

    def detail(self, text: str) -> None:
        """See ``runner.Progress``: what processes print is shown only if one dies."""


async def _first_model(url: str, key: str | None) -> str | None:
    class Listed(Struct):
        id: str

    class Models(Struct):
        data: list[Listed]

    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        async with (
            aiohttp.ClientSession(timeout=_ASK) as session,
            session.get(f"{url}/v1/models", headers=headers) as r,
        ):
            return msgspec.json.decode(await r.read(), type=Models).data[0].id if r.status == 200 else None
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        raise StartupError(f"{url} cannot be reached: {error}") from error
    except (msgspec.MsgspecError, IndexError):
        return None


def _trace(settings: Settings) -> list[workload.TraceLine]:
    return workload.read_trace(_read(Path(settings.trace)), settings.trace) if settings.trace else []


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StartupError(f"cannot read {file}: {error.strerror}") from error


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"
