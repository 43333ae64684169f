"""Faults for real: each test kills or stops a process while a request is on its way."""

import asyncio
import os
import signal
import time
from pathlib import Path

import aiohttp

from tests.e2e.conftest import FLOAT32, ROLES, Reference
from tests.e2e.system import System, client, generate, launch, post, restart, stream

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
            status, reply = await post(session, f"{system.url}/v1/completions", {"prompt": "a", "max_tokens": 2})
            assert status == 503, reply
            assert "prefill" in reply["error"]["message"]

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


async def test_decode_worker_is_killed(tmp_path: Path, reference: Reference) -> None:
    """Mid-stream the client gets an explicit error; the prefill worker frees everything; the other one serves on."""
    roles = {**ROLES, "colocated-0": "both"}
    prompt = reference.prompts()[15]
    with launch(tmp_path, roles, engine=FLOAT32) as system:
        async with client() as session:
            body = {"prompt": list(prompt), "max_tokens": 400, "temperature": 0, "ignore_eos": True}
            events = []
            async for event in stream(session, system.url, body):
                events.append(event)
                if len(events) == 3:
                    running = {name: (await system.info(session, name))["running"] for name in roles}
                    victim = next(name for name in ("decode-0", "colocated-0") if running[name])
                    system.workers[victim].kill()
            assert "error" in events[-1]
            rest = [name for name in roles if name != victim]
            await system.idle(session, rest)
            assert await generate(session, system.url, prompt, TOKENS) == reference.generate(prompt, TOKENS)


async def test_colocated_worker_serves_when_no_pair_is_there(tmp_path: Path, reference: Reference) -> None:
    prompt = reference.prompts()[14]
    with launch(tmp_path, {"prefill-0": "prefill", "colocated-0": "both"}, engine=FLOAT32) as system:
        async with client() as session:
            assert await generate(session, system.url, prompt, TOKENS) == reference.generate(prompt, TOKENS)


async def test_layouts_differ(tmp_path: Path, reference: Reference) -> None:
    """Workers with different block sizes never exchange a block; the answer is right all the same."""
    prompt = reference.prompts()[15]
    with launch(tmp_path, ROLES, engine=FLOAT32) as system:
        other = ["serve", "--role", "decode", "--name", "decode-0", "--threads", "1", *FLOAT32, "--block-size", "8"]
        system.workers["decode-0"].stop()
        system.workers["decode-0"] = restart(tmp_path, system.workers["decode-0"], other)
        async with client() as session:
            deadline = time.monotonic() + 60
            while (await session.get(f"{system.url}/ready")).status != 200:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.2)
            status, reply = await post(
                session,
                f"{system.url}/generate",
                {"input_ids": list(prompt), "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS}},
                x_request_id="differ",
            )
            assert status == 200
            assert reply["output_ids"] == reference.generate(prompt, TOKENS)
            async with session.get(f"{system.url}/debug/requests/differ") as timeline:
                events = (await timeline.json())["events"]
        reasons = [event["detail"]["reason"] for event in events if event["event"] == "fallback"]
        assert reasons
        assert "layouts differ" in reasons[0]
