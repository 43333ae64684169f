"""The NIXL link with the real library and real processes: whatever becomes of a peer, a read that is over is over."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.peer_process import CLAIM, SECRET, content, peer_process
from twostroke.errors import HandoverFailed, StartupError
from twostroke.kv.memory import Bytes, PoolMemory
from twostroke.links import nixl
from twostroke.links.nixl import NixlLink, NixlServer, _Agent, batches, signed
from twostroke.messages import NixlMemory, PoolAddress, TcpEndpoint

pytestmark = pytest.mark.skipif(not nixl.installed(), reason="NIXL is not installed")
SLOTS, BYTES = 8, 3000
SOON = 3.0  # seconds: what is promised of a peer that is lost


class Reader:
    """Our end: a link and the slots that it reads into."""

    def __init__(self, secret: str = SECRET, slots: int = SLOTS, block_bytes: int = BYTES) -> None:
        self.own: Bytes = np.zeros((slots, block_bytes), np.uint8)
        self.link = NixlLink(torch.from_numpy(self.own), secret, slowest=lambda: 0.0)

    async def read(self, address: PoolAddress, *slots: int) -> None:
        """Each into the same slot of ours; all, if none is named."""
        which = list(slots or range(len(self.own)))
        await self.link.read(address, which, which, CLAIM)


@pytest.fixture
def reader() -> Iterator[Reader]:
    one = Reader()
    yield one
    one.link.close()


@pytest.fixture(scope="module")
def peer() -> Iterator[PoolAddress]:
    with peer_process(SLOTS, BYTES, nixl=True) as (_, address):
        yield address


def memory_of(address: PoolAddress) -> NixlMemory:
    assert isinstance(address.memory, NixlMemory)
    return address.memory


async def fails(reader: Reader, address: PoolAddress, what: str) -> None:
    """The read does, in time and without a byte."""
    before, start = reader.own.copy(), time.monotonic()
    with pytest.raises(HandoverFailed, match=what):
        await reader.read(address)
    assert time.monotonic() - start < SOON
    assert (reader.own == before).all()


# -- peers that are lost ---------------------------------------------------------------------------------------------


async def test_a_peer_that_is_killed(reader: Reader) -> None:
    with peer_process(SLOTS, BYTES, "gone", nixl=True) as (process, address):
        await reader.read(address, 1)
        assert (reader.own[1] == content(SLOTS, BYTES)[1]).all()
        process.kill()
        process.wait()
    for _ in range(2):
        await fails(reader, address, "NIXL cannot read the peer's pool")
    stranger = Reader()
    await fails(stranger, address, "NIXL cannot read the peer's pool")
    stranger.link.close()


async def test_a_peer_that_is_stopped(reader: Reader, peer: PoolAddress) -> None:
    """It answers nobody who connects, so what was begun is never known to be over. Then NIXL is torn down: whatever
    the peer does once it wakes, our slots, which belong to somebody else by then, stay as they are. Others' reads are
    not held up, and reads that wait behind the first fail with it.
    """
    with peer_process(SLOTS, BYTES, "stopped", nixl=True) as (process, address):
        os.kill(process.pid, signal.SIGSTOP)
        start = time.monotonic()
        reads = [asyncio.create_task(reader.read(address, slot)) for slot in range(4)]
        await asyncio.sleep(0)
        await reader.read(peer, 7)
        assert not any(read.done() for read in reads)
        results = await asyncio.gather(*reads, return_exceptions=True)
        assert time.monotonic() - start < SOON
        assert all(isinstance(result, HandoverFailed) for result in results), results
        reader.own[:] = 7
        os.kill(process.pid, signal.SIGCONT)
        await asyncio.sleep(0.2)
        assert (reader.own == 7).all()
        await reader.read(address)
        assert (reader.own == content(SLOTS, BYTES)).all()


async def test_a_read_that_was_given_up_does_not_land_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reads that depend on their owner, which the link excludes: they are still to be answered when the
    reader gives up, and the owner answers them when it wakes.
    """
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setenv("UCX_PROTO_EMULATION_ENABLE", "y")
    slots, size = 64, 368_640
    reader = Reader(slots=slots, block_bytes=size)
    with peer_process(slots, size, "late", nixl=True) as (process, address):
        await reader.read(address)
        assert (reader.own == content(slots, size)).all()
        os.kill(process.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(HandoverFailed, match="silent, or slower"):
            await reader.read(address)
        assert time.monotonic() - start < SOON
        reader.own[:] = 7
        os.kill(process.pid, signal.SIGCONT)
        await asyncio.sleep(0.3)
        assert (reader.own == 7).all()
    reader.link.close()


READER = """
import asyncio, sys, msgspec
from tests.links.test_nixl import Reader
from twostroke.messages import PoolAddress

async def main():
    reader, address = Reader(), msgspec.json.decode(sys.argv[1], type=PoolAddress)
    while True:
        await reader.read(address)
        print(flush=True)

asyncio.run(main())
"""


@contextmanager
def reading(address: PoolAddress) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that reads all the time, and has for a while."""
    command = [sys.executable, "-c", READER, msgspec.json.encode(address).decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(20):
            assert process.stdout.readline()
        yield process
        process.kill()


async def test_an_owner_survives_its_readers(reader: Reader) -> None:
    """One that is stopped, and then killed."""
    with peer_process(SLOTS, BYTES, "owner", nixl=True) as (owner, address):
        with reading(address) as other:
            os.kill(other.pid, signal.SIGSTOP)
            await reader.read(address)
        reader.own[:] = 0
        await reader.read(address)
        assert (reader.own == content(SLOTS, BYTES)).all()
        assert owner.poll() is None


async def test_reads_that_depend_on_their_owner_are_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As between machines without RDMA."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    reader = Reader()
    with peer_process(SLOTS, BYTES, "far", nixl=True) as (process, address):
        await fails(reader, address, "NIXL cannot read")
        assert process.poll() is None
    reader.link.close()


@pytest.mark.parametrize("late", [0.2, 5.0])  # seconds that each transfer takes: none, or no single one is too slow
async def test_a_slow_link(reader: Reader, peer: PoolAddress, monkeypatch: pytest.MonkeyPatch, late: float) -> None:
    monkeypatch.setattr(nixl, "BATCH_SECONDS", 0.01)
    monkeypatch.setattr(nixl, "SLOWEST", 2 * BYTES / 0.01)  # two slots are a batch
    monkeypatch.setattr(nixl, "PATIENCE", 0.3)
    done, begun = _Agent.done, time.monotonic()

    def slowly(self: _Agent, handle: int) -> bool:
        nonlocal begun
        if time.monotonic() - begun < late or not done(self, handle):
            return False
        begun = time.monotonic()
        return True

    monkeypatch.setattr(_Agent, "done", slowly)
    start = time.monotonic()
    with pytest.raises(HandoverFailed, match="silent, or slower than"):
        await reader.read(peer)
    assert time.monotonic() - start < SOON


# -- who is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", ["", "another", SECRET + " "])
async def test_the_wrong_secret(peer: PoolAddress, secret: str) -> None:
    reader = Reader(secret)
    await fails(reader, peer, "secret")
    assert not reader.link._peers, "native code has seen nothing of it"
    reader.link.close()


@given(data=st.data())
def test_whatever_is_changed_in_an_address_is_seen_before_native_code_sees_it(
    peer: PoolAddress, data: st.DataObject
) -> None:
    memory = memory_of(peer)
    blob = bytearray(memory.agent)
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    other = data.draw(
        st.sampled_from(
            [
                msgspec.structs.replace(memory, agent=bytes(blob)),
                msgspec.structs.replace(memory, agent=bytes(blob[: len(blob) // 2])),
                msgspec.structs.replace(memory, base=memory.base + BYTES),
                msgspec.structs.replace(memory, segment="VRAM"),
                msgspec.structs.replace(memory, device=1),
                msgspec.structs.replace(memory, proof=bytes(32)),
            ]
        )
    )
    reader = Reader()
    with pytest.raises(HandoverFailed, match="secret"):
        asyncio.run(reader.read(msgspec.structs.replace(peer, memory=other), 0))
    assert not reader.link._peers


async def test_a_peer_that_knows_the_secret_and_is_wrong(reader: Reader, peer: PoolAddress) -> None:
    """NIXL knows what was registered, and whose it is."""
    larger = signed(msgspec.structs.replace(peer, num_slots=SLOTS + 5), SECRET)
    with pytest.raises(HandoverFailed, match="NOT_FOUND"):
        await reader.link.read(larger, [SLOTS], [0], CLAIM)
    with pytest.raises(HandoverFailed, match="NOT_FOUND"):
        await reader.link.read(larger, [SLOTS - 1, SLOTS], [0, 1], CLAIM)
    shifted = msgspec.structs.replace(memory_of(peer), base=memory_of(peer).base - 1)
    await fails(reader, signed(msgspec.structs.replace(peer, memory=shifted), SECRET), "NOT_FOUND")
    await fails(reader, signed(msgspec.structs.replace(peer, instance="stranger"), SECRET), "another instance")
    assert not reader.own.any()
    await reader.read(peer)
    assert (reader.own == content(SLOTS, BYTES)).all()


async def test_a_pool_that_is_not_registered(reader: Reader, peer: PoolAddress) -> None:
    with pytest.raises(HandoverFailed, match="behind a TCP port"):
        await reader.read(msgspec.structs.replace(peer, memory=TcpEndpoint("127.0.0.1", 1)), 0)


def test_bounds_of_an_address(peer: PoolAddress) -> None:
    memory = memory_of(peer)
    assert msgspec.json.decode(msgspec.json.encode(peer), type=PoolAddress) == peer
    for changes in ({"agent": b""}, {"agent": bytes(70_000)}, {"proof": bytes(31)}, {"base": -1}, {"base": 2**57}):
        wide = msgspec.json.encode(msgspec.structs.replace(memory, **changes))
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(wide, type=NixlMemory)


def test_a_network_device_that_is_not_there(reader: Reader) -> None:
    pool = PoolMemory(2, BYTES, "owner")
    with pytest.raises(StartupError, match="NIXL does not work with network device mlx5_99"):
        NixlServer(torch.from_numpy(pool.slots), pool.address, SECRET, ["mlx5_99"])
    NixlServer(torch.from_numpy(pool.slots), pool.address, SECRET).close()
    pool.close()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "_PACKAGES", ("nixl_is_not_here",))
    assert not nixl.installed()
    with pytest.raises(StartupError, match=r"pip install 'twostroke\[nixl\]'"):
        Reader()


# -- ends ------------------------------------------------------------------------------------------------------------


async def test_cancellation_is_waited_for_and_harms_nobody_else(
    reader: Reader, peer: PoolAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl, "BATCH_SECONDS", 1e-9)  # one slot is a batch
    begun, go = threading.Event(), threading.Event()
    done = _Agent.done

    def held(self: _Agent, handle: int) -> bool:
        begun.set()
        return go.is_set() and done(self, handle)

    monkeypatch.setattr(_Agent, "done", held)
    first, second = asyncio.create_task(reader.read(peer)), asyncio.create_task(reader.read(peer, 7))
    await asyncio.to_thread(begun.wait, 10)
    for _ in range(3):
        first.cancel()
        await asyncio.sleep(0.01)
        assert not first.done(), "NIXL may still write"
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not reader.own[1:7].any(), "the rest was not begun"
    reader.own[:7] = 7
    await second
    assert (reader.own[7] == content(SLOTS, BYTES)[7]).all()
    assert (reader.own[:7] == 7).all()


def files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_nothing_is_left(monkeypatch: pytest.MonkeyPatch, peer: PoolAddress) -> None:
    """Of a link that is closed, of peers that are lost, and of more peers than there may be at once."""
    monkeypatch.setattr(nixl, "MAX_PEERS", 2)
    Reader().link.close()
    warm = Reader()
    await warm.read(peer, 0)
    warm.link.close()  # what the libraries keep is there now
    before, threads = files(), threading.active_count()
    reader = Reader()
    for number in range(2):
        with peer_process(SLOTS, BYTES, f"life-{number}", nixl=True) as (process, address):
            await reader.read(address)
            process.kill()
            process.wait()
        if number:
            await fails(reader, address, "NIXL cannot read")
        await reader.read(peer, 0)
        assert len(reader.link._peers) <= 2
    reader.link.close()
    while threading.active_count() > threads:  # noqa: ASYNC110 - those that nobody waits for
        await asyncio.sleep(0.01)
    assert files() == before


@given(
    copies=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(1, 9)), max_size=8),
    limit=st.integers(1, 12),
)
def test_batches_are_the_copies_in_order(copies: list[tuple[int, int, int]], limit: int) -> None:
    def slots(of: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
        return [(theirs + i, ours + i) for theirs, ours, count in of for i in range(count)]

    cut = list(batches(copies, limit))
    assert [pair for batch in cut for pair in slots(batch)] == slots(copies)
    sizes = [len(slots(batch)) for batch in cut]
    assert all(size == limit for size in sizes[:-1])
    assert all(0 < size <= limit for size in sizes)
