"""Stamps make timelines and metrics."""

from prometheus_client.parser import text_string_to_metric_families

from twostroke.api.lifecycle import MAX_EVENTS, MAX_REQUESTS, Gauges, Lifecycle
from twostroke.messages import Slots


def samples(lifecycle: Lifecycle) -> dict[tuple[str, ...], float]:
    """Values by name and label values, without histogram buckets."""
    families = text_string_to_metric_families(lifecycle.metrics().decode())
    return {
        (sample.name.removeprefix("twostroke_"), *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def whole_life(lifecycle: Lifecycle, request_id: str) -> None:
    lifecycle.stamp(request_id, "received", prompt_tokens=10)
    lifecycle.stamp(request_id, "admitted")
    lifecycle.stamp(request_id, "prefill_started", cached_tokens=4)
    lifecycle.stamp(request_id, "attached")
    lifecycle.stamp(request_id, "first_token")
    lifecycle.stamp(request_id, "kv_complete", bytes=1000, blocks=2, exposed_ms=5.0)
    for _ in range(3):
        lifecycle.tokens(request_id, 1)
    lifecycle.stamp(request_id, "finished", reason="length", output_tokens=3)


def test_timeline_in_order() -> None:
    lifecycle = Lifecycle("decode-0")
    whole_life(lifecycle, "a/0/0")
    events = lifecycle.timeline("a")
    assert [event.event for event in events][:2] == ["received", "admitted"]
    assert events[-1].detail == {"reason": "length", "output_tokens": 3}
    assert {event.worker for event in events} == {"decode-0"}
    assert sorted(event.time for event in events) == [event.time for event in events]
    assert lifecycle.timeline("b") == []


def test_metrics_of_one_request() -> None:
    lifecycle = Lifecycle("decode-0")
    whole_life(lifecycle, "a/0/0")
    values = samples(lifecycle)
    for name in ("time_to_first_token_seconds", "request_queue_time_seconds", "e2e_request_latency_seconds"):
        assert values[(f"{name}_count",)] == 1
    assert values[("request_time_per_output_token_seconds_count",)] == 1
    assert values[("inter_token_latency_seconds_count",)] == 2
    assert values[("prompt_tokens_total",)] == 10
    assert values[("cached_tokens_total",)] == 4
    assert values[("generation_tokens_total",)] == 3
    assert values[("handover_exposed_seconds_sum",)] == 0.005
    assert values[("handovers_total", "complete")] == 1
    assert values[("requests_total", "finished", "length")] == 1


def test_what_came_over_each_link() -> None:
    lifecycle = Lifecycle("decode-0")
    for link, blocks in (("shm", 2), ("shm", 1), ("tcp", 1)):
        lifecycle.received(link, blocks, 500 * blocks)
    values = samples(lifecycle)
    assert values[("handover_bytes_total", "shm")] == 1500
    assert values[("handover_blocks_total", "tcp")] == 1


def test_choices_of_a_call_are_kept_apart() -> None:
    lifecycle = Lifecycle("w")
    whole_life(lifecycle, "a/0/0")
    whole_life(lifecycle, "a/0/1")
    assert samples(lifecycle)[("time_to_first_token_seconds_count",)] == 2
    assert {event.detail.get("sequence") for event in lifecycle.timeline("a")} == {None, "0/1"}


def test_a_repeated_stamp_counts_once() -> None:
    lifecycle = Lifecycle("w")
    for _ in range(3):
        lifecycle.stamp("a", "received", prompt_tokens=5)
    assert samples(lifecycle)[("prompt_tokens_total",)] == 5
    assert len(lifecycle.timeline("a")) == 3


def test_labels_take_no_free_text() -> None:
    lifecycle = Lifecycle("w")
    lifecycle.stamp("a", "finished", reason="something long")
    lifecycle.stamp("b", "failed", reason="whatever")
    values = samples(lifecycle)
    assert values[("requests_total", "finished", "other")] == 1
    assert values[("requests_total", "failed", "")] == 1


def test_the_store_is_bounded() -> None:
    lifecycle = Lifecycle("w")
    for i in range(MAX_REQUESTS + 1):
        lifecycle.stamp(f"r{i}", "received")
    assert lifecycle.timeline("r0") == []
    assert lifecycle.timeline("r1")
    for _ in range(MAX_EVENTS + 1):
        lifecycle.stamp("r1", "published")
    assert len(lifecycle.timeline("r1")) == MAX_EVENTS


def test_gauges_are_asked_at_each_scrape() -> None:
    lifecycle = Lifecycle("w")
    now = Gauges(running=1, waiting=2)
    lifecycle.watch(lambda: now)
    assert samples(lifecycle)[("num_requests_running",)] == 1
    now = Gauges(running=3, waiting=2, slots=Slots(10, 5, 3, 2), handovers=1, tasks=7)
    values = samples(lifecycle)
    assert [values[(name,)] for name in ("num_requests_running", "handovers_open", "tasks")] == [3, 1, 7]
    assert [values[("slots", state)] for state in ("free", "cached", "leased")] == [5, 3, 2]
