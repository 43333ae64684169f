"""The host tier under a GPU's pool, against what the link between the two carries. Blocks of Qwen2.5-7B's shape.

    python -m benchmarks.bench_offload_cuda [--only tier,ttft,decode] [--repeats 5]

- *tier*: writing the pool's blocks into the tier, reading them back, and both at once, verified as always, against
  copies between pinned and GPU memory without anything else.
- *ttft*: a prompt whose blocks are in the tier and not in the pool, through a real worker over HTTP, against 1.3 times
  the copy of its KV at the link's speed, and one step.
- *decode*: a batch of 32 decodes while blocks go both ways as fast as they can, against the same without.

Random weights; a minute and a half on an H100.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import torch

from benchmarks.bench_engine_cuda import STEPS, Engines, _gaps, prompts
from benchmarks.common import Row, report, row
from benchmarks.servers import free_port, running
from benchmarks.shapes import shape
from benchmarks.store_pool import key
from benchmarks.store_serving import generate
from twostroke.kv.cuda_memory import CudaPool, register
from twostroke.links.staging import of_thread, staging
from twostroke.store.host import HostTier
from twostroke.store.tier import Tier
from twostroke.worker.loading import GPU_AT_ONCE
from twostroke.worker.offload import SlotsEnd

SHAPE = "Qwen2.5-7B"
TOKEN = 57_344  # bytes of KV
BLOCK = 16 * TOKEN
BLOCKS = 2048  # moved in a repeat
CALL = 256  # blocks of one call, which takes about 5 ms
AT_ONCE = 2  # calls each way at any time, as from several requests
LENGTHS = {8192: 8.5, 32768: 34.0}  # tokens of a prompt, and ms of its copy at 55 GB/s
DEVICE = torch.device("cuda", 0)


class Slots:
    """Slots of a pool on the GPU with random contents, taken in random order."""

    def __init__(self, count: int, seed: int) -> None:
        self.pool = CudaPool(count, BLOCK, "bench", DEVICE)
        self.pool.slots.copy_(torch.randint(0, 256, (count, BLOCK), dtype=torch.uint8, device=DEVICE))
        torch.cuda.synchronize()
        self.order = random.Random(seed).sample(range(count), count)
        self._access = of_thread(staging(self.pool.slots))

    async def move(self, call: Callable[..., object], keys: list[bytes]) -> None:
        """``put`` or ``get`` of a tier for all of them."""

        async def some(start: int) -> None:
            for first in range(start, len(keys), AT_ONCE * CALL):
                end = SlotsEnd(self.order[first : first + CALL], self._access)
                moved = await call(keys[first : first + CALL], end)  # type: ignore[misc]
                assert moved == len(keys[first : first + CALL])
                end.close()

        await asyncio.gather(*(some(nth * CALL) for nth in range(AT_ONCE)))


def link(repeats: int) -> dict[str, list[float]]:
    """GB/s of copies of 256 MiB between pinned and GPU memory: out, in, and both at once."""
    size = 256 << 20
    host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    gpu = [torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    streams = [torch.cuda.Stream(DEVICE) for _ in range(2)]  # type: ignore[no-untyped-call]
    pairs = [(host[0], gpu[0]), (gpu[1], host[1])]

    def copies(which: list[int]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(8):
            for one in which:
                with torch.cuda.stream(streams[one]):
                    pairs[one][0].copy_(pairs[one][1], non_blocking=True)
        torch.cuda.synchronize()
        return 8 * len(which) * size / 1e9 / (time.perf_counter() - start)

    copies([0, 1])
    ways = {"out": [0], "in": [1], "both": [0, 1]}
    return {way: [copies(which) for _ in range(repeats)] for way, which in ways.items()}


async def tier_rows(repeats: int, limit: dict[str, list[float]]) -> list[Row]:
    """The tier alone."""
    slots, others = Slots(BLOCKS, 1), Slots(BLOCKS, 2)
    start = time.perf_counter()
    tier = HostTier(BLOCK, 3 * BLOCKS * BLOCK, at_once=GPU_AT_ONCE, register=lambda memory: register(memory, 0))
    await tier.open()
    print(f"{3 * BLOCKS * BLOCK / 2**30:.1f} GiB of memory ready in {time.perf_counter() - start:.1f} s", flush=True)
    figures: dict[str, list[float]] = {"out": [], "in": [], "both": []}
    total = BLOCKS * BLOCK / 1e9
    for turn in range(repeats + 1):
        first, second = ([key(turn, part, index) for index in range(BLOCKS)] for part in range(2))
        before = slots.pool.slots.clone()
        start = time.perf_counter()
        await slots.move(tier.put, first)
        put = time.perf_counter() - start
        slots.pool.slots.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        await slots.move(tier.get, first)
        got = time.perf_counter() - start
        assert torch.equal(slots.pool.slots, before), "what came back is what went out"
        start = time.perf_counter()
        await asyncio.gather(slots.move(tier.get, first), others.move(tier.put, second))
        both = time.perf_counter() - start
        if turn:
            for way, speed in (("out", total / put), ("in", total / got), ("both", 2 * total / both)):
                figures[way].append(speed)
    await tier.close()
    slots.pool.close()
    others.pool.close()
    names = {"out": "GPU to tier", "in": "tier to GPU", "both": "both at once"}
    goals = {"out": ">= 50 GB/s", "in": ">= 50 GB/s", "both": ">= 85 GB/s"}
    return [row(names[way], "GB/s", figures[way], limit[way], "pinned copies", goals[way]) for way in names]


@contextmanager
def worker(folder: Path, tokens: int) -> Iterator[str]:
    """The URL of a worker with a host tier, and a pool of so many tokens."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = ["twostroke", "serve", str(shape(SHAPE, folder)), "--load-format", "dummy", "--port", str(port)]
    command += ["--store", "host:12GiB", "--kv-memory", str(tokens * TOKEN)]
    with running(command, f"{url}/ready"):
        yield url


