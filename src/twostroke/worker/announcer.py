"""Tells routers that this worker is there, again and again: a router that was restarted knows it again in a second."""

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

import aiohttp

from twostroke.messages import SECRET_HEADER, Join, Leave, encode

log = logging.getLogger(__name__)

SECONDS = 1.0  # between announcements
_TIMEOUT = aiohttp.ClientTimeout(total=5.0)  # a router asks us back before it answers
_LEAVE_TIMEOUT = aiohttp.ClientTimeout(total=1.0)  # whoever does not hear it finds out
_MAX_REPLY = 64 << 10  # bytes


class Announcer:
    """Announces one worker to its routers from when it is made until ``close``."""

    def __init__(
        self, session: aiohttp.ClientSession, routers: Sequence[str], join: Callable[[], Join], secret: str
    ) -> None:
        """``join`` makes the announcement, as things are."""
        self._session = session
        self._routers = [router.rstrip("/") for router in routers]
        self._join = join
        self._headers = {SECRET_HEADER: secret} if secret else {}
        self._now = asyncio.Event()
        self._said: dict[str, str] = {}  # how each router answered last
        self._tasks = [asyncio.create_task(self._announce(router)) for router in self._routers]

    def announce(self) -> None:
        """Something has changed: say so now."""
        self._now.set()

    async def leave(self) -> None:
        """Say good-bye, and nothing more."""
        self.close()
        join = self._join()
        message = encode(Leave(join.url, join.instance))
        posts = (self._post(f"{router}/internal/leave", message, _LEAVE_TIMEOUT) for router in self._routers)
        await asyncio.gather(*posts)

    def close(self) -> None:
        """Announce no more."""
        for task in self._tasks:
            task.cancel()

    async def _announce(self, router: str) -> None:
        while True:
            said = await self._post(f"{router}/internal/join", encode(self._join()), _TIMEOUT)
            if said and said != self._said.get(router):
                log.warning("the router at %s does not take this worker: %s", router, said)
            self._said[router] = said
            self._now.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(SECONDS):
                    await self._now.wait()

    async def _post(self, url: str, message: bytes, limit: aiohttp.ClientTimeout) -> str:
        """Empty, or why it was in vain."""
        try:
            async with self._session.post(url, data=message, headers=self._headers, timeout=limit) as reply:
                body = await reply.content.read(_MAX_REPLY)
                return "" if reply.status == 200 else _reason(body) or f"status {reply.status}"
        except (aiohttp.ClientError, OSError) as error:
            return str(error) or type(error).__name__


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
