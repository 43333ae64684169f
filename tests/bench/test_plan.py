"""Which runs there are."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostroke.bench import plan
from twostroke.bench.plan import Settings, Workloads
from twostroke.bench.results import Point
from twostroke.bench.workload import Chat, Grid, TraceLine

GRID = Grid(input_lens=(10, 20), num_prompts=3, request_rate=2.0, output_len=4)


def test_points_of_a_grid() -> None:
    settings = Settings(grid=GRID, modes=("pd", "prefill-only"), rates=(1.0, 2.0))
    found = list(plan.points(settings, "s", 1, ["10", "20"]))
    assert len(found) == len({point.name for point in found}) == 8
    assert found[0] == Point("s", "pd", "10", 1.0, 1)
    assert found[0].name == "s.pd.10.rate-1.1"


def test_workloads() -> None:
    random = Workloads(Settings(grid=GRID), 100)
    assert random.names == ["10", "20"]
    assert random.longest("20") == (20, 4)
    assert {item.output_len for item in random.items(Point("s", "prefill-only", "10", 2.0))} == {1}
    slow, fast = (random.items(Point("s", "pd", "10", rate)) for rate in (1.0, 2.0))
    assert [item.prompt for item in slow] == [item.prompt for item in fast]
    assert slow[-1].at == 2 * fast[-1].at == 3.0
    chat = Workloads(Settings(grid=GRID, chat=Chat(2, 3, 10, 5, 7)), 100)
    assert (chat.names, chat.longest("chat")) == (["chat"], (10 + 2 * 12 + 5, 7))
    trace = Workloads(Settings(grid=GRID, trace="t", trace_scale=0.5), 100, [TraceLine(0, 100, 6, [1])])
    assert (trace.names, trace.longest("trace")) == (["trace"], (50, 3))


def knee(good: Callable[[float], bool], first: float) -> dict[float, float]:
    tried: dict[float, float] = {}
    while (rate := plan.next_rate(tried, first)) is not None:
        assert rate not in tried
        tried[rate] = 1.0 if good(rate) else 0.0
    return tried


@given(limit=st.floats(0.05, 500), first=st.floats(0.5, 50))
def test_a_sweep_finds_the_knee(limit: float, first: float) -> None:
    tried = knee(lambda rate: rate <= limit, first)
    assert len(tried) <= 16
    good = [rate for rate, share in tried.items() if share]
    assert max(good) <= limit < 1.1 * max(good)


def test_a_sweep_ends_where_there_is_no_knee() -> None:
    for answer in (True, False):
        assert len(knee(lambda _, answer=answer: answer, 4.0)) <= 12  # type: ignore[misc]


@given(shares=st.dictionaries(st.floats(0.1, 100), st.floats(0, 1), max_size=20))
def test_a_sweep_bears_any_noise(shares: dict[float, float]) -> None:
    rate = plan.next_rate(shares, 4.0)
    assert rate is None or (rate > 0 and math.isfinite(rate))


@pytest.mark.parametrize("share", [0.9, 0.89])
def test_enough_is_ninety_percent(share: float) -> None:
    assert (plan.next_rate({4.0: share}, 4.0) == 8.0) is (share >= 0.9)
