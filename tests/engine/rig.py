"""A real engine, thread and all, on a tiny model."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from tests.engine.ahead import AheadRunner
from twostroke.engine.cpu import CpuRunner
from twostroke.engine.engine import Engine, Job
from twostroke.engine.model import Model
from twostroke.engine.runner import Limits
from twostroke.engine.scheduler import Sequence
from twostroke.kv.keys import root_key
from twostroke.kv.memory import PoolMemory
from twostroke.kv.pool import Pool
from twostroke.messages import Output, Request, Sampling, Slots

_numbers = iter(range(10**9))


def request(prompt: list[int], count: int = 8, *, priority: int = 0, salt: str = "", **knobs: object) -> Request:
    """A request with a fresh id; greedy unless ``knobs`` of ``Sampling`` say otherwise."""
    sampling = Sampling(**{"max_tokens": count, "seed": 0, "temperature": 0.0, **knobs})  # type: ignore[arg-type]
    return Request(f"r{next(_numbers)}/0/0", prompt, sampling, priority=priority, salt=salt)


def sequences(*prompts: list[int], slots: int, block_tokens: int) -> list[Sequence]:
    """Sequences that hold slots for these tokens and one more, of one pool and in no order."""
    pool, shuffled, result = Pool(slots), list(range(slots)), []
    random.Random(slots).shuffle(shuffled)
    for prompt in prompts:
        sequence = Sequence(Request("r/0/0", prompt, Sampling(4, 0, temperature=0)), root_key("", ""))
        sequence.lease = pool.lease()
        assert sequence.lease.grow(len(prompt) // block_tokens + 1), "the pool is too small"
        sequence.lease.slots = [shuffled[slot] for slot in sequence.lease.slots]
        result.append(sequence)
    return result


class Rig:
    """An engine on a model that is bound to a pool already, of which it uses the first ``slots``."""

    memory: PoolMemory  # of the pool, if it is on the CPU

    def __init__(self, model: Model, *, slots: int, budget: int, max_batch: int) -> None:
        self.model = model
        self.engine = Engine(model, Pool(slots), max_batch=max_batch, token_budget=budget)
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


def preemptions(rig: Rig) -> list[Sequence]:
    """From now on, who is preempted."""
    seen, preempt = [], rig.engine.scheduler._preempt

    def note(sequence: Sequence) -> None:
        seen.append(sequence)
        preempt(sequence)

    rig.engine.scheduler._preempt = note  # type: ignore[method-assign]
    return seen


async def until(holds: Callable[[], bool]) -> None:
    """Wait, for a while, until something is so."""
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - also what another thread changes
            await asyncio.sleep(0.002)


@asynccontextmanager
async def serving(rig: Rig) -> AsyncIterator[Rig]:
    """The engine runs; at the end nobody may hold a slot."""
    rig.engine.start(asyncio.get_running_loop(), rig.died.set)
    try:
        yield rig
        await until(lambda: rig.counts.leased == 0)  # a step for a sequence that has ended may still be in flight
        counts = rig.counts
        assert counts.free + counts.cached == counts.total
    finally:
        await asyncio.to_thread(rig.engine.stop)


@asynccontextmanager
async def running(
    directory: Path, *, block_tokens: int = 16, slots: int = 100, budget: int = 64, max_batch: int = 8, depth: int = 1
) -> AsyncIterator[Rig]:
    """An engine on the CPU that runs, with steps as deep as ``depth``; at the end nobody may hold a slot."""
    model = Model(directory, dtype="float32", block_tokens=block_tokens, threads=1)
    if depth == AheadRunner.depth:
        assert isinstance(model.runner, CpuRunner)
        model.runner, model.depth = AheadRunner(model.runner._network, model.layout, 1), depth
    memory = PoolMemory(slots, model.layout.block_bytes, f"rig-{next(_numbers)}")
    model.bind(torch.from_numpy(memory.slots), Limits(max_batch, budget, 512))
    rig = Rig(model, slots=slots, budget=budget, max_batch=max_batch)
    rig.memory = memory
    try:
        async with serving(rig):
            yield rig
    finally:
        memory.close()
