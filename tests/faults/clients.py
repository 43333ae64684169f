"""Rows in which clients leave."""

import asyncio
from contextlib import suppress
from uuid import uuid4

import aiohttp

from tests.faults.fleet import Json, events
from tests.faults.stage import STREAM_PROMPT, Stage, happened, row

_LONG_PROMPT, _LONG_ANSWER = 3000, 3000


@row("client leaves before the first token", "both sides stop within 1 s", "shm")
async def leaves_early(stage: Stage) -> None:
    answered = True
    while answered:  # whoever is that fast
        leaving = asyncio.create_task(_first(stage, stage.body(_LONG_PROMPT, 10)))
        while not any(
            [(await stage.fleet.system.info(stage.session, name))["running"] for name in stage.fleet.workers]
        ):
            pass
        answered = leaving.done()
        leaving.cancel()
        with suppress(asyncio.CancelledError):
            await leaving
    await stage.freed()


@row("client leaves in mid-stream", "both sides stop within 1 s", "shm")
async def leaves_in_mid_stream(stage: Stage) -> None:
    await _first(stage, stage.body(STREAM_PROMPT, _LONG_ANSWER), events_=stage.random.randrange(1, 20))
    await stage.freed()


async def _first(stage: Stage, body: Json, events_: int = 1) -> None:
    """Leave after the first events."""
    async with aiohttp.ClientSession() as leaving:
        async for event in events(leaving, stage.fleet.url, body, uuid4().hex):
            assert "error" not in event, event
            events_ -= 1
            if not events_:
                return


@row("200 clients abort at once", "all freed within 1 s", "crowd")
async def crowd_leaves(stage: Stage) -> None:
    seen = 0

    async def ask(leaving: aiohttp.ClientSession) -> None:
        nonlocal seen
        async for event in events(leaving, stage.fleet.url, stage.body(STREAM_PROMPT, _LONG_ANSWER), uuid4().hex):
            assert "error" not in event, event
            seen += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as leaving:
        clients = [asyncio.create_task(ask(leaving)) for _ in range(200)]
        while seen < 300:
            happened(not any(client.done() for client in clients), "a client's stream ended")
            await asyncio.sleep(0.01)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    await stage.freed()
