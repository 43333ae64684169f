"""Ten thousand schedules keep every promise; a schedule is a function of its seed; and planted bugs are found."""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.e2e.system import NURSERY
from tests.simulation import bugs
from tests.simulation.world import simulate

SCHEDULES = 10_000
SEARCHED = 4_000  # schedules in which a planted bug has to be found
_CHUNK = 50


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(os.cpu_count(), NURSERY, logging.disable, (logging.CRITICAL,)) as executor:
        yield executor


def _broken(first: int) -> list[str]:
    """What went wrong in a chunk of schedules."""
    outcomes = [simulate(seed) for seed in range(first, first + _CHUNK)]
    return [f"python -m tests.simulation --seed {o.seed}: {'; '.join(o.wrong)}" for o in outcomes if o.wrong]


def _finds(bug: str, first: int) -> bool:
    """Whether the schedules of a chunk show the bug."""
    with getattr(bugs, bug)():
        return any(simulate(seed).wrong for seed in range(first, first + _CHUNK))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_schedule_keeps_every_promise(pool: ProcessPoolExecutor) -> None:
    assert [line for lines in pool.map(_broken, range(0, SCHEDULES, _CHUNK)) for line in lines] == []


@pytest.mark.xfail(reason="the router waits for a worker that answers heartbeats, on a connection that is silent")
def test_connections_to_the_router_go_silent() -> None:
    assert [seed for seed in range(300) if simulate(seed, everywhere=True).wrong] == []


def test_schedules_are_not_idle() -> None:
    """They have answers, errors, clients that leave, and faults; and most clients get their answer."""
    outcomes = [simulate(seed) for seed in range(100)]
    exact, errors, left = (sum(getattr(o, what) for o in outcomes) for what in ("exact", "errors", "left"))
    assert exact > 200
    assert errors > 20
    assert left > 20
    assert sum(outcome.faults for outcome in outcomes) > 80


def test_a_schedule_is_a_function_of_its_seed() -> None:
    for seed in range(30):
        assert simulate(seed, verbose=True).trace == simulate(seed, verbose=True).trace


@pytest.mark.parametrize("bug", bugs.BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found(pool: ProcessPoolExecutor, bug: object) -> None:
    name = bug.__name__  # type: ignore[attr-defined]
    chunks = [pool.submit(_finds, name, first) for first in range(0, SEARCHED, _CHUNK)]
    try:
        assert any(chunk.result() for chunk in chunks)
    finally:
        for chunk in chunks:
            chunk.cancel()
