"""What the router believes of its workers, from real heartbeats."""

import asyncio
from contextlib import suppress

import aiohttp
import msgspec
import pytest
from msgspec import structs

from tests.router.scripted import ScriptedWorker, system, until
from twostroke.messages import Slots
from twostroke.router import registry as registries
from twostroke.router.policy import ANSWER_TOKENS
from twostroke.router.registry import Registry
from twostroke.router.worker import Worker


async def given_up(worker: Worker) -> bool:
    """Wait for a worker that never does anything, until it is given up."""
    async with asyncio.timeout(5) as patience:
        with suppress(TimeoutError):
            async with worker.alive():
                await asyncio.Event().wait()
    return not patience.expired()


async def test_a_worker_that_never_answered_is_starting_until_it_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    async with aiohttp.ClientSession() as session:
        registry = Registry([("http://127.0.0.1:1", "decode")], session, secret="", heartbeat=1)
        (worker,) = registry.workers
        await registry.poll(worker.url)
        assert worker.report().state == "starting"
        assert "not answered yet" in worker.detail
        assert registry.waited_for() == [worker]
        monkeypatch.setattr(registries, "START_SECONDS", 0.0)
        await registry.poll(worker.url)
        assert worker.report().state == "lost"
        assert registry.waited_for() == []
        assert worker.report().id == "http://127.0.0.1:1"


async def test_states_follow_the_worker() -> None:
    async with system(0, 0, 1) as running:
        (scripted,) = running.workers
        for state in ("starting", "ready", "draining"):
            scripted.info = structs.replace(scripted.info, state=state, detail=f"is {state}")
            await running.look()
            (worker,) = running.router.registry.workers
            assert (worker.state, worker.detail) == (state, f"is {state}")
            assert worker.ready == (state == "ready")


async def test_a_refused_connection_loses_a_worker_at_once_and_an_answer_brings_it_back() -> None:
    async with system(0, 0, 1) as running:
        await running.workers[0].stop()
        await running.look()
        assert not running.router.registry.workers[0].ready
        await running.workers[0].start()
        await running.look()
        assert running.router.registry.workers[0].ready


async def test_a_silent_worker_is_lost_and_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries, "SILENCE", 0.2)
    async with system(0, 0, 1) as running:
        (scripted,) = running.workers
        (worker,) = running.router.registry.workers
        scripted.info_delay = 0.1
        await running.look()
        assert worker.report().state == "ready"  # slow, and there
        scripted.info_delay = 0.5
        looking = asyncio.create_task(running.look())
        assert await given_up(worker)
        await looking
        assert worker.report().state == "lost"


async def test_a_new_instance_is_a_new_worker() -> None:
    async with system(0, 0, 1) as running:
        (before,) = running.router.registry.workers
        with before.held(100):
            scripted = running.workers[0]
            scripted.info = structs.replace(scripted.info, instance="second")
            looking = asyncio.create_task(running.look())
            assert await given_up(before)
            await looking
            (after,) = running.router.registry.workers
            assert after is not before
            assert (after.in_flight, before.in_flight) == (0, 1)
        assert after.in_flight == 0
        await running.look()
        assert running.router.registry.workers == [after]


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"not json", b'{"id": 1}', b"x" * 100_000, b'{"id": "\xff"}', b'{"x":' + b"[" * 60_000, b"\xff"],
)
async def test_nonsense_is_not_believed(body: bytes) -> None:
    async with system(0, 0, 1) as running:
        running.workers[0].info_body = body
        await running.look()
        assert running.router.registry.workers[0].state == "lost"


async def test_another_protocol_is_refused() -> None:
    async with system(0, 0, 1) as running:
        running.workers[0].info = structs.replace(running.workers[0].info, protocol=99)
        await running.look()
        assert "protocol 99" in running.router.registry.workers[0].detail


async def test_a_wrong_secret_says_so() -> None:
    async with system(0, 0, 1, secret="right") as running:
        assert running.router.registry.workers[0].ready
        running.workers[0].secret = "other"
        await running.look()
        assert "TWOSTROKE_SECRET" in running.router.registry.workers[0].detail


async def test_watching_polls_every_worker_until_cancelled() -> None:
    scripted = [ScriptedWorker(name, []) for name in ("v", "w")]
    for one in scripted:
        await one.start()
    async with aiohttp.ClientSession() as session:
        registry = Registry([(one.url, "colocated") for one in scripted], session, secret="", heartbeat=0.01)
        watching = asyncio.create_task(registry.watch())
        await until(lambda: all(worker.ready for worker in registry.workers))
        scripted[1].info = structs.replace(scripted[1].info, queued_tokens=3)
        await until(lambda: registry.workers[1].queued == 3)
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching
    for one in scripted:
        await one.stop()


def test_the_load_is_what_we_sent_and_what_others_sent() -> None:
    worker, info = Worker("http://w", "colocated"), ScriptedWorker("w", []).info
    slots = Slots(total=1000, free=100, cached=0, leased=900)
    with worker.held(1000), worker.held(1000):
        assert (worker.queued, worker.resident, worker.in_flight) == (2000, 2000 + 2 * ANSWER_TOKENS, 2)
        worker.heard(structs.replace(info, queued_tokens=9000, slots=slots))
        assert (worker.queued, worker.resident) == (9000, 900 * 16)
    assert worker.queued == 7000  # ours ended, the others' did not
    assert worker.resident == 900 * 16 - 2000 - 2 * ANSWER_TOKENS
    with worker.held(1000) as hold:
        worker.heard(structs.replace(info, queued_tokens=1000))
        assert worker.queued == 1000  # what the worker counted was ours
        assert hold.begin()
        assert not hold.begin()
        assert (worker.queued, worker.resident) == (0, 1000 + ANSWER_TOKENS)
    assert (worker.queued, worker.resident) == (0, 0)


def test_each_end_of_a_hand_over_counts_its_part() -> None:
    prefill, decode = Worker("http://p", "prefill"), Worker("http://d", "decode")
    with prefill.held(1000, answers=False), decode.held(1000, computes=False):
        assert (prefill.queued, prefill.resident) == (1000, 1000)
        assert (decode.queued, decode.resident) == (0, 1000 + ANSWER_TOKENS)


def test_a_failed_request_is_counted_off() -> None:
    worker = Worker("http://w", "prefill")
    with pytest.raises(RuntimeError), worker.held(4000):
        raise RuntimeError
    assert (worker.in_flight, worker.queued, worker.resident) == (0, 0, 0)


def test_a_report_is_json_with_the_slots() -> None:
    report = msgspec.json.decode(msgspec.json.encode(Worker("http://w", "decode").report()))
    assert report["slots"] == {"total": 0, "free": 0, "cached": 0, "leased": 0}
    assert report["role"] == "decode"
