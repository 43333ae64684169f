"""Another process that owns a pool: the real peer of tests over shared memory, CUDA IPC and NIXL.

``python -m tests.peer_process SLOTS BYTES INSTANCE [GPU|nixl]`` fills a pool, in a memory file or on a GPU, prints its
address and lives until its stdin closes. With ``nixl`` the memory file is registered, and the address is NIXL's.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np

from twostroke.kv.memory import Bytes, PoolMemory, SlotMemory
from twostroke.links.link import Claim
from twostroke.messages import PoolAddress, encode

SECRET = "a secret"
CLAIM = Claim("a hand-over", 0)


def content(num_slots: int, block_bytes: int) -> Bytes:
    """What the peer's slots hold: different in each slot."""
    return np.random.default_rng(num_slots).integers(0, 256, (num_slots, block_bytes), dtype=np.uint8)


@contextmanager
def peer_process(
    num_slots: int, block_bytes: int, instance: str = "peer", gpu: int | None = None, *, nixl: bool = False
) -> Iterator[tuple["subprocess.Popen[bytes]", PoolAddress]]:
    """A process that owns a pool, on a GPU if its number is given; killed at the latest when the context ends.

    ``nixl``: in host memory and registered under ``SECRET``.
    """
    command = [sys.executable, "-m", "tests.peer_process", str(num_slots), str(block_bytes), instance]
    if gpu is not None:
        command.append(str(gpu))
    if nixl:
        command.append("nixl")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield process, msgspec.json.decode(process.stdout.readline(), type=PoolAddress)
        finally:
            process.kill()


def filled(num_slots: int, block_bytes: int, instance: str, gpu: int | None) -> SlotMemory:
    """A pool of this process that holds ``content``."""
    if gpu is None:
        memory = PoolMemory(num_slots, block_bytes, instance)
        memory.slots[:] = content(num_slots, block_bytes)
        return memory
    import torch

    from twostroke.kv.cuda_memory import CudaPool

    pool = CudaPool(num_slots, block_bytes, instance, torch.device("cuda", gpu))
    pool.slots.copy_(torch.from_numpy(content(num_slots, block_bytes)))
    torch.cuda.synchronize(gpu)
    return pool


def main() -> None:
    num_slots, block_bytes, instance = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    where = sys.argv[4] if len(sys.argv) > 4 else None
    memory = filled(num_slots, block_bytes, instance, int(where) if where not in (None, "nixl") else None)
    address = memory.address
    if where == "nixl":
        import torch

        from twostroke.links.nixl import NixlServer

        assert isinstance(memory, PoolMemory)
        server = NixlServer(torch.from_numpy(memory.slots), memory.address, SECRET)
        address = server.address
    print(encode(address).decode(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
