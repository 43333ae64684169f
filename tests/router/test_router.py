"""The router between real sockets: what it sends on, what it sends back, and what it does when workers fail."""

import asyncio
import subprocess
import sys

import aiohttp
import msgspec
import pytest
from starlette.types import Send

from tests.router.scripted import (
    STREAM,
    ScriptedWorker,
    System,
    frame,
    hang,
    json_answer,
    stream_answer,
    system,
    until,
)
from twostroke.api.keys import tenant
from twostroke.api.server import Timeline
from twostroke.messages import SECRET_HEADER, TENANT_HEADER, TICKET_HEADER, Abandon
from twostroke.router import router as routers
from twostroke.router.worker import WorkerReport

PATH = "/v1/completions"
BODY = b'{"prompt": "\xc3\xa4", "stream": true,  "x": [1 , 2]}'
EVENTS = (b'data: {"a": 1}\n\n', b'data: {"b": "\xc3\xa4"}\n\ndata: {"c": 3}\n\n', b"data: [DONE]\n\n")


async def ask(running: System, body: bytes = BODY, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    async with running.client.post(PATH, data=body, headers=headers) as reply:
        return reply.status, await reply.read()


def error_of(body: bytes) -> dict[str, str | None]:
    return msgspec.json.decode(body, type=dict[str, dict[str, str | None]])["error"]


# -- what is sent on, and what comes back --------------------------------------------------------------------------


async def test_both_ends_get_the_body_as_it_is_and_their_ticket() -> None:
    async with system(secret="s3cret") as running:
        status, body = await ask(running, headers={"x-request-id": "mine"})
        p, d = running.workers
        async with asyncio.timeout(1):
            await p.asked.wait()
        assert (status, body) == (200, b'{"ok":true}')
        for worker in (p, d):
            (seen,) = worker.seen
            assert seen.path == PATH
            assert seen.body == BODY
            assert seen.headers["x-request-id"] == "mine"
            assert seen.headers[SECRET_HEADER] == "s3cret"
        produce, consume = p.seen[0].ticket, d.seen[0].ticket
        assert produce
        assert consume
        assert (produce.side, produce.peer) == ("produce", None)
        assert (consume.side, consume.peer) == ("consume", p.url)
        assert produce.id == consume.id


async def test_a_client_cannot_bring_its_own_ticket_or_secret() -> None:
    async with system(0, 0, 1) as running:
        await ask(running, headers={TICKET_HEADER: '{"id":"x","side":"produce"}', SECRET_HEADER: "guess"})
        (seen,) = running.workers[0].seen
        assert seen.ticket is None
        assert SECRET_HEADER not in seen.headers


async def test_every_request_has_an_id_and_hand_overs_are_never_named_twice() -> None:
    async with system() as running:
        for _ in range(2):
            async with running.client.post(PATH, data=BODY) as reply:
                assert len(reply.headers["x-request-id"]) == 32
        tickets = [seen.ticket for seen in running.workers[1].seen]
        assert tickets[0]
        assert tickets[1]
        assert tickets[0].id != tickets[1].id


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate", "/v1/completions?x=1"])
async def test_every_token_path_is_relayed(path: str) -> None:
    async with system() as running, running.client.post(path, data=BODY) as reply:
        assert reply.status == 200
        assert running.workers[1].seen[0].path == path.partition("?")[0]


async def test_a_stream_arrives_byte_for_byte() -> None:
    async with system() as running:
        running.workers[1].answer = stream_answer(*EVENTS)
        for _ in EVENTS:
            running.workers[1].gate.release()
        async with running.client.post(PATH, data=BODY) as reply:
            assert reply.headers["content-type"] == "text/event-stream"
            assert await reply.read() == b"".join(EVENTS)


async def test_tokens_are_not_held_back() -> None:
    async with system() as running:
        d = running.workers[1]
        d.answer = stream_answer(EVENTS[0], EVENTS[-1])
        async with running.client.post(PATH, data=BODY) as reply, asyncio.timeout(2):
            assert await reply.content.readany() == EVENTS[0]  # the worker still waits at its gate
            d.gate.release()
            assert await reply.content.read() == EVENTS[-1]


async def test_an_error_of_the_worker_is_relayed_with_its_headers() -> None:
    async with system(0, 0, 1) as running:
        running.workers[0].answer = json_answer(b'{"error":{}}', 429, [(b"retry-after", b"7")])
        async with running.client.post(PATH, data=BODY) as reply:
            assert (reply.status, reply.headers["retry-after"]) == (429, "7")
            assert await reply.read() == b'{"error":{}}'


async def test_a_body_that_is_too_large_is_refused_and_the_next_one_served() -> None:
    async with system(max_body=1000) as running:
        status, body = await ask(running, b"x" * 1001)
        assert status == 413
        assert "1000 bytes" in (error_of(body)["message"] or "")
        assert (await ask(running, b"x" * 1000))[0] == 200


async def test_large_bodies_pass() -> None:
    async with system(max_body=8 << 20) as running:
        body = bytes(range(256)) * (4 << 12)
        assert (await ask(running, body))[0] == 200
        assert running.workers[1].seen[0].body == body


# -- schedules -----------------------------------------------------------------------------------------------------


async def test_concurrent_asks_decode_while_prefill_works() -> None:
    async with system() as running, asyncio.timeout(5):
        running.workers[0].answer = hang
        assert await ask(running) == (200, b'{"ok":true}')


async def test_a_producer_that_nobody_needs_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twostroke.router.relay._PRODUCER_GRACE", 0.01)
    async with system() as running, asyncio.timeout(5):
        running.workers[0].answer = hang
        await ask(running)
        await running.workers[0].dropped.wait()
        assert running.router.registry.workers[0].state == "ready"


async def test_serial_asks_decode_after_prefill() -> None:
    async with system(schedule="serial") as running:
        assert (await ask(running))[0] == 200
        assert running.log == ["p-0 asked", "p-0 answered", "d-0 asked", "d-0 answered"]


async def test_serial_passes_on_a_refusal_of_prefill() -> None:
    async with system(schedule="serial") as running:
        running.workers[0].answer = json_answer(b'{"error":{"code":"bad"}}', 400)
        assert await ask(running) == (400, b'{"error":{"code":"bad"}}')
        assert not running.workers[1].seen


@pytest.mark.parametrize("status", [401, 409, 500, 503])
async def test_serial_lets_decode_make_good_a_failure_of_prefill(status: int) -> None:
    async with system(schedule="serial") as running:
        running.workers[0].answer = json_answer(b"{}", status)
        assert (await ask(running))[0] == 200
        assert bool(running.workers[1].seen[0].ticket) == (status != 503)


async def test_serial_without_a_producer_sends_no_ticket() -> None:
    async with system(schedule="serial") as running:
        await running.workers[0].stop()
        assert (await ask(running))[0] == 200
        assert running.workers[1].seen[0].ticket is None


async def test_a_colocated_worker_gets_no_ticket() -> None:
    async with system(1, 0, 1) as running:
        assert (await ask(running))[0] == 200
        assert running.workers[1].seen[0].ticket is None
        assert not running.workers[0].seen


# -- failures ------------------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_before_the_first_token_ends_a_hand_over_that_is_computed() -> None:
    """P's reply is over, so there is no connection to close, and D may never come to tell P that it needs nothing."""
    async with system() as running:
        p, d = running.workers
        d.answer = hang
        async with asyncio.timeout(5):
            asking = asyncio.create_task(ask(running))
            await until(lambda: "p-0 answered" in running.log and bool(d.seen))
            asking.cancel()
            await until(lambda: len(p.seen) == 2)
        produced, abandoned = p.seen
        assert abandoned.path == "/internal/handover/abandon"
        assert produced.ticket is not None
        assert msgspec.json.decode(abandoned.body, type=Abandon) == Abandon(produced.ticket.id, 0)


async def test_a_client_that_leaves_ends_the_request_on_both_workers() -> None:
    async with system() as running:
        p, d = running.workers
        p.answer, d.answer = hang, stream_answer(EVENTS[0], EVENTS[-1])
        async with running.client.post(PATH, data=BODY) as reply:
            await reply.content.readany()
            reply.close()
        async with asyncio.timeout(1):
            await p.dropped.wait()
            await d.dropped.wait()
        assert [worker.in_flight for worker in running.router.registry.workers] == [0, 0]


async def test_a_client_that_leaves_before_the_answer_ends_it_too() -> None:
    async with system() as running:
        p, d = running.workers
        p.answer = d.answer = hang
        asking = asyncio.create_task(ask(running))
        await d.asked.wait()
        asking.cancel()
        async with asyncio.timeout(1):
            await p.dropped.wait()
            await d.dropped.wait()


async def test_a_lost_decode_worker_costs_one_retry() -> None:
    async with system(1, 2) as running:
        p, lost, other = running.workers
        await lost.stop()
        assert (await ask(running))[0] == 200
        (seen,) = other.seen
        assert seen.ticket
        assert seen.ticket.attempt == 1
        assert seen.ticket.id == p.seen[-1].ticket.id  # type: ignore[union-attr]
        assert [worker.state for worker in running.router.registry.workers] == ["ready", "lost", "ready"]


async def test_a_worker_that_drains_costs_one_retry() -> None:
    async with system(0, 0, 2) as running:
        running.workers[0].answer = json_answer(b"{}", 503)
        assert (await ask(running))[0] == 200
        assert len(running.workers[1].seen) == 1


async def test_a_reply_that_breaks_unseen_is_asked_for_again() -> None:
    async def broken(worker: ScriptedWorker, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"100")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{", "more_body": True})
        raise ConnectionError("scripted")

    async with system(0, 0, 2) as running:
        running.workers[0].answer = broken
        assert await ask(running) == (200, b'{"ok":true}')


async def test_a_worker_that_comes_back_is_used_again() -> None:
    async with system(0, 0, 1) as running:
        (worker,) = running.workers
        await worker.stop()
        status, body = await ask(running)
        assert status in (502, 503)
        assert error_of(body)["message"]
        await worker.start()
        await running.look()
        assert (await ask(running))[0] == 200


async def test_a_worker_replaced_behind_its_address_serves_the_next_request() -> None:
    """Without a heartbeat between: kept connections to the old process are not used."""
    async with system() as running:
        assert (await ask(running))[0] == 200
        for worker in running.workers:
            await worker.stop()
            worker.info = msgspec.structs.replace(worker.info, instance=f"{worker.info.id}-second")
            await worker.start()
        assert (await ask(running))[0] == 200
        before = list(running.router.registry.workers)
        assert all(worker.ready for worker in before)
        await running.look()
        assert not set(before) & set(running.router.registry.workers)
        assert (await ask(running))[0] == 200


async def test_a_stream_without_a_journal_is_not_passed_on() -> None:
    """It could be torn anywhere. A worker that answers so is none of ours."""

    async def bare(worker: ScriptedWorker, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM[:1]})
        await send({"type": "http.response.body", "body": b"".join(EVENTS)})

    async with system(0, 0, 1) as running:
        running.workers[0].answer = bare
        status, body = await ask(running)
        assert status == 503
        assert b"data:" not in body
        assert running.router.registry.workers[0].detail == "its stream has no journal"


@pytest.mark.parametrize(
    ("counts", "missing"), [((1, 1, 0), "no prefill and no decode worker"), ((0, 0, 1), "no colocated worker")]
)
async def test_without_a_worker_the_error_names_what_is_missing(counts: tuple[int, int, int], missing: str) -> None:
    async with system(*counts) as running:
        for worker in running.workers:
            await worker.stop()
        await running.look()
        async with running.client.post(PATH, data=BODY) as reply:
            assert reply.status == 503
            assert int(reply.headers["retry-after"]) > 0
            assert missing in (error_of(await reply.read())["message"] or "")


# -- everything else ---------------------------------------------------------------------------------------------


async def test_workers_are_listed() -> None:
    async with system(1, 1, 1) as running, running.client.get("/workers") as reply:
        reports = msgspec.json.decode(await reply.read(), type=list[WorkerReport])
        assert [(report.id, report.role, report.state) for report in reports] == [
            ("p-0", "prefill", "ready"),
            ("d-0", "decode", "ready"),
            ("c-0", "colocated", "ready"),
        ]
        assert [report.url for report in reports] == [worker.url for worker in running.workers]
        assert reports[0].slots.total == 4


async def test_ready_means_that_all_are() -> None:
    async with system(0, 0, 2) as running:
        first, second = running.workers

        async def ready() -> int:
            await running.look()
            async with running.client.get("/ready") as reply:
                return reply.status

        assert await ready() == 200
        first.info = msgspec.structs.replace(first.info, state="starting")
        assert await ready() == 503
        first.info = msgspec.structs.replace(first.info, state="ready")
        assert await ready() == 200
        await first.stop()
        assert await ready() == 200  # lost, and the other one serves
        await second.stop()
        assert await ready() == 503
        async with running.client.get("/health") as reply:
            assert reply.status == 200


async def test_timelines_of_router_and_workers_are_merged_by_time() -> None:
    async with system() as running:
        await ask(running, headers={"x-request-id": "traced"})
        async with running.client.get("/debug/requests/traced") as reply:
            timeline = msgspec.json.decode(await reply.read(), type=Timeline)
        stamps = [(event.worker, event.event) for event in timeline.events]
        assert stamps[:2] == [("p-0", "prefill_started"), ("d-0", "prefill_started")]
        assert [event for worker, event in stamps if worker == "router"] == [
            *("received", "routed", "first_byte", "finished")
        ]
        routed = next(event for event in timeline.events if event.event == "routed")
        assert (routed.detail["prefill"], routed.detail["decode"]) == ("p-0", "d-0")


async def test_a_timeline_does_not_wait_for_who_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names who could not be asked: one that is known to be lost, and one that does not answer."""
    monkeypatch.setattr(routers, "_GLANCE", aiohttp.ClientTimeout(total=0.2))
    async with system(1, 1, 1) as running:
        p, d, _ = running.workers
        await d.stop()
        await running.look()
        p.timeline_delay = 5.0
        async with running.client.get("/debug/requests/traced") as reply:
            timeline = msgspec.json.decode(await reply.read(), type=Timeline)
        assert [event.worker for event in timeline.events] == ["c-0"]
        assert set(timeline.missing) == {"p-0", "d-0"}
        assert timeline.missing["d-0"].startswith("is lost: ")
        await running.workers[2].stop()
        await running.look()
        async with running.client.get("/debug/requests/traced") as reply:
            assert reply.status == 404
            assert "p-0 does not answer" in await reply.text()


async def test_model_questions_go_to_a_worker_and_aborts_to_all() -> None:
    async with system() as running:
        async with running.client.get("/v1/models") as reply:
            assert await reply.read() == b'{"ok":true}'
        async with running.client.post("/abort_request", data=b'{"rid":"x"}') as reply:
            assert reply.status == 200
        assert [[seen.path for seen in worker.seen] for worker in running.workers] == [
            ["/v1/models", "/abort_request"],
            ["/abort_request"],
        ]


async def test_unknown_paths_and_methods_get_error_objects() -> None:
    async with system() as running:
        for method, path, status in (("GET", "/nope", 404), ("GET", PATH, 405), ("POST", "/workers", 405)):
            async with running.client.request(method, path) as reply:
                assert reply.status == status
                assert error_of(await reply.read())["message"]


async def test_metrics_count_what_is_in_flight() -> None:
    async with system(0, 0, 1) as running:
        running.workers[0].answer = hang
        asking = asyncio.create_task(ask(running))
        await running.workers[0].asked.wait()
        async with running.client.get("/metrics") as reply:
            assert b"twostroke_num_requests_waiting 1.0" in await reply.read()
        asking.cancel()


async def test_requests_spread_over_workers() -> None:
    async with system(0, 0, 3) as running:
        for worker in running.workers:
            worker.answer = hang
        asking = [asyncio.create_task(ask(running)) for _ in range(6)]
        await until(lambda: sum(len(worker.seen) for worker in running.workers) == 6)
        assert [len(worker.seen) for worker in running.workers] == [2, 2, 2]
        for task in asking:
            task.cancel()


def test_the_router_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, twostroke.cli, twostroke.router.router; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- API keys ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", ["", "s"])
async def test_keys_are_checked_here_and_workers_told_whose_the_request_is(secret: str) -> None:
    """Both ends of a hand-over alike, since their blocks have the same names only then."""
    async with system(secret=secret, api_keys=("sk-one",)) as running:
        async with running.client.post("/v1/completions", data=b"{}") as reply:
            assert reply.status == 401
            assert (await reply.json())["error"]["code"] == "invalid_api_key"
        assert not any(worker.seen for worker in running.workers)
        headers = {"authorization": "Bearer sk-one", TENANT_HEADER: "somebody else"}
        async with running.client.post("/v1/completions", data=b"{}", headers=headers) as reply:
            assert reply.status == 200
        seen = [worker.seen[0].headers for worker in running.workers]
        assert [one[TENANT_HEADER] for one in seen] == [tenant("sk-one")] * 2
        assert [one["authorization"] for one in seen] == ["Bearer sk-one"] * 2, "a worker may want to see it, too"
        async with running.client.get("/v1/models", headers=headers) as reply:
            assert reply.status != 401
        async with running.client.get("/health") as reply:
            assert reply.status == 200


# -- a client that reads slowly --------------------------------------------------------------------------------------


async def test_a_client_that_does_not_read_holds_up_its_worker_and_gets_everything_later() -> None:
    """What has begun is passed on at once as long as the client reads; then it waits, and not in the router."""
    event, count = b"data: %b\n\n" % (b"x" * 65536), 1000
    sent = 0

    async def pour(worker: ScriptedWorker, send: Send) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        for nth in range(count):
            await send({"type": "http.response.body", "body": frame(b"data: %d\n\n" % nth + event), "more_body": True})
            sent += 1
        await send({"type": "http.response.body", "body": frame(b"data: [DONE]\n\n"), "more_body": False})

    async with system(0, 0, 1) as running:
        running.workers[0].answer = pour
        async with running.client.post(PATH, data=BODY, headers={"x-request-id": "slow"}) as reply:
            assert reply.status == 200
            await asyncio.sleep(0.5)
            held = sent
            await asyncio.sleep(0.5)
            assert sent == held, "the worker waits"
            assert held < count // 2, "and not because it is done"
            assert (await ask(running, b"{}"))[0] == 200, "nobody else does"
            body = await reply.read()
        expected = b"".join(b"data: %d\n\n" % nth + event for nth in range(count)) + b"data: [DONE]\n\n"
        assert body == expected
