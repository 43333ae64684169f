"""Tasks end before what they write into is given back."""

import asyncio
from contextlib import suppress

from twostroke.worker.tasks import end


async def test_a_task_is_over_before_its_slots_are_released_even_if_we_are_cancelled_twice() -> None:
    writing, allowed = asyncio.Event(), asyncio.Event()

    async def pull() -> None:
        try:
            writing.set()
            await asyncio.sleep(3600)
        finally:
            await allowed.wait()  # a copy that cannot be interrupted

    task = asyncio.create_task(pull())
    await writing.wait()
    ending = asyncio.create_task(end(task))
    for _ in range(3):
        await asyncio.sleep(0)
        ending.cancel()
        await asyncio.sleep(0)
        assert not ending.done()
    allowed.set()
    with suppress(asyncio.CancelledError):
        await ending
    assert task.done()


async def test_nothing_to_end() -> None:
    await end(None)
