"""What links make of the machine: TCP against a raw loopback socket, shared memory against memcpy. The same bytes.

A child process owns the pool that is read. ``python -m benchmarks.bench_link``, about 15 seconds.
"""

import argparse
import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable

import msgspec
import numpy as np

from benchmarks.common import report, row, seconds
from twostroke.kv.memory import PoolMemory, host_id
from twostroke.kv.pool import Pool
from twostroke.links.link import Claim
from twostroke.links.shm import SharedMemoryLink
from twostroke.links.staging import HostStaging
from twostroke.links.tcp import TcpLink, TcpServer
from twostroke.messages import PoolAddress, TcpEndpoint, encode

BLOCK = 368_640  # bytes: 16 tokens of SmolLM2-135M in bfloat16
CLAIM = Claim("bench", 0)


class Addresses(msgspec.Struct):
    """Where the child's pool is."""

    mapped: PoolAddress
    served: PoolAddress
    raw: int  # a port, on which each byte that comes is answered by all slots


def child(blocks: int) -> None:
    """Own a pool until stdin closes."""
    memory = PoolMemory(blocks, BLOCK, "bench")
    memory.slots[:] = np.random.default_rng(0).integers(0, 256, memory.slots.shape, dtype=np.uint8)
    lease = Pool(blocks).lease()
    lease.grow(blocks)
    server = TcpServer(socket.create_server(("127.0.0.1", 0)), memory.address, lambda: HostStaging(memory.slots), "s")
    server.start(lambda _handover, _attempt: lease)
    listening = socket.create_server(("127.0.0.1", 0))
    addresses = Addresses(memory.address, server.address, listening.getsockname()[1])
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


async def compare(addresses: Addresses, blocks: int, repeats: int) -> None:
    """Take all four in turn, and report bytes a second."""
    memory = PoolMemory(blocks, BLOCK, "own")
    source = PoolMemory(blocks, BLOCK, "source")
    own, slots = memory.slots, list(range(blocks))
    order = np.random.default_rng(1).permutation(blocks).tolist()
    endpoint = TcpEndpoint("127.0.0.1", 1)
    tcp = TcpLink(PoolAddress(host_id(), os.getpid(), "own", blocks, BLOCK, endpoint), lambda: HostStaging(own), "s")
    shm = SharedMemoryLink(own)
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

    async def read(link: TcpLink | SharedMemoryLink, pool: PoolAddress) -> float:
        loop = asyncio.get_running_loop()
        start = loop.time()
        await link.read(pool, slots, order, CLAIM)
        return loop.time() - start

    times: dict[str, list[float]] = {"tcp": [], "loopback": [], "shm": [], "memcpy": []}
    for repeat in range(repeats + 2):
        taken = {
            "loopback": await timed(loopback),
            "tcp": await read(tcp, addresses.served),
            "memcpy": await timed(memcpy),
            "shm": await read(shm, addresses.mapped),
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
        ],
        repeats=repeats,
    )
    raw.close()
    tcp.close()
    shm.close()
    source.close()
    memory.close()


if __name__ == "__main__":
    main()
