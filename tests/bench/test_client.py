"""The load generator against real sockets."""

import asyncio

import pytest
from starlette.types import Send

from tests.bench.serving import CHUNK, STREAM, Server, refuse, serving, two_tokens
from twostroke.bench.client import Client, Record, judge
from twostroke.bench.dialect import Asking, Dialect
from twostroke.bench.workload import Item

ITEMS = [Item([10 + i, 20, 30], 2, 0.01 * i) for i in range(5)]


async def test_a_slow_server_does_not_slow_the_sending() -> None:
    """The server answers nobody until everybody has asked: a client that waits for answers would never get there."""

    async def answer(server: Server, send: Send) -> None:
        async with server.arrived:
            await server.arrived.wait_for(lambda: len(server.bodies) == len(ITEMS))
        await two_tokens(server, send)

    ended: list[Item] = []
    async with serving(answer) as server:
        load = await Client(server.url, Asking(salt="s"), timeout=20).load(ITEMS, "run", ended.append)
    assert [record.error for record in load.records] == [""] * 5
    assert [record.id for record in load.records] == [f"run-{i}" for i in range(5)] == sorted(server.ids)
    assert len(ended) == 5
    for record, item in zip(load.records, ITEMS, strict=True):
        assert record.start >= item.at == record.planned
        assert (record.output_len, record.input_len, len(record.chunks)) == (2, 3, 2)
        assert 0 < record.ttft <= record.e2el
    assert load.duration >= load.records[-1].start + load.records[-1].e2el
    body = min(server.bodies, key=str)
    assert body == {
        "prompt": [10, 20, 30], "max_tokens": 2, "temperature": 0, "stream": True, "cache_salt": "s",
        "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dialect", "text", "path", "prompt"),
    [
        ("completions", True, "/v1/completions", {"prompt": "da"}),
        ("chat", False, "/v1/chat/completions", {"messages": [{"role": "user", "content": "da"}]}),
        ("generate", False, "/generate", {"input_ids": [5]}),
        ("generate", True, "/generate", {"text": "da"}),
    ],
)
async def test_dialects(dialect: Dialect, text: bool, path: str, prompt: dict[str, object]) -> None:
    async with serving(two_tokens) as server:
        asking = Asking(dialect, model=None if dialect == "generate" else "m", text=text)
        await Client(server.url, asking).load([Item([5], 7, 0.0)], "run")
    assert server.paths == [path]
    (body,) = server.bodies
    assert prompt.items() <= body.items()
    if dialect == "generate":
        assert body["sampling_params"] == {"max_new_tokens": 7, "temperature": 0, "ignore_eos": True}
    else:
        assert (body["max_tokens"], body["model"]) == (7, "m")


async def cut(server: Server, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": STREAM})
    await send({"type": "http.response.body", "body": CHUNK})


async def broken(server: Server, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": STREAM})
    await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
    raise ConnectionError("scripted")


async def silent(server: Server, send: Send) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("answer", "error"),
    [(refuse, "status 503"), (cut, "ended early"), (broken, "Error"), (silent, "no complete answer within 0.2 s")],
)
async def test_failures_are_records(answer: object, error: str) -> None:
    async with serving(answer) as server:  # type: ignore[arg-type]
        load = await Client(server.url, Asking(), timeout=0.2).load(ITEMS[:2], "run")
    assert all(error in record.error for record in load.records)


async def test_nobody_listens() -> None:
    load = await Client("http://127.0.0.1:9", Asking()).load(ITEMS[:1], "run")
    assert "Connect" in load.records[0].error


async def test_a_cancelled_run_drops_its_requests() -> None:
    async with serving(silent) as server:
        running = asyncio.create_task(Client(server.url, Asking()).load(ITEMS, "run"))
        async with server.arrived:
            await server.arrived.wait_for(lambda: len(server.bodies) == 5)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert len(asyncio.all_tasks()) < 20


def record(late: float, ttft: float) -> Record:
    return Record("r", 1.0, 1.0 + late, 10, 2, 2, [ttft, ttft + 1])


def test_the_generator_says_when_it_was_the_limit() -> None:
    assert not judge([record(0.001, 0.01)] * 10, cpu=0.1, duration=10).limited
    assert not judge([record(0.02, 1.0)] * 10, cpu=0.1, duration=10).limited  # 2 % of the TTFT
    assert judge([record(0.2, 1.0)] * 10, cpu=0.1, duration=10).limited
    assert judge([record(0.0, 1.0)] * 10, cpu=9.0, duration=10).limited
    judged = judge([record(0.25, 1.0)] * 10, cpu=0.1, duration=10)
    assert judged.late_ms_p50 == pytest.approx(250)
    assert judged.late_ms_max == pytest.approx(250)
    assert judged.cpu_us_per_request == pytest.approx(10_000)
    assert judged.cpu_us_per_token == pytest.approx(5_000)
