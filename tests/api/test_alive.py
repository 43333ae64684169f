"""Signs of life, over a real socket: who asks for them gets them, nobody else does, and no message is torn by one."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from twostroke.api import alive
from twostroke.api.alive import Alive, _Joining
from twostroke.api.http import EVENT_STREAM, reply
from twostroke.api.serving import bind, serve
from twostroke.messages import ALIVE_HEADER, JOURNAL_HEADER

INTERIM = b"HTTP/1.1 102 Processing\r\n\r\n"
FRAME = b"4\r\n:0 \n\r\n"
QUIET = 0.5  # seconds in which the application says nothing


@asynccontextmanager
async def serving(app: ASGIApp, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    monkeypatch.setattr(alive, "ALIVE_SECONDS", 0.05)
    sock, stop = bind("127.0.0.1", 0), asyncio.Event()
    running = asyncio.create_task(serve(Alive(app), sock, shutdown_seconds=0, stop=stop))
    try:
        yield sock.getsockname()[1]
    finally:
        stop.set()
        await running


async def asked(port: int, *headers: str) -> bytes:
    """All that comes over the wire."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = ["POST / HTTP/1.1", "host: x", "content-length: 0", "connection: close", *headers]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    async with asyncio.timeout(10):
        text = await reader.read()
    writer.close()
    return re.sub(rb"date: [^\r]*\r\n", b"", text)


async def whole(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.sleep(QUIET)
    await reply(send, b"{}", 418)


def streaming(*headers: tuple[bytes, bytes]) -> ASGIApp:
    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [*EVENT_STREAM, *headers]})
        for _ in range(2):
            await asyncio.sleep(QUIET)
            await send({"type": "http.response.body", "body": b":6 \ndata\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return stream


async def test_before_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the status can still be any."""
    async with serving(whole, monkeypatch) as port:
        text = await asked(port, f"{ALIVE_HEADER}: 1")
        assert text.count(INTERIM) >= 2
        assert text.replace(INTERIM, b"") == await asked(port)
        assert text.endswith(b"\r\n\r\n{}")
        assert b"418" in text


async def test_in_a_stream_with_a_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(streaming((JOURNAL_HEADER.encode(), b"1")), monkeypatch) as port:
        text = await asked(port, f"{ALIVE_HEADER}: 1")
        assert text.count(FRAME) >= 4
        assert text.replace(FRAME, b"") == await asked(port)


async def test_no_place_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(streaming(), monkeypatch) as port:
        assert await asked(port, f"{ALIVE_HEADER}: 1") == await asked(port)


class Written(asyncio.Transport):
    """What a transport was told."""

    def __init__(self) -> None:
        self.said: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.said.append(bytes(data))

    def close(self) -> None:
        self.said.append(b"closed")


async def test_a_head_goes_out_with_what_follows_and_waits_for_nothing() -> None:
    head, wire = b"HTTP/1.1 200 OK\r\n\r\n", Written()
    joining = _Joining(wire)
    for piece in (head, b"a", b"b"):
        joining.write(piece)
    assert wire.said == [head + b"a", b"b"]
    joining.write(head)
    await asyncio.sleep(0)
    assert wire.said[2:] == [head]
    joining.write(b"c")
    joining.write(head)
    joining.close()
    await asyncio.sleep(0)
    assert wire.said[3:] == [b"c", head, b"closed"]
