"""Ten thousand schedules keep every promise; a schedule is a function of its seed; and planted bugs are found."""

import logging
import os
import sys
from collections.abc import Iterator
from functools import partial
from multiprocessing.pool import Pool

import pytest

from tests.e2e.system import NURSERY
from tests.simulation import bugs
from tests.simulation.world import simulate

SCHEDULES = 10_000
SEARCHED = 4_000  # schedules in which a planted bug has to be found
_CHUNK = 50


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Processes, which are ended with whatever they still do. Not concurrent.futures': it can hang where each process
    does only so many tasks (https://github.com/python/cpython/issues/115634).
    """
    with NURSERY.Pool(os.cpu_count(), _quiet, maxtasksperchild=40) as pool:
        yield pool


def _quiet() -> None:
    """Nobody reads what simulated processes log, nor how the dead ones are finalized."""
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None


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
def test_every_schedule_keeps_every_promise(pool: Pool) -> None:
    assert [line for lines in pool.imap(_broken, range(0, SCHEDULES, _CHUNK)) for line in lines] == []


def test_schedules_are_not_idle(pool: Pool) -> None:
    """They have answers, errors, clients that leave, and faults; and most clients get their answer."""
    outcomes = list(pool.map(simulate, range(100), chunksize=_CHUNK))
    exact, errors, left = (sum(getattr(o, what) for o in outcomes) for what in ("exact", "errors", "left"))
    assert exact > 200
    assert errors > 20
    assert left > 20
    assert sum(outcome.faults for outcome in outcomes) > 80


def test_a_schedule_is_a_function_of_its_seed(pool: Pool) -> None:
    traced = partial(simulate, verbose=True)
    first, again = ([o.trace for o in pool.map(traced, range(40), chunksize=20)] for _ in range(2))
    assert first == again


@pytest.mark.parametrize("bug", bugs.BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found(pool: Pool, bug: object) -> None:
    name = bug.__name__  # type: ignore[attr-defined]
    assert any(pool.imap_unordered(partial(_finds, name), range(0, SEARCHED, _CHUNK)))
