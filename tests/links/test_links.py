"""What every link promises, over each of them; shared memory and NIXL with a real other process for a peer."""

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.peer_process import CLAIM, SECRET, content, peer_process
from twostroke.errors import HandoverFailed
from twostroke.kv.board import Board
from twostroke.kv.memory import Bytes, PoolMemory
from twostroke.links import copying, nixl
from twostroke.links.copying import runs
from twostroke.links.link import Link, MemoryLink
from twostroke.links.nixl import NixlLink
from twostroke.links.shm import SharedMemoryLink
from twostroke.messages import CudaMemory, MemoryFile, PoolAddress, Posted

SLOTS, BYTES, PEER_SLOTS = 6, 3000, 8


class Setup:
    """A link, our slots, and a peer's address."""

    def __init__(self, link: Link, own: Bytes, address: PoolAddress) -> None:
        self.link, self.own, self.address = link, own, address

    def changed(self, **fields: int | str) -> PoolAddress:
        return msgspec.structs.replace(self.address, **fields)


@pytest.fixture(scope="module")
def peer() -> Iterator[PoolAddress]:
    with peer_process(PEER_SLOTS, BYTES) as (_, address):
        yield address


@pytest.fixture(scope="module")
def registered() -> Iterator[PoolAddress]:
    with peer_process(PEER_SLOTS, BYTES, nixl=True) as (_, address):
        yield address


NIXL = pytest.param("nixl", marks=pytest.mark.skipif(not nixl.installed(), reason="NIXL is not installed"))


@pytest.fixture(params=["memory", "shm", NIXL])
def setup(request: pytest.FixtureRequest) -> Iterator[Setup]:
    own = np.zeros((SLOTS, BYTES), np.uint8)
    address = request.getfixturevalue("registered" if request.param == "nixl" else "peer")
    links: dict[str, Callable[[], Link]] = {
        "memory": lambda: MemoryLink(own, {"peer": content(PEER_SLOTS, BYTES)}),
        "shm": lambda: SharedMemoryLink(own),
        "nixl": lambda: NixlLink(torch.from_numpy(own), SECRET, slowest=lambda: 0.0),
    }
    link = links[request.param]()
    yield Setup(link, own, address)
    link.close()


async def test_bytes_arrive_pairwise(setup: Setup) -> None:
    await setup.link.read(setup.address, [7, 0, 3], [1, 5, 0], CLAIM)
    theirs = content(PEER_SLOTS, BYTES)
    expected = np.zeros_like(setup.own)
    expected[[1, 5, 0]] = theirs[[7, 0, 3]]
    assert (setup.own == expected).all()


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_slots_in_any_order(setup: Setup, data: st.DataObject) -> None:
    local = data.draw(st.lists(st.integers(0, SLOTS - 1), unique=True, min_size=1))
    remote = data.draw(st.lists(st.integers(0, PEER_SLOTS - 1), min_size=len(local), max_size=len(local)))
    setup.own[:] = 9
    asyncio.run(setup.link.read(setup.address, remote, local, CLAIM))
    expected = np.full_like(setup.own, 9)
    expected[local] = content(PEER_SLOTS, BYTES)[remote]
    assert (setup.own == expected).all()


async def test_several_reads_at_once(setup: Setup) -> None:
    await asyncio.gather(*(setup.link.read(setup.address, [slot], [slot], CLAIM) for slot in range(SLOTS)))
    assert (setup.own == content(PEER_SLOTS, BYTES)[:SLOTS]).all()


@pytest.mark.parametrize("remote", [[PEER_SLOTS], [0, PEER_SLOTS], [2**31 - 1], [-1]])
async def test_slots_outside_the_peers_pool(setup: Setup, remote: list[int]) -> None:
    with pytest.raises(HandoverFailed):
        await setup.link.read(setup.address, remote, list(range(len(remote))), CLAIM)
    assert not setup.own.any()


async def test_a_peer_that_overstates_its_pool(setup: Setup) -> None:
    """First seen with its true size, then with a larger one: what is mapped is what counts."""
    await setup.link.read(setup.address, [0], [0], CLAIM)
    with pytest.raises(HandoverFailed):
        await setup.link.read(setup.changed(num_slots=PEER_SLOTS + 5), [PEER_SLOTS + 1], [1], CLAIM)
    assert not setup.own[1].any()


