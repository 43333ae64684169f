"""An answer whose worker is lost: what the client sees, and what the next worker is given."""

import asyncio
from collections.abc import Sequence

import msgspec
import pytest
from starlette.types import Send

from tests.router.scripted import STREAM, Answer, ScriptedWorker, Seen, System, frame, hang, json_answer, system, until
from twostroke.api.http import DONE, error_object
from twostroke.api.server import Timeline
from twostroke.errors import EngineFailed, Unavailable
from twostroke.messages import ALIVE_HEADER, ATTEMPT_HEADER, JOURNAL_HEADER, SECRET_HEADER, TICKET_HEADER, Journal
from twostroke.router import registry as registries
from twostroke.router import upstream as upstreams
from twostroke.router.breaker import Breaker
from twostroke.router.reply import Frames

PATH = "/v1/completions"
BODY = b'{"prompt": "x", "stream": true}'
EVENTS = [b'data: {"n": %d, "text": "\n:7 x"}\n\n' % n for n in range(4)]
LINES = [b"[[0,[%d],null,0]]" % n for n in range(4)]
WHOLE = b"".join(EVENTS) + DONE
FRAMES = [*(frame(event, line) for event, line in zip(EVENTS, LINES, strict=True)), frame(DONE)]


def journaled(*pieces: bytes, then: str = "end") -> Answer:
    """Send the pieces; then "end", "break" or "hang"."""

    async def answer(worker: ScriptedWorker, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if then == "hang":
            await asyncio.Event().wait()
        if then == "break":
            raise ConnectionError("scripted")
        await send({"type": "http.response.body", "body": b""})

    return answer


async def continuing(worker: ScriptedWorker, send: Send) -> None:
    """As a worker does: send what the journal in front of the body does not have."""
    await journaled(*FRAMES[len(parts(worker.seen[-1])[0]) :])(worker, send)


def parts(seen: Seen) -> tuple[list[bytes], bytes]:
    """The journal's lines, and the body."""
    size = msgspec.json.decode(seen.headers[JOURNAL_HEADER], type=Journal).size
    return seen.body[:size].splitlines(), seen.body[size:]


async def ask(running: System) -> bytes:
    async with running.client.post(PATH, data=BODY, headers={"x-request-id": "mine"}) as reply:
        assert reply.status == 200
        assert JOURNAL_HEADER not in reply.headers
        return await reply.read()


async def stamps(running: System) -> list[str]:
    async with running.client.get("/debug/requests/mine") as reply:
        timeline = msgspec.json.decode(await reply.read(), type=Timeline)
    return [event.event for event in timeline.events if event.worker == "router"]


def error_code(text: bytes) -> str | None:
    """The code of the error event that ends a stream."""
    event = text.removesuffix(DONE).rsplit(b"data: ", 1)[1]
    code: str | None = msgspec.json.decode(event)["error"]["code"]
    return code


@pytest.mark.parametrize("then", ["break", "end"])
async def test_cut_anywhere_the_client_sees_one_stream(then: str) -> None:
    text = b"".join(FRAMES)
    async with system(0, 0, 2) as running:
        for cut in range(len(text) - len(FRAMES[-1]) + 1):
            asked: list[Seen] = []

            async def answer(worker: ScriptedWorker, send: Send, cut: int = cut, asked: list[Seen] = asked) -> None:
                asked.append(worker.seen[-1])
                await (journaled(text[:cut], then=then) if len(asked) == 1 else continuing)(worker, send)

            await running.look()
            for known, worker in zip(running.router.registry.workers, running.workers, strict=True):
                worker.answer, known.breaker = answer, Breaker()
            async with running.client.post(PATH, data=BODY) as reply:
                assert await reply.read() == WHOLE
            _, second = asked
            lines, body = parts(second)
            assert body == BODY
            assert lines == LINES[: len(lines)]
            assert len(b"".join(FRAMES[: len(lines)])) <= cut  # no more than what the client can have seen
            assert [worker.in_flight for worker in running.router.registry.workers] == [0, 0]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000])
