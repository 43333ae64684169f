"""The NIXL link: slots are read straight out of the owner's registered memory, by RDMA, or from process to process
within one machine. The owner does nothing for it.

UCX could also read with the owner's help, over any network ("software emulation"). It may not: an owner that answers a
reader which has given up can end with a fatal error of UCX (seen with NIXL 1.5.1, a reader that timed out, and an owner
that was stopped and woken), and the TCP link is faster, checks what it brings, and asks for the lease. So where neither
RDMA nor the same machine connects two workers, a read fails, and the next link is used.

NIXL reads what the owner says of its agent with native code that trusts it (a flipped bit can crash it). So that comes
with a proof: only who knows the cluster secret can have made it. Blocks carry no checksum: RDMA has its own, and the
CPUs' time is what the link saves.
"""

import asyncio
import hmac
import importlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from twostroke import config
from twostroke.errors import HandoverFailed, StartupError
from twostroke.kv.pool import Slot
from twostroke.links.copying import runs
from twostroke.links.link import Claim, check_read, settled
from twostroke.messages import NixlMemory, PoolAddress, encode

SLOWEST = 64 << 20  # bytes a second: neither RDMA nor one machine's memory is slower unless something is wrong
PATIENCE = 1.0  # seconds by which reads may fall behind ``SLOWEST``, or what is faster than that to compute
BATCH_SECONDS = 0.25  # what that brings in so long is read at once
MAX_PEERS = 16  # connections, each with some 20 file descriptors; those that were used least recently are closed

_PACKAGES = ("nixl_cu13", "nixl_cu12")  # the same library for two versions of CUDA; neither needs a GPU
_RDMA = Path("/sys/class/infiniband")
_WAKE_MICROSECONDS = 10_000  # how often an owner's agent looks for strangers, unless it is woken
_names = itertools.count()

Kind = Literal["DRAM", "VRAM"]
Copies = Sequence[tuple[Slot, Slot, int]]  # theirs, ours, how many follow each other


def installed() -> bool:
    """Whether NIXL is here."""
    return any(find_spec(name) for name in _PACKAGES)


def has_rdma() -> bool:
    """Whether this machine has a network device that NIXL can read other machines' memory with."""
    return _RDMA.is_dir() and any(_RDMA.iterdir())


def _library() -> tuple[ModuleType, tuple[type[Exception], ...]]:
    """NIXL and its errors, which have no common base. ``StartupError`` if it is not installed."""
    name = next((name for name in _PACKAGES if find_spec(name)), None)
    if name is None:
        raise StartupError("NIXL is not installed: pip install 'twostroke[nixl]'")
    config.quieten_ucx()
    # Not its public class: that one has a thread of each agent poll without a pause, a whole core for nothing.
    library = importlib.import_module(f"{name}._bindings")
    return library, tuple(error for name, error in vars(library).items() if name.endswith("Error"))


