"""A TCP connection in a thread: every wait has a deadline, and another thread can end it at any time.

``Listener`` is where such connections arrive, each served in a thread of its own.
"""

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from msgspec import Struct

from twostroke.links.framing import HEADER, Framing, Proof, Refused, Wanted

log = logging.getLogger(__name__)
MAX_CONNECTIONS = 256  # of a listener
_REFUSAL_SECONDS = 2.0
_TICK = struct.pack("@ll", 0, 100_000)  # 0.1 s, a timeval: how often a call that waits looks at the clock


class Wire:
    """One connected socket. Used by one thread; ``abort`` may come from any other."""

    def __init__(self, tcp: socket.socket, framing: Framing) -> None:
        """Takes the socket over, connected or not. ``framing``: what is spoken on it."""
        self.framing = framing
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
        self, head: bytes | memoryview, body: memoryview | None = None, *, seconds: float, silence: float | None = None
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

    def say(self, content: Struct, seconds: float) -> None:
        """Send a message. Errors as for ``send``."""
        self.send(self.framing.message(content), seconds=seconds)

    def hear(self, wanted: type[Wanted], deadline: float) -> Wanted:
        """The message that is the next frame. Raises the framing's error if it is not, and ``OSError`` if the
        connection broke, or the message was not there by the deadline.
        """
        return self.framing.parse_message(self.body(deadline), wanted)

    def body(self, deadline: float) -> bytearray:
        """What the next frame, a message, holds. Errors as for ``hear``."""
        _, size = self.framing.parse_header(self.take(HEADER.size, deadline))
        return self.take(size, deadline)

    def greet(self, hello: Struct, wanted: type[Wanted], secret: str, seconds: float) -> Wanted:
        """As the client: both ends prove that they know the secret; the server's challenge. Errors as for ``hear``."""
        deadline, framing = time.monotonic() + seconds, self.framing
        self.say(hello, seconds)
        challenge = self.hear(wanted, deadline)
        self.say(framing.prove("client", secret, hello, challenge), seconds)
        framing.check_proof(self.hear(Proof, deadline), framing.prove("server", secret, hello, challenge))
        return challenge

    def admit(self, hello: Struct, challenge: Struct, secret: str, seconds: float) -> None:
        """As the server, to whom a client has said hello: the same. Errors as for ``hear``."""
        framing = self.framing
        self.say(challenge, seconds)
        proof = self.hear(Proof, time.monotonic() + seconds)
        framing.check_proof(proof, framing.prove("client", secret, hello, challenge))
        self.say(framing.prove("server", secret, hello, challenge), seconds)

    def refuse(self, reason: str) -> None:
        """Say why, and nothing more."""
        try:
            self.say(Refused(reason[:1024]), _REFUSAL_SECONDS)
            self._hang_up(_REFUSAL_SECONDS)
        except OSError as error:
            log.debug("a refusal was not heard: %s", error)

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

    def abort(self) -> None:
        """Have whoever waits on it fail at once."""
        with self._closing, suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back."""
        with self._closing:
            self._socket.close()

    def _hang_up(self, seconds: float) -> None:
        """Wait for the peer to hang up: a socket that is closed with bytes unread takes back what it said last."""
        deadline = time.monotonic() + seconds
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline:
                with suppress(BlockingIOError):
                    if not self._socket.recv(1 << 16):
                        return


class Listener:
    """Takes connections, and has each served in a thread of its own."""

    def __init__(self, listening: socket.socket, framing: Framing, serve: Callable[[Wire], None], name: str) -> None:
        """Takes the socket over. ``serve`` serves one connection until it ends, by ``OSError``, or is to be refused, by
        the framing's error. ``name``: of the threads.
        """
        listening.setblocking(True)  # ``accept`` waits, whoever made it for an event loop
        self.threads: dict[Wire, threading.Thread] = {}
        self._listening = listening
        self._framing = framing
        self._serve = serve
        self._name = name
        self._accepting = threading.Thread(target=self._accept, name=name, daemon=True)
        self._closed = False

    def start(self) -> None:
        """Answer whoever connects."""
        self._accepting.start()

    def close(self, seconds: float | None = None) -> None:
        """End every connection. When this returns, nobody is served any more, unless that took longer than so long."""
        self._closed = True
        if self._accepting.is_alive():
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes ``accept``
            self._accepting.join(seconds)
        self._listening.close()
        for wire in list(self.threads):
            wire.abort()
        for thread in list(self.threads.values()):
            thread.join(seconds)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connected, _ = self._listening.accept()
            except OSError as error:
                if not self._closed:  # out of files, say: others may be closed soon
                    log.warning("%s cannot take a connection: %s", self._name, error)
                    time.sleep(0.1)
                continue
            if len(self.threads) >= MAX_CONNECTIONS:
                connected.close()
                continue
            wire = Wire(connected, self._framing)
            self.threads[wire] = threading.Thread(target=self._run, args=[wire], name=self._name, daemon=True)
            self.threads[wire].start()

    def _run(self, wire: Wire) -> None:
        try:
            self._serve(wire)
        except OSError as error:
            log.debug("a connection of %s ended: %s", self._name, error)
        except self._framing.error as error:
            log.info("a client of %s was refused: %s", self._name, error)
            wire.refuse(str(error))
        finally:
            wire.close()
            del self.threads[wire]


def _limit(deadline: float, silence: float | None) -> float:
    """When to give up if nothing happens until then."""
    return deadline if silence is None else min(deadline, time.monotonic() + silence)


def _check(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError("too slow, or silent")
