"""Rows in which the network between the workers fails."""

import asyncio
from collections.abc import Coroutine
from itertools import count

from tests.faults.fleet import ATTACH
from tests.faults.stage import PROMPT, STREAM_PROMPT, STREAM_TOKENS, Stage, row
from tests.links.faults import Faults, Proxy

_ASKED = b"POST /v1/completions"
_SAID = 1200  # bytes that a prefill worker tells a consumer, about
_SENT = 150_000  # bytes of a prompt's blocks
_PROMPTS = 50  # lengths of prompts that are tried in turn


async def _fails(stage: Stage, network: Proxy, faults: Faults) -> None:
    """The answer is the fault-free one, though the hand-over fails: the first one, or one that reaches that byte. A
    prompt's blocks can come over several connections, each with bytes of its own.
    """
    network.down = faults
    while not await stage.reasons(await stage.exactly(), "fallback"):
        pass
    stage.fleet.heal()
    await stage.freed()


@row("half-open TCP: P's stream of events", "detected ≤ 3 s; fall back", "tcp")
async def events_half_open(stage: Stage) -> None:
    at = stage.random.randrange(_SAID // 2)
    await _fails(stage, stage.fleet.control, Faults(where=ATTACH, stall=at, half_open=True))


@row("half-open TCP: D's answer to the router", "detected ≤ 3 s; continued or asked again elsewhere", "shm")
async def answer_half_open(stage: Stage) -> None:
    """One that is streamed and one that is not, though D answers heartbeats. Nobody tells it to stop but the router."""
    lengths = count()  # prompts are new: known ones would go to the other decode worker, which gets as many requests

    def ask(way: str) -> Coroutine[None, None, str]:
        more = next(lengths) % _PROMPTS
        if way == "streamed":
            return stage.streamed(lambda: asyncio.sleep(0), stage.body(STREAM_PROMPT + more, STREAM_TOKENS))
        return stage.exactly(stage.body(PROMPT + more))

    for way in ("streamed", "whole"):
        stage.fleet.answers.down = Faults(where=_ASKED, stall=stage.random.randrange(420), half_open=True)
        stamps: set[tuple[str, str]] = set()
        while not {event for _, event in stamps} & {"continued", "retried"}:
            asked = [asyncio.create_task(ask(way)) for _ in range(2)]
            stamps = {(e["worker"], e["event"]) for one in asked for e in await stage.timeline(await one)}
        stage.fleet.heal()
        while ("decode-0", "finished") not in stamps:  # a worker that only ever failed would be left alone
            stamps = {(e["worker"], e["event"]) for e in await stage.timeline(await ask("whole"))}
    await stage.freed()


@row("half-open TCP: the link", "detected ≤ 3 s; fall back", "tcp")
async def link_half_open(stage: Stage) -> None:
    await _fails(stage, stage.fleet.link, Faults(stall=stage.random.randrange(_SENT), half_open=True))


@row("P's stream of events is cut at any byte", "detected ≤ 3 s; fall back", "tcp")
async def events_cut(stage: Stage) -> None:
    await _fails(stage, stage.fleet.control, Faults(where=ATTACH, cut=stage.random.randrange(_SAID // 2)))


@row("the link is cut at any byte", "detected ≤ 3 s; fall back", "tcp")
async def link_cut(stage: Stage) -> None:
    await _fails(stage, stage.fleet.link, Faults(cut=stage.random.randrange(_SENT)))


@row("the link is 100 times slower", "detected ≤ 3 s; fall back", "tcp")
async def link_slow(stage: Stage) -> None:
    """So slow for the few bytes of a tiny model that computing them is faster."""
    await _fails(stage, stage.fleet.link, Faults(rate=_SENT / 10))


@row("a flipped bit on the TCP link", "detected, refetched or recomputed", "tcp")
async def bit_flipped(stage: Stage) -> None:
    faults = Faults(flip=(stage.random.randrange(_SENT),), bit=stage.random.randrange(8))
    stage.fleet.link.down = faults
    while faults.flip:  # until that byte passes
        await stage.exactly()
    stage.fleet.heal()
    await stage.freed()
