"""What links make of the way between two GPUs, the same bytes each time: CUDA IPC against a peer copy within one
process, and beside it the links to other machines, NIXL (where it is installed) and TCP. Blocks of Qwen2.5-7B's shape.

A child process owns the pool that is read, on the other GPU; with one GPU, on the same. About 30 seconds.

    python -m benchmarks.bench_link_cuda
"""

import argparse
import asyncio
import random
import socket
import subprocess
import sys
from collections.abc import Sequence

import msgspec
import torch

from benchmarks.common import Row, report, row, seconds
from twostroke.errors import StartupError
from twostroke.kv.cuda_memory import CudaPool
from twostroke.kv.pool import Pool
from twostroke.links import nixl
from twostroke.links.cuda_ipc import CudaIpcLink
from twostroke.links.link import Claim, Link
from twostroke.links.nixl import NixlLink, NixlServer
from twostroke.links.staging import staging
from twostroke.links.tcp import TcpLink, TcpServer
from twostroke.messages import PoolAddress, TcpEndpoint, encode

BLOCK = 16 * 57_344  # bytes
BLOCKS = 2048  # of each pool
COUNTS = (64, 512, 2048)  # read at once; 512 are a chunk of prefill
CLAIM = Claim("bench", 0)
SLOWEST = 32 << 20  # bytes a second
REPEATS = {"cuda-ipc": 30, "nixl": 5, "tcp": 3}
SECRET = "a secret of this benchmark"


def child(gpu: int) -> None:
    """Own a pool until stdin closes; print its addresses."""
    device = torch.device("cuda", gpu)
    torch.cuda.set_device(device)
    pool = CudaPool(BLOCKS, BLOCK, "bench", device)
    pool.slots.copy_(_content(device))
    torch.cuda.synchronize()
    lease = Pool(BLOCKS).lease()
    lease.grow(BLOCKS)
    server = TcpServer(socket.create_server(("127.0.0.1", 0)), pool.address, staging(pool.slots), SECRET)
    server.start(lambda _handover, _attempt: lease)
    addresses = [pool.address, server.address]
    if nixl.installed():
        try:
            registered = NixlServer(pool.slots, pool.address, SECRET)
            addresses.append(registered.address)
        except StartupError as error:
            print(error.message, file=sys.stderr)
    print(encode(addresses).decode(), flush=True)
    sys.stdin.read()


def _content(device: torch.device) -> torch.Tensor:
    """The same in both processes; slots differ."""
    generator = torch.Generator(device).manual_seed(1)
    return torch.randint(0, 256, (BLOCKS, BLOCK), dtype=torch.uint8, device=device, generator=generator)


def peer_copies(ours: int, theirs: int, repeats: int) -> list[float]:
    """GB/s of 1 GiB from one GPU to the other within this process; on one GPU, what it reads."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=torch.device("cuda", theirs))
    target = torch.empty_like(source, device=torch.device("cuda", ours))

    def copy() -> None:
        for _ in range(4):
            target.copy_(source)
        torch.cuda.synchronize(ours)
        torch.cuda.synchronize(theirs)

    copy()
    return [4 * target.nbytes / 1e9 / seconds(copy) for _ in range(repeats)]


async def compare(addresses: Sequence[PoolAddress], ours: int, theirs: int) -> list[Row]:
    """Every link that both ends have; slots in order, as they come from a fresh pool, and in any order."""
    device = torch.device("cuda", ours)
    torch.cuda.set_device(device)
    own = torch.zeros(BLOCKS, BLOCK, dtype=torch.uint8, device=device)
    right = _content(device)
    torch.cuda.synchronize()
    by_link = {address.memory.link: address for address in addresses}
    links: list[Link] = [CudaIpcLink(own)]
    if "nixl" in by_link:
        links.append(NixlLink(own, SECRET, (), slowest=lambda: SLOWEST))
    endpoint = msgspec.structs.replace(by_link["tcp"], memory=TcpEndpoint("127.0.0.1", 1))
    links.append(TcpLink(endpoint, staging(own), SECRET, slowest=lambda: SLOWEST))
    orders = {"in order": list(range(BLOCKS)), "scattered": random.Random(3).sample(range(BLOCKS), BLOCKS)}
    raw, rows, loop = peer_copies(ours, theirs, 10), list[Row](), asyncio.get_running_loop()
    for link in links:
        for name, order in orders.items():
            for count in COUNTS if link.name == "cuda-ipc" else COUNTS[1:2]:
                remote, local, speeds = order[:count], order[::-1][:count], list[float]()
                if name == "in order":
                    local = remote
                for turn in range(REPEATS[link.name] + 1):
                    start = loop.time()
                    await link.read(by_link[link.name], remote, local, CLAIM)
                    if turn:
                        speeds.append(count * BLOCK / 1e9 / (loop.time() - start))
                assert torch.equal(own[local], right[remote]), "what was read is what is there"
                own.zero_()
                torch.cuda.synchronize()
                goal = ">= 0.90" if link.name == "cuda-ipc" else ""
                rows.append(row(f"{link.name}, {count} blocks {name}", "GB/s", speeds, raw, "peer copy", goal))
        link.close()
    return rows


def main() -> None:
    """Measure between the first two GPUs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return child(options.child)
    ours, theirs = 0, torch.cuda.device_count() - 1
    command = [sys.executable, "-m", "benchmarks.bench_link_cuda", "--child", str(theirs)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            addresses = msgspec.json.decode(process.stdout.readline(), type=list[PoolAddress])
            rows = asyncio.run(compare(addresses, ours, min(theirs, 1)))
        finally:
            process.kill()
    report("link_cuda", rows, gpus=torch.cuda.device_count(), device=torch.cuda.get_device_name(), block_bytes=BLOCK)
    return None


if __name__ == "__main__":
    main()
