"""Result files of any origin: ours, of ``vllm bench serve``, and of aiperf.

Of aiperf's requests, where a file tells them, the figures are made again by our definitions. They differ: aiperf's
"inter-token latency" of a request is our TPOT, but divides by the tokens that its own tokenizer makes of the answer's
text, ours by the server's count where it is known; and its duration leaves out failed requests. A summary alone is
taken as it is.
"""

import gzip
import zlib
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from twostroke.bench import results
from twostroke.bench.client import Load, Record, judge
from twostroke.bench.results import METRICS, Figures, Point, Result, Stats
from twostroke.errors import StartupError

AIPERF_RECORDS = "profile_export.jsonl"  # a line for each request
_AIPERF_SUMMARY = "profile_export_aiperf.json"


def read(path: Path) -> list[Result]:
    """Every run of a result folder of ours; of another tool's folder, or a single file, every result there is.

    Raises:
        StartupError: there is no result, or a file is none, or cannot be read.
    """
    try:
        if path.is_file():
            return [_decode(path)]
        if (path / AIPERF_RECORDS).exists():
            return [_decode(path / AIPERF_RECORDS)]
        runs = path / "runs"
        files = sorted(file for file in (runs if runs.is_dir() else path).iterdir() if _is_result(file))
        if not files:
            raise StartupError(f"{path} holds no benchmark results")
        return [_decode(file) for file in files]
    except (OSError, EOFError, zlib.error) as error:
        raise StartupError(f"{path} cannot be read: {error}") from error


def _is_result(file: Path) -> bool:
    """By its name; compressed ones are those that were put away (``benchmarks/results``)."""
    return file.name.endswith((".json", ".json.gz")) and not file.name.startswith(".")


def _decode(file: Path) -> Result:
    data = file.read_bytes()
    if file.suffix == ".gz":
        data = gzip.decompress(data)
    name = file.parent.name if file.name in (AIPERF_RECORDS, _AIPERF_SUMMARY) else file.name.partition(".json")[0]
    return of_aiperf_records(data, name) if file.suffix == ".jsonl" else decode(data, name)


def decode(data: bytes, name: str) -> Result:
    """A result file (JSON). ``name`` is what a run of another tool is called, unless it has a label.

    Raises:
        StartupError: it is no result.
    """
    try:
        fields: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
        if "twostroke" in fields:
            return results.from_json(data, name)
        return _of_aiperf(fields, name) if "aiperf_version" in fields else _of_vllm(fields, name)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StartupError(f"{name} is no benchmark result: {error}") from error


class _Vllm(Figures, kw_only=True):
    request_rate: float | str | None = None
    label: str | None = None
    input_lens: tuple[int, ...] = ()
    output_lens: tuple[int, ...] = ()
    ttfts: tuple[float, ...] = ()
    itls: tuple[list[float], ...] = ()
    start_times: tuple[float, ...] = ()
    errors: tuple[str, ...] = ()


def _of_vllm(fields: Mapping[str, Any], name: str) -> Result:
    """A run of ``vllm bench serve``; its requests are there only with ``--save-detailed``."""
    file = msgspec.convert(fields, _Vllm, strict=False)
    lengths = set(file.input_lens)
    workload = lengths.pop() if len(lengths) == 1 else round(file.total_input_tokens / max(1, file.completed))
    point = Point(file.label or name, "pd", str(workload), float(file.request_rate or "inf"))
    stats: dict[str, Stats] = {metric: results.read_stats(fields, metric) for metric in METRICS}
    return Result(
        point, file.duration, file.completed, file.failed, file.total_input_tokens, file.total_output_tokens,
        file.request_throughput, file.request_goodput, file.output_throughput, file.total_token_throughput, stats,
        list(_records_of_vllm(file, name)), origin=name,
    )  # fmt: skip


def _records_of_vllm(file: _Vllm, name: str) -> Iterable[Record]:
    first = min((at for at in file.start_times if at), default=0.0)
    rows = zip(file.start_times, file.input_lens, file.output_lens, file.ttfts, file.itls, file.errors, strict=False)
    for i, (at, input_len, output_len, ttft, itl, error) in enumerate(rows):
        chunks = [] if error else list(accumulate([ttft, *itl]))
        start = max(0.0, at - first)
        yield Record(f"{name}-{i}", start, start, input_len, output_len, output_len, chunks, error=error)


