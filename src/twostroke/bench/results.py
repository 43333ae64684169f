"""A run's figures, named as ``vllm bench serve --save-result`` names them, and the files they are kept in."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Struct, field

from twostroke.bench.client import Generator, Load, Record
from twostroke.bench.watch import Watched
from twostroke.errors import StartupError

VERSION = 1  # of our own part of a result file
Metric = Literal["ttft", "tpot", "itl", "e2el"]
METRICS: tuple[Metric, ...] = ("ttft", "tpot", "itl", "e2el")
Stamp = tuple[str, str, float, dict[str, str | int | float]]  # worker, event, seconds after the request's start, detail


class Stats(Struct, frozen=True):
    """Of one metric over the completed requests, in ms. None where there is nothing to count."""

    mean: float | None = None
    median: float | None = None
    std: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Stats":
        """As NumPy has them: linear percentiles, standard deviation of the population."""
        if not seconds:
            return cls()
        ms = 1e3 * np.asarray(seconds)
        p50, p90, p99 = (float(p) for p in np.percentile(ms, [50, 90, 99]))
        return cls(float(ms.mean()), float(np.median(ms)), float(ms.std()), p50, p90, p99)


class Point(Struct, frozen=True):
    """What a run measured: a scheme, a mode, a workload, a rate. ``repeat`` counts from 0."""

    scheme: str
    mode: str
    workload: str  # "1000" for random prompts of that length, "chat", a trace's name
    rate: float
    repeat: int = 0

    @property
    def name(self) -> str:
        """Names its file."""
        return f"{self.scheme}.{self.mode}.{self.workload}.rate-{self.rate:g}.{self.repeat}"

    @property
    def length(self) -> int | None:
        """Prompt tokens, if that is what the workload says."""
        return int(self.workload) if self.workload.isdigit() else None


class Result(Struct):
    """One run."""

    point: Point
    duration: float
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    request_goodput: float | None  # requests a second that met the goal; None without one
    output_throughput: float
    total_token_throughput: float
    stats: dict[str, Stats]  # by Metric
    records: list[Record]
    goal: dict[str, float] = {}
    workers: int = 1
    started: float = 0.0  # unix seconds
    generator: Generator | None = None
    timelines: dict[str, list[Stamp]] = {}  # by request id, of those that the server remembers
    watched: Watched = field(default_factory=Watched)  # empty of servers without metrics
    error: str = ""  # why the run as a whole does not count
    origin: str = ""  # the file it was read from

    @property
    def good(self) -> list[Record]:
        """The requests that were completed."""
        return [record for record in self.records if not record.error]

    @property
    def attained(self) -> float | None:
        """Share of all requests that met the goal; failed ones did not."""
        if self.request_goodput is None:
            return None
        return round(self.request_goodput * self.duration) / max(1, self.completed + self.failed)


def meets(record: Record, goal: Mapping[str, float]) -> bool:
    """Did a request stay within every limit of the goal? TPOT of a single token is 0, as for ``vllm bench``."""
    itl = record.itl
    reached = {
        "ttft": record.ttft,
        "tpot": record.tpot or 0.0,
        "itl": sum(itl) / len(itl) if itl else 0.0,
        "e2el": record.e2el,
    }
    return all(1e3 * reached[metric] <= limit for metric, limit in goal.items())


def summarize(point: Point, load: Load, goal: Mapping[str, float], workers: int = 1) -> Result:
    """The figures of a run. Failed requests are counted, and in nothing else."""
    good = [record for record in load.records if not record.error]
    inputs, outputs = sum(r.input_len for r in good), sum(r.output_len for r in good)
    tpots = [tpot for r in good if (tpot := r.tpot) is not None]
    return Result(
        point=point,
        duration=load.duration,
        completed=len(good),
        failed=len(load.records) - len(good),
        total_input_tokens=inputs,
        total_output_tokens=outputs,
        request_throughput=len(good) / load.duration,
        request_goodput=sum(meets(r, goal) for r in good) / load.duration if goal else None,
        output_throughput=outputs / load.duration,
        total_token_throughput=(inputs + outputs) / load.duration,
        stats={
            "ttft": Stats.of([r.ttft for r in good]),
            "tpot": Stats.of(tpots),
            "itl": Stats.of([gap for r in good for gap in r.itl]),
            "e2el": Stats.of([r.e2el for r in good]),
        },
        records=load.records,
        goal=dict(goal),
        workers=workers,
        started=load.started,
        generator=load.generator,
    )


def to_json(result: Result) -> bytes:
    """A result file: the names of ``vllm bench serve`` first, then every stamp, from which they can be made again."""
    plain: dict[str, Any] = msgspec.to_builtins(result)
    records, stats = result.records, plain.pop("stats")
    own = {name: plain.pop(name) for name in _Own.__struct_fields__ if name != "version"}
    del plain["origin"]
    flat = {f"{part}_{metric}_ms": value for metric, one in stats.items() for part, value in one.items()}
    lists = {
        "input_lens": [r.input_len for r in records],
        "output_lens": [0 if r.error else r.output_len for r in records],
        "ttfts": [0.0 if r.error else r.ttft for r in records],
        "itls": [[] if r.error else r.itl for r in records],
        "start_times": [r.start for r in records],
        "errors": [r.error for r in records],
    }
    return msgspec.json.encode(jsonable({**plain, **flat, **lists, "twostroke": {"version": VERSION, **own}})) + b"\n"


class _Own(Struct):
    version: int
    point: Point
    records: list[Record]
    timelines: dict[str, list[Stamp]]
    generator: Generator | None
    workers: int
    goal: dict[str, float]
    error: str = ""
    watched: Watched = field(default_factory=Watched)


class Figures(Struct):
    """What a result file of ours and one of ``vllm bench serve`` have in common."""

    duration: float
    completed: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    failed: int = 0
    request_goodput: float | None = None


class _File(Figures, kw_only=True):
    started: float = 0.0
    twostroke: _Own


def from_json(data: bytes, origin: str) -> Result:
    """Read a result file of ours.

    Raises:
        StartupError: it is none.
    """
    try:
        fields: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
        file = msgspec.convert(fields, _File, strict=False)
        stats: dict[str, Stats] = {metric: read_stats(fields, metric) for metric in METRICS}
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StartupError(f"{origin} is no benchmark result: {error}") from error
    own = file.twostroke
    return Result(
        own.point, file.duration, file.completed, file.failed, file.total_input_tokens, file.total_output_tokens,
        file.request_throughput, file.request_goodput, file.output_throughput, file.total_token_throughput, stats,
        own.records, own.goal, own.workers, file.started, own.generator, own.timelines, own.watched, own.error,
        origin,
    )  # fmt: skip


def read_stats(fields: Mapping[str, Any], metric: str) -> Stats:
    """Of one metric, from a file with the names of ``vllm bench serve``."""
    names = Stats.__struct_fields__
    return msgspec.convert({name: fields.get(f"{name}_{metric}_ms") for name in names}, Stats)


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        StartupError: it cannot be written; nothing is left of it.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StartupError(
            f"cannot write {path}: {error.strerror}; make room and run the same command again, it goes on from there"
        ) from error


def jsonable(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """Floats to a microsecond: more digits are noise, and fill disks. Infinity, which JSON lacks, as "inf", which is
    also how ``vllm bench`` writes it; whoever reads must not be strict.
    """
    if isinstance(value, float):
        return "inf" if math.isinf(value) else round(value, 6)
    if isinstance(value, dict):
        return {name: jsonable(one) for name, one in value.items()}
    return [jsonable(one) for one in value] if isinstance(value, list | tuple) else value
