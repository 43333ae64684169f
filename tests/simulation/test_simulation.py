"""Ten thousand schedules keep every promise; a schedule is a function of its seed; and planted bugs are found."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import TypeVar

import pytest

from tests.e2e.system import NURSERY
from tests.simulation import bugs
from tests.simulation.world import simulate

SCHEDULES = 10_000
PARTS = 5  # of them, which may run beside other tests
SEARCHED = 4_000  # schedules in which a planted bug has to be found
_CHUNK = 50
T = TypeVar("T")


def _spread(work: Callable[[int], T], seeds: Sequence[int]) -> Iterator[T]:
    """What each seed comes to, in processes that end with the test. multiprocessing's pool would do: but its locks are
    files in ``/dev/shm``, where tests beside this one see them.
    """
    beside = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    count = max(1, (os.cpu_count() or 1) // beside)
    shares: list[tuple[ForkServerProcess, Connection]] = []
    try:
        for share in range(count):
            receiver, sender = NURSERY.Pipe(duplex=False)
            process = NURSERY.Process(target=_play, args=(work, seeds[share::count], sender), daemon=True)
            process.start()
            sender.close()
            shares.append((process, receiver))
        for turn in range(len(seeds)):
            yield shares[turn % count][1].recv()
    finally:
        for process, receiver in shares:
            process.kill()
            process.join()
            receiver.close()


def _play(work: Callable[[int], T], seeds: Sequence[int], sender: Connection) -> None:
    """Nobody reads what simulated processes log, nor how the dead ones are finalized."""
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    for seed in seeds:
        sender.send(work(seed))
    sender.close()


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
@pytest.mark.parametrize("part", range(PARTS), ids="{}:".format)  # each a group
def test_every_schedule_keeps_every_promise(part: int) -> None:
    share = SCHEDULES // PARTS
    chunks = range(part * share, (part + 1) * share, _CHUNK)
    assert [line for lines in _spread(_broken, chunks) for line in lines] == []


def test_schedules_are_not_idle() -> None:
    """They have answers, errors, clients that leave, and faults; and most clients get their answer."""
    outcomes = list(_spread(simulate, range(100)))
    exact, errors, left = (sum(getattr(o, what) for o in outcomes) for what in ("exact", "errors", "left"))
    assert exact > 200
    assert errors > 20
    assert left > 20
    assert sum(outcome.faults for outcome in outcomes) > 80


def test_a_schedule_is_a_function_of_its_seed() -> None:
    traced = partial(simulate, verbose=True)
    first, again = ([o.trace for o in _spread(traced, range(40))] for _ in range(2))
    assert first == again


@pytest.mark.parametrize("name", [bug.__name__ for bug in bugs.BUGS], ids="{}:".format)
def test_a_planted_bug_is_found(name: str) -> None:
    assert any(_spread(partial(_finds, name), range(0, SEARCHED, _CHUNK)))
