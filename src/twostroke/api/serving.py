"""The loop that serves an ASGI application: its socket, and how a signal ends it."""

import asyncio
import errno
import gc
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from twostroke.api.alive import HttpProtocol
from twostroke.api.http import KEEP_ALIVE
from twostroke.errors import PortInUse, StartupError

_BACKLOG = 2048
_GARBAGE = 20_000  # objects more than there were, at which a garbage collection begins


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port is known before anything heavy is loaded. Port 0 picks one.

    Raises:
        PortInUse: somebody else listens there.
        StartupError: the address is not one of this machine, or not permitted.
    """
    if not 0 <= port <= 65535:
        raise StartupError(f"cannot listen on port {port}: ports are 0 to 65535")
    sock: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With the protocol left out, asyncio would not know TCP when it sees it and leave Nagle's algorithm on.
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is accepted inherits it
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not for a port left in TIME_WAIT
        sock.bind(address)
        sock.listen(_BACKLOG)  # binding alone would not keep a second process out
    except OSError as error:
        if sock is not None:
            sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"port {port} on {host} is in use; choose another one with --port") from error
        raise StartupError(f"cannot listen on {host} port {port}: {error}") from error
    sock.setblocking(False)
    return sock


async def serve(
    app: ASGIApp,
    sock: socket.socket,
    *,
    shutdown_seconds: float,
    stop: asyncio.Event | None = None,
    drain: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM or ``stop``; then let requests finish for ``shutdown_seconds``, and end the rest.

    With ``drain``, the first signal calls that instead: everything is served on until ``stop``. What is still running
    at the end gets a last error event. A second signal ends it all at once. Returns normally, so the caller can clean
    up and choose its exit status.
    """
    stop = stop or asyncio.Event()
    server = _Server(
        uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            proxy_headers=False,  # who connects is nobody's business here, and it costs every request
            access_log=False,
            log_config=None,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=math.ceil(KEEP_ALIVE) + 2,
            timeout_graceful_shutdown=math.ceil(shutdown_seconds),
        )
    )
    with _signals(server, stop, drain):
        stopping = asyncio.ensure_future(_stop_on(server, stop))
        try:
            await server.serve(sockets=[sock])
            if server.server_state.tasks:  # cancelled by now: let them say so
                await asyncio.wait(server.server_state.tasks, timeout=1.0)
        finally:
            stopping.cancel()
            sock.close()


def settled() -> None:
    """What this process has by now stays: garbage collection leaves it alone from now on. A worker's libraries are
    370,000 objects; to look through them holds up every stream for 0.2 s, or for seconds beside other work.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE)


class _Server(uvicorn.Server):
    """Leaves signals to ``serve``: uvicorn would raise them again at the end, and kill the caller's clean-up."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _stop_on(server: _Server, stop: asyncio.Event) -> None:
    await stop.wait()
    server.should_exit = True


@contextmanager
def _signals(server: _Server, stop: asyncio.Event, drain: Callable[[], None] | None) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    signalled = False

    def on_signal() -> None:
        nonlocal signalled
        server.force_exit = signalled
        if signalled or drain is None:
            stop.set()
        else:
            drain()
        signalled = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
