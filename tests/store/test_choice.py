"""Load or recompute."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostroke.store.choice import OLD_SECONDS, Average, Run, Speed, choose


def runs(*loads: float | None) -> list[Run]:
    """One block each."""
    return [Run(1, load) for load in loads]


def test_loading_that_is_quicker_is_done_and_slower_is_not() -> None:
    assert choose([Run(2, 0.1)], 1.0).blocks == 2
    assert choose([Run(2, 2.0)], 1.0).blocks == 0
    assert choose([], 1.0).blocks == 0


def test_only_the_first_blocks_if_that_is_best() -> None:
    """Half in memory, half in a slow tier; or a slow block that quick ones behind it make up for."""
    assert choose([Run(2, 0.1), Run(2, 5.0)], 1.0).blocks == 2
    assert choose([Run(1, 5.0), Run(5, 0.1)], 1.0).blocks == 6
    assert choose(runs(0.5, 5.0, 0.1, 3.0), 1.0).blocks == 1


def test_what_nobody_knows_is_tried() -> None:
    assert choose([Run(2, None)], 1.0).blocks == 2
    assert choose(runs(0.1), None) == (1, "prefill is not measured yet")
    assert "unmeasured" in choose(runs(None), 1.0).why
    assert "takes 200 ms" in choose([Run(3, 0.1), Run(1, 0.5), Run(7, None)], 1.0).why


@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0, 10)), max_size=8), st.floats(0.01, 5))
def test_never_slower_than_any_other_choice(given: list[tuple[int, float]], compute: float) -> None:
    loads = [seconds for blocks, seconds in given for _ in range(blocks)]

    def seconds(count: int) -> float:
        return sum(loads[:count]) + compute * (len(loads) - count)

    best = choose([Run(*run) for run in given], compute).blocks
    assert seconds(best) <= min(seconds(count) for count in range(len(loads) + 1)) + 1e-6


def test_recent_measurements_weigh_most() -> None:
    average = Average()
    rates = []
    for now, amount in enumerate([10, *[2] * 30]):
        average.measured(amount, 1, now)
        rates.append(average.rate)
    assert rates[0] == 10
    assert 2 <= rates[-1] < 2.1


def test_an_old_measurement_weighs_nothing() -> None:
    average = Average()
    assert average.old(now=0)
    average.measured(1, 50, now=50)  # a stall
    assert not average.old(now=50 + OLD_SECONDS)
    now = 50.1 + OLD_SECONDS
    assert average.old(now)
    average.measured(10, 1, now)
    assert average.rate == 10
    average.measured(1, 50, now)
    assert average.rate > 5, "one stall among others"


def test_the_very_first_call_is_not_measured() -> None:
    """It makes connections, or maps memory."""
    speed = Speed()
    assert speed.rate(0) is None
    speed.measured(10, 1, now=0)
    assert speed.rate(0) is None
    assert speed.seconds(10, 0) is None
    speed.measured(10, 1, now=0)
    assert speed.rate(0) == 10
    assert speed.seconds(10, 0) == 1


def test_a_call_for_few_does_not_say_how_fast_one_for_many_is() -> None:
    """Each takes 10 ms beside its blocks, 10,000 of which come in a second."""

    def took(blocks: int) -> float:
        return 0.01 + blocks / 10_000

    speed = Speed()
    for _ in range(2):
        speed.measured(4, took(4), now=0)
    assert (speed.seconds(64, 0) or 1) < took(64), "it is worth a try"
    speed.measured(64, took(64), now=0)
    for blocks in (4, 64, 100):
        assert speed.seconds(blocks, 0) == pytest.approx(took(blocks), rel=0.4)
    assert (speed.seconds(1000, 0) or 1) <= took(1000)
    assert (speed.seconds(1, 0) or 1) <= took(1)
    assert speed.rate(0) == pytest.approx(64 / took(64))


def test_what_few_blocks_already_take_is_what_many_take_at_least() -> None:
    speed = Speed()
    for _ in range(2):
        speed.measured(4, 2.0, now=0)
    assert speed.seconds(64, 0) == 2.0


def test_sizes_that_were_not_called_for_long_are_no_measure() -> None:
    speed = Speed()
    for _ in range(2):
        speed.measured(64, 10.0, now=0)
    now = 1 + OLD_SECONDS
    assert speed.old(64, now)
    assert speed.seconds(64, now) == 10.0, "nothing better is known"
    speed.measured(8, 0.1, now)
    assert speed.old(64, now)
    assert not speed.old(8, now)
    assert speed.seconds(64, now) == pytest.approx(0.1)
