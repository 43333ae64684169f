"""Another process that owns a pool: the real peer of tests over shared memory.

``python -m tests.peer_process SLOTS BYTES INSTANCE`` fills a pool, prints its address and lives until its stdin closes.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np

from twostroke.kv.memory import Bytes, PoolMemory
from twostroke.messages import PoolAddress, encode


def content(num_slots: int, block_bytes: int) -> Bytes:
    """What the peer's slots hold: different in each slot."""
    return np.random.default_rng(num_slots).integers(0, 256, (num_slots, block_bytes), dtype=np.uint8)


@contextmanager
def peer_process(
    num_slots: int, block_bytes: int, instance: str = "peer"
) -> Iterator[tuple["subprocess.Popen[bytes]", PoolAddress]]:
    """A process that owns a pool, killed at the latest when the context ends."""
    command = [sys.executable, "-m", "tests.peer_process", str(num_slots), str(block_bytes), instance]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield process, msgspec.json.decode(process.stdout.readline(), type=PoolAddress)
        finally:
            process.kill()


def main() -> None:
    num_slots, block_bytes = int(sys.argv[1]), int(sys.argv[2])
    memory = PoolMemory(num_slots, block_bytes, sys.argv[3])
    memory.slots[:] = content(num_slots, block_bytes)
    print(encode(memory.address).decode(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
