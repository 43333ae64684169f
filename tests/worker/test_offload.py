"""Requests on a real engine over a real store: tiny model, a pool too small to keep what was computed."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.engine.rig import Rig, ids, request, running
from tests.tiny import generate
from twostroke.api.lifecycle import Lifecycle
from twostroke.engine.engine import Admitted
from twostroke.links.staging import staging
from twostroke.messages import Output, Request
from twostroke.store.disk import disk_tier
from twostroke.store.host import host_tier
from twostroke.store.store import Store
from twostroke.store.tier import MemoryTier, Tier
from twostroke.worker.offload import Offload
from twostroke.worker.worker import end

SLOTS, BLOCK = 12, 4  # of the pool, and tokens
PROMPTS = [[(7 * i + 3 * p) % 300 + 5 for i in range(33)] for p in range(6)]  # 8 full blocks each: no two fit
COUNT = 5
MiB = 1 << 20


@dataclass
class Bench:
    """An engine with a store under it."""

    rig: Rig
    offload: Offload
    lifecycle: Lifecycle

    async def tokens(self, one: Request) -> list[int]:
        """What a client gets, as a worker serves it."""
        where = await self.offload.find(one)
        job = self.rig.engine.submit(one, loads=bool(where))
        outputs: list[Output] = []
        load: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(30):
                async for update in job.updates():
                    if isinstance(update, Output):
                        outputs.append(update)
                    elif isinstance(update, Admitted) and where and load is None:
                        load = asyncio.create_task(self.offload.load(job, update, where))
        finally:
            await end(load)
            self.rig.engine.abort(job)
        return ids(outputs)

    def hits(self) -> dict[str, int]:
        """Blocks that each tier gave."""
        return {report.name: report.hits for report in self.offload.store.reports()}


@asynccontextmanager
async def bench(
    directory: Path, tiers: Callable[[int, str], Sequence[Tier]], slots: int = SLOTS
) -> AsyncIterator[Bench]:
    """``tiers`` is given the bytes of a block and the layout's fingerprint. At the end nobody holds a slot."""
    async with running(directory, block_tokens=BLOCK, slots=slots) as rig:
        layout, lifecycle = rig.model.layout, Lifecycle("w")
        store = Store(tiers(layout.block_bytes, layout.fingerprint), layout.block_bytes, most=4)
        offload = Offload(rig.engine, store, staging(torch.from_numpy(rig.memory.slots)), lifecycle)
        await offload.open()
        try:
            yield Bench(rig, offload, lifecycle)
        finally:
            await offload.close()


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("Qwen3ForCausalLM")


@pytest.mark.parametrize("names", ["host", "disk", "memory", "host disk", "disk memory", "host disk memory"])
async def test_the_same_tokens_with_each_tier_list(model: Path, tmp_path: Path, names: str) -> None:
    def make(block_bytes: int, fingerprint: str) -> list[Tier]:
        tiers: dict[str, Tier] = {
            "host": host_tier(block_bytes, 20 * block_bytes),  # fewer than all blocks
            "disk": disk_tier(tmp_path, block_bytes, fingerprint, MiB, "w"),
            "memory": MemoryTier(),
        }
        return [tiers[name] for name in names.split()]

    expected = [generate(model, prompt, COUNT) for prompt in PROMPTS]
    async with bench(model, make) as one:
        for _ in range(3):
            for prompt, tokens in zip(PROMPTS, expected, strict=True):
                assert await one.tokens(request(prompt, COUNT)) == tokens
                await one.offload.store.settle()
        hits = one.hits()
        assert sum(hits.values()) >= 2 * 5 * 6 or names == "host", hits
        assert names == "memory" or all(report.damaged == 0 for report in one.offload.store.reports())
