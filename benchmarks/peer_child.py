"""What runs inside a peer's own environment, and therefore imports nothing of ours: its blocks in slots, put and got.

Reads a line of JSON a command and answers with one, on the file descriptor that it was given: ``bench_store_peers.py``
is the other end. Blocks are the same random bytes in the same random order as those that our own tiers are given.
"""

import argparse
import json
import math
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

Slots = np.ndarray[tuple[int, int], np.dtype[np.uint8]]


class Store(Protocol):
    """A peer, with slots of ours to put from and get into."""

    def put(self, turn: int) -> float | None:
        """All slots, under keys of this turn. How many seconds it took, if it has measured that itself."""
        ...

    def get(self, turn: int) -> float | None:
        """All slots of this turn, likewise."""
        ...


def both(work: Callable[[int, int], None], count: int) -> None:
    """``work(first, end)`` on two threads, half of ``count`` each: as many as our tiers copy with."""
    threads = [threading.Thread(target=work, args=(count * i // 2, count * (i + 1) // 2)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class LocalCpu:
    """LMCache's local CPU back end. Blocks are copied into memory of its allocator, and out of it."""

    def __init__(self, slots: Slots, order: Sequence[int], capacity: int) -> None:
        import torch
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

        torch.set_num_threads(1)
        size = slots.shape[1]
        config: Any = LMCacheEngineConfig.from_defaults(
            chunk_size=16, local_cpu=True, max_local_cpu_size=capacity / 2**30
        )
        metadata = LMCacheMetadata("bench", 1, 1, 0, 0, torch.uint8, (1, 2, 16, 1, size // 32))
        self._backend: Any = LocalCPUBackend(config, metadata, dst_device="cpu")
        as_tensor: Any = torch.from_numpy
        self._order, self._slots = order, [as_tensor(slot) for slot in slots]
        self._shape, self._type = torch.Size([size]), torch.uint8
        key: Any = CacheEngineKey
        self._key: Callable[[int, int], Any] = lambda turn, at: key("bench", 1, 0, turn << 20 | at, torch.uint8)

    def put(self, turn: int) -> None:
        """See ``Store``."""

        def some(first: int, end: int) -> None:
            for index in range(first, end):
                block = self._backend.allocate(self._shape, self._type)
                block.raw_data[: self._shape[0]].copy_(self._slots[self._order[index]])
                self._backend.submit_put_task(self._key(turn, index), block)
                block.ref_count_down()

        both(some, len(self._order))

    def get(self, turn: int) -> None:
        """See ``Store``."""

        def some(first: int, end: int) -> None:
            for index in range(first, end):
                block = self._backend.get_blocking(self._key(turn, index))
                self._slots[self._order[index]].copy_(block.raw_data[: self._shape[0]])
                block.ref_count_down()

        both(some, len(self._order))


class Files:
    """LMCache's adapters that write files, measured by the functions of ``lmcache bench l2``: all keys at once."""

    def __init__(self, slots: Slots, order: Sequence[int], options: argparse.Namespace) -> None:
        import torch
        from lmcache.cli.commands.bench.l2_adapter_bench import data, runner
        from lmcache.v1.distributed.l2_adapters import create_l2_adapter
        from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2AdapterConfig
        from lmcache.v1.distributed.l2_adapters.fs_native_l2_adapter import FSNativeL2AdapterConfig

        self._data: Any = data
        self._runner: Any = runner
        options.path.mkdir()
        spec: dict[str, object] = {"base_path": str(options.path), "use_odirect": options.direct}
        config: Any = FSL2AdapterConfig if options.peer == "fs" else FSNativeL2AdapterConfig
        made = config.from_dict(spec if options.peer == "fs" else spec | {"num_workers": options.threads})
        as_tensor: Any = torch.from_numpy
        memory = as_tensor(slots.reshape(-1))
        self._adapter: Any = create_l2_adapter(made, l1_memory_desc=self._data.create_l1_memory_desc(memory, 4096))
        before = slots.copy()  # the next line fills them with other bytes
        blocks = self._data.make_memory_objects(memory, len(order), slots.shape[1], 0)
        slots[:] = before
        self._blocks, self._size = [blocks[slot] for slot in order], slots.shape[1]

    def put(self, turn: int) -> float:
        """See ``Store``."""
        return self._round(self._runner.bench_store, turn)

    def get(self, turn: int) -> float:
        """See ``Store``."""
        return self._round(self._runner.bench_load, turn)

    def close(self) -> None:
        """End its threads."""
        self._adapter.close()

    def _round(self, bench: Callable[..., Any], turn: int) -> float:
        count = len(self._blocks)
        keys = self._data.make_object_keys(count, key_offset=turn * count)
        given: Sequence[Any] = (lambda _: [keys], lambda _: [self._blocks], lambda _: None)
        result = bench(self._adapter, 1, count, self._size, 1, *given)
        assert result.success_counts == [count], f"{result.success_counts} of {count}"
        took: float = result.round_durations[0]
        return took


class Mooncake:
    """Mooncake's client, without copies: it sends from slots that are registered with it, and receives into them."""

    def __init__(self, slots: Slots, order: Sequence[int], master: str, memory: int) -> None:
        """``memory``: that it adds itself, so that blocks are copied within its process; 0 is another process's."""
        from mooncake.store import MooncakeDistributedStore

        self._client: Any = MooncakeDistributedStore()
        code = self._client.setup(
            {
                "local_hostname": "127.0.0.1",
                "metadata_server": "P2PHANDSHAKE",
                "global_segment_size": str(memory),
                "local_buffer_size": str(16 << 20),
                "protocol": "tcp",
                "master_server_addr": master,
            }
        )
        assert code == 0, f"Mooncake's client does not start: {code}"
        assert self._client.register_buffer(slots.ctypes.data, slots.nbytes) == 0
        self._addresses = [slots[slot].ctypes.data for slot in order]
        self._sizes = [slots.shape[1]] * len(order)

    def put(self, turn: int) -> None:
        """See ``Store``."""
        codes = self._client.batch_put_from(self._names(turn), self._addresses, self._sizes)
        assert set(codes) == {0}, f"put: {set(codes)}"

    def get(self, turn: int) -> None:
        """See ``Store``."""
        sizes = self._client.batch_get_into(self._names(turn), self._addresses, self._sizes)
        assert sizes == self._sizes, f"get: {set(sizes)}"

    def forget(self, turn: int) -> None:
        """Make room for the next turn."""
        self._client.batch_remove(self._names(turn), True)

    def close(self) -> None:
        """Give up the memory."""
        self._client.close()

    def _names(self, turn: int) -> list[str]:
        return [f"{self._sizes[0]}-{turn}-{index}" for index in range(len(self._sizes))]


class Valkey:
    """redis-py with hiredis: two connections, each with a pipeline of sets, or one MGET, of some MiB at once."""

    def __init__(self, slots: Slots, order: Sequence[int], port: int) -> None:
        import redis

        self._clients = [redis.Redis(port=port, protocol=3) for _ in range(2)]
        self._slots, self._order = slots, order
        self._batch = max(1, (4 << 20) // slots.shape[1])

    def put(self, turn: int) -> None:
        """See ``Store``."""

        def some(first: int, end: int) -> None:
            client = self._clients[first > 0]
            for at in range(first, end, self._batch):
                with client.pipeline(transaction=False) as pipeline:
                    for index in range(at, min(end, at + self._batch)):
                        pipeline.set(f"{turn}-{index}", cast(bytes, memoryview(self._slots[self._order[index]])))
                    pipeline.execute()

        both(some, len(self._order))

    def get(self, turn: int) -> None:
        """See ``Store``."""

        def some(first: int, end: int) -> None:
            client = self._clients[first > 0]
            for at in range(first, end, self._batch):
                indices = range(at, min(end, at + self._batch))
                values = cast(list[bytes], client.mget([f"{turn}-{index}" for index in indices]))
                for index, value in zip(indices, values, strict=True):
                    self._slots[self._order[index]] = np.frombuffer(value, np.uint8)

        both(some, len(self._order))

    def forget(self, turn: int) -> None:
        """Make room for the next turn."""
        self._clients[0].flushall()


def seconds(work: Callable[[int], float | None], turn: int) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    measured = work(turn)
    return time.perf_counter() - start if measured is None else measured


def serve(make: Callable[[Slots, Sequence[int]], Store], answers: int) -> None:
    """Obey commands until stdin ends."""
    store: Store | None = None
    slots: Slots = np.empty((0, 0), np.uint8)
    with os.fdopen(answers, "w") as out:
        for line in sys.stdin:
            command = json.loads(line)
            answer: dict[str, object] = {}
            match command["do"]:
                case "open":
                    shape = command["blocks"], command["size"]
                    slots = np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)  # on whole pages
                    slots[:] = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
                    order = np.random.default_rng(1).permutation(command["blocks"]).tolist()
                    store = make(slots, order)
                case "put" if store is not None:
                    answer["seconds"] = seconds(store.put, command["turn"])
                case "get" if store is not None:
                    before = int(slots.sum(dtype=np.uint64))
                    slots[:] = 0
                    answer["seconds"] = seconds(store.get, command["turn"])
                    assert int(slots.sum(dtype=np.uint64)) == before, "other bytes came back"
                    getattr(store, "forget", int)(command["turn"])
                case "close":
                    getattr(store, "close", int)()
                    store = None
            out.write(json.dumps(answer) + "\n")
            out.flush()


def main() -> None:
    """One peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=["lmcache", "fs", "fs_native", "mooncake", "owner", "valkey"])
    parser.add_argument("--answers", type=int, required=True)
    parser.add_argument("--capacity", type=int, default=0)
    parser.add_argument("--master", default="")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--path", type=Path, default=Path())
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--threads", type=int, default=4)
    options = parser.parse_args()
    if options.peer == "owner":  # adds memory to Mooncake's store, and waits
        owner = Mooncake(np.zeros((1, 4096), np.uint8), [0], options.master, options.capacity)
        os.write(options.answers, b"{}\n")
        sys.stdin.read()
        owner.close()
        return
    makers: dict[str, Callable[[Slots, Sequence[int]], Store]] = {
        "lmcache": lambda slots, order: LocalCpu(slots, order, options.capacity),
        "fs": lambda slots, order: Files(slots, order, options),
        "fs_native": lambda slots, order: Files(slots, order, options),
        "mooncake": lambda slots, order: Mooncake(slots, order, options.master, options.capacity),
        "valkey": lambda slots, order: Valkey(slots, order, options.port),
    }
    serve(makers[options.peer], options.answers)


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # what lies beside this file is ours
    main()
