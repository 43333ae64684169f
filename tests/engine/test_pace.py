"""How fast prefill is."""

import time

import pytest

from twostroke.engine.pace import Pace


def clock(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    """What the clock says, one after the other."""
    given = iter(times)
    monkeypatch.setattr(time, "perf_counter", lambda: next(given))


def test_tokens_over_the_time_of_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 12.0)
    pace = Pace()
    assert pace.rate is None
    pace.launched(10.0)
    pace.committed(100)
    assert pace.rate == 50


def test_steps_under_way_at_once_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second began while the first computed: it is measured from the first one's end."""
    clock(monkeypatch, 12.0, 14.0)
    pace = Pace()
    pace.launched(10.0)
    pace.launched(10.5)
    pace.committed(100)
    pace.committed(100)
    assert pace.rate == 50


def test_steps_that_hardly_prefill_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 11.0)
    pace = Pace()
    pace.launched(10.0)
    pace.committed(8)
    assert pace.rate is None
