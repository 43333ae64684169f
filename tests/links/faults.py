"""A faulty network for tests: a TCP proxy that cuts, slows down, or flips bits of what it passes on."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class Faults:
    """What goes wrong with bytes of each connection in one direction; positions count from its start."""

    cut: int | None = None  # so many bytes pass, then the connection breaks
    flip: tuple[int, ...] = ()  # the lowest bit of these bytes, on the first connection only
    bit: int = 0  # which bit it is
    rate: float | None = None  # bytes a second
    stall: int | None = None  # so many bytes pass, then nothing more does


@dataclass
class Proxy:
    """Passes connections on to ``target``."""

    target: tuple[str, int]
    up: Faults = field(default_factory=Faults)  # client → server
    down: Faults = field(default_factory=Faults)
    passed: list[int] = field(default_factory=lambda: [0, 0])  # bytes up, down
    connections: int = 0
    port: int = 0
    seen: bytearray = field(default_factory=bytearray)  # all that clients sent

    def _pump(self, source: socket.socket, sink: socket.socket, faults: Faults, way: int, first: bool) -> None:
        at = 0
        with suppress(OSError):
            while data := bytearray(source.recv(1 << 16 if faults.rate is None else max(1, int(faults.rate / 50)))):
                for position in faults.flip if first else ():
                    if at <= position < at + len(data):
                        data[position - at] ^= 1 << faults.bit
                if faults.stall is not None:
                    del data[max(0, faults.stall - at) :]
                whole = len(data)
                if faults.cut is not None:
                    del data[max(0, faults.cut - at) :]
                sink.sendall(data)
                at += len(data)
                self.passed[way] += len(data)
                if way == 0:
                    self.seen += data
                if len(data) < whole:
                    break
                if faults.rate is not None:
                    time.sleep(len(data) / faults.rate)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _run(self, listening: socket.socket, threads: list[threading.Thread], ends: list[socket.socket]) -> None:
        with suppress(OSError):
            while True:
                client, _ = listening.accept()
                server = socket.create_connection(self.target)
                ends += [client, server]
                first = self.connections == 0
                self.connections += 1
                for source, sink, faults, way in ((client, server, self.up, 0), (server, client, self.down, 1)):
                    threads.append(threading.Thread(target=self._pump, args=[source, sink, faults, way, first]))
                    threads[-1].start()


@contextmanager
def proxy(target: tuple[str, int], *, up: Faults | None = None, down: Faults | None = None) -> Iterator[Proxy]:
    """A proxy on loopback, at ``port``."""
    passing = Proxy(target, up or Faults(), down or Faults())
    threads: list[threading.Thread] = []
    ends: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        passing.port = listening.getsockname()[1]
        accepting = threading.Thread(target=passing._run, args=[listening, threads, ends])
        accepting.start()
        try:
            yield passing
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for end in ends:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
            for end in ends:
                end.close()
