"""Lifecycle stamps, which are the metrics: timelines, Prometheus and the benchmark read the same events.

The worker stamps (with these details where it knows them; numbers are counts unless said otherwise):

=================  =====================================================================================
received           ``prompt_tokens``
admitted           the queue time ends
readmitted         it was preempted, and holds slots again
prefill_started    ``cached_tokens``: of the prompt, not to be computed
prefill_ended
attached           ``link``: the producer has opened its pool to us
store              ``found_blocks``, of these ``pool_blocks`` were in the pool and ``loaded_blocks`` loaded from
                   ``tiers``; ``bytes``, ``load_ms`` (that tiers took); ``why`` so many
first_token        sampled here, or received from the producer
kv_complete        ``link``, ``bytes``, ``blocks``, ``exposed_ms`` (waited for after prefill had ended)
link_failed        ``link``, ``reason``, ``following``: the link that is used from now on
fallback           ``reason``: the hand-over failed; the rest is computed here
finished           ``reason``, ``output_tokens``
aborted, failed    ``reason``
release_failed     ``reason``: the producer's lease was left to expire
=================  =====================================================================================
No stamp carries text of a prompt or an answer.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from twostroke.messages import Slots, TierReport, TimelineEvent

MAX_REQUESTS = 1024  # timelines kept; the oldest goes first
MAX_EVENTS = 256  # of one HTTP request

_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.2, 0.5, 1, 5)  # seconds
_SPANS = {  # histogram of the time between two events of a sequence, observed at the second
    "admitted": ("request_queue_time_seconds", "received", "Time from arrival to admission."),
    "prefill_ended": ("request_prefill_time_seconds", "prefill_started", "Time of the prefill on this worker."),
    "first_token": ("time_to_first_token_seconds", "received", "Time from arrival to the first token."),
    "kv_complete": ("handover_seconds", "attached", "Time from attaching until every block is here."),
    "finished": ("e2e_request_latency_seconds", "received", "Time from arrival to the last token."),
}
_COUNTS = {  # counter of a detail
    ("received", "prompt_tokens"): ("prompt_tokens", "Prompt tokens received."),
    ("prefill_started", "cached_tokens"): ("cached_tokens", "Prompt tokens that were not computed here."),
    ("finished", "output_tokens"): ("generation_tokens", "Tokens generated."),
}
_ENDS = ("finished", "aborted", "failed")
_HANDOVERS = {"kv_complete": "complete", "fallback": "fallback"}


class Gauges(Struct, frozen=True):
    """What is true at the moment of a scrape. ``slots`` is None while there is no pool."""

    running: int
    waiting: int
    slots: Slots | None = None
    handovers: int = 0  # that this worker produces
    tasks: int = 0  # of the event loop


class _Sequence:
    """When one sequence passed its events, in seconds of the monotonic clock."""

    __slots__ = ("last_token", "times")

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.last_token: float | None = None


class _Timeline:
    __slots__ = ("events", "sequences")

    def __init__(self) -> None:
        self.events: list[TimelineEvent] = []
        self.sequences: dict[str, _Sequence] = {}


class Lifecycle:
    """The stamps of one process and the metrics made of them. Safe to use from several threads.

    ``request_id`` is an x-request-id or a ``Request.id`` of it; the latter keeps the n sequences of a call apart.
    """

    def __init__(self, worker_id: str) -> None:
        self._worker = worker_id
        self._lock = threading.Lock()
        self._timelines: OrderedDict[str, _Timeline] = OrderedDict()
        self._registry = CollectorRegistry()
        self._spans = {event: self._histogram(name, text, _LONG) for event, (name, _, text) in _SPANS.items()}
        self._counts: dict[str, list[tuple[str, Counter]]] = {}  # by event: details and their counters
        for (event, detail), (name, text) in _COUNTS.items():
            self._counts.setdefault(event, []).append((detail, self._counter(name, text)))
        self._exposed = self._histogram("handover_exposed_seconds", "KV wait after prefill had ended.", _SHORT)
        self._itl = self._histogram("inter_token_latency_seconds", "Gap between outputs, per token.", _SHORT)
        self._tpot = self._histogram("request_time_per_output_token_seconds", "Mean gap after the first.", _SHORT)
        self._outcomes = self._counter("requests", "Sequences ended.", "outcome", "reason")
        self._preemptions = self._counter("preemptions", "Times that a sequence lost its slots and started over.")
        self._handovers = self._counter("handovers", "Hand-overs consumed.", "outcome")
        self._blocks = self._counter("handover_blocks", "Blocks of KV cache read from producers.", "link")
        self._bytes = self._counter("handover_bytes", "Bytes of KV cache read from producers.", "link")

    def stamp(self, request_id: str, event: str, **detail: str | int | float) -> None:
        """Note that ``event`` happened now."""
        wall, now = time.time(), time.monotonic()
        http_id, _, sequence_id = request_id.partition("/")
        if sequence_id and sequence_id != "0/0":
            detail["sequence"] = sequence_id
        if event == "readmitted":
            self._preemptions.inc()
        with self._lock:
            timeline = self._timelines.get(http_id) or self._open(http_id)
            if len(timeline.events) < MAX_EVENTS:
                timeline.events.append(TimelineEvent(event, self._worker, wall, detail))
            sequence = timeline.sequences.get(sequence_id) or timeline.sequences.setdefault(sequence_id, _Sequence())
            start = sequence.times.get(_SPANS[event][1]) if event in _SPANS else None
            first_time = sequence.times.setdefault(event, now) == now
        if first_time:
            self._measure(event, sequence, None if start is None else now - start, detail)

    def tokens(self, request_id: str, count: int) -> None:
        """Note that ``count`` tokens of a sequence leave now, for the gaps between tokens. The API calls this."""
        http_id, _, sequence_id = request_id.partition("/")
        timeline = self._timelines.get(http_id)
        if timeline is None or not count:
            return
        sequence = timeline.sequences.setdefault(sequence_id, _Sequence())
        now, last = time.monotonic(), sequence.last_token
        sequence.last_token = now
        if last is not None:
            for _ in range(count):
                self._itl.observe((now - last) / count)

    def received(self, link: str, blocks: int, size: int) -> None:
        """Note that so many blocks, of ``size`` bytes in all, have come over a link just now, and were confirmed."""
        self._blocks.labels(link).inc(blocks)
        self._bytes.labels(link).inc(size)

    def timeline(self, http_id: str) -> list[TimelineEvent]:
        """The stamps of an HTTP request in order; empty when it is unknown or forgotten."""
        with self._lock:
            timeline = self._timelines.get(http_id)
            return list(timeline.events) if timeline else []

    def watch(self, gauges: Callable[[], Gauges]) -> None:
        """Ask ``gauges`` at every scrape."""
        self._registry.register(_GaugeCollector(gauges))

    def collect(self, collector: Collector) -> None:
        """Ask ``collector`` too, at every scrape."""
        self._registry.register(collector)

    def metrics(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _open(self, http_id: str) -> _Timeline:
        while len(self._timelines) >= MAX_REQUESTS:
            self._timelines.popitem(last=False)
        return self._timelines.setdefault(http_id, _Timeline())

    def _measure(
        self, event: str, sequence: _Sequence, span: float | None, detail: dict[str, str | int | float]
    ) -> None:
        if span is not None:
            self._spans[event].observe(span)
        for name, counter in self._counts.get(event, ()):
            value = detail.get(name)
            if isinstance(value, int | float):
                counter.inc(max(value, 0))
        if event in _HANDOVERS:
            self._handovers.labels(_HANDOVERS[event]).inc()
        if event == "kv_complete":
            self._exposed.observe(float(detail.get("exposed_ms", 0)) / 1000)
        if event in _ENDS:
            self._outcomes.labels(event, _label(detail) if event == "finished" else "").inc()
            self._observe_tpot(sequence, detail)

    def _observe_tpot(self, sequence: _Sequence, detail: dict[str, str | int | float]) -> None:
        times, tokens = sequence.times, int(detail.get("output_tokens", 0))
        if "first_token" in times and "finished" in times and tokens > 1:
            self._tpot.observe((times["finished"] - times["first_token"]) / (tokens - 1))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"twostroke_{name}", text, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"twostroke_{name}", text, labels, registry=self._registry)


def _label(detail: dict[str, str | int | float]) -> str:
    """The finish reason, of which there are few: a label must not take free text."""
    reason = detail.get("reason", "")
    return str(reason) if reason in ("", "stop", "length", "abort", "handover") else "other"


class _GaugeCollector(Collector):
    def __init__(self, gauges: Callable[[], Gauges]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        now = self._gauges()
        yield GaugeMetricFamily("twostroke_num_requests_running", "Sequences that compute.", value=now.running)
        yield GaugeMetricFamily("twostroke_num_requests_waiting", "Sequences that wait.", value=now.waiting)
        slots = GaugeMetricFamily("twostroke_slots", "Slots of the KV pool.", labels=["state"])
        if now.slots is not None:
            for state in ("free", "cached", "leased"):
                slots.add_metric([state], getattr(now.slots, state))
        yield slots
        yield GaugeMetricFamily("twostroke_handovers_open", "Hand-overs that are produced.", value=now.handovers)
        yield GaugeMetricFamily("twostroke_tasks", "Tasks of the event loop.", value=now.tasks)


_TIER_GAUGES = {
    "in_service": "Whether the tier may be asked.",
    "capacity": "Bytes that the tier may use.",
    "used": "Bytes that the tier uses.",
    "blocks": "Blocks in the tier.",
    "pinned": "Blocks of these that are never evicted.",
}
_TIER_COUNTS = {
    "hits": "Blocks that the tier gave to requests.",
    "misses": "Blocks of requests that the tier did not have.",
    "written": "Blocks written into the tier.",
    "dropped": "Blocks that were not written.",
    "evictions": "Blocks evicted from the tier.",
    "damaged": "Blocks that did not verify.",
    "faults": "Times that the tier failed.",
    "read_bytes": "Bytes read from the tier.",
    "written_bytes": "Bytes written into the tier.",
    "read_seconds": "Time that reads took.",
    "write_seconds": "Time that writes took.",
}


class StoreCollector(Collector):
    """How the tiers of a store are."""

    def __init__(self, reports: Callable[[], Sequence[TierReport]]) -> None:
        self._reports = reports

    def collect(self) -> Iterator[Metric]:
        reports = self._reports()
        for name, text in _TIER_GAUGES.items():
            gauge = GaugeMetricFamily(f"twostroke_store_{name}", text, labels=["tier"])
            for report in reports:
                gauge.add_metric([report.name], float(getattr(report, name)))
            yield gauge
        for name, text in _TIER_COUNTS.items():
            counter = CounterMetricFamily(f"twostroke_store_{name}", text, labels=["tier"])
            for report in reports:
                counter.add_metric([report.name], float(getattr(report, name)))
            yield counter
