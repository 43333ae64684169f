"""What routers hear of a worker, and when."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import pytest
from aiohttp import web

from twostroke.messages import SECRET_HEADER, Join, Leave
from twostroke.worker import announcer as announcers
from twostroke.worker.announcer import Announcer


class Router:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[Join | Leave] = asyncio.Queue()
        self.secrets: set[str | None] = set()
        self.refusal = b""
        self.url = ""

    async def join(self, request: web.Request) -> web.Response:
        self.secrets.add(request.headers.get(SECRET_HEADER))
        self.heard.put_nowait(msgspec.json.decode(await request.read(), type=Join))
        return web.Response(status=409, body=self.refusal) if self.refusal else web.Response()

    async def leave(self, request: web.Request) -> web.Response:
        self.heard.put_nowait(msgspec.json.decode(await request.read(), type=Leave))
        return web.Response()

    async def next(self) -> Join | Leave:
        async with asyncio.timeout(10):
            return await self.heard.get()


@asynccontextmanager
async def serving(port: int = 0) -> AsyncIterator[Router]:
    router, app = Router(), web.Application()
    app.router.add_post("/internal/join", router.join)
    app.router.add_post("/internal/leave", router.leave)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    router.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield router
    finally:
        await runner.cleanup()


def joining() -> Join:
    return Join("http://w:1", "i", "decode", "ready")


async def test_it_says_so_again_and_again_at_once_when_asked_and_good_bye() -> None:
    async with serving() as router, serving() as other, aiohttp.ClientSession() as session:
        announcer = Announcer(session, [router.url + "/", other.url], joining, "s3cret")
        assert await router.next() == await other.next() == joining()
        assert await router.next() == joining()
        announcer.announce()
        assert await router.next() == joining()
        await announcer.leave()
        while isinstance(said := await router.next(), Join):
            pass
        assert said == Leave("http://w:1", "i")
        await asyncio.sleep(0.05)
        assert router.heard.empty()
        assert router.secrets == {"s3cret"}


async def test_a_router_that_comes_back_hears_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcers, "SECONDS", 0.05)
    async with aiohttp.ClientSession() as session:
        async with serving() as router:
            port = int(router.url.rsplit(":", 1)[1])
            announcer = Announcer(session, [router.url], joining, "")
            await router.next()
        await asyncio.sleep(0.1)
        async with serving(port) as again:
            assert await again.next() == joining()
            announcer.close()


async def test_a_refusal_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(announcers, "SECONDS", 0.01)
    caplog.set_level(logging.WARNING, "twostroke")
    async with serving() as router, aiohttp.ClientSession() as session:
        router.refusal = b'{"error":{"message":"worker a has dtype x, worker b has y"}}'
        announcer = Announcer(session, [router.url], joining, "")
        for _ in range(3):
            await router.next()
        router.refusal = b"nonsense"
        for _ in range(3):
            await router.next()
        announcer.close()
    said = [record.getMessage() for record in caplog.records]
    assert sum("worker a has dtype x, worker b has y" in line for line in said) == 1
    assert sum("status 409" in line for line in said) == 1
