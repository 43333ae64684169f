"""A load generator on bare sockets: it must cost less than the router that it measures."""

import asyncio
import time
from collections.abc import Sequence
from typing import cast


def post(url: str, path: str, body: bytes) -> tuple[str, int, bytes]:
    """Host, port, and the bytes of a request."""
    host, _, port = url.removeprefix("http://").partition(":")
    head = f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\ncontent-length: "
    return host, int(port), head.encode() + b"%d\r\n\r\n%b" % (len(body), body)


class Caller(asyncio.Protocol):
    """One connection that asks the same again and again."""

    def __init__(self, request: bytes) -> None:
        self.replies = 0
        self.failed = 0
        self.closed = asyncio.get_running_loop().create_future()
        self._request = request
        self._transport: asyncio.Transport
        self._buffer = b""
        self._done: asyncio.Future[float] | None = None
        self._first: asyncio.Future[float] | None = None
        self._again = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def start(self) -> None:
        """Ask until ``stop``."""
        self._again = True
        self._transport.write(self._request)

    def stop(self) -> None:
        """Leave."""
        self._again = False
        self._transport.close()

    async def first_event(self) -> float:
        """Ask for a stream; seconds to its first event. The rest is read and dropped."""
        self._first = asyncio.get_running_loop().create_future()
        start = time.perf_counter()
        self._transport.write(self._request)
        return await self._first - start

    async def end(self) -> None:
        """Until the stream is over."""
        self._done = asyncio.get_running_loop().create_future()
        await self._done

    def data_received(self, data: bytes) -> None:
        if self._again:
            self._whole(data)
            return
        if self._first is not None and not self._first.done() and b"data: " in data:
            self._first.set_result(time.perf_counter())
        if self._done is not None and not self._done.done() and data.endswith(b"0\r\n\r\n"):
            self._done.set_result(time.perf_counter())

    def _whole(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        head = self._buffer[:end].lower()
        at = head.index(b"content-length:") + 15
        size = int(head[at : head.index(b"\r\n", at)])
        if len(self._buffer) < end + size:
            return
        self.replies += 1
        self.failed += not head.startswith(b"http/1.1 200")
        self._buffer = b""
        self._transport.write(self._request)


async def connect(url: str, path: str, body: bytes, count: int) -> list[Caller]:
    """Connections that will ask for ``body``."""
    host, port, request = post(url, path, body)
    loop = asyncio.get_running_loop()
    return [(await loop.create_connection(lambda: Caller(request), host, port))[1] for _ in range(count)]


async def throughput(url: str, path: str, body: bytes, *, connections: int, seconds: float) -> float:
    """Requests a second that this many clients get answered, each with one at a time.

    Raises:
        RuntimeError: some reply was an error.
    """
    callers = await connect(url, path, body, connections)
    for caller in callers:
        caller.start()
    await asyncio.sleep(seconds / 4)
    before, start = sum(caller.replies for caller in callers), time.perf_counter()
    await asyncio.sleep(seconds)
    rate = (sum(caller.replies for caller in callers) - before) / (time.perf_counter() - start)
    await close(callers)
    if failed := sum(caller.failed for caller in callers):
        raise RuntimeError(f"{failed} requests failed at {url}")
    return rate


async def close(callers: Sequence[Caller]) -> None:
    """Leave them all."""
    for caller in callers:
        caller.stop()
    await asyncio.gather(*(caller.closed for caller in callers))
