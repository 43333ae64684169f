"""A tier's threads."""

import threading

import pytest

from twostroke.store.threads import Threads


async def test_runs_cover_every_number_once_and_keep_their_order() -> None:
    threads = Threads(3, "test")
    for count in (0, 1, 2, 7, 8, 9, 100):
        seen: list[range] = []

        def work(run: range, seen: list[range] = seen) -> list[int]:
            seen.append(run)
            return [10 * index for index in run]

        assert await threads.runs(work, count, 4) == [10 * index for index in range(count)]
        assert all(len(run) <= 4 for run in seen)
        assert sorted(index for run in seen for index in run) == list(range(count))
    threads.close()


async def test_a_run_that_fails_ends_the_others_that_have_not_begun() -> None:
    threads, begun = Threads(1, "test"), []

    def work(run: range) -> list[int]:
        begun.append(run)
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        await threads.runs(work, 100, 5)
    assert begun == [range(5)]
    threads.close()


async def test_all_threads_are_asked_once_each() -> None:
    threads, asked = Threads(3, "test"), []
    for turn in range(1, 4):
        await threads.all(lambda: asked.append(threading.current_thread().name))
        assert sorted(asked) == sorted([f"test-{nth}" for nth in (1, 2, 3)] * turn)
    threads.close()
