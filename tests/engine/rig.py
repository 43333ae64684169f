"""A real engine, thread and all, on a tiny model."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from twostroke.engine.engine import Engine, Job
from twostroke.engine.model import Model
from twostroke.kv.memory import PoolMemory
from twostroke.kv.pool import Pool
from twostroke.messages import Output, Request, Sampling, Slots

_numbers = iter(range(10**9))


def request(prompt: list[int], count: int = 8, *, priority: int = 0, salt: str = "", **knobs: object) -> Request:
    """A request with a fresh id; greedy unless ``knobs`` of ``Sampling`` say otherwise."""
    sampling = Sampling(**{"max_tokens": count, "seed": 0, "temperature": 0.0, **knobs})  # type: ignore[arg-type]
    return Request(f"r{next(_numbers)}/0/0", prompt, sampling, priority=priority, salt=salt)


class Rig:
    """An engine and the memory of its pool."""

    def __init__(self, directory: Path, *, block_tokens: int, slots: int, budget: int, max_batch: int) -> None:
        self.model = Model(directory, dtype="float32", block_tokens=block_tokens, threads=1)
        self.memory = PoolMemory(slots, self.model.layout.block_bytes, f"rig-{next(_numbers)}")
        self.model.bind(torch.from_numpy(self.memory.slots))
        self.engine = Engine(self.model, Pool(slots), max_batch=max_batch, token_budget=budget)
        self.died = asyncio.Event()

    @property
    def counts(self) -> Slots:
        return self.engine.load().slots

    async def outputs(self, job: Job) -> list[Output]:
        """All outputs of a job."""
        return [update async for update in job.updates() if isinstance(update, Output)]

    async def tokens(self, request: Request) -> list[int]:
        """The ids that a request gets."""
        return ids(await self.outputs(self.engine.submit(request)))


def ids(outputs: list[Output]) -> list[int]:
    """The token ids of outputs; only the last one finishes."""
    assert [bool(output.finish) for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return [token.id for output in outputs for token in output.tokens]


async def until(holds: Callable[[], bool]) -> None:
    """Wait, for a while, until something is so."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - also what another thread changes
            await asyncio.sleep(0.002)


@asynccontextmanager
async def running(
    directory: Path, *, block_tokens: int = 16, slots: int = 100, budget: int = 64, max_batch: int = 8
) -> AsyncIterator[Rig]:
    """An engine that runs; at the end nobody may hold a slot."""
    rig = Rig(directory, block_tokens=block_tokens, slots=slots, budget=budget, max_batch=max_batch)
    rig.engine.start(asyncio.get_running_loop(), rig.died.set)
    try:
        yield rig
        counts = rig.counts
        assert counts.leased == 0
        assert counts.free + counts.cached == counts.total
    finally:
        await asyncio.to_thread(rig.engine.stop)
        rig.memory.close()
