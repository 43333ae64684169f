"""Tasks that work on a request's behalf."""

import asyncio
from contextlib import suppress


async def end(task: asyncio.Task[None] | None) -> None:
    """Cancel a task and wait until it is over, however often we are cancelled meanwhile: it may still write into slots
    that are released after this.
    """
    if task is None:
        return
    task.cancel()
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task])
