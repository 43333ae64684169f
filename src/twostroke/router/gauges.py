"""What the router knows of its workers and of itself, as metrics."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from twostroke.router.registry import Registry
from twostroke.router.relay import Relay

_BREAKER = {"closed": 0, "half-open": 1, "open": 2}


class WorkerGauges(Collector):
    """Read at every scrape from what the router routes by."""

    def __init__(self, registry: Registry, relay: Relay) -> None:
        self._registry = registry
        self._relay = relay

    def collect(self) -> Iterator[Metric]:
        """See ``Collector``."""
        events = CounterMetricFamily("twostroke_router_events", "Requests that went otherwise.", labels=["event"])
        for event, times in self._relay.counts.items():
            events.add_metric([event], times)
        yield events
        about = ["worker", "url", "role"]
        ready = GaugeMetricFamily("twostroke_worker_ready", "Whether it takes requests.", labels=about)
        breaker = GaugeMetricFamily("twostroke_worker_breaker", "0 closed, 1 half-open, 2 open.", labels=about)
        in_flight = GaugeMetricFamily("twostroke_worker_in_flight", "Requests of this router there.", labels=about)
        queued = GaugeMetricFamily("twostroke_worker_queued_tokens", "Prompt tokens to compute, est.", labels=about)
        resident = GaugeMetricFamily("twostroke_worker_resident_tokens", "Tokens whose KV it holds, est.", labels=about)
        for worker in self._registry.workers:
            labels = [worker.id, worker.url, worker.pool]
            ready.add_metric(labels, worker.ready)
            breaker.add_metric(labels, _BREAKER[worker.report().breaker])
            in_flight.add_metric(labels, worker.in_flight)
            queued.add_metric(labels, worker.queued)
            resident.add_metric(labels, worker.resident)
        yield from (ready, breaker, in_flight, queued, resident)