class _Agent:
    """A NIXL agent with our slots registered. Its methods are called from one thread.

    Nothing else may hold ``_agent``: ``close`` drops the last reference, whereupon NIXL closes the agent's connections
    and takes back its registrations. Only then is a read that was given up certainly over: to cancel it promises less.
    """

    def __init__(self, name: str, slots: torch.Tensor, devices: Sequence[str], *, serves: bool) -> None:
        """``serves``: answers readers who connect, in a thread of NIXL's.

        Raises:
            StartupError: NIXL is not installed, cannot use these devices, or cannot register the memory.
        """
        assert slots.is_contiguous(), "a slot is one run of bytes"
        self.slots = slots
        self._nixl, self.errors = _library()
        self._kind: Kind = "VRAM" if slots.is_cuda else "DRAM"
        self.device: int = slots.device.index or 0
        settings = self._nixl.nixlAgentConfig()
        settings.useProgThread, settings.pthrDelay = serves, _WAKE_MICROSECONDS
        parameters = {"engine_config": "PROTO_EMULATION_ENABLE=n"}
        if devices:
            parameters["device_list"] = ",".join(devices)
        try:
            self._agent = self._nixl.nixlAgent(name, settings)
            self._backend = self._agent.createBackend("UCX", parameters)
            memory = (slots.data_ptr(), slots.nbytes, self.device, "")
            self._agent.registerMem(self._nixl.nixlRegDList(self._segment(self._kind), [memory]), [self._backend])
        except self.errors as error:
            which = f"with network device {', '.join(devices)}" if devices else "here"
            raise StartupError(f"NIXL does not work {which}: {error}") from error

    def close(self) -> None:
        """See above. Nothing is read or written by it any more."""
        del self._agent

    @property
    def metadata(self) -> bytes:
        """What another agent has to know of this one."""
        metadata: bytes = self._agent.getLocalMD()
        return metadata

    def memory(self) -> NixlMemory:
        """What our slots are to other agents; without its proof."""
        return NixlMemory(self._kind, self.device, self.slots.data_ptr(), self.metadata, bytes(32))

    def meet(self, metadata: bytes) -> str:
        """Load another agent's metadata; its name."""
        name: bytes = self._agent.loadRemoteMD(metadata)
        return name.decode()

    def start(self, peer: str, address: PoolAddress, batch: Copies) -> int:
        """Begin to read; a handle."""
        theirs = address.memory
        assert isinstance(theirs, NixlMemory), "nothing else was connected"
        size = address.block_bytes
        handle: int = self._agent.createXferReq(
            self._nixl.NIXL_READ,
            self._list(self._kind, self.slots.data_ptr(), self.device, size, [(ours, n) for _, ours, n in batch]),
            self._list(theirs.segment, theirs.base, theirs.device, size, [(slot, n) for slot, _, n in batch]),
            peer,
            "",
            [self._backend],
        )
        self._agent.postXferReq(handle, "")
        return handle

    def done(self, handle: int) -> bool:
        """Whether it is read, in which case the handle is released."""
        status = self._agent.getXferStatus(handle)
        if status == self._nixl.NIXL_IN_PROG:
            return False
        self._agent.releaseXferReq(handle)
        if status != self._nixl.NIXL_SUCCESS:
            raise HandoverFailed(f"NIXL: {status}")
        return True

    def _segment(self, kind: Kind) -> object:
        return {"DRAM": self._nixl.DRAM_SEG, "VRAM": self._nixl.VRAM_SEG}[kind]

    def _list(self, kind: Kind, base: int, device: int, size: int, slots: Sequence[tuple[Slot, int]]) -> object:
        rows = [(base + slot * size, count * size, device) for slot, count in slots]
        table: npt.NDArray[np.uint64] = np.array(rows, np.uint64)
        return self._nixl.nixlXferDList(self._segment(kind), table)


# -- the producer's end ----------------------------------------------------------------------------------------------


class NixlServer:
    """Our slots, registered for readers who know the secret."""

    def __init__(self, slots: torch.Tensor, pool: PoolAddress, secret: str, devices: Sequence[str] = ()) -> None:
        """``slots``: ``uint8 [num_slots, block_bytes]``, those of ``pool``. Errors as for ``_Agent``."""
        self._agent = _Agent(pool.instance, slots, devices, serves=True)
        self.address = signed(msgspec.structs.replace(pool, memory=self._agent.memory()), secret)

    def close(self) -> None:
        """When this returns, the pool is not registered any more."""
        self._agent.close()


def signed(address: PoolAddress, secret: str) -> PoolAddress:
    """The address with a proof of the secret over all of it."""
    memory = address.memory
    assert isinstance(memory, NixlMemory), "other addresses have no proof"
    bare = msgspec.structs.replace(address, memory=msgspec.structs.replace(memory, proof=bytes(32)))
    proof = hmac.digest(secret.encode(), b"nixl" + encode(bare), "sha256")
    return msgspec.structs.replace(address, memory=msgspec.structs.replace(memory, proof=proof))


# -- the consumer's end ----------------------------------------------------------------------------------------------


class NixlLink:
    """Reads pools that are registered with NIXL. Each peer is read by an agent and in a thread of its own, so that one
    that hangs can be given up without harm to reads from others.
    """

    name = NixlMemory.link

    def __init__(
        self, own: torch.Tensor, secret: str, devices: Sequence[str] = (), *, slowest: Callable[[], float]
    ) -> None:
        """A link that knows nobody yet.

        Args:
            own: our slots, ``uint8 [num_slots, block_bytes]``.
            secret: the cluster's, which peers must know.
            devices: network devices to use, such as "mlx5_2"; none is all.
            slowest: bytes a second below which reading takes longer than computing.

        Raises:
            StartupError: NIXL is not installed.
        """
        _, self._errors = _library()
        self._own = own
        self._secret = secret
        self._devices = devices
        self._slowest = slowest
        self._peers: dict[PoolAddress, _Connection] = {}  # least recently used first; only the event loop's
        self._leaving: list[Future[None]] = []  # peers that are let go of

    def reaches(self, peer: PoolAddress) -> bool:
        """See ``Link.reaches``."""
        return isinstance(peer.memory, NixlMemory)

    async def read(self, peer: PoolAddress, remote: Sequence[Slot], local: Sequence[Slot], claim: Claim) -> None:
        """See ``Link.read``."""
        check_read(self._own.shape[1], peer, remote)
        assert all(0 <= slot < len(self._own) for slot in local), "we write into our own slots"
        if not isinstance(peer.memory, NixlMemory):
            raise HandoverFailed(f"the peer's pool is {peer.memory.kind}: {self.name} cannot reach it")
        if not hmac.compare_digest(encode(signed(peer, self._secret)), encode(peer)):
            raise HandoverFailed("the cluster secret differs: set TWOSTROKE_SECRET to the same value on every worker")
        if not remote:
            return
        copies, stop, connection = runs(remote, local).listed(), threading.Event(), self._connection(peer)
        work = connection.thread.submit(connection.read, copies, max(SLOWEST, self._slowest()), stop)
        await settled(asyncio.wrap_future(work), stop.set)

    def close(self) -> None:
        """See ``Link.close``."""
        for address in list(self._peers):
            self._leave(address)
        wait(self._leaving)

    def _connection(self, peer: PoolAddress) -> "_Connection":
        connection = self._peers.pop(peer, None)
        if connection is not None:
            self._peers[peer] = connection
        for address, other in list(self._peers.items()):
            if other.broken or (address != peer and len(self._peers) > MAX_PEERS - (connection is None)):
                self._leave(address)
        if peer not in self._peers:
            self._peers[peer] = _Connection(peer, self._own, self._devices, self._errors)
        return self._peers[peer]

    def _leave(self, address: PoolAddress) -> None:
        self._leaving = [future for future in self._leaving if not future.done()]
        self._leaving.append(self._peers.pop(address).close())


