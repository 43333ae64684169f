"""What the matrix has no row for: all that an answer consists of is continued, by whoever is left."""

import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from uuid import uuid4

import aiohttp
import pytest

from tests.e2e.system import client, post
from tests.faults.fleet import DECODE, PAIR, PREFILL, ROLES, Fleet, Fleets, Json, events, fleet
from tests.faults.stage import STREAM_PROMPT, STREAM_TOKENS, Stage, warm


async def at_third(stream: AsyncIterator[Json], act: Callable[[], Awaitable[None]]) -> list[Json]:
    """All events of a stream; ``act`` runs when three have come."""
    seen = []
    async for event in stream:
        seen.append(event)
        if len(seen) == 3:
            await act()
    return seen


def text_of(events: Sequence[Json], index: int = 0) -> str:
    """What a client reads of one choice."""
    return "".join(c["text"] for event in events for c in event["choices"] if c["index"] == index)


def staged(running: Fleet, fleets: Fleets, session: aiohttp.ClientSession) -> Stage:
    return Stage(running, fleets.model, session, 0)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_sampled_choices_are_continued(fleets: Fleets, fault: signal.Signals) -> None:
    """Seeded, with penalties, two choices and usage: to the same last character, as one answer."""
    running = fleets.get("shm")
    async with client() as session:
        await warm("shm", running, fleets.model, session)
        stage = staged(running, fleets, session)
        body = stage.body(STREAM_PROMPT, STREAM_TOKENS, temperature=0.8, seed=7, n=2, frequency_penalty=0.3)
        body |= {"repetition_penalty": 1.1, "stream_options": {"include_usage": True}}
        whole = [event async for event in events(session, running.url, body, uuid4().hex)]
        lost, id_ = "", uuid4().hex

        async def strike() -> None:
            nonlocal lost
            lost = await stage.decoding()
            running.workers[lost].signal(fault)

        seen = await at_third(events(session, running.url, body, id_), strike)
        if fault == signal.SIGKILL:
            await running.replace(session, lost)
        else:
            running.workers[lost].signal(signal.SIGCONT)
            await running.whole(session)
        assert len(await stage.reasons(id_, "continued")) == 1
        for index in range(2):
            assert text_of(seen, index) == text_of(whole, index)
        assert {(event["id"], event["created"]) for event in seen} == {(f"cmpl-{id_}", seen[0]["created"])}
        counts = [[e["usage"]["completion_tokens"] for e in stream if e["usage"]] for stream in (seen, whole)]
        assert counts == [[2 * STREAM_TOKENS]] * 2
        assert sorted(c["index"] for event in seen for c in event["choices"] if c["finish_reason"]) == [0, 1]
        await running.freed(session)


async def test_the_last_decode_worker_is_killed(fleets: Fleets, tmp_path: Path) -> None:
    """The prefill worker is as good as any: it continues the answer."""
    with fleet(tmp_path, fleets.model, PAIR) as running:
        async with client() as session:

            async def strike() -> None:
                running.workers[DECODE[0]].kill()

            await staged(running, fleets, session).streamed(strike)
            await running.freed(session, [PREFILL])


async def test_on_loss_error(fleets: Fleets, tmp_path: Path) -> None:
    """The client gets an explicit error, also from a worker that is only silent; everybody else frees everything."""
    with fleet(tmp_path, fleets.model, ROLES, router=["--on-loss", "error"]) as running:
        async with client() as session:
            stage = staged(running, fleets, session)
            for fault in (signal.SIGSTOP, signal.SIGKILL):
                lost = ""

                async def strike(fault: signal.Signals = fault) -> None:
                    nonlocal lost
                    lost = await stage.decoding()
                    running.workers[lost].signal(fault)

                body = stage.body(STREAM_PROMPT, 1000)
                seen = await at_third(events(session, running.url, body, uuid4().hex), strike)
                assert seen[-1]["error"]["code"] == "worker_lost"
                running.workers[lost].signal(signal.SIGCONT)
                await running.freed(session, [name for name in ROLES if name != lost or fault == signal.SIGSTOP])
                if fault == signal.SIGSTOP:
                    await running.whole(session)
            await stage.exactly()


async def test_a_colocated_worker_serves_when_no_pair_is_there(fleets: Fleets, tmp_path: Path) -> None:
    with fleet(tmp_path, fleets.model, {PREFILL: "prefill", "colocated-0": "both"}) as running:
        async with client() as session:
            await staged(running, fleets, session).exactly()


async def test_layouts_differ(fleets: Fleets, tmp_path: Path) -> None:
    """Workers with different block sizes never exchange a block, though somebody asks them to; both are named."""
    with fleet(tmp_path, fleets.model, PAIR, kv=[1024, 2048], own={DECODE[0]: ["--block-size", "8"]}) as running:
        async with client() as session:
            body, id_ = staged(running, fleets, session).body(), uuid4().hex
            ticket = {"id": "h", "side": "consume", "attempt": 0, "peer": running.workers[PREFILL].url}
            headers = {"x-request-id": id_, "x-twostroke-handover": json.dumps(ticket)}
            url = f"{running.workers[DECODE[0]].url}/v1/completions"
            infos = [await running.system.info(session, name) for name in PAIR]
            status, reply = await post(session, url, body, **headers)
            assert status == 200
            assert reply["choices"][0]["text"] == fleets.model.text(body["prompt"], body["max_tokens"])
            async with session.get(f"{running.workers[DECODE[0]].url}/debug/requests/{id_}") as timeline:
                stamps = (await timeline.json())["events"]
        (reason,) = [stamp["detail"]["reason"] for stamp in stamps if stamp["event"] == "fallback"]
        assert "layouts differ" in reason
        assert all(info["fingerprint"] in reason for info in infos)
