"""The engine on one GPU against its limits, measured in the same run. Real shapes, random weights, bfloat16.

    python -m benchmarks.bench_engine_cuda [--shape Qwen2.5-7B] [--tables ttft,decode,idle,workload] [--repeats 5]

- *ttft*: one prompt alone, until its first token, against its FLOPs at the rate of a large matrix product.
- *decode*: time between tokens while a batch decodes, against weights and KV bytes at the bandwidth of a large copy.
- *idle*: the same at batch 32 against the captured step replayed back to back, which leaves the GPU no pause.
- *workload*: many prompts at once, 10 tokens each; the time until the last one is done, against vLLM's 0.26 on an H100.
"""

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import Row, filling, report, row
from benchmarks.cuda_limits import limits, milliseconds
from benchmarks.shapes import shape
from twostroke.engine.engine import Engine
from twostroke.engine.model import Model
from twostroke.engine.runner import Limits
from twostroke.kv.cuda_memory import CudaPool
from twostroke.kv.pool import Pool
from twostroke.messages import Output, Request, Sampling
from twostroke.worker.worker import TURN_SECONDS

BLOCK = 16
BUDGET = 8192
MAX_BATCH = 256
STEPS = 40
TTFT = {1024: 24, 8192: 195, 32768: 1020, 50000: 1850}  # ms, the goals on an H100
DECODE = [(1, 1024), (8, 1024), (32, 1024), (128, 1024), (1, 8192), (8, 8192)]
WORKLOAD = {(160, 1000): 3.56, (160, 10000): 39.5, (160, 20000): 89.6, (32, 50000): 60.6}  # s, vLLM 0.26 on an H100
MOE_DECODE = {(1, 1024): 4.8, (8, 1024): 12.2, (32, 1024): 21.7, (128, 1024): 29.2}  # ms, likewise
_ids = random.Random(45)


@dataclass(frozen=True)
class Times:
    """When one request got each of its tokens, in seconds after it was sent."""

    tokens: list[float]


