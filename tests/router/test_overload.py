"""Workers that have no place: another one, the line, or a refusal; never a request that nobody ends."""

import asyncio

import msgspec
import pytest

from tests.router.scripted import Answer, ScriptedWorker, System, hang, json_answer, stream_answer, system, until
from twostroke.api.http import error_object
from twostroke.api.server import Timeline
from twostroke.errors import NoRoom, Overloaded, Unavailable
from twostroke.router import reply as replies
from twostroke.router.breaker import FAILURES
from twostroke.router.worker import WorkerReport

PATH = "/v1/completions"
BODY = b'{"prompt": "x"}'
NO_ROOM = json_answer(error_object(NoRoom("full")), 429, [(b"retry-after", b"1")])
BUSY = json_answer(error_object(Overloaded("queue full")), 429, [(b"retry-after", b"7")])
OK = b'{"ok":true}'


async def ask(running: System, body: bytes = BODY) -> tuple[int, bytes]:
    async with running.client.post(PATH, data=body, headers={"x-request-id": "mine"}) as reply:
        return reply.status, await reply.read()


async def stamps(running: System) -> list[str]:
    async with running.client.get("/debug/requests/mine") as reply:
        timeline = msgspec.json.decode(await reply.read(), type=Timeline)
    return [event.event for event in timeline.events if event.worker == "router"]


