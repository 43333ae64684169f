"""What results mean, against timelines written by hand."""

import pytest

from tests.bench.made import colocated_stamps, pd_stamps, record, result, watched
from twostroke.bench import analysis
from twostroke.bench.analysis import PHASES
from twostroke.bench.results import Stamp


def test_the_way_of_a_request_of_one_worker() -> None:
    one = record("r", 0.0, ttft=0.36, tokens=5, gap=0.06)
    way = analysis.way(one, colocated_stamps())
    assert way is not None
    assert list(way.phases) == list(PHASES)
    assert list(way.phases.values()) == pytest.approx([0.01, 0.09, 0, 0.25, 0.01, 0, 0.24])
    assert sum(way.phases.values()) == pytest.approx(one.e2el)
    assert way.hidden == 0


def test_the_way_of_a_request_that_is_handed_over() -> None:
    one = record("r", 0.0, ttft=0.32, tokens=5, gap=0.07)
    way = analysis.way(one, pd_stamps())
    assert way is not None
    assert list(way.phases.values()) == pytest.approx([0.02, 0.05, 0.03, 0.2, 0.02, 0.02, 0.26])
    assert sum(way.phases.values()) == pytest.approx(one.e2el)
    assert way.hidden == pytest.approx(0.13)


def test_what_decode_loads_while_prefill_computes_takes_no_time() -> None:
    """As where the two meet in a store."""
    one, stamps = record("r", 0.0, ttft=0.32, tokens=5, gap=0.07), pd_stamps()
    loading: Stamp = ("d", "store", 0.05, {"load_ms": 250.0, "bytes": 1 << 20, "tiers": "service"})
    assert analysis.way(one, [stamps[0], loading, *stamps[1:]]) == analysis.way(one, stamps)


def test_without_a_timeline_there_is_no_way() -> None:
    assert analysis.way(record("r", 0.0), []) is None
    assert "not known" in analysis.verdict(result())
    assert analysis.typical(result()) == {}


def test_busy_is_the_union_of_what_ran_at_once() -> None:
    """Prefills of 250 ms that begin every 500 ms, of a run of 2 s."""
    assert analysis.busy(result(stamps=colocated_stamps()), "prefill_started", "prefill_ended") == {
        "w": pytest.approx(0.5)
    }
    stamps: list[Stamp] = [("w", "a", 0.0, {}), ("w", "b", 0.7, {})]
    crowded = result(stamps=stamps)  # 0 - 0.7, 0.5 - 1.2, 1 - 1.7, 1.5 - 2.2
    assert analysis.busy(crowded, "a", "b") == {"w": pytest.approx(1.1)}


def test_a_producer_is_not_busy_decoding() -> None:
    assert set(analysis.busy(result("pd", stamps=pd_stamps()), "first_token", "finished")) == {"d"}


def test_what_limits_a_scheme_is_said() -> None:
    idle = analysis.verdict(result(stamps=colocated_stamps()))
    assert "prefill takes" in idle
    assert "it could take more" in idle
    crowded = analysis.verdict(result("pd", stamps=pd_stamps(), duration=0.9))
    assert "prefill computes p 89 % of the time: add prefill workers" in crowded
    assert "the hand-over keeps a request waiting for 20.0 ms after prefill" in crowded
    same = analysis.verdict(result(stamps=colocated_stamps(), duration=1.0))
    assert "prefill computes w 100 % of the time: add workers" in same
    lost: list[Stamp] = [*pd_stamps(), ("d", "fallback", 0.2, {"reason": "gone"})]
    assert "4 hand-overs failed" in analysis.verdict(result("pd", stamps=lost))


def test_repeats_are_put_together() -> None:
    runs = [result(repeat=i, ttft=t) for i, t in enumerate((0.4, 0.6, 0.5))]
    died = result(repeat=3)
    died.error = "killed"
    (group,) = analysis.groups([*runs, died])
    assert len(group.runs) == 3
    assert group.values("ttft") == pytest.approx([415, 615, 515])
    assert group.median("ttft") == pytest.approx(515)
    interval = group.interval("ttft")
    assert interval is not None
    low, high = interval
    assert 400 <= low < 515 < high <= 630
    assert group.interval("ttft") == interval, "the same each time"
    assert group.median("attained") == pytest.approx(0.25)  # 4 of 4, 0 of 4, 1 of 4 within 500 ms


def test_failed_requests_are_counted_only() -> None:
    (group,) = analysis.groups([result(errors={0: "lost", 3: "lost"})])
    assert (group.failed, len(group.records)) == (2, 2)
    assert group.interval("ttft") is None


def test_whole_requests_come_first_then_the_shorter() -> None:
    runs = [result(mode="decode-only"), result(workload="1000"), result(workload="200"), result(rate=2.0)]
    keys = [(g.key.mode, g.key.workload, g.key.rate) for g in analysis.groups(runs)]
    assert keys == [("pd", "100", 2), ("pd", "200", 4), ("pd", "1000", 4), ("decode-only", "100", 4)]


def test_concurrency_over_time() -> None:
    times, waiting, running = analysis.concurrency(result(tokens=3))
    assert times[-1] == pytest.approx(1.5 + 0.43 + 0.1)
    assert (waiting[-1], running[-1]) == (0, 0)
    assert (max(waiting), max(running)) == (1, 1)


def test_rates_are_of_what_the_counters_grew_by() -> None:
    run = result("pd")
    run.watched = watched()
    times, moved = analysis.traffic(run)
    assert times == [0, 1, 3]
    assert moved == {"link shm": [0, 20, 0], "tier host, written": [100, 110, 0]}
    assert analysis.traffic(result()) == ([], {})


def test_states_are_of_who_answered() -> None:
    run = result("pd")
    run.watched = watched()
    assert analysis.states(run) == [
        ("p", "running", [0, 1, 3], [1, 2, 0]), ("p", "waiting", [0, 1, 3], [0, 0, 0]), ("d", "running", [1, 3], [0, 1])
    ]  # fmt: skip