class Engines:
    """One model, and engines that run on it one after the other."""

    def __init__(self, name: str, slots_bytes: float, chunk: int) -> None:
        self.name = name
        sys.setswitchinterval(TURN_SECONDS)  # as in a worker
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            self.model = Model(
                shape(name, Path(folder)), dtype="bfloat16", block_tokens=BLOCK, device="cuda", load_format="dummy"
            )
        loaded = time.perf_counter()
        limits_ = Limits(MAX_BATCH, chunk, 65536)
        self.chunk = chunk
        needed = self.model.runner.measure(limits_)
        total = torch.cuda.get_device_properties(0).total_memory
        size = self.model.layout.block_bytes
        self.slots = int((slots_bytes * total - needed) // size)
        self._pool = CudaPool(self.slots, size, "benchmark", self.model.device)
        self.model.bind(self._pool.slots, limits_, print)
        self.start = (loaded - start, time.perf_counter() - loaded)
        print(
            f"{name}: weights {self.start[0]:.1f} s, ready {self.start[1]:.1f} s later, {self.slots} slots", flush=True
        )

    def run(self, work: "Callable[[Running], Awaitable[list[Times]]]") -> list[Times]:
        """On a fresh engine, whose cache is empty."""

        async def measured() -> list[Times]:
            engine = Engine(self.model, Pool(self.slots), max_batch=MAX_BATCH, token_budget=self.chunk)
            engine.start(asyncio.get_running_loop(), lambda: None)
            try:
                return await work(Running(engine))
            finally:
                await asyncio.to_thread(engine.stop)

        return asyncio.run(measured())


class Running:
    """An engine that steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._count = itertools.count()

    async def all(self, prompts: list[list[int]], tokens: int) -> list[Times]:
        """Send all at once."""
        return list(await asyncio.gather(*(self._one(prompt, tokens) for prompt in prompts)))

    async def _one(self, prompt: list[int], tokens: int) -> Times:
        sampling = Sampling(max_tokens=tokens, seed=0, temperature=0, ignore_eos=True)
        start = time.perf_counter()
        job = self._engine.submit(Request(f"{next(self._count)}/0/0", prompt, sampling))
        return Times([time.perf_counter() - start async for update in job.updates() if isinstance(update, Output)])


def prompts(count: int, tokens: int) -> list[list[int]]:
    """Random ids, so that nothing is in the prefix cache."""
    return [[_ids.randrange(100, 150_000) for _ in range(tokens)] for _ in range(count)]


def ttft(engines: Engines, repeats: int, rate: float) -> list[Row]:
    """One prompt alone."""
    rows = []
    config = engines.model.runner._network.config  # type: ignore[attr-defined]
    for tokens, goal in TTFT.items():
        times = []
        for _ in range(repeats + 1):
            (one,) = engines.run(lambda running, tokens=tokens: running.all(prompts(1, tokens), 1))  # type: ignore[misc]
            times.append(one.tokens[0] * 1e3)
        attention = (
            2 * config.num_hidden_layers * config.num_attention_heads * engines.model.layout.head_dim * tokens**2
        )
        flops = 2 * active_weights(engines.model, tokens) * tokens + attention
        goal_text = f"≤ {goal} ms" if engines.name == "Qwen2.5-7B" else ""
        rows.append(row(f"TTFT, {tokens} tokens", "ms", times[1:], [flops / rate * 1e3], "FLOPs / product", goal_text))
        print(rows[-1].what, f"{rows[-1].measured:.1f} ms {flops / rows[-1].measured / 1e9:.0f} TFLOP/s", flush=True)
    return rows


def decode(engines: Engines, repeats: int, bandwidth: float) -> list[Row]:
    """All of a batch decode."""
    rows = []
    for batch, context in DECODE:
        given = prompts(batch, context - 2 * STEPS)
        times = [gap for _ in range(repeats) for gap in _gaps(engines, given)]
        layout = engines.model.layout
        weights = 2 * active_weights(engines.model, batch, head=True)
        floor = (weights + batch * context * layout.token_bytes) / bandwidth * 1e3
        if engines.name == "Qwen2.5-7B":
            rows.append(row(f"decode, {batch} x {context}", "ms", times, [floor], "bytes / bandwidth", "≤ 1.2"))
        else:
            rows.append(row(f"decode, {batch} x {context}", "ms", times, [floor], "bytes / bandwidth", ""))
            if theirs := MOE_DECODE.get((batch, context)):
                rows.append(row(f"decode, {batch} x {context}", "ms", times, [theirs], "vLLM 0.26, H100", "≤ 1"))
        print(
            rows[-1].what, f"{statistics.median(times):.3f} ms, {rows[-1].ratio:.2f} of {rows[-1].against}", flush=True
        )
    return rows


def _gaps(engines: Engines, given: list[list[int]]) -> list[float]:
    """Milliseconds between tokens of the request that started last, while all decode."""
    times = engines.run(lambda running: running.all(given, 2 * STEPS))
    last = max(times, key=lambda one: one.tokens[0]).tokens
    first_end = min(one.tokens[-1] for one in times)
    inner = [at for at in last[4:] if at < first_end]
    assert len(inner) > STEPS // 2, "the batch must decode together for a while"
    return [(inner[-1] - inner[0]) / (len(inner) - 1) * 1e3]


def idle(engines: Engines, repeats: int) -> list[Row]:
    """Engine's decode step at batch 32 against its graph alone."""
    times = [gap for _ in range(repeats) for gap in _gaps(engines, prompts(32, 1024 - 2 * STEPS))]
    slots = random.sample(range(engines.slots), 32 * 1024 // BLOCK)
    pages = 1024 // BLOCK
    engines.model.forward([filling(slots[i * pages : (i + 1) * pages], BLOCK) for i in range(32)])  # what it computes
    graph = next(one for one in engines.model.runner._decodes if one.room.rows == 32)  # type: ignore[attr-defined]
    alone = milliseconds(lambda: [graph.graph.replay() for _ in range(20)])
    return [row("decode step, batch 32", "ms", times, [one / 20 for one in alone], "its graph alone", "≤ 1.05")]


def workload(engines: Engines, lengths: list[int]) -> list[Row]:
    """Everything at once."""
    rows = []
    for (count, tokens), theirs in WORKLOAD.items():
        if tokens not in lengths:
            continue
        given = prompts(count, tokens)
        times = engines.run(lambda running, given=given: running.all(given, 10))  # type: ignore[misc]
        total = max(one.tokens[-1] for one in times)
        first = sorted(one.tokens[0] for one in times)
        tpot = statistics.median((one.tokens[-1] - one.tokens[0]) / 9 for one in times)
        rows.append(row(f"{count} x {tokens}, output 10: total", "s", [total], [theirs], "vLLM 0.26, H100", "≤ 1"))
        print(f"{rows[-1].what}: {total:.2f} s, {rows[-1].ratio:.3f} of vLLM, {count * tokens / total:.0f} tok/s")
        p50, p99 = statistics.median(first), first[int(0.99 * len(first))]
        print(f"    TTFT p50 {p50:.2f} p99 {p99:.2f} s, TPOT p50 {tpot * 1e3:.0f} ms", flush=True)
    return rows


def active_weights(model: Model, tokens: int, *, head: bool = False) -> float:
    """Weights that a step of ``tokens`` tokens reads, or, without ``head``, multiplies each token with."""
    network = model.runner._network  # type: ignore[attr-defined]
    experts = sum(p.numel() for name, p in network.named_parameters() if "experts" in name)
    dense = sum(p.numel() for name, p in network.base_model.named_parameters() if "embed" not in name) - experts
    config = network.config
    if experts:
        share = config.num_experts_per_tok / config.num_experts
        # Each token takes its experts at random: how many of all are taken by at least one.
        dense += experts * (1 - (1 - share) ** tokens if head else share)
    return float(dense) + (network.get_output_embeddings().weight.numel() if head else 0)


def main() -> None:
    """Measure the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="Qwen2.5-7B")
    parser.add_argument("--tables", default="ttft,decode,idle,workload")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunk-size", type=int, default=BUDGET)
    parser.add_argument("--lengths", default="1000,10000,20000,50000", help="of the workload")
    options = parser.parse_args()
    bandwidth, rate = limits()
    print(f"copy {bandwidth / 1e12:.2f} TB/s, product {rate / 1e12:.0f} TFLOP/s", flush=True)
    engines = Engines(options.shape, 0.9, options.chunk_size)
    tables = options.tables.split(",")
    rows = []
    if "ttft" in tables:
        rows += ttft(engines, options.repeats, rate)
    if "decode" in tables:
        rows += decode(engines, options.repeats, bandwidth)
    if "idle" in tables:
        rows += idle(engines, options.repeats)
    if "workload" in tables:
        rows += workload(engines, [int(length) for length in options.lengths.split(",")])
    report(
        f"engine_cuda_{options.shape}",
        rows,
        device=torch.cuda.get_device_name(),
        copy_bytes_per_s=bandwidth,
        product_flops=rate,
        start_s=engines.start,
        block_tokens=BLOCK,
        chunk_tokens=options.chunk_size,
        max_batch=MAX_BATCH,
    )


if __name__ == "__main__":
    main()