def metric(text: str, name: str) -> float:
    return next(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


async def test_a_decode_worker_without_room_costs_no_prefill_when_another_has_some() -> None:
    async with system(1, 2) as running:
        p, full, roomy = running.workers
        p.answer, full.answer = hang, NO_ROOM
        assert await ask(running) == (200, OK)
        (seen,) = roomy.seen
        assert seen.ticket
        assert seen.ticket.attempt == 1
        assert not seen.ticket.waits
        async with asyncio.timeout(1):
            await p.dropped.wait()  # the first attempt's prefill was given up
        assert [ticket.attempt for s in p.seen if (ticket := s.ticket)] == [0, 1]
        assert all(worker.state == "ready" for worker in running.router.registry.workers)


@pytest.mark.parametrize("refusal", [NO_ROOM, BUSY, json_answer(error_object(Unavailable("drains")), 503)])
async def test_a_refusal_goes_to_another_worker(refusal: Answer) -> None:
    async with system(0, 0, 2) as running:
        running.workers[0].answer = refusal
        assert await ask(running) == (200, OK)
        assert "retried" in await stamps(running)


async def test_when_all_refuse_the_client_gets_the_refusal_as_it_is() -> None:
    async with system(0, 0, 2) as running:
        for worker in running.workers:
            worker.answer = BUSY
        async with running.client.post(PATH, data=BODY) as reply:
            assert (reply.status, reply.headers["retry-after"]) == (429, "7")
            assert b"queue full" in await reply.read()
        assert [len(worker.seen) for worker in running.workers] == [1, 1]


@pytest.mark.parametrize(("retries", "asked"), [(0, 1), (1, 2), (2, 3)])
async def test_the_budget_is_kept(retries: int, asked: int) -> None:
    async with system(0, 0, 5, retries=retries) as running:
        for worker in running.workers:
            worker.answer = BUSY
        assert (await ask(running))[0] == 429
        assert sum(len(worker.seen) for worker in running.workers) == asked


async def test_decode_out_of_slots_means_waiting_in_line_until_a_request_ends() -> None:
    async with system() as running, asyncio.timeout(5):
        p, d = running.workers
        p.answer, d.answer = hang, stream_answer(b"data: 1\n\n", b"data: [DONE]\n\n")
        async with running.client.post(PATH, data=BODY) as first:
            await first.content.readany()
            d.answer = NO_ROOM
            second = asyncio.create_task(ask(running))
            await until(lambda: bool(running.router._relay.line))
            d.answer = json_answer()
            assert not second.done()
            d.gate.release()
            await first.read()
            assert await second == (200, OK)
        assert [event for event in await stamps(running) if event in ("queued", "retried")] == ["queued", "retried"]


async def test_the_line_is_kept_in_order_and_nobody_overtakes() -> None:
    async with system(queue_timeout=5) as running, asyncio.timeout(5):
        p, d = running.workers
        p.answer, d.answer = hang, NO_ROOM
        served: list[int] = []

        async def numbered(number: int) -> None:
            async with running.client.post(PATH, data=b'{"prompt": "%d"}' % number) as reply:
                assert reply.status == 200
                served.append(number)

        asking = []
        for number in range(4):
            asking.append(asyncio.create_task(numbered(number)))
            await until(lambda n=number: len(running.router._relay.line._waiting) == n + 1)  # type: ignore[misc]
        assert len(d.seen) == 1  # who comes later does not even try
        d.answer = json_answer()
        running.router._relay.line.room()
        await asyncio.gather(*asking)
        assert served == [0, 1, 2, 3]


async def test_a_place_in_line_has_a_deadline() -> None:
    async with system(queue_timeout=0.1) as running:
        running.workers[1].answer = NO_ROOM
        async with running.client.post(PATH, data=BODY) as reply:
            assert reply.status == 429
            assert int(reply.headers["retry-after"]) >= 1
            assert b"no decode worker had room" in await reply.read()


async def test_a_client_that_leaves_the_line_is_forgotten() -> None:
    async with system() as running:
        running.workers[1].answer = NO_ROOM
        asking = asyncio.create_task(ask(running))
        await until(lambda: bool(running.router._relay.line))
        asking.cancel()
        await until(lambda: not running.router._relay.line)
        assert running.router._relay.in_flight == running.router._relay.backlog.waiting == 0


async def test_room_is_looked_for_although_nothing_ends_here() -> None:
    async with system() as running, asyncio.timeout(5):
        d = running.workers[1]
        d.answer = NO_ROOM
        watching = asyncio.create_task(running.router.watch())
        asking = asyncio.create_task(ask(running))
        await until(lambda: bool(running.router._relay.line))
        d.answer = json_answer()
        assert await asking == (200, OK)
        watching.cancel()


async def test_a_busy_prefill_worker_is_passed_over_before_decode_computes_the_prompt() -> None:
    async with system(2, 1) as running, asyncio.timeout(5):
        busy, other, d = running.workers
        busy.answer = BUSY

        async def once(worker: ScriptedWorker, send: object) -> None:
            await (hang if len(worker.seen) == 1 else json_answer())(worker, send)  # type: ignore[arg-type]

        d.answer = once
        assert await ask(running) == (200, OK)
        assert [(t.side, t.attempt) for s in (*busy.seen, *other.seen) if (t := s.ticket)] == [
            ("produce", 0),
            ("produce", 1),
        ]
        assert d.dropped.is_set()
        assert (ticket := d.seen[-1].ticket)
        assert ticket.peer == other.url


async def test_with_all_prefill_workers_busy_the_decode_worker_computes() -> None:
    async with system() as running, asyncio.timeout(5):
        p, d = running.workers
        p.answer = BUSY

        async def alone(worker: ScriptedWorker, send: object) -> None:
            await (json_answer() if worker.seen[-1].ticket is None else hang)(worker, send)  # type: ignore[arg-type]

        d.answer = alone
        assert await ask(running) == (200, OK)


async def test_both_out_of_slots_end_in_the_line_and_then_in_an_answer() -> None:
    async with system(queue_timeout=5) as running, asyncio.timeout(5):
        p, d = running.workers
        p.answer, d.answer = BUSY, NO_ROOM
        asking = asyncio.create_task(ask(running))
        await until(lambda: bool(running.router._relay.line))
        p.answer, d.answer = hang, json_answer()
        running.router._relay.line.room()
        assert await asking == (200, OK)


async def test_the_router_itself_takes_only_so_many() -> None:
    async with system(0, 0, 1, max_queue=2) as running:
        (worker,) = running.workers
        worker.answer = stream_answer(b"data: 1\n\n", b"data: [DONE]\n\n")
        begun = await running.client.post(PATH, data=BODY)
        await begun.content.readany()  # what has begun does not wait
        worker.answer = hang
        waiting = [asyncio.create_task(ask(running)) for _ in range(2)]
        await until(lambda: running.router._relay.backlog.waiting == 2)
        async with running.client.post(PATH, data=BODY) as reply:
            assert reply.status == 429
            assert int(reply.headers["retry-after"]) >= 1
        async with running.client.get("/metrics") as reply:
            text = await reply.text()
        assert metric(text, "twostroke_num_requests_waiting") == 2
        assert metric(text, "twostroke_num_requests_running") == 1
        for task in waiting:
            task.cancel()
        begun.close()
        await until(lambda: running.router._relay.in_flight == 0)
        assert running.router._relay.backlog.waiting == 0
        worker.answer = json_answer()
        assert await ask(running) == (200, OK)


async def test_a_worker_that_fails_is_left_alone_until_a_try_succeeds() -> None:
    async with system(0, 0, 2, policy="round-robin") as running:
        bad, good = running.workers
        bad.answer = json_answer(b"{}", 500)
        statuses = [(await ask(running))[0] for _ in range(4 * FAILURES)]
        assert statuses.count(500) == FAILURES
        async with running.client.get("/workers") as reply:
            reports = msgspec.json.decode(await reply.read(), type=list[WorkerReport])
        assert [(report.state, report.breaker) for report in reports] == [("ready", "open"), ("ready", "closed")]
        async with running.client.get("/metrics") as reply:
            name = f'twostroke_worker_breaker{{role="colocated",url="{bad.url}"'
            assert metric(await reply.text(), name) == 2
        bad.answer = json_answer()
        running.router.registry.workers[0].clock = lambda: 1e12
        served = len(bad.seen)
        for _ in range(2):
            await ask(running)
        assert len(bad.seen) == served + 1
        assert running.router.registry.workers[0].breaker.state(1e12) == "closed"
        assert good.seen


async def test_a_client_that_does_not_send_its_body_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "_BODY_SECONDS", 0.1)
    async with system(0, 0, 1, max_queue=1) as running, asyncio.timeout(10):
        base = running.client._base_url
        assert base
        reader, writer = await asyncio.open_connection(base.host, base.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert b" 408 " in await reader.readline()
        writer.close()
        assert running.router._relay.backlog.waiting == 0
        assert await ask(running) == (200, OK)


# -- who knows a prompt --------------------------------------------------------------------------------------------


async def test_a_decode_worker_computes_alone_only_what_it_was_given_before() -> None:
    body = b'{"prompt": "' + b"x" * 2000 + b'"}'
    async with system(2, 1, policy="prefix-aware", short_prompt=100) as running, asyncio.timeout(10):
        p, other, d = running.workers
        d.answer = stream_answer(b"data: 1\n\n", b"data: [DONE]\n\n")
        async with running.client.post(PATH, data=body) as first:
            await first.content.readany()
            d.answer = json_answer()
            await until(lambda: not any(worker.in_flight for worker in running.router.registry.workers[:2]))
            assert (await ask(running, body))[0] == 200  # while the first one is on its way: the same prefill worker
            assert len(p.seen) + len(other.seen) == 2
            assert not (p.seen and other.seen)  # which has computed the first, and waits for nothing
            d.gate.release()
            await first.read()
        assert (await ask(running, body))[0] == 200
        assert [seen.ticket is None for seen in d.seen] == [False, False, True]
        assert (await ask(running, body.replace(b"}", b', "cache_salt": "another tenant"}')))[0] == 200
        assert d.seen[-1].ticket
