"""The cache service, a process of its own: against memcpy, and over TCP against a raw loopback socket."""

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np

from benchmarks.common import Row, row, seconds
from benchmarks.servers import free_port, running
from benchmarks.store_pool import FINGERPRINT, SIZES, Pool, timed
from twostroke.kv.memory import Bytes, PoolMemory
from twostroke.store import service
from twostroke.store.service import ServiceTier

_BYTES = 128 << 20  # of all blocks that are written and read in one turn
_READ, _WRITE, _READ_SLOTS, _WRITE_SLOTS = b"r", b"w", b"R", b"W"


def _raw_peer(port: int, blocks: int, size: int) -> None:
    """The other end of the raw socket: gives or takes as many bytes as it is told, of one buffer or of slots."""
    buffer, slots = memoryview(bytearray(size)), PoolMemory(blocks, size, "peer").slots
    slots[:] = 1
    with socket.create_server(("127.0.0.1", port)) as listening:
        raw, _ = listening.accept()
        with raw:
            while command := raw.recv(1):
                for slot in slots:
                    memory = buffer if command in (_READ, _WRITE) else slot.data
                    raw.sendall(memory) if command in (_READ, _READ_SLOTS) else _fill(raw, memory)
                if command in (_WRITE, _WRITE_SLOTS):
                    raw.sendall(b"!")


def _fill(raw: socket.socket, buffer: memoryview) -> None:
    assert raw.recv_into(buffer, 0, socket.MSG_WAITALL) == len(buffer)


@contextmanager
def _raw(blocks: int, size: int, pool: Pool, slots: Bytes) -> Iterator[dict[str, Callable[[], None]]]:
    """What writes all slots of a pool to another process through one socket, and what reads as much: with one buffer at
    the other end, and here to read into, which stays in the caches; or with slots at both ends, as a store has.
    """
    port = free_port()
    peer = multiprocessing.get_context("spawn").Process(target=_raw_peer, args=(port, blocks, size))
    peer.start()
    while True:
        try:
            raw = socket.create_connection(("127.0.0.1", port))
            break
        except ConnectionRefusedError:
            assert peer.is_alive(), "the raw socket's other end has died"
            peer.join(0.05)
    buffer = memoryview(bytearray(size))

    def write(command: bytes) -> None:
        raw.sendall(command)
        for slot in pool.order:
            raw.sendall(pool.memory.slots[slot].data)
        raw.recv(1)

    def read(command: bytes) -> None:
        raw.sendall(command)
        for slot in pool.order:
            _fill(raw, buffer if command == _READ else slots[slot].data)

    with raw:
        yield {
            "write": partial(write, _WRITE),
            "read": partial(read, _READ),
            "write, slots": partial(write, _WRITE_SLOTS),
            "read, slots": partial(read, _READ_SLOTS),
        }
    peer.join()


async def _size(name: str, size: int, repeats: int) -> list[Row]:
    blocks = _BYTES // size
    pool, other = Pool(blocks, size), PoolMemory(blocks, size, "other")
    port = free_port()

    def memcpy() -> None:
        for index, slot in enumerate(pool.order):
            np.copyto(other.slots[index], pool.memory.slots[slot])

    figures: dict[str, list[float]] = {}
    near = ServiceTier("127.0.0.1", port, size, FINGERPRINT, "")
    with patch.object(service, "host_id", lambda: "elsewhere"):
        far = ServiceTier("127.0.0.1", port, size, FINGERPRINT, "")
    room = 2 * (repeats + 2) * _BYTES  # for all turns: it would rather evict what is new than what was read twice
    command = ["twostroke", "store", "--port", str(port), "--memory", str(room)]
    with running(command, port), _raw(blocks, size, pool, other.slots) as raw:
        await near.open()
        for turn in range(repeats + 1):
            values = {"memcpy": _BYTES / 1e9 / seconds(memcpy)}
            values["put, same host"], values["get, same host"] = await timed(near, pool, 2 * turn)
            values |= {way: _BYTES / 1e9 / seconds(work) for way, work in raw.items()}
            values["put, TCP"], values["get, TCP"] = await timed(far, pool, 2 * turn + 1)
            for what, value in values.items() if turn else ():  # nothing is mapped or connected before
                figures.setdefault(what, []).append(value)
        assert min(near.mapped, near.offered) == (repeats + 1) * blocks
        assert max(far.mapped, far.offered) == 0
        await near.close()
        await far.close()
    other.close()
    pool.memory.close()
    goal = ">= 0.80" if size >= 1 << 20 else ""
    against = [
        ("put, same host", "memcpy", "memcpy, one thread", goal),
        ("get, same host", "memcpy", "memcpy, one thread", goal),
        ("put, TCP", "write", "raw loopback socket", goal),
        ("get, TCP", "read", "raw loopback socket", goal),
        ("put, TCP", "write, slots", "the same, into slots", ""),
        ("get, TCP", "read, slots", "the same, out of slots into slots", ""),
    ]
    return [
        row(f"service {what}, {name}", "GB/s", figures[what], figures[reference], words, aim)
        for what, reference, words, aim in against
    ]


async def measure(repeats: int) -> list[Row]:
    """All sizes of blocks."""
    return [one for name, size in SIZES.items() for one in await _size(name, size, repeats)]
