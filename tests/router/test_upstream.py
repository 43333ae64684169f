"""The client of the token path, against servers that behave and servers that do not."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from tests.router.scripted import until
from twostroke.errors import BadRequest
from twostroke.router import upstream as upstreams
from twostroke.router.upstream import Silent, Upstream

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEADERS = {"content-type": "application/json", "x-request-id": "mine"}


async def request_of(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    size = next(int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("content-length"))
    return head, await reader.readexactly(size)


class Server:
    def __init__(self, url: str) -> None:
        self.url = url
        self.connections = 0
        self.closed = asyncio.Event()


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[tuple[Server, Upstream]]:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        try:
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            server.closed.set()
            writer.close()

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    server, upstream = Server(f"http://127.0.0.1:{port}"), Upstream()
    try:
        yield server, upstream
    finally:
        upstream.close()
        listening.close()


async def echoing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        head, body = await request_of(reader)
        reply = head.encode() + body
        writer.write(b"HTTP/1.1 201 Created\r\nX-Some: Thing\r\ncontent-length: %d\r\n\r\n%b" % (len(reply), reply))


async def post(upstream: Upstream, url: str, body: bytes = b"{}") -> tuple[int, bytes]:
    async with asyncio.timeout(10), upstream.post(url, "/v1/completions?x=1", HEADERS, body) as reply:
        return reply.status, await reply.read()


async def test_a_request_and_its_reply_on_a_connection_that_is_kept() -> None:
    async with serving(echoing) as (server, upstream):
        for _ in range(3):
            async with upstream.post(server.url, "/v1/completions?x=1", HEADERS, b"\x00body") as reply:
                assert (reply.status, reply.headers["x-some"], reply.streams) == (201, "Thing", False)
                text = await reply.read()
                assert text.startswith(b"POST /v1/completions?x=1 HTTP/1.1\r\nhost: 127.0.0.1:")
                assert b"\r\nx-request-id: mine\r\n" in text
                assert text.endswith(b"\r\n\r\n\x00body")
        assert server.connections == 1
        await asyncio.gather(*(post(upstream, server.url) for _ in range(5)))
        assert server.connections == 5


async def test_a_reply_that_nobody_has_read_is_not_the_next_ones() -> None:
    """Its client left when it was here already. Nobody else may get any of it."""
    async with serving(echoing) as (server, upstream):
        for leave in (True, False):
            async with asyncio.timeout(10), upstream.post(server.url, "/x", HEADERS, b"of %d" % leave) as reply:
                await until(lambda reply=reply: reply._connection.over)  # type: ignore[misc]
                text = b"" if leave else await reply.read()
        assert text.startswith(b"POST /x HTTP/1.1\r\n")
        assert text.count(b"POST") == 1
        assert text.endswith(b"of 0")
        assert server.connections == 2


async def test_large_bodies_both_ways() -> None:
    async with serving(echoing) as (server, upstream):
        body = bytes(range(256)) * (40 << 10)  # 10 MiB, more than what may lie unread
        assert (await post(upstream, server.url, body))[1].endswith(body)


async def test_pieces_come_as_they_are_sent_and_leaving_closes() -> None:
    async def trickling(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
        )
        writer.write(b"transfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        await writer.drain()
        await reader.read()

    async with serving(trickling) as (server, upstream), asyncio.timeout(10):
        async with upstream.post(server.url, "/", HEADERS, b"") as reply:
            assert reply.streams
            assert await reply.piece() == b"one"
        await server.closed.wait()
        server.closed.clear()
        waiting = asyncio.create_task(post(upstream, server.url))
        await until(lambda: server.connections == 2)
        waiting.cancel()
        await server.closed.wait()


async def pieces(writer: asyncio.StreamWriter, *said: bytes) -> None:
    """Chunks of a reply, each on its way by itself."""
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    for one in said:
        writer.write(b"%x\r\n%b\r\n" % (len(one), one))
        await writer.drain()
        await asyncio.sleep(0.02)
    writer.write(b"0\r\n\r\n")


def all_of(whole: bytearray) -> Callable[[bytes], bool]:
    """Takes every piece."""

    def sink(piece: bytes) -> bool:
        whole.extend(piece)
        return True

    return sink


async def test_what_is_poured_goes_on_at_once_and_what_is_not_taken_is_read() -> None:
    async def trickling(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await request_of(reader)
            await pieces(writer, b"one", b"two", b"three", b"four", b"five")

    taken: list[bytes] = []

    def sink(piece: bytes) -> bool:
        if len(taken) == 2:
            return False
        taken.append(piece)
        return True

    async with serving(trickling) as (server, upstream), asyncio.timeout(10):
        async with upstream.post(server.url, "/", HEADERS, b"") as reply:
            await reply.pour(sink)
            assert taken == [b"one", b"two"]
            assert await reply.read() == b"threefourfive"
        async with upstream.post(server.url, "/", HEADERS, b"") as reply:
            whole = bytearray()
            await reply.pour(all_of(whole))
            assert whole == b"onetwothreefourfive"
            assert await reply.piece() == b""
        assert server.connections == 1


async def test_who_refuses_what_is_poured_breaks_the_connection() -> None:
    async def trickling(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        await pieces(writer, b"one", b"two")

    def sink(piece: bytes) -> bool:
        raise ConnectionError(f"{piece.decode()} is no such stream")

    async with serving(trickling) as (server, upstream), asyncio.timeout(10):
        async with upstream.post(server.url, "/", HEADERS, b"") as reply:
            with pytest.raises(ConnectionError, match="one is no such stream"):
                await reply.pour(sink)
        await server.closed.wait()


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\ncontent-le", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhal", "middle of its reply"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhal", "middle of its reply"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nnonsense\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000, "not HTTP"),
        (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", "not HTTP"),
    ],
)
async def test_whatever_is_not_a_whole_reply_is_a_broken_connection(reply: bytes, words: str) -> None:
    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(reply)
        await writer.drain()

    async with serving(broken) as (server, upstream):
        with pytest.raises(ConnectionError, match=words):
            await post(upstream, server.url)
        with pytest.raises(ConnectionError):  # the connection was not kept
            await post(upstream, server.url)
        assert server.connections == 2


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 102 Processing\r\n\r\n", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhal"]
)
async def test_a_connection_that_goes_silent(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstreams, "SILENCE", 0.12)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(said)
        await reader.read()

    async with serving(silent) as (server, upstream):
        with pytest.raises(Silent, match="silent"):
            await post(upstream, server.url)
        await server.closed.wait()


async def test_interim_responses_are_signs_of_life_and_who_does_not_read_is_not_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upstreams, "SILENCE", 0.2)

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        for _ in range(8):
            await asyncio.sleep(0.06)
            writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\no")
        await asyncio.sleep(0.4)  # in which the client does something else
        writer.write(b"k")

    async with serving(slow) as (server, upstream), upstream.post(server.url, "/", HEADERS, b"") as reply:
        assert reply.status == 200
        assert await reply.piece() == b"o"
        await asyncio.sleep(0.35)
        assert await reply.piece() == b"k"


async def test_a_connection_that_the_server_ends_is_not_used_again() -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok")

    async def silently(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    for serve in (once, silently):
        async with serving(serve) as (server, upstream):
            for number in range(3):
                assert await post(upstream, server.url) == (200, b"ok")
                assert server.connections == number + 1
                await server.closed.wait()
                await asyncio.sleep(0.05)


async def test_more_than_was_asked_for_ends_the_connection() -> None:
    async def talkative(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await asyncio.sleep(0.05)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
        await reader.read()

    async with serving(talkative) as (server, upstream):
        assert await post(upstream, server.url) == (200, b"ok")
        await server.closed.wait()
        assert await post(upstream, server.url) == (200, b"ok")


async def test_no_server_and_no_header_of_two_lines() -> None:
    upstream = Upstream()
    with pytest.raises(OSError):
        await post(upstream, "http://127.0.0.1:1")
    async with serving(echoing) as (server, upstream):
        with pytest.raises(BadRequest):
            async with upstream.post(server.url, "/", {"x": "a\r\nb: c"}, b""):
                pass
