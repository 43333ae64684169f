"""A faulty network for tests: a TCP proxy that cuts, slows down, silences, or flips bits of what it passes on."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class Faults:
    """What goes wrong with bytes of each connection in one direction. Positions count from the connection's start, or
    from where these faults were set up, or from the piece in which the client says ``where``.
    """

    cut: int | None = None  # so many bytes pass, then the connection breaks
    flip: tuple[int, ...] = ()  # a bit of these bytes, once each
    bit: int = 0  # which bit it is
    rate: float | None = None  # bytes a second
    stall: int | None = None  # so many bytes pass, then nothing more does
    half_open: bool = False  # once stalled, nothing passes either way: neither end learns that the other one leaves
    strike: tuple[int, Callable[[], None]] | None = None  # so many bytes pass, then this happens, once
    where: bytes = b""  # only on connections whose client says this


@dataclass(eq=False)
class _Connection:
    """A client's connection and ours to the target."""

    ends: tuple[socket.socket, socket.socket]
    chosen: bytes = b""  # which ``where`` the client said last
    times: int = 0  # that it said so
    silenced: bool = False

    def shut(self) -> None:
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for end in self.ends:
            end.close()


@dataclass
class Proxy:
    """Passes connections on to ``target``. Faults and target may be replaced at any time."""

    target: tuple[str, int]
    up: Faults = field(default_factory=Faults)  # client → server
    down: Faults = field(default_factory=Faults)
    passed: list[int] = field(default_factory=lambda: [0, 0])  # bytes up, down
    connections: int = 0
    port: int = 0
    seen: bytearray = field(default_factory=bytearray)  # all that clients sent
    rewrite: Callable[[bytearray], bytearray] = lambda data: data  # of what the server says; the length stays
    _open: dict[_Connection, threading.Thread] = field(default_factory=dict)

    def hang_up(self) -> None:
        """Break every connection, and wait until none is left."""
        for connection, thread in list(self._open.items()):
            connection.silenced = False
            connection.shut()
            thread.join()

    def _serve(self, connection: _Connection) -> None:
        down = threading.Thread(target=self._pump, args=[connection, 1])
        down.start()
        self._pump(connection, 0)
        down.join()
        connection.close()
        self._open.pop(connection, None)

    def _pump(self, connection: _Connection, way: int) -> None:
        source, sink = connection.ends if way == 0 else connection.ends[::-1]
        faults, times, at = (self.up, self.down)[way], 0, 0
        with suppress(OSError):
            while data := bytearray(source.recv(1 << 16 if faults.rate is None else max(1, int(faults.rate / 50)))):
                if way == 0:
                    self._note(connection, data)
                else:
                    data = self.rewrite(data)
                now = (self.up, self.down)[way]
                if now is not faults or (now.where and connection.times != times):
                    faults, times, at = now, connection.times, 0
                if faults.where not in (b"", connection.chosen):
                    self._send(sink, data, way)
                    continue
                if self._broken(connection, sink, faults, at, data, way):
                    break
                at += len(data)
                if faults.rate is not None:
                    time.sleep(len(data) / faults.rate)
        if not connection.silenced:
            connection.shut()

    def _note(self, connection: _Connection, data: bytearray) -> None:
        self.seen += data
        for where in {self.up.where, self.down.where} - {b""}:
            if where in data:
                connection.chosen = where
                connection.times += 1

    def _send(self, sink: socket.socket, data: bytearray, way: int) -> None:
        self.passed[way] += len(data)  # before somebody who has them asks
        sink.sendall(data)

    def _broken(
        self, connection: _Connection, sink: socket.socket, faults: Faults, at: int, data: bytearray, way: int
    ) -> bool:
        """Pass on what the faults let pass of ``data``, which begins at position ``at``; whether they end it here."""
        for position in faults.flip:
            if at <= position < at + len(data):
                data[position - at] ^= 1 << faults.bit
                faults.flip = tuple(other for other in faults.flip if other != position)
        if connection.silenced:
            data.clear()
        if faults.stall is not None and at + len(data) > faults.stall:
            del data[max(0, faults.stall - at) :]
            connection.silenced = faults.half_open
        if faults.strike is not None and at + len(data) > faults.strike[0]:
            head, happen = max(0, faults.strike[0] - at), faults.strike[1]
            faults.strike = None
            self._send(sink, data[:head], way)
            happen()
            self._send(sink, data[head:], way)
            return False
        whole = len(data)
        if faults.cut is not None:
            del data[max(0, faults.cut - at) :]
        self._send(sink, data, way)
        return len(data) < whole

    def _run(self, listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listening.accept()
                try:
                    server = socket.create_connection(self.target)
                except OSError:  # nobody is there: the client shall see that too
                    client.close()
                    continue
                connection = _Connection((client, server))
                self.connections += 1
                self._open[connection] = threading.Thread(target=self._serve, args=[connection])
                self._open[connection].start()


@contextmanager
def proxy(target: tuple[str, int], *, up: Faults | None = None, down: Faults | None = None) -> Iterator[Proxy]:
    """A proxy on loopback, at ``port``."""
    passing = Proxy(target, up or Faults(), down or Faults())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        passing.port = listening.getsockname()[1]
        accepting = threading.Thread(target=passing._run, args=[listening])
        accepting.start()
        try:
            yield passing
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            accepting.join()
            passing.hang_up()
