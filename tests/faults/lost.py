"""Rows in which a process is lost: killed, stopped, or replaced."""

import asyncio
import signal
import time

import aiohttp

from tests.faults.fleet import ATTACH, DECODE, PREFILL
from tests.faults.stage import STREAM_PROMPT, Stage, happened, row
from tests.links.faults import Faults


async def _struck(stage: Stage, number: signal.Signals) -> str:
    """The prefill worker gets a signal at some byte of what it tells a consumer; the answer is the fault-free one."""
    prefill, struck, id_ = stage.fleet.workers[PREFILL], [], ""

    def strike() -> None:
        prefill.signal(number)
        struck.append(True)

    while not struck:  # where a fast prefill is told in few words, the byte may not be reached
        stage.fleet.control.down = Faults(where=ATTACH, strike=(stage.random.randrange(200, 1200), strike))
        id_ = await stage.exactly()
    stage.fleet.heal()
    return id_


@row("kill -9 P while blocks travel (shared memory)", "no client error; ≤ 3 s added", "shm")
async def prefill_killed(stage: Stage) -> None:
    await _struck(stage, signal.SIGKILL)
    await stage.freed(DECODE)
    await stage.exactly_or_refused(stage.body())  # whether the router knows already or not
    await stage.fleet.replace(stage.session, PREFILL)


@row("kill -9 P while blocks travel (TCP)", "no client error; ≤ 3 s added", "tcp")
async def prefill_killed_over_tcp(stage: Stage) -> None:
    prefill, at = stage.fleet.workers[PREFILL], stage.random.randrange(120_000)
    stage.fleet.link.down = Faults(strike=(at, lambda: prefill.signal(signal.SIGKILL)))
    await stage.exactly()
    happened(stage.fleet.link.down.strike is None, f"byte {at} of the link was not reached")
    stage.fleet.heal()
    await stage.freed(DECODE)
    await stage.fleet.replace(stage.session, PREFILL)


@row("P replaced behind the same address", "next request works", "shm")
async def prefill_replaced(stage: Stage) -> None:
    """The first request after the router says that it is ready again, and those after it."""
    await stage.fleet.replace(stage.session, PREFILL)
    await stage.exactly()
    id_ = await stage.exactly()
    assert "kv_complete" in {event["event"] for event in await stage.timeline(id_)}, "D reads the new one's pool"


@row("SIGSTOP P, then SIGCONT", "as kill -9; the woken process is refused as stale and rejoins", "shm")
async def prefill_stopped(stage: Stage) -> None:
    id_ = await _struck(stage, signal.SIGSTOP)
    await stage.freed(DECODE)
    stage.fleet.workers[PREFILL].signal(signal.SIGCONT)
    assert await stage.reasons(id_, "fallback")
    await stage.freed()
    await stage.fleet.whole(stage.session)


async def _decode_lost(stage: Stage, number: signal.Signals) -> None:
    lost = ""

    async def strike() -> None:
        nonlocal lost
        lost = await stage.decoding()
        stage.fleet.workers[lost].signal(number)

    id_ = await stage.streamed(strike)
    await stage.freed([name for name in stage.fleet.workers if name != lost])
    if number == signal.SIGKILL:
        await stage.fleet.replace(stage.session, lost)
    else:
        stage.fleet.workers[lost].signal(signal.SIGCONT)
        await stage.freed()
        await stage.fleet.whole(stage.session)
    happened(len(await stage.reasons(id_, "continued")) == 1, "the stream was not continued elsewhere")


@row("kill -9 D in mid-stream, another D alive", "stream continues, no gap or repeat", "shm")
async def decode_killed(stage: Stage) -> None:
    await _decode_lost(stage, signal.SIGKILL)


@row("SIGSTOP D in mid-stream, then SIGCONT", "as kill -9; the woken process is refused as stale and rejoins", "shm")
async def decode_stopped(stage: Stage) -> None:
    await _decode_lost(stage, signal.SIGSTOP)


@row("kill -9 the router", "workers free everything within 10 s; a new one is ready in ≤ 2 s", "shm")
async def router_killed(stage: Stage) -> None:
    """Its clients see their connections break; the time added is until the new one is ready."""
    router = stage.fleet.system.router
    seen = 0

    async def ask(number: int) -> None:
        nonlocal seen
        body = stage.body(STREAM_PROMPT, 3000, stream=True)
        async with stage.session.post(f"{stage.fleet.url}/v1/completions", json=body) as reply:
            async for line in reply.content:
                seen += line.startswith(b"data: ")
        raise AssertionError("the stream ended as if it were whole")

    asked = [asyncio.create_task(ask(number)) for number in range(4)]
    while seen < 8:  # noqa: ASYNC110 - the clients' count
        await asyncio.sleep(0.005)
    router.kill()
    for broken in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(broken, aiohttp.ClientError), repr(broken)
        stage.outcome.errors += 1
    await stage.freed()
    start = time.monotonic()
    stage.fleet.system.router = router.again()
    await stage.fleet.whole(stage.session)
    stage.outcome.added.append(time.monotonic() - start)
    async with stage.session.get(f"{stage.fleet.url}/workers") as reply:
        assert {worker["state"] for worker in await reply.json()} == {"ready"}
