"""Rows in which there are fewer slots than are asked for."""

import asyncio

from tests.faults.stage import Stage, happened, row

_REQUESTS = 10


async def _crowded(stage: Stage) -> None:
    """Everybody gets the fault-free answer, or is told that there is no room."""
    await asyncio.gather(*(stage.exactly_or_refused(stage.body(200, 40)) for _ in range(_REQUESTS)))
    happened(stage.outcome.exact, "nobody was served")
    await stage.freed()


@row("D out of slots", "queue or 429, never a deadlock", "small D")
async def decode_full(stage: Stage) -> None:
    await _crowded(stage)


@row("P out of slots", "queue or 429, never a deadlock", "small P")
async def prefill_full(stage: Stage) -> None:
    await _crowded(stage)


@row("P and D out of slots, short queues", "queue or 429, never a deadlock", "small")
async def both_full(stage: Stage) -> None:
    await _crowded(stage)