def test_frames_arrive_in_any_pieces(size: int) -> None:
    text, frames = b"".join(FRAMES), Frames()
    found = [frames.feed(text[i : i + size]) for i in range(0, len(text), size)]
    assert b"".join(part.events for part in found) == WHOLE
    assert b"".join(part.lines for part in found).splitlines() == LINES
    frames.end()


@pytest.mark.parametrize("text", [b":x [[0,[1]]]\ndata: 1\n\n", b":-5 \n", b": \n", b":" + b"9" * 5000 + b" \n"])
async def test_a_stream_that_is_none_loses_its_worker(text: bytes) -> None:
    async with system(0, 0, 2) as running:
        running.workers[0].answer, running.workers[1].answer = journaled(FRAMES[0], text, then="hang"), continuing
        assert await ask(running) == WHOLE


async def test_what_is_complete_is_not_continued() -> None:
    async with system(0, 0, 2) as running:
        running.workers[0].answer = journaled(*FRAMES, then="break")
        assert await ask(running) == WHOLE
        assert not running.workers[1].seen
        assert (await stamps(running))[-1] == "finished"


async def test_decode_goes_on_without_a_ticket_and_prefill_is_the_last_resort() -> None:
    async with system(1, 2, secret="s3cret") as running:
        p, first, second = running.workers
        first.answer = journaled(*FRAMES[:1], then="break")
        second.answer = journaled(*FRAMES[1:3], then="break")

        async def as_asked(worker: ScriptedWorker, send: Send) -> None:
            produces = worker.seen[-1].ticket is not None
            await (json_answer() if produces else continuing)(worker, send)

        p.answer = as_asked
        assert await ask(running) == WHOLE
        assert JOURNAL_HEADER in first.seen[0].headers
        assert JOURNAL_HEADER not in p.seen[0].headers  # it answers nobody
        assert [len(parts(worker.seen[-1])[0]) for worker in (first, second, p)] == [0, 1, 3]
        for worker in (second, p):
            assert TICKET_HEADER not in worker.seen[-1].headers
            assert worker.seen[-1].headers[SECRET_HEADER] == "s3cret"
        created = {msgspec.json.decode(w.seen[-1].headers[JOURNAL_HEADER])["created"] for w in (first, second, p)}
        assert len(created) == 1
        assert (await stamps(running)).count("continued") == 2


async def test_two_losses_are_survived_and_a_third_is_not() -> None:
    async with system(0, 0, 4) as running:

        async def one_event(worker: ScriptedWorker, send: Send) -> None:
            await journaled(FRAMES[len(parts(worker.seen[-1])[0])], then="break")(worker, send)

        for worker in running.workers:
            worker.answer = one_event
        text = await ask(running)
        assert text.startswith(b"".join(EVENTS[:3]))
        assert EVENTS[3] not in text
        assert error_code(text) == "worker_lost"
        assert sorted(len(worker.seen) for worker in running.workers) == [0, 1, 1, 1]


async def test_no_other_worker_is_there() -> None:
    async with system(0, 0, 1) as running:
        running.workers[0].answer = journaled(FRAMES[0], FRAMES[1][:-1], then="break")
        text = await ask(running)
        assert text.startswith(EVENTS[0] + b'data: {"error"')
        assert error_code(text) == "worker_lost"
        assert text.endswith(DONE)


async def test_on_loss_error_keeps_no_journal() -> None:
    async with system(0, 0, 2, on_loss="error") as running:
        running.workers[0].answer = journaled(FRAMES[0], then="break")
        text = await ask(running)
        assert text.startswith(EVENTS[0])
        assert error_code(text) == "worker_lost"
        assert not running.workers[1].seen


@pytest.mark.parametrize("answer", [json_answer(b"{}", 429), json_answer(b"{}", 400), journaled()])
async def test_who_cannot_continue_is_passed_over(answer: Answer) -> None:
    async with system(0, 0, 3) as running:
        first, second, third = running.workers
        first.answer, second.answer, third.answer = journaled(*FRAMES[:2], then="break"), answer, continuing
        assert await ask(running) == WHOLE


