"""The circuit breaker, with the time in the test's hands."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostroke.router.breaker import FAILURES, FIRST_SECONDS, MOST_SECONDS, Breaker

steps = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.floats(0, 40)),
        st.tuples(st.just("send"), st.just(0.0)),
        st.tuples(st.sampled_from(["succeed", "fail", "drop"]), st.floats(0, 1)),
    ),
    max_size=60,
)


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(FAILURES):
        breaker.failed(now, trying=breaker.taken(now))
    return breaker


def test_failures_in_a_row_open_it() -> None:
    breaker = Breaker()
    for _ in range(FAILURES - 1):
        breaker.failed(0)
    breaker.succeeded()
    for _ in range(FAILURES - 1):
        breaker.failed(0)
        assert breaker.state(0) == "closed"
        assert breaker.allows(0)
    breaker.failed(0)
    assert breaker.state(0) == "open"
    assert not breaker.allows(0)


def test_one_request_tries_when_its_time_is_over_and_closes_it() -> None:
    breaker = opened()
    assert not breaker.allows(FIRST_SECONDS - 0.01)
    assert breaker.state(FIRST_SECONDS) == "half-open"
    assert breaker.allows(FIRST_SECONDS)
    assert breaker.taken(FIRST_SECONDS)
    assert not breaker.allows(FIRST_SECONDS)  # one is enough
    assert not breaker.taken(FIRST_SECONDS)
    breaker.succeeded(trying=True)
    assert breaker.state(FIRST_SECONDS) == "closed"
    assert breaker.failures == 0


def test_a_try_that_fails_opens_it_for_longer() -> None:
    breaker, now, seconds = opened(), 0.0, FIRST_SECONDS
    for _ in range(8):
        now += seconds
        assert breaker.taken(now)
        breaker.failed(now, trying=True)
        seconds = min(2 * seconds, MOST_SECONDS)
        assert breaker.state(now + seconds - 0.01) == "open"
        assert breaker.state(now + seconds) == "half-open"
    assert seconds == MOST_SECONDS


def test_a_try_without_a_verdict_lets_the_next_one_try() -> None:
    breaker = opened()
    assert breaker.taken(FIRST_SECONDS)
    breaker.dropped(trying=True)
    assert breaker.allows(FIRST_SECONDS)


@pytest.mark.parametrize("verdict", ["succeeded", "failed"])
def test_requests_from_before_it_opened_change_nothing(verdict: str) -> None:
    breaker = Breaker()
    early = breaker.taken(0)
    for _ in range(FAILURES):
        breaker.failed(0)
    if verdict == "succeeded":
        breaker.succeeded(trying=early)
    else:
        breaker.failed(0.5, trying=early)
    assert breaker.state(FIRST_SECONDS - 0.01) == "open"
    assert breaker.state(FIRST_SECONDS) == "half-open"


@given(steps)
def test_whatever_happens_at_most_one_tries_and_it_never_stays_shut(sequence: list[tuple[str, float]]) -> None:
    breaker, now, out = Breaker(), 0.0, list[bool]()
    for what, number in sequence:
        if what == "wait":
            now += number
        elif what == "send":
            if breaker.allows(now):
                out.append(breaker.taken(now))
        elif out:
            trying = out.pop(int(number * (len(out) - 1)))
            if what == "succeed":
                breaker.succeeded(trying=trying)
            elif what == "fail":
                breaker.failed(now, trying=trying)
            else:
                breaker.dropped(trying=trying)
        assert sum(out) <= 1
    for trying in out:
        breaker.dropped(trying=trying)
    assert breaker.allows(now + MOST_SECONDS)
