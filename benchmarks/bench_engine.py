"""The engine against plain transformers and against its own matrix products, on this CPU, in one run.

Embedded model, bfloat16. A decode step of ours is a whole engine step: plan, run, sample, commit.

    python -m benchmarks.bench_engine [repeats]
"""

import asyncio
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.common import Row, report, row, seconds
from twostroke import models
from twostroke.engine.engine import Engine
from twostroke.engine.model import Model
from twostroke.engine.runner import Limits
from twostroke.kv.memory import PoolMemory
from twostroke.kv.pool import Pool
from twostroke.messages import Output, Request, Sampling

CONTEXT = 128  # tokens of prompt before the decode steps
STEPS = 16
SLOTS = 1200
BATCHES = {1: "≤ 0.857 (36 / 42 ms)", 8: "", 32: "≤ 0.723 (60 / 83 ms)"}
THREADS = torch.get_num_threads()
_ids = random.Random(45)


def prompt(tokens: int) -> list[int]:
    """Random token ids, so that nothing is in the prefix cache."""
    return [_ids.randrange(100, 49_000) for _ in range(tokens)]


def alone(work: Callable[[], float]) -> float:
    """Run in a thread of its own: whoever used torch in a thread that lives on would leave OpenMP threads behind, which
    then compete with those of the next.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


class Ours:
    """The real engine, thread and all."""

    def __init__(self, directory: Path) -> None:
        self._model = Model(directory, dtype="bfloat16", block_tokens=16, threads=THREADS)
        memory = PoolMemory(SLOTS, self._model.layout.block_bytes, "benchmark")
        self._model.bind(torch.from_numpy(memory.slots), Limits(64, 512, 2048))

    def run(self, work: Callable[["Running"], Coroutine[None, None, float]]) -> float:
        """Measure on a fresh engine."""

        async def measured() -> float:
            engine = Engine(self._model, Pool(SLOTS), max_batch=64, token_budget=512)
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
        self._count = 0

    async def decode(self, batch: int) -> float:
        """Median seconds between the outputs of one sequence while ``batch`` of them decode."""
        times = await self._all([prompt(CONTEXT) for _ in range(batch)], STEPS)
        last = times[-1]  # it started last: all others decode too
        return statistics.median(after - before for before, after in itertools.pairwise(last[1:]))

    async def prefill(self, prompts: int, tokens: int) -> float:
        """Seconds until the last of ``prompts`` prompts has its first token."""
        start = time.perf_counter()
        await self._all([prompt(tokens) for _ in range(prompts)], 1)
        return time.perf_counter() - start

    async def _all(self, prompts: list[list[int]], tokens: int) -> list[list[float]]:
        return await asyncio.gather(*(self._one(ids, tokens) for ids in prompts))

    async def _one(self, ids: list[int], tokens: int) -> list[float]:
        self._count += 1
        sampling = Sampling(max_tokens=tokens, seed=0, temperature=0, ignore_eos=True)
        job = self._engine.submit(Request(f"{self._count}/0/0", ids, sampling))
        return [time.perf_counter() async for update in job.updates() if isinstance(update, Output)]


def plain_decode(network: PreTrainedModel, batch: int) -> float:
    """Median seconds of a decode step of plain transformers with its own cache."""
    with torch.inference_mode():
        cache = network(torch.tensor([prompt(CONTEXT) for _ in range(batch)]), use_cache=True).past_key_values
        step = torch.tensor([prompt(1) for _ in range(batch)])
        return statistics.median(
            seconds(lambda: network(step, past_key_values=cache, use_cache=True).logits.argmax(-1).tolist())
            for _ in range(STEPS)
        )


def plain_prefill(network: PreTrainedModel, prompts: int, tokens: int) -> float:
    """Seconds for all prompts, one after the other."""
    with torch.inference_mode():
        return sum(
            seconds(lambda: network(torch.tensor([prompt(tokens)]), use_cache=True, logits_to_keep=1))
            for _ in range(prompts)
        )


class Products:
    """Only the matrix products of a step, with QKV and gate-up fused: the floor with torch's kernels."""

    def __init__(self, network: PreTrainedModel) -> None:
        config = network.config
        wide, inner = config.hidden_size, config.intermediate_size
        kv = config.num_key_value_heads * config.head_dim
        shapes = [(wide + 2 * kv, wide), (wide, wide), (2 * inner, wide), (wide, inner)]
        self._layers = [
            [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes] for _ in range(config.num_hidden_layers)
        ]
        self._head = torch.randn(config.vocab_size, wide, dtype=torch.bfloat16)

    def step(self, rows: int, sampled: int) -> float:
        """Seconds for ``rows`` tokens, ``sampled`` of which go through the head."""
        inputs = {size: torch.randn(rows, size, dtype=torch.bfloat16) for size in {w.shape[1] for w in self._layers[0]}}

        def products() -> None:
            for layer in self._layers:
                for weight in layer:
                    torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            torch.nn.functional.linear(inputs[self._head.shape[1]][:sampled], self._head)

        with torch.inference_mode():
            return statistics.median(seconds(products) for _ in range(5))


def measure(repeats: int) -> list[Row]:
    """Ours and the references in turn."""
    directory = models.resolve(None, print)
    with ThreadPoolExecutor(1) as loader:
        ours = loader.submit(Ours, directory).result()
        network = loader.submit(AutoModelForCausalLM.from_pretrained, directory, dtype=torch.bfloat16).result()
        products = loader.submit(Products, network).result()
    rows = []
    for batch, goal in BATCHES.items():
        mine, plain, floor = [], [], []
        for _ in range(repeats):
            mine.append(1e3 * ours.run(partial(Running.decode, batch=batch)))
            plain.append(1e3 * alone(partial(plain_decode, network, batch)))
            floor.append(1e3 * alone(partial(products.step, batch, batch)))
        rows.append(row(f"decode step, batch {batch}", "ms", mine, plain, "transformers", goal))
        rows.append(row(f"decode step, batch {batch}", "ms", mine, floor, "its matrix products", "1 is the floor"))
    prompts, tokens = 16, 512
    mine, plain, floor = [], [], []
    for _ in range(repeats):
        mine.append(prompts * tokens / ours.run(partial(Running.prefill, prompts=prompts, tokens=tokens)))
        plain.append(prompts * tokens / alone(partial(plain_prefill, network, prompts, tokens)))
        floor.append(tokens / alone(partial(products.step, tokens, 1)))
    name = f"prefill, {prompts} × {tokens} tokens"
    rows.append(row(name, "tok/s", mine, plain, "transformers", "≥ 1.176 (2,000 / 1,700)"))
    rows.append(row(name, "tok/s", mine, floor, "its matrix products", "1 is the floor"))
    return rows


if __name__ == "__main__":
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    report("engine", measure(repeats), model=models.EMBEDDED_NAME, threads=THREADS, repeats=repeats)