@pytest.mark.parametrize("begun", [0, 2])
async def test_a_silent_worker_is_given_up(begun: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries, "SILENCE", 0.2)
    async with system(1, 2) as running:
        p, stopped, other = running.workers
        p.answer = hang
        stopped.answer = journaled(*FRAMES[:begun], then="hang") if begun else hang
        other.answer = continuing
        asking = asyncio.create_task(ask(running))
        await stopped.asked.wait()
        stopped.info_delay = 5.0
        await running.look()
        assert await asking == WHOLE
        async with asyncio.timeout(1):
            await stopped.dropped.wait()  # so it drops the request when it wakes up
        assert ("continued" if begun else "retried") in await stamps(running)


@pytest.mark.parametrize("begun", [0, 2])
async def test_a_silent_connection_is_given_up(begun: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its worker answers heartbeats; it is told that the request is over, since it may not see that."""
    monkeypatch.setattr(upstreams, "SILENCE", 0.2)
    async with system(0, 0, 2) as running:
        silent, other = running.workers
        silent.answer = journaled(*FRAMES[:begun], then="hang") if begun else hang
        other.answer = continuing
        async with asyncio.timeout(2):
            assert await ask(running) == WHOLE
            await until(lambda: len(silent.seen) == 2)
        assert ALIVE_HEADER in silent.seen[0].headers
        assert (silent.seen[1].path, silent.seen[1].body) == ("/abort_request", b'{"rid":"mine"}')
        assert silent.seen[1].headers[ATTEMPT_HEADER] == "0"
        assert ("continued" if begun else "retried") in await stamps(running)
        await running.look()
        assert [worker.state for worker in running.router.registry.workers] == ["ready", "ready"]


async def test_signs_of_life_keep_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstreams, "SILENCE", 0.2)

    async def slow(worker: ScriptedWorker, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        for piece in FRAMES:
            for _ in range(4):
                await asyncio.sleep(0.06)
                await send({"type": "http.response.body", "body": b":0 \n", "more_body": True})
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async with system(0, 0, 2) as running:
        running.workers[0].answer = slow
        assert await ask(running) == WHOLE
        assert "continued" not in await stamps(running)


async def test_a_client_that_leaves_a_continued_stream_ends_it() -> None:
    async with system(0, 0, 2) as running:
        first, second = running.workers
        first.answer, second.answer = journaled(FRAMES[0], then="break"), journaled(FRAMES[1], then="hang")
        async with running.client.post(PATH, data=BODY) as reply:
            await until(lambda: bool(second.seen))
            reply.close()
        async with asyncio.timeout(1):
            await second.dropped.wait()


def boundary(error: EngineFailed | Unavailable) -> bytes:
    """What a worker's boundary says in the middle of a stream."""
    return b"data: " + error_object(error) + b"\n\n" + DONE


async def test_a_worker_that_shuts_down_is_a_lost_one() -> None:
    async with system(0, 0, 2) as running:
        running.workers[0].answer = journaled(*FRAMES[:2], boundary(Unavailable("the server is shutting down")))
        running.workers[1].answer = continuing
        assert await ask(running) == WHOLE


@pytest.mark.parametrize("size", [1, 1000])
async def test_any_other_error_of_the_worker_is_the_answer(size: int) -> None:
    error = boundary(EngineFailed("it went wrong"))
    async with system(0, 0, 2) as running:
        pieces: Sequence[bytes] = [error[i : i + size] for i in range(0, len(error), size)]
        running.workers[0].answer = journaled(*FRAMES[:2], *pieces)
        assert await ask(running) == b"".join(EVENTS[:2]) + error
        assert not running.workers[1].seen


async def test_long_journals_pass() -> None:
    many = [frame(b"data: %d\n\n" % n, b"[[0,[%d],null,0]]" % n) for n in range(100_000)]
    async with system(0, 0, 2) as running:
        first, second = running.workers
        first.answer = journaled(*(b"".join(many[i : i + 1000]) for i in range(0, len(many), 1000)), then="break")
        second.answer = journaled(frame(DONE))
        text = await ask(running)
        assert text == b"".join(b"data: %d\n\n" % n for n in range(100_000)) + DONE
        lines, body = parts(second.seen[0])
        assert (len(lines), body) == (100_000, BODY)
