"""What links make of the machine, the same bytes each time: TCP against a raw loopback socket, shared memory against
memcpy, NIXL against its library used directly. Within one machine NIXL copies from process to process.

A child process owns the pool that is read. ``python -m benchmarks.bench_link``, about 20 seconds.
"""

import argparse
import asyncio
import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import torch

from benchmarks.common import report, row, seconds
from twostroke.kv.memory import Bytes, PoolMemory, host_id
from twostroke.kv.pool import Pool
from twostroke.links.link import Claim, Link
from twostroke.links.nixl import NixlLink, NixlServer
from twostroke.links.shm import SharedMemoryLink
from twostroke.links.staging import HostStaging
from twostroke.links.tcp import TcpLink, TcpServer
from twostroke.messages import NixlMemory, PoolAddress, TcpEndpoint, encode

BLOCK = 368_640  # bytes: 16 tokens of SmolLM2-135M in bfloat16
CLAIM = Claim("bench", 0)
SLOWEST = 32 << 20  # bytes a second


class Addresses(msgspec.Struct):
    """Where the child's pool is."""

    mapped: PoolAddress
    served: PoolAddress
    registered: PoolAddress
    raw: int  # a port, on which each byte that comes is answered by all slots


def child(blocks: int) -> None:
    """Own a pool until stdin closes."""
    memory = PoolMemory(blocks, BLOCK, "bench")
    memory.slots[:] = np.random.default_rng(0).integers(0, 256, memory.slots.shape, dtype=np.uint8)
    lease = Pool(blocks).lease()
    lease.grow(blocks)
    server = TcpServer(socket.create_server(("127.0.0.1", 0)), memory.address, lambda: HostStaging(memory.slots), "s")
    server.start(lambda _handover, _attempt: lease)
    registered = NixlServer(torch.from_numpy(memory.slots), memory.address, "s")
    listening = socket.create_server(("127.0.0.1", 0))
    addresses = Addresses(memory.address, server.address, registered.address, listening.getsockname()[1])
    print(encode(addresses).decode(), flush=True)
    raw, _ = listening.accept()
    while raw.recv(1):
        for slot in range(blocks):
            raw.sendall(memory.slots[slot].data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    blocks: int = options.blocks
    if options.child:
        return child(blocks)
    command = [sys.executable, "-m", "benchmarks.bench_link", "--child", "--blocks", str(blocks)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            addresses = msgspec.json.decode(process.stdout.readline(), type=Addresses)
            asyncio.run(compare(addresses, blocks, options.repeats))
        finally:
            process.kill()
    return None


class Library:
    """NIXL used directly: one transfer of everything, from one thread that polls without a pause."""

    def __init__(self, own: Bytes, peer: PoolAddress) -> None:
        self._nixl = importlib.import_module("nixl_cu13._bindings")
        self._own, self._agent = own, self._nixl.nixlAgent("raw", self._nixl.nixlAgentConfig())
        self._backend = self._agent.createBackend("UCX", {})
        memory = (own.ctypes.data, own.nbytes, 0, "")
        self._agent.registerMem(self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [memory]), [self._backend])
        assert isinstance(peer.memory, NixlMemory)
        self._base = peer.memory.base
        self._peer = self._agent.loadRemoteMD(peer.memory.agent).decode()

    def read(self, remote: Sequence[int], local: Sequence[int]) -> None:
        """Slots into slots."""
        theirs, ours = self._slots(self._base, remote), self._slots(self._own.ctypes.data, local)
        handle = self._agent.createXferReq(self._nixl.NIXL_READ, ours, theirs, self._peer, "", [self._backend])
        self._agent.postXferReq(handle, "")
        while self._agent.getXferStatus(handle) == self._nixl.NIXL_IN_PROG:
            pass
        self._agent.releaseXferReq(handle)

    def _slots(self, base: int, slots: Sequence[int]) -> object:
        table = np.array([(base + slot * BLOCK, BLOCK, 0) for slot in slots], np.uint64)
        return self._nixl.nixlXferDList(self._nixl.DRAM_SEG, table)


async def compare(addresses: Addresses, blocks: int, repeats: int) -> None:
    """Take all in turn, and report bytes a second."""
    memory = PoolMemory(blocks, BLOCK, "own")
    source = PoolMemory(blocks, BLOCK, "source")
    own, slots = memory.slots, list(range(blocks))
    order = np.random.default_rng(1).permutation(blocks).tolist()
    endpoint = TcpEndpoint("127.0.0.1", 1)
    address = PoolAddress(host_id(), os.getpid(), "own", blocks, BLOCK, endpoint)
    tcp = TcpLink(address, lambda: HostStaging(own), "s", slowest=lambda: SLOWEST)
    shm = SharedMemoryLink(own)
    nixl = NixlLink(torch.from_numpy(own), "s", slowest=lambda: SLOWEST)
    library = Library(own, addresses.registered)
    raw = socket.create_connection(("127.0.0.1", addresses.raw))

    def loopback() -> None:
        raw.sendall(b"x")
        for slot in order:
            raw.recv_into(own[slot].data, BLOCK, socket.MSG_WAITALL)

    def memcpy() -> None:
        for theirs, ours in zip(slots, order, strict=True):
            np.copyto(own[ours], source.slots[theirs])

    async def timed(work: Callable[[], object]) -> float:
        return await asyncio.to_thread(seconds, work)

    async def read(link: Link, pool: PoolAddress) -> float:
        loop = asyncio.get_running_loop()
        start = loop.time()
        await link.read(pool, slots, order, CLAIM)
        return loop.time() - start

    names = ("tcp", "loopback", "shm", "memcpy", "nixl", "library")
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 2):
        taken = {
            "loopback": await timed(loopback),
            "tcp": await read(tcp, addresses.served),
            "memcpy": await timed(memcpy),
            "shm": await read(shm, addresses.mapped),
            "library": await timed(lambda: library.read(slots, order)),
            "nixl": await read(nixl, addresses.registered),
        }
        if repeat >= 2:  # the first ones connect, map, and let TCP's windows grow
            for name, value in taken.items():
                times[name].append(blocks * BLOCK / value / 1e9)
    what = f"{blocks} blocks of {BLOCK:,} bytes"
    report(
        "link",
        [
            row(f"TCP, {what}", "GB/s", times["tcp"], times["loopback"], "raw loopback socket", ">= 0.80"),
            row(f"shared memory, {what}", "GB/s", times["shm"], times["memcpy"], "memcpy", ">= 0.85"),
            row(f"NIXL, {what}", "GB/s", times["nixl"], times["library"], "raw NIXL library", ">= 0.90"),
        ],
        repeats=repeats,
    )
    raw.close()
    tcp.close()
    shm.close()
    nixl.close()
    source.close()
    memory.close()


if __name__ == "__main__":
    main()
