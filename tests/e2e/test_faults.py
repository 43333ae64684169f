"""Faults for real: each test kills or stops a process while a request is on its way."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.conftest import FLOAT32, ROLES, Reference
from tests.e2e.system import Json, System, client, generate, launch, restart, stream

TOKENS = 10


async def until_prefilling(session: aiohttp.ClientSession, system: System, worker: str = "prefill-0") -> None:
    """Until the worker holds computed blocks of a running prompt."""
    deadline = time.monotonic() + 30
    while True:
        info = await system.info(session, worker)
        if info["running"] and info["slots"]["leased"]:
            return
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_prefill_worker_is_killed(tmp_path: Path, reference: Reference) -> None:
    """The decode worker computes the rest; the client does not notice. A new prefill worker serves the next one."""
    prompt = reference.prompts()[-1][:2500]
    expected = reference.generate(prompt, TOKENS)
    with launch(tmp_path, ROLES, engine=[*FLOAT32, "--chunk-size", "128"]) as system:
        async with client() as session:
            answer = asyncio.create_task(generate(session, system.url, prompt, TOKENS))
            await until_prefilling(session, system)
            await asyncio.sleep(0.5)
            system.workers["prefill-0"].kill()
            assert await answer == expected
            await system.idle(session, ["decode-0"])
            short = reference.prompts()[15]
            assert await generate(session, system.url, short, TOKENS) == reference.generate(short, TOKENS)  # by D alone

            again = ["serve", "--role", "prefill", "--name", "prefill-0", "--threads", "1", *FLOAT32]
            system.workers["prefill-0"] = restart(tmp_path, system.workers["prefill-0"], again)
            deadline = time.monotonic() + 60
            while True:
                async with session.get(f"{system.url}/ready") as ready:
                    if ready.status == 200:
                        break
                assert time.monotonic() < deadline
                await asyncio.sleep(0.2)
            other = reference.prompts()[16]
            assert await generate(session, system.url, other, TOKENS) == reference.generate(other, TOKENS)


async def test_prefill_worker_is_stopped(tmp_path: Path, reference: Reference) -> None:
    """A silent producer is given up; what it says after it wakes is too late and harms nobody."""
    prompt = reference.prompts()[-1][:2000]
    with launch(tmp_path, ROLES, engine=[*FLOAT32, "--chunk-size", "128"]) as system:
        async with client() as session:
            answer = asyncio.create_task(generate(session, system.url, prompt, TOKENS))
            await until_prefilling(session, system)
            os.kill(system.workers["prefill-0"].popen.pid, signal.SIGSTOP)
            assert await answer == reference.generate(prompt, TOKENS)
            await system.idle(session, ["decode-0"])
            os.kill(system.workers["prefill-0"].popen.pid, signal.SIGCONT)
            await system.idle(session, ["prefill-0"], seconds=10)


TWO_DECODE = {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}
SEAM = 40  # tokens of answers that two workers share
LONG = 100  # tokens: seconds of decoding, in which something can happen


async def at_third(
    events: AsyncIterator[Json], act: Callable[[], Awaitable[None]]
) -> tuple[list[Json], float]:  # and the longest gap, in seconds
    """All events of a stream; ``act`` runs when three have come."""
    seen: list[Json] = []
    gap, last = 0.0, time.monotonic()
    async for event in events:
        seen.append(event)
        gap, last = max(gap, time.monotonic() - last), time.monotonic()
        if len(seen) == 3:
            await act()
    return seen, gap


async def victim(session: aiohttp.ClientSession, system: System) -> str:
    """The worker that decodes now."""
    for name in system.workers:
        if not name.startswith("prefill") and (await system.info(session, name))["running"]:
            return name
    raise AssertionError("nobody decodes")


def text_of(events: Sequence[Json], index: int = 0) -> str:
    """What a client reads of one choice."""
    return "".join(c["text"] for event in events for c in event["choices"] if c["index"] == index)


async def continued(session: aiohttp.ClientSession, system: System, id_: str) -> list[str]:
    """Why the router had this request continued."""
    async with session.get(f"{system.url}/debug/requests/{id_}") as reply:
        events = (await reply.json())["events"]
    return [event["detail"]["reason"] for event in events if event["event"] == "continued"]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_decode_worker_is_lost_in_mid_stream(tmp_path: Path, reference: Reference, fault: signal.Signals) -> None:
    """Its answers go on elsewhere, to the same last character: greedy, and seeded with penalties and two choices. A
    worker that wakes up drops what it held, and serves again.
    """
    prompt = reference.prompts()[15]
    greedy: Json = {"temperature": 0}
    seeded: Json = {"temperature": 0.8, "seed": 7, "n": 2, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
    with launch(tmp_path, TWO_DECODE, engine=FLOAT32) as system:
        async with client() as session:
            for number, knobs in enumerate((greedy, seeded)):
                body = {"prompt": list(prompt), "max_tokens": SEAM, "ignore_eos": True, **knobs}
                body["stream_options"], choices = {"include_usage": True}, range(body.get("n", 1))
                whole = [event async for event in stream(session, system.url, body)]
                lost = ""

                async def strike() -> None:
                    nonlocal lost
                    lost = await victim(session, system)
                    os.kill(system.workers[lost].popen.pid, fault)

                id_ = f"continued-{number}"
                events, gap = await at_third(stream(session, system.url, body, x_request_id=id_), strike)
                for index in choices:
                    assert text_of(events, index) == text_of(whole, index)
                assert {(e["id"], e["created"]) for e in events} == {(f"cmpl-{id_}", events[0]["created"])}
                assert sum(event["usage"] is not None for event in events) == 1
                counts, others = events[-1]["usage"], whole[-1]["usage"]
                assert counts["completion_tokens"] == others["completion_tokens"] == SEAM * len(choices)
                finished = [c["index"] for event in events for c in event["choices"] if c["finish_reason"]]
                assert sorted(finished) == list(choices)
                assert gap < 10
                assert len(await continued(session, system, id_)) == 1
                await system.idle(session, [name for name in TWO_DECODE if name != lost])
                if fault == signal.SIGKILL:
                    again = ["serve", "--role", "decode", "--name", lost, "--threads", "1", *FLOAT32]
                    system.workers[lost] = restart(tmp_path, system.workers[lost], again)
                else:
                    os.kill(system.workers[lost].popen.pid, signal.SIGCONT)
                    await system.idle(session, [lost])
                await until_ready(session, system)


async def test_the_last_decode_worker_is_killed(tmp_path: Path, reference: Reference) -> None:
    """The prefill worker is as good as any: it continues the answer, and serves new requests."""
    prompt = reference.prompts()[15]
    body = {"prompt": list(prompt), "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    with launch(tmp_path, ROLES, engine=FLOAT32) as system:
        async with client() as session:

            async def strike() -> None:
                system.workers["decode-0"].kill()

            events, _ = await at_third(stream(session, system.url, body), strike)
            assert text_of(events) == reference.decode([*prompt, *reference.generate(prompt, 60)]).removeprefix(
                reference.decode(prompt)
            )
            await system.idle(session, ["prefill-0"])
            assert await generate(session, system.url, prompt, TOKENS) == reference.generate(prompt, TOKENS)


async def test_on_loss_error(tmp_path: Path, reference: Reference) -> None:
    """The client gets an explicit error, also from a worker that is only silent; everybody else frees everything."""
    prompt = reference.prompts()[15]
    body = {"prompt": list(prompt), "max_tokens": LONG, "temperature": 0, "ignore_eos": True}
    with launch(tmp_path, TWO_DECODE, engine=FLOAT32, router=["--on-loss", "error"]) as system:
        async with client() as session:
            lost = []
            for fault in (signal.SIGSTOP, signal.SIGKILL):

                async def strike(fault: signal.Signals = fault) -> None:
                    lost.append(await victim(session, system))
                    os.kill(system.workers[lost[-1]].popen.pid, fault)

                events, _ = await at_third(stream(session, system.url, body), strike)
                assert events[-1]["error"]["code"] == "worker_lost"
                if fault == signal.SIGSTOP:
                    os.kill(system.workers[lost[-1]].popen.pid, signal.SIGCONT)
                    await system.idle(session)
                    await until_ready(session, system)
            await system.idle(session, [name for name in TWO_DECODE if name != lost[-1]])
            assert await generate(session, system.url, prompt, TOKENS) == reference.generate(prompt, TOKENS)


async def until_ready(session: aiohttp.ClientSession, system: System) -> None:
    """Until the router sees every worker ready."""
    deadline = time.monotonic() + 60
    while True:
        async with session.get(f"{system.url}/workers") as reply:
            if all(worker["state"] == "ready" for worker in await reply.json()):
                return
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


async def test_colocated_worker_serves_when_no_pair_is_there(tmp_path: Path, reference: Reference) -> None:
    prompt = reference.prompts()[14]
    with launch(tmp_path, {"prefill-0": "prefill", "colocated-0": "both"}, engine=FLOAT32) as system:
        async with client() as session:
            assert await generate(session, system.url, prompt, TOKENS) == reference.generate(prompt, TOKENS)


async def test_layouts_differ(tmp_path: Path, reference: Reference) -> None:
    """Workers with different block sizes never exchange a block: the second one is refused, and both are named."""
    prompt = reference.prompts()[15]
    with launch(tmp_path, ROLES, engine=FLOAT32) as system:
        other = ["serve", "--role", "decode", "--name", "decode-0", "--threads", "1", *FLOAT32, "--block-size", "8"]
        system.workers["decode-0"].stop()
        system.workers["decode-0"] = restart(tmp_path, system.workers["decode-0"], other)
        async with client() as session:
            deadline = time.monotonic() + 60
            while True:
                async with session.get(f"{system.url}/workers") as listed:
                    refused = [worker for worker in await listed.json() if worker["state"] == "refused"]
                if refused:
                    break
                assert time.monotonic() < deadline
                await asyncio.sleep(0.2)
            assert "worker decode-0" in refused[0]["detail"]
            assert "has block size 8, worker prefill-0" in refused[0]["detail"]
            assert await generate(session, system.url, prompt, TOKENS) == reference.generate(prompt, TOKENS)
