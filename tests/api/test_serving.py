"""Sockets, and signals that end a server."""

import asyncio
import gc
import signal
import socket
import sys

import aiohttp
import pytest

from twostroke.api.serving import bind, settled
from twostroke.errors import PortInUse, StartupError


def test_a_taken_port() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(PortInUse, match=f"port {port} on 127.0.0.1 is in use"):
            bind("127.0.0.1", port)
    bind("127.0.0.1", port).close()


def test_addresses_that_cannot_be() -> None:
    for host, port in (("no host", 0), ("127.0.0.1", 70_000)):
        with pytest.raises(StartupError, match="cannot listen"):
            bind(host, port)


def test_what_is_settled_is_not_looked_through_again() -> None:
    before = gc.get_threshold()
    try:
        settled()
        assert gc.get_freeze_count() > 10_000
        assert len(gc.get_objects()) < 10_000
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


_SERVER = """
import asyncio
from starlette.responses import PlainTextResponse
from twostroke.api.serving import bind, serve
sock = bind("127.0.0.1", 0)
print("listening", sock.getsockname()[1], flush=True)
asyncio.run(serve(PlainTextResponse("hello"), sock, shutdown_seconds=1))
print("cleaned up")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_leaves_time_to_clean_up(number: signal.Signals) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _SERVER, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    port = await asyncio.wait_for(_port_of(process), 60)
    async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/") as response:
        assert await response.text() == "hello"  # so the signal handlers are in place
    process.send_signal(number)
    assert await asyncio.wait_for(process.stdout.read(), 60) == b"cleaned up\n"
    assert await process.wait() == 0


async def _port_of(process: asyncio.subprocess.Process) -> int:
    assert process.stdout is not None
    return int((await process.stdout.readline()).split()[1])


def test_ipv6() -> None:
    if socket.has_ipv6:
        try:
            bind("::1", 0).close()
        except PortInUse:
            raise
        except StartupError:
            pytest.skip("no IPv6 here")


_DRAINING = """
import asyncio
from twostroke.api.http import reply
from twostroke.api.serving import bind, serve

async def app(scope, receive, send):
    if scope["path"] == "/hang":
        print("hanging", flush=True)
        await asyncio.Event().wait()
    await reply(send, b"hello")

sock = bind("127.0.0.1", 0)
print("listening", sock.getsockname()[1], flush=True)
asyncio.run(serve(app, sock, shutdown_seconds=60, drain=lambda: print("draining", flush=True)))
print("over", flush=True)
"""


async def test_the_first_signal_drains_and_the_second_ends_it_all_at_once() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _DRAINING, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    async with aiohttp.ClientSession() as http, asyncio.timeout(60):
        url = f"http://127.0.0.1:{await _port_of(process)}"
        hanging = asyncio.create_task(http.post(f"{url}/hang"))
        assert await process.stdout.readline() == b"hanging\n"
        process.send_signal(signal.SIGTERM)
        assert await process.stdout.readline() == b"draining\n"
        async with http.get(url) as response:
            assert await response.text() == "hello"  # all is served on
        process.send_signal(signal.SIGTERM)
        assert await process.stdout.read() == b"over\n"
        assert await process.wait() == 0
        hanging.cancel()
