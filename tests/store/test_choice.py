"""Load or recompute."""

from hypothesis import given
from hypothesis import strategies as st

from twostroke.store.choice import OLD_SECONDS, Average, choose


def test_loading_that_is_quicker_is_done_and_slower_is_not() -> None:
    assert choose([0.1, 0.1], 1.0).blocks == 2
    assert choose([2.0, 2.0], 1.0).blocks == 0
    assert choose([], 1.0).blocks == 0


def test_only_the_first_blocks_if_that_is_best() -> None:
    """Half in memory, half in a slow tier; or a slow block that quick ones behind it make up for."""
    assert choose([0.1, 0.1, 5.0, 5.0], 1.0).blocks == 2
    assert choose([5.0, 0.1, 0.1, 0.1, 0.1, 0.1], 1.0).blocks == 6
    assert choose([0.5, 5.0, 0.1, 3.0], 1.0).blocks == 1


def test_what_nobody_knows_is_tried() -> None:
    assert choose([None, None], 1.0).blocks == 2
    assert choose([0.1], None) == (1, "prefill is not measured yet")
    assert "unmeasured" in choose([None], 1.0).why


@given(st.lists(st.floats(0, 10), max_size=12), st.floats(0.01, 5))
def test_never_slower_than_any_other_choice(loads: list[float], compute: float) -> None:
    def seconds(count: int) -> float:
        return sum(loads[:count]) + compute * (len(loads) - count)

    best = choose(loads, compute).blocks
    assert seconds(best) <= min(seconds(count) for count in range(len(loads) + 1)) + 1e-6


def test_recent_measurements_weigh_most_and_the_very_first_nothing() -> None:
    average = Average()
    rates = []
    for now, amount in enumerate([100, 10, *[2] * 30]):
        average.measured(amount, 1, now)
        rates.append(average.rate)
    assert rates[:2] == [None, 10], "at first it makes connections, or maps memory"
    assert 2 <= (rates[-1] or 0) < 2.1


def test_an_old_measurement_weighs_nothing() -> None:
    average = Average()
    assert average.old(now=0)
    average.measured(1, 1, now=0)
    average.measured(1, 50, now=50)  # a stall
    assert not average.old(now=50 + OLD_SECONDS)
    now = 50.1 + OLD_SECONDS
    assert average.old(now)
    average.measured(10, 1, now)
    assert average.rate == 10
    average.measured(1, 50, now)
    assert average.rate > 5, "one stall among others"
