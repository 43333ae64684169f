"""One scheme, running: its processes, from start to stop."""

import asyncio
import secrets
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import aiohttp

from twostroke import config
from twostroke.bench.schemes import Scheme
from twostroke.children import Child
from twostroke.up import GRACE_SECONDS, LOOPBACK, free_ports

START_SECONDS = 900.0  # loading and compiling a large model takes minutes
_STOP_SECONDS = GRACE_SECONDS * 2 + 5  # ``up`` itself waits for its router and then for its workers
_LOOK_SECONDS = 0.2


class SystemDied(Exception):
    """A process of the scheme ended while it was needed. The text says which, and its last words."""


class System:
    """The processes of a scheme."""

    def __init__(self, url: str, children: Sequence[Child]) -> None:
        self.url = url
        self._children = children

    async def died(self) -> str:
        """Waits for the first process that ends; its epitaph."""
        ends = {child.ended: child for child in self._children}
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        return ends[done.pop()].epitaph()


@asynccontextmanager
async def running(
    scheme: Scheme, arguments: Callable[[str, int], list[str]], say: Callable[[str], None]
) -> AsyncIterator[System]:
    """Start a scheme, wait until it is ready, and stop it when the block ends, however it ends.

    ``arguments`` makes the command line of ``up`` of a scratch directory and a port.

    Raises:
        SystemDied: it did not get ready.
    """
    port, beside = free_ports(2)
    async with AsyncExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="twostroke-bench-"))
        children: list[Child] = []
        stack.push_async_callback(_stop, children)
        environment = config.child_environment(config.cluster_secret() or secrets.token_hex(32))
        up = [*arguments(scratch, beside), "--port", str(port)]
        for line in (*scheme.companions(scratch, beside), up):
            children.append(await Child.start(line[0], line, environment, lambda _, text: say(text)))
        system = System(f"http://{LOOPBACK}:{port}", children)
        await _until_ready(system)
        yield system


async def _until_ready(system: System) -> None:
    died = asyncio.create_task(system.died())
    deadline = time.monotonic() + START_SECONDS
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            while not await _answers(session, f"{system.url}/ready"):
                if died.done():
                    raise SystemDied(died.result())
                if time.monotonic() > deadline:
                    raise SystemDied(f"it is not ready after {START_SECONDS:.0f} s")
                await asyncio.wait([died], timeout=_LOOK_SECONDS)
    finally:
        died.cancel()


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    with suppress(aiohttp.ClientError, OSError, TimeoutError):
        async with session.get(url) as reply:
            return reply.status == 200
    return False


async def _stop(children: Sequence[Child]) -> None:
    """In the reverse order of starting. Cancelling this (a second Ctrl-C) kills: children die with their parents."""
    try:
        for child in reversed(children):
            child.signal(signal.SIGTERM)
            await asyncio.wait([child.ended], timeout=_STOP_SECONDS)
    finally:
        for child in children:
            child.signal(signal.SIGKILL)