async def test_slots_of_another_size(setup: Setup) -> None:
    with pytest.raises(HandoverFailed, match="bytes"):
        await setup.link.read(setup.changed(block_bytes=BYTES - 1), [0], [0], CLAIM)


async def test_another_instance(setup: Setup) -> None:
    with pytest.raises(HandoverFailed):
        await setup.link.read(setup.changed(instance="stranger"), [0], [0], CLAIM)
    await setup.link.read(setup.address, [0], [0], CLAIM)
    assert setup.own[0].any()


async def test_reading_nothing(setup: Setup) -> None:
    await setup.link.read(setup.address, [], [], CLAIM)
    assert not setup.own.any()


def test_names() -> None:
    assert {MemoryLink.name, SharedMemoryLink.name, NixlLink.name} == {"memory", "shm", "nixl"}


@given(pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_runs_are_the_pairs_in_order(pairs: list[tuple[int, int]]) -> None:
    copies = runs([theirs for theirs, _ in pairs], [ours for _, ours in pairs]).listed()
    assert [(theirs + i, ours + i) for theirs, ours, count in copies for i in range(count)] == pairs
    ends = [(theirs + count, ours + count) for theirs, ours, count in copies]
    assert all(end != following[:2] for end, following in zip(ends, copies[1:], strict=False)), "none could be longer"


# -- shared memory ---------------------------------------------------------------------------------------------------


def mapped() -> int:
    gc.collect()  # tracebacks of errors can still hold a mapping
    return Path("/proc/self/maps").read_text().count("twostroke-pool")


async def test_a_peer_that_is_gone() -> None:
    link = SharedMemoryLink(np.zeros((1, BYTES), np.uint8))
    with peer_process(2, BYTES, "gone") as (process, address):
        process.send_signal(signal.SIGKILL)
        process.wait()
    with pytest.raises(HandoverFailed, match="process is gone"):
        await link.read(address, [0], [0], CLAIM)
    link.close()


async def test_a_peer_that_is_gone_after_a_read() -> None:
    own = np.zeros((2, BYTES), np.uint8)
    link = SharedMemoryLink(own)
    with peer_process(2, BYTES, "gone") as (process, address):
        await link.read(address, [0], [0], CLAIM)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with pytest.raises(HandoverFailed, match="process is gone"):
        await link.read(address, [1], [1], CLAIM)
    assert not own[1].any()
    link.close()


async def test_a_peer_whose_pool_is_gpu_memory(peer: PoolAddress) -> None:
    link = SharedMemoryLink(np.zeros((1, BYTES), np.uint8))
    gpu = CudaMemory(device="GPU", handle="00" * 64, offset=0)
    with pytest.raises(HandoverFailed, match="is GPU memory, ours a memory file"):
        await link.read(msgspec.structs.replace(peer, memory=gpu), [0], [0], CLAIM)
    link.close()


async def test_another_machine(peer: PoolAddress) -> None:
    link = SharedMemoryLink(np.zeros((1, BYTES), np.uint8))
    with pytest.raises(HandoverFailed, match="another machine"):
        await link.read(msgspec.structs.replace(peer, host="elsewhere"), [0], [0], CLAIM)
    link.close()


async def test_whether_the_lease_was_alive_is_seen_after_the_read() -> None:
    memory, board = PoolMemory(2, BYTES, "peer"), Board("peer")
    maps, files = mapped(), len(os.listdir("/proc/self/fd"))
    link, posted = SharedMemoryLink(np.zeros((1, BYTES), np.uint8)), board.post()
    assert posted is not None

    async def seen(posted: Posted) -> bool | None:
        return await link.read(memory.address, [1], [0], CLAIM._replace(posted=posted))

    assert await seen(posted) is True
    assert await seen(Posted(posted.board, posted.cell, posted.number + 1)) is False
    assert await seen(msgspec.structs.replace(posted, board=memory.address)) is False, "the number is not there"
    assert await seen(msgspec.structs.replace(posted, board=replaced(posted, fd=10_000))) is None, "it is nowhere"
    assert await seen(msgspec.structs.replace(posted, board=replaced(posted, instance="other"))) is None
    board.clear(posted)
    assert await seen(posted) is False
    assert await link.read(memory.address, [1], [0], CLAIM) is None, "it has to be asked"
    link.close()
    assert (mapped(), len(os.listdir("/proc/self/fd"))) == (maps, files)
    board.close()
    memory.close()


def replaced(posted: Posted, *, fd: int | None = None, instance: str = "peer") -> PoolAddress:
    """The board's address, changed."""
    board = msgspec.structs.replace(posted.board, instance=instance)
    return board if fd is None else msgspec.structs.replace(board, memory=MemoryFile(fd))


async def test_close_lets_go_of_files_memory_and_threads(peer: PoolAddress) -> None:
    maps, files, threads = mapped(), len(os.listdir("/proc/self/fd")), threading.active_count()
    link = SharedMemoryLink(np.zeros((1, BYTES), np.uint8))
    for _ in range(3):
        await link.read(peer, [1], [0], CLAIM)
    assert mapped() == maps + 1  # once, however often it is read
    assert len(os.listdir("/proc/self/fd")) == files + 1  # Python's mmap keeps a file of its own
    link.close()
    assert (mapped(), len(os.listdir("/proc/self/fd")), threading.active_count()) == (maps, files, threads)


async def test_a_peer_that_is_gone_is_let_go_without_another_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool's memory lives as long as somebody maps it, and its worker, started again, needs it."""
    monkeypatch.setattr(copying, "SWEEP_SECONDS", 0.01)
    maps = mapped()
    link = SharedMemoryLink(np.zeros((1, BYTES), np.uint8))
    with peer_process(2, BYTES, "gone") as (process, address):
        await link.read(address, [0], [0], CLAIM)
        await asyncio.sleep(0.1)
        assert mapped() == maps + 1
        process.kill()
        process.wait()
        async with asyncio.timeout(10):
            while mapped() > maps:  # noqa: ASYNC110 - what another thread changes
                await asyncio.sleep(0.01)
    link.close()


async def test_pools_of_peers_that_are_gone_are_let_go_when_another_comes() -> None:
    """A peer that restarts must not cost a pool each time."""
    maps = mapped()
    link = SharedMemoryLink(np.zeros((1, BYTES), np.uint8))
    for number in range(3):
        with peer_process(2, BYTES, f"life-{number}") as (process, address):
            await link.read(address, [0], [0], CLAIM)
            assert mapped() <= maps + 1
        process.wait()
    link.close()
    assert mapped() == maps


@pytest.mark.parametrize("cancels", [1, 3])
async def test_after_cancellation_nothing_writes(
    peer: PoolAddress, monkeypatch: pytest.MonkeyPatch, cancels: int
) -> None:
    """The slots may go to another request at once."""
    own = np.zeros((SLOTS, BYTES), np.uint8)
    link = SharedMemoryLink(own)
    begun, go = threading.Event(), threading.Event()
    copyto: Callable[[Bytes, Bytes], None] = np.copyto

    def slowly(target: Bytes, source: Bytes) -> None:
        begun.set()
        assert go.wait(10)
        copyto(target, source)

    monkeypatch.setattr(np, "copyto", slowly)
    read = asyncio.create_task(link.read(peer, [0, 1, 2], [0, 1, 2], CLAIM))
    await asyncio.to_thread(begun.wait, 10)
    for _ in range(cancels):
        read.cancel()
        await asyncio.sleep(0.01)
        assert not read.done(), "the copy still runs"
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await read
    own[:] = 7
    link.close()
    assert (own == 7).all()


async def test_cancelled_before_it_began(peer: PoolAddress) -> None:
    own = np.zeros((SLOTS, BYTES), np.uint8)
    link = SharedMemoryLink(own)
    read = asyncio.create_task(link.read(peer, [0], [0], CLAIM))
    read.cancel()
    with pytest.raises(asyncio.CancelledError):
        await read
    own[:] = 7
    link.close()
    assert (own == 7).all()


async def test_our_own_pool_can_be_a_peer() -> None:
    """Two workers of one process, as tests have them."""
    memory = PoolMemory(3, 16, "me")
    memory.slots[2] = 5
    own = np.zeros((1, 16), np.uint8)
    link = SharedMemoryLink(own)
    await link.read(memory.address, [2], [0], CLAIM)
    assert (own == 5).all()
    link.close()
    memory.close()