async def ttft_rows(repeats: int, limit: dict[str, list[float]]) -> list[Row]:
    """Two long prompts and a short one by turns: the pool, which has room for one and the short one, has lost each."""
    rng = random.Random(45)
    lengths = [32768, 32768, 8192]
    given = [[rng.randrange(100, 150_000) for _ in range(tokens)] for tokens in lengths]
    times: dict[int, list[float]] = {tokens: [] for tokens in LENGTHS}
    computed: dict[int, list[float]] = {tokens: [] for tokens in LENGTHS}
    with tempfile.TemporaryDirectory() as folder, worker(Path(folder), 38_400) as url:
        async with aiohttp.ClientSession() as http:
            await generate(http, url, given[0][::-100], 2)
            for tokens, prompt in zip(lengths, given, strict=True):
                computed[tokens].append(1e3 * (await generate(http, url, prompt, 1)).ttft)
                await asyncio.sleep(1.0)  # it is written
            step = statistics.median([1e3 * (await generate(http, url, given[2][:500], 30)).tpot for _ in range(3)])
            for turn in range(repeats + 1):
                for tokens, prompt in zip(lengths, given, strict=True):
                    reply = await generate(http, url, prompt, 1)
                    if turn:
                        times[tokens].append(1e3 * reply.ttft)
    rows = []
    for tokens in LENGTHS:
        floor = tokens * TOKEN / 1e6 / statistics.median(limit["in"])
        rows.append(row(f"TTFT, {tokens:,} in the tier", "ms", times[tokens], [floor + step], "copy + step", ""))
        rows.append(
            row(f"TTFT, {tokens:,} in the tier", "ms", times[tokens], [1.3 * floor + step], "1.3 copies + step", "<= 1")
        )
        rows.append(row(f"TTFT, {tokens:,} in the tier", "ms", times[tokens], computed[tokens], "computed", ""))
    return rows


def decode_rows(repeats: int) -> list[Row]:
    """With and without traffic, in turn."""
    engines = Engines(SHAPE, 0.8, 8192)
    slots = [Slots(AT_ONCE * CALL, seed) for seed in range(2)]
    moved = 0

    async def traffic(tier: Tier, over: asyncio.Event) -> None:
        nonlocal moved
        there = [key("there", index) for index in range(AT_ONCE * CALL)]
        await slots[0].move(tier.put, there)
        turn = 0
        while not over.is_set():
            turn += 1
            new = [key(turn, index) for index in range(AT_ONCE * CALL)]
            await tier.contains(there)  # as before any load; or they would be evicted
            await asyncio.gather(slots[0].move(tier.get, there), slots[1].move(tier.put, new))
            moved += 2 * AT_ONCE * CALL * BLOCK

    class Busy:
        """An engine that runs beside the traffic."""

        def run(self, work: Callable[..., object]) -> object:
            async def both(engine: object) -> object:
                over, capacity = asyncio.Event(), 4 * AT_ONCE * CALL * BLOCK
                tier = HostTier(BLOCK, capacity, at_once=GPU_AT_ONCE, register=lambda memory: register(memory, 0))
                await tier.open()
                task = asyncio.create_task(traffic(tier, over))
                try:
                    return await work(engine)  # type: ignore[misc]
                finally:
                    over.set()
                    await task
                    await tier.close()

            return engines.run(both)  # type: ignore[arg-type]

    alone, busy, speeds = [], [], []
    for _ in range(repeats):
        given = prompts(32, 1024 - 2 * STEPS)
        alone += _gaps(engines, given)
        moved, start = 0, time.perf_counter()
        busy += _gaps(Busy(), given)  # type: ignore[arg-type]
        speeds.append(moved / 1e9 / (time.perf_counter() - start))
    print(f"traffic meanwhile: {statistics.median(speeds):.1f} GB/s, prefill and start included")
    return [row("decode step, 32 x 1k, beside copies", "ms", busy, alone, "without copies", "<= 1.05")]


def main() -> None:
    """Measure the sections."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="tier,ttft,decode")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    limit = link(options.repeats)
    settings = {"device": torch.cuda.get_device_name(), "block_bytes": BLOCK, "at_once": GPU_AT_ONCE}
    for section in options.only.split(","):
        match section:
            case "tier":
                rows = asyncio.run(tier_rows(options.repeats, limit))
            case "ttft":
                rows = asyncio.run(ttft_rows(options.repeats, limit))
            case _:
                rows = decode_rows(options.repeats)
        report("offload_cuda", rows, section, **settings)


if __name__ == "__main__":
    main()