def _of_aiperf(fields: Mapping[str, Any], name: str) -> Result:
    """The summary that aiperf exports: an object for each metric, with ``avg`` and percentiles."""

    def value(metric: str, part: str = "avg") -> float:
        return float((fields.get(metric) or {}).get(part) or 0.0)

    def stats(metric: str) -> Stats:
        parts = {"mean": "avg", "median": "p50", "std": "std", "p50": "p50", "p90": "p90", "p99": "p99"}
        return Stats(**{ours: (fields.get(metric) or {}).get(theirs) for ours, theirs in parts.items()})

    duration, completed = value("benchmark_duration"), round(value("request_count"))
    inputs, outputs = round(value("total_isl")), round(value("total_osl"))
    if not duration:
        raise StartupError(f"{name} is no benchmark result: aiperf measured nothing in it")
    return Result(
        Point(name, "pd", str(round(value("input_sequence_length"))), float("inf")),
        duration, completed, round(value("error_request_count")), inputs, outputs, completed / duration, None,
        outputs / duration, (inputs + outputs) / duration,
        {"ttft": stats("time_to_first_token"), "tpot": stats("inter_token_latency"), "itl": Stats(),
         "e2el": stats("request_latency")},
        [], origin=name,
    )  # fmt: skip


class _Metadata(Struct):
    x_request_id: str
    request_start_ns: int
    request_end_ns: int
    benchmark_phase: str = "profiling"


class _Value(Struct):
    value: float | list[float]


class _Line(Struct):
    metadata: _Metadata
    metrics: dict[str, _Value]
    error: dict[str, Any] | None = None

    def number(self, *names: str) -> int:
        """The first of these metrics that is there, else 0."""
        known = (self.metrics[name].value for name in names if name in self.metrics)
        return next((round(value) for value in known if isinstance(value, float)), 0)

    def record(self, began: int) -> Record:
        """Of this request, in a run that ``began`` at so many ns."""
        start = (self.metadata.request_start_ns - began) / 1e9
        ttft, gaps = self.metrics.get("time_to_first_token"), self.metrics.get("inter_chunk_latency")
        steps = [ttft.value if ttft else 0.0, *(gaps.value if gaps and isinstance(gaps.value, list) else [])]
        chunks = list(accumulate(step / 1e3 for step in steps if isinstance(step, float)))
        output = self.number("usage_completion_tokens", "output_sequence_length")
        error = str(self.error.get("message") or "failed") if self.error else "" if ttft else "no token came"
        return Record(
            self.metadata.x_request_id, start, start, self.number("usage_prompt_tokens", "input_sequence_length"),
            output, output, [] if error else chunks, error=error,
        )  # fmt: skip


def of_aiperf_records(data: bytes, name: str) -> Result:
    """Every request of a run of aiperf; warm-up is left out.

    Raises:
        StartupError: a line is no request of aiperf, or there is none.
    """
    try:
        lines = msgspec.json.decode(b"[" + b",".join(data.splitlines()) + b"]", type=list[_Line], strict=False)
    except msgspec.MsgspecError as error:
        raise StartupError(f"{name} is no benchmark result: {error}") from error
    told = [line for line in lines if line.metadata.benchmark_phase == "profiling"]
    if not told:
        raise StartupError(f"{name} holds no request")
    began = min(line.metadata.request_start_ns for line in told)
    duration = (max(line.metadata.request_end_ns for line in told) - began) / 1e9
    records = sorted((line.record(began) for line in told), key=lambda record: record.start)
    good = [record.input_len for record in records if not record.error]
    point = Point(name, "pd", str(round(sum(good) / max(1, len(good)))), float("inf"))
    result = results.summarize(point, Load(records, duration, began / 1e9, judge(records, 0.0, duration)), {})
    result.generator, result.origin = None, name
    return result