class _Connection:
    """An agent that reads one peer. All but ``__init__`` and ``close`` happens in its thread."""

    def __init__(
        self, peer: PoolAddress, own: torch.Tensor, devices: Sequence[str], errors: tuple[type[Exception], ...]
    ) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="nixl-link")
        self.broken = False  # for good: reads that wait for their turn fail too, or each would wait as long again
        self._peer = peer
        self._own = own
        self._devices = devices
        self._errors: tuple[type[Exception], ...] = (HandoverFailed, StartupError, *errors)
        self._agent: _Agent | None = None
        self._name = ""  # the peer's agent
        self._behind = 0.0  # seconds later than over the slowest link

    def close(self) -> "Future[None]":
        """Let go of the peer after the reads that were asked for. Done when that is done."""
        gone = self.thread.submit(self._disconnect)
        self.thread.shutdown(wait=False)
        return gone

    def read(self, copies: Copies, slowest: float, stop: threading.Event) -> None:
        """Copy slots, unless told to stop. When this returns or raises, nothing writes into ours any more.

        Raises:
            HandoverFailed: the peer cannot be read, or is slower than ``slowest`` bytes a second.
        """
        if self.broken:
            raise HandoverFailed("NIXL could not read the peer's pool a moment ago")
        well = False
        try:
            agent = self._agent or self._connect()
            for batch in batches(copies, max(1, int(slowest * BATCH_SECONDS) // self._peer.block_bytes)):
                if stop.is_set():  # between batches: to break one off would break reads that wait behind it
                    break
                self._transfer(agent, batch, slowest)
            well = True
        except self._errors as error:
            raise HandoverFailed(f"NIXL cannot read the peer's pool: {error}") from error
        finally:
            if not well:
                self.broken = True
                self._disconnect()

    def _connect(self) -> _Agent:
        if self._own.is_cuda:
            torch.cuda.set_device(self._own.device)  # UCX registers a GPU's memory in this thread's context
        # Named by the process too: UCX connects agents of the same name with each other.
        self._agent = _Agent(f"reader-{os.getpid()}-{next(_names)}", self._own, self._devices, serves=False)
        memory = self._peer.memory
        assert isinstance(memory, NixlMemory), "the link has seen to that"
        self._name = self._agent.meet(memory.agent)
        if self._name != self._peer.instance:
            raise HandoverFailed("the peer's pool belongs to another instance")
        return self._agent

    def _transfer(self, agent: _Agent, batch: Copies, slowest: float) -> None:
        start, pause = time.monotonic(), 20e-6
        fair = sum(count for *_, count in batch) * self._peer.block_bytes / slowest
        handle = agent.start(self._name, self._peer, batch)
        while not agent.done(handle):
            if time.monotonic() - start > PATIENCE - self._behind + fair:
                raise HandoverFailed(f"it is silent, or slower than {slowest / 2**20:.0f} MiB/s")
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)
        self._behind = max(0.0, self._behind + time.monotonic() - start - fair)

    def _disconnect(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None


def batches(copies: Copies, limit: int) -> Iterator[list[tuple[Slot, Slot, int]]]:
    """The same copies, at most ``limit`` slots at once."""
    batch: list[tuple[Slot, Slot, int]] = []
    room = limit
    for theirs, ours, count in copies:
        done = 0
        while done < count:
            part = min(room, count - done)
            batch.append((theirs + done, ours + done, part))
            done, room = done + part, room - part
            if not room:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch
