"""A TCP connection in a thread: every wait has a deadline, and another thread can end it at any time."""

import socket
import struct
import threading
import time
from contextlib import suppress

from twostroke.links.frames import HEADER, Wanted, parse_header, parse_message

_TICK = struct.pack("@ll", 0, 100_000)  # 0.1 s, a timeval: how often a call that waits looks at the clock


class Wire:
    """One connected socket. Used by one thread; ``abort`` may come from any other."""

    def __init__(self, tcp: socket.socket) -> None:
        """Takes the socket over, connected or not."""
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A blocking socket whose calls return every tick: one call then moves a whole block, without the GIL.
        tcp.setblocking(True)
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TICK)
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TICK)
        self._socket = tcp
        self._closing = threading.Lock()

    def connect(self, host: str, port: int, seconds: float) -> None:
        """Connect to a numeric address. ``OSError`` if that fails, or takes longer."""
        self._socket.settimeout(seconds)
        self._socket.connect((host, port))
        self._socket.setblocking(True)

    def send(
        self, head: bytes, body: memoryview | None = None, *, seconds: float, silence: float | None = None
    ) -> None:
        """Send all of it. ``OSError`` if the connection broke, takes it no faster than in ``seconds``, or takes nothing
        for ``silence``.
        """
        deadline = time.monotonic() + seconds
        limit = _limit(deadline, silence)
        parts = [memoryview(head)] if body is None else [memoryview(head), body]
        while parts:
            try:
                sent = self._socket.sendmsg(parts)
            except BlockingIOError:
                sent = 0
            if sent:
                limit = _limit(deadline, silence)
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][sent:]
                _check(limit)

    def receive(self, into: memoryview, deadline: float, silence: float | None = None) -> None:
        """Fill ``into``. ``OSError`` if the connection broke, has not given as much by the (monotonic) deadline, or has
        given nothing for ``silence`` seconds.
        """
        limit = _limit(deadline, silence)
        while into:
            try:
                count = self._socket.recv_into(into, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                count = 0
            else:
                if not count:
                    raise ConnectionError("the connection was closed")
                limit = _limit(deadline, silence)
            into = into[count:]
            if into:
                _check(limit)

    def take(self, count: int, deadline: float) -> bytearray:
        """The next ``count`` bytes. Errors as for ``receive``."""
        buffer = bytearray(count)
        self.receive(memoryview(buffer), deadline)
        return buffer

    def message(self, wanted: type[Wanted], deadline: float) -> Wanted:
        """The message that is the next frame.

        Raises:
            HandoverFailed: the peer broke the protocol or refused.
            OSError: the connection broke, or the message was not there by the deadline.
        """
        _, size = parse_header(self.take(HEADER.size, deadline))
        return parse_message(self.take(size, deadline), wanted)

    @property
    def quiet(self) -> bool:
        """Whether the peer has said nothing that was not read, and has not hung up."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def hang_up(self, seconds: float) -> None:
        """Say nothing more, and wait for the peer to hang up: a socket that is closed with bytes unread takes back what
        it said last.
        """
        deadline = time.monotonic() + seconds
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline:
                with suppress(BlockingIOError):
                    if not self._socket.recv(1 << 16):
                        return

    def abort(self) -> None:
        """Have whoever waits on it fail at once."""
        with self._closing, suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back."""
        with self._closing:
            self._socket.close()


def _limit(deadline: float, silence: float | None) -> float:
    """When to give up if nothing happens until then."""
    return deadline if silence is None else min(deadline, time.monotonic() + silence)


def _check(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError("too slow, or silent")
