"""Requests on a real engine over a real store: tiny model, a pool too small to keep what was computed."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.rig import Rig, ids, preemptions, request, running, until
from tests.store.blocks import Taken
from tests.tiny import generate
from twostroke.api.lifecycle import Lifecycle
from twostroke.engine.runner import Launched
from twostroke.engine.scheduler import Chunk
from twostroke.errors import HandoverFailed
from twostroke.links.staging import of_thread, staging
from twostroke.messages import Output, Request
from twostroke.store import choice
from twostroke.store.directory import DirectoryTier
from twostroke.store.disk import disk_tier
from twostroke.store.host import HostTier
from twostroke.store.slots import SlotTier
from twostroke.store.store import Store
from twostroke.store.tier import MemoryTier, Target, Tier
from twostroke.worker.offload import Offload, Writer

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

    async def tokens(self, one: Request, writer: Writer | None = None) -> list[int]:
        """What a client gets, as a worker serves it; with a ``writer``, one that decodes through the store."""
        fetch = self.offload.follow(one, writer) if writer else await self.offload.prepare(one, 30)
        job = self.rig.engine.submit(one, loads=fetch.loads, reloads=True)
        fetch.submitted(job)
        outputs: list[Output] = []
        try:
            async with asyncio.timeout(30):
                async for update in job.updates():
                    fetch.observe(job, update)
                    if isinstance(update, Output):
                        outputs.append(update)
        finally:
            await fetch.end()
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
        # Nobody knows how fast prefill is unless a test says so; or this model would be computed, not loaded, at times.
        rig.engine._measure = lambda step: None  # type: ignore[method-assign]
        store = Store(tiers(layout.block_bytes, layout.fingerprint), layout.block_bytes, most=4)
        offload = Offload(rig.engine, store, of_thread(staging(torch.from_numpy(rig.memory.slots))), lifecycle)
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
            "host": HostTier(block_bytes, 20 * block_bytes),  # fewer than all blocks
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


class Hanging(MemoryTier):
    """Answers only once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.go.set()
        self.asked = 0

    async def get(self, keys: Sequence[bytes], target: Target) -> int:
        self.asked += 1
        await self.go.wait()
        return await super().get(keys, target)


def only(tier: Tier) -> Callable[[int, str], list[Tier]]:
    """A store of one tier."""
    return lambda _size, _fingerprint: [tier]


async def fill(one: Bench, prompts: Sequence[list[int]] = PROMPTS) -> None:
    """Have all of them in the store, and hardly any in the pool."""
    for prompt in prompts:
        await one.tokens(request(prompt, 1))
        await one.offload.store.settle()


def stamps(one: Bench, name: str = "store") -> list[dict[str, str | int | float]]:
    """Details of what was stamped, of all requests."""
    timelines = one.lifecycle._timelines.values()
    return [event.detail for timeline in timelines for event in timeline.events if event.event == name]


async def test_what_the_first_tier_lost_comes_from_the_second(model: Path, tmp_path: Path) -> None:
    def make(block_bytes: int, fingerprint: str) -> list[Tier]:
        tiers = HostTier(block_bytes, 10 * block_bytes), disk_tier(tmp_path, block_bytes, fingerprint, MiB, "w")
        return list(tiers)

    async with bench(model, make) as one:
        await fill(one)
        assert await one.tokens(request(PROMPTS[0], COUNT)) == generate(model, PROMPTS[0], COUNT)
        assert sum(one.hits().values()) == 8
        assert one.hits()["disk"] > 0
        (stamp,) = stamps(one)
        assert (stamp["found_blocks"], stamp["pool_blocks"], stamp["loaded_blocks"]) == (8, 0, 8)
        assert "disk" in str(stamp["tiers"])
        assert stamp["why"] == "prefill is not measured yet"
        await one.offload.store.settle()  # and it is back in the first
        assert await one.tokens(request(PROMPTS[1], 1))
        await one.tokens(request(PROMPTS[0], COUNT))
        assert one.hits()["host"] > 0


async def test_blocks_of_an_answer_are_stored_too(model: Path) -> None:
    """The next turn of a conversation finds them."""
    async with bench(model, only(MemoryTier())) as one:
        answer = await one.tokens(request(PROMPTS[0][:10], 20))
        await fill(one, PROMPTS[1:3])
        turn = [*PROMPTS[0][:10], *answer, 7]
        assert await one.tokens(request(turn, COUNT)) == generate(model, turn, COUNT)
        assert one.hits()["memory"] == 7


async def test_tenants_share_nothing_through_any_tier(model: Path, tmp_path: Path) -> None:
    def make(block_bytes: int, fingerprint: str) -> list[Tier]:
        return [
            MemoryTier(),
            HostTier(block_bytes, MiB),
            disk_tier(tmp_path / "disk", block_bytes, fingerprint, MiB, "w"),
            DirectoryTier(tmp_path / "dir", block_bytes, fingerprint),
        ]

    async with bench(model, make) as one:
        await one.tokens(request(PROMPTS[0], 1, salt="a"))
        await fill(one, PROMPTS[1:3])
        await one.tokens(request(PROMPTS[0], 1, salt="b"))
        await one.tokens(request(PROMPTS[0], 1))
        assert not any(one.hits().values())
        await fill(one, PROMPTS[1:3])
        await one.tokens(request(PROMPTS[0], 1, salt="a"))
        assert sum(one.hits().values()) >= 8


def computed(one: Bench) -> list[int]:
    """From now on, the sizes of the chunks that are computed."""
    sizes: list[int] = []
    launch = one.rig.model.launch

    def note(chunks: Sequence[Chunk]) -> Launched:
        sizes.extend(chunk.size for chunk in chunks)
        return launch(chunks)

    one.rig.model.launch = note  # type: ignore[method-assign]
    return sizes


async def test_two_requests_for_the_same_prefix_compute_it_once(model: Path) -> None:
    async with bench(model, only(MemoryTier()), slots=60) as one:
        sizes = computed(one)
        prompts = [[*PROMPTS[0], *PROMPTS[number][:9]] for number in range(1, 5)]
        answers = await asyncio.gather(*(one.tokens(request(prompt, 1)) for prompt in prompts))
        assert answers == [generate(model, prompt, 1) for prompt in prompts]
        assert sum(sizes) <= 42 + 3 * 10
        assert not len(one.offload._flights)


async def test_whoever_waits_for_blocks_goes_on_when_their_request_is_gone(model: Path) -> None:
    async with bench(model, only(MemoryTier()), slots=60) as one:
        first = await one.offload.prepare(request(PROMPTS[0], 1), 30)
        waiting = asyncio.create_task(one.tokens(request(PROMPTS[0], COUNT)))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await first.end()
        assert await waiting == generate(model, PROMPTS[0], COUNT)


async def test_nobody_waits_for_who_is_served_later_nor_for_ever(model: Path) -> None:
    async with bench(model, only(MemoryTier()), slots=60) as one:
        first = await one.offload.prepare(request(PROMPTS[0], 1, priority=5), 30)
        urgent = await one.offload.prepare(request(PROMPTS[0], 1, priority=1), 30)
        patient = await one.offload.prepare(request(PROMPTS[0], 1, priority=9), 0.05)
        for fetch in (first, urgent, patient):
            await fetch.end()


async def test_a_tier_that_hangs_is_left_behind(model: Path) -> None:
    """The request computes; nothing is written into its slots when the tier answers after all."""
    tier = Hanging()
    async with bench(model, only(tier)) as one:
        await fill(one)
        tier.go.clear()
        one.rig.engine._speed = 4000.0
        assert await one.tokens(request(PROMPTS[0], COUNT)) == generate(model, PROMPTS[0], COUNT)
        one.rig.engine._speed = 0.0
        (report,) = one.offload.store.reports()
        assert (report.in_service, report.faults) == (False, 1)
        assert "no answer" in report.reason
        asked = tier.asked
        assert await one.tokens(request(PROMPTS[1], COUNT)) == generate(model, PROMPTS[1], COUNT)
        assert tier.asked == asked, "it is not asked again"
        tier.go.set()
        await until(lambda: one.offload.store.reports()[0].in_service)
        await one.tokens(request(PROMPTS[2], COUNT))
        assert one.hits()["memory"] > 0


async def test_a_tier_that_fails_at_any_call(model: Path) -> None:
    tier = MemoryTier()
    async with bench(model, only(tier)) as one:
        await fill(one)
        tier.fails = "broken"
        for prompt in PROMPTS[:2]:
            assert await one.tokens(request(prompt, COUNT)) == generate(model, prompt, COUNT)
        assert not one.offload.store.reports()[0].in_service


async def test_a_damaged_block_is_computed_again(model: Path) -> None:
    """Those before it are loaded, those behind it computed."""
    tier = MemoryTier()
    async with bench(model, only(tier)) as one:
        await fill(one)
        fourth = one.offload._keys(request(PROMPTS[0], 1))[3]
        payload, digest = tier.blocks[fourth]
        tier.blocks[fourth] = bytes([payload[0] ^ 1]) + payload[1:], digest
        assert await one.tokens(request(PROMPTS[0], COUNT)) == generate(model, PROMPTS[0], COUNT)
        assert one.hits()["memory"] == 3
        assert one.offload.store.reports()[0].damaged == 1
        await one.offload.store.settle()
        await fill(one, PROMPTS[1:3])
        assert await one.tokens(request(PROMPTS[0], COUNT)) == generate(model, PROMPTS[0], COUNT)
        assert one.hits()["memory"] >= 11


def flip(tier: SlotTier, folder: Path, payload: bytes) -> None:
    """One bit of a block, in the tier's memory or its file."""
    if tier._memory is not None:
        (slot,) = np.flatnonzero((tier._memory.slots == np.frombuffer(payload, np.uint8)).all(1))
        tier._memory.slots[slot, 5] ^= 1
        return
    (path,) = [path for path in folder.rglob("*.segment") if payload in path.read_bytes()]
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(payload) + 5)
        file.write(bytes([payload[5] ^ 1]))


@pytest.mark.parametrize("name", ["host", "disk"])
async def test_a_bit_that_flips_where_blocks_are_kept_is_never_computed_with(
    model: Path, tmp_path: Path, name: str
) -> None:
    """It may reach a slot of the pool, on its way to be verified; it is computed again there."""

    def make(block_bytes: int, fingerprint: str) -> list[Tier]:
        host = name == "host"
        return [HostTier(block_bytes, MiB) if host else disk_tier(tmp_path, block_bytes, fingerprint, MiB, "w")]

    async with bench(model, make) as one:
        await fill(one)
        (stage,), taken = one.offload.store.stages, Taken()
        fourth = one.offload._keys(request(PROMPTS[0], 1))[3]
        assert await stage.tier.get([fourth], taken) == 1
        assert isinstance(stage.tier, SlotTier)
        flip(stage.tier, tmp_path, taken.blocks[0])
        assert await one.tokens(request(PROMPTS[0], COUNT)) == generate(model, PROMPTS[0], COUNT)
        assert one.hits() == {name: 3}
        assert one.offload.store.reports()[0].damaged == 1


async def test_a_client_that_leaves_while_its_blocks_are_loaded(model: Path) -> None:
    """Its slots serve others, into which the late read writes nothing."""
    tier = Hanging()
    async with bench(model, only(tier)) as one:
        await fill(one)
        tier.go.clear()
        leaving = asyncio.create_task(one.tokens(request(PROMPTS[0], COUNT)))
        await until(lambda: tier.asked > 0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert one.rig.counts.leased == 0
        other = asyncio.create_task(one.tokens(request([9] * 33, COUNT)))
        tier.go.set()
        assert await other == generate(model, [9] * 33, COUNT)


async def test_a_job_that_ends_under_its_load(model: Path) -> None:
    """As a hand-over whose consumer leaves: the slots stay held until nobody writes into them."""
    tier = Hanging()
    async with bench(model, only(tier)) as one:
        await fill(one)
        tier.go.clear()
        fetch = await one.offload.prepare(request(PROMPTS[0], COUNT), 30)
        job = one.rig.engine.submit(request(PROMPTS[0], COUNT), loads=True)
        updates = job.updates()
        fetch.observe(job, await anext(updates))
        await until(lambda: tier.asked > 0)
        one.rig.engine.abort(job)
        assert one.rig.counts.leased == 9
        tier.go.set()
        await until(lambda: one.rig.counts.leased == 0)
        await fetch.end()


async def test_loading_that_takes_longer_than_computing_is_not_done(model: Path) -> None:
    async with bench(model, only(MemoryTier())) as one:
        await fill(one)
        for _ in range(2):
            one.offload.store.stages[0].reads.measured(8, 8, time.monotonic())  # blocks, seconds
        one.rig.engine._speed = 4000.0  # tokens a second
        assert await one.tokens(request(PROMPTS[0], COUNT)) == generate(model, PROMPTS[0], COUNT)
        (stamp,) = stamps(one)
        assert stamp["loaded_blocks"] == 0
        assert stamp["why"] == "to load a block takes 1e+03 ms, to compute it 1 ms"


async def test_few_blocks_that_a_producer_has_written_are_loaded_though_a_call_takes_long(model: Path) -> None:
    """What a call takes beside its blocks says nothing of the many that are about to come."""
    async with bench(model, only(MemoryTier())) as one:
        for _ in range(2):
            one.offload.store.stages[0].reads.measured(1, 0.0015, time.monotonic())  # blocks, seconds
        one.rig.engine._speed = 4000.0  # tokens a second: 1 ms a block
        assert one.offload.store.batch > 1
        assert one.offload._worthwhile([0], more=False)[0] == 0
        assert one.offload._worthwhile([0], more=True)[0] == 1


class Slow(HostTier):
    """Real, but for a pause before each read."""

    seconds = 0.0

    async def get(self, keys: Sequence[bytes], target: Target) -> int:
        await asyncio.sleep(self.seconds)
        return await super().get(keys, target)


async def test_a_tier_that_was_slow_is_loaded_from_once_it_is_fast(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only loads measure it, and nobody loads what is slow: it is measured beside a request, which computes."""
    tiers: list[Slow] = []

    def make(block_bytes: int, _fingerprint: str) -> list[Slow]:
        tiers.append(Slow(block_bytes, MiB))
        return tiers

    async with bench(model, make) as one:
        await fill(one)
        (tier,), (stage,) = tiers, one.offload.store.stages
        monkeypatch.setattr(choice, "OLD_SECONDS", 0.0)
        one.rig.engine._speed = 400.0  # tokens a second: 10 ms a block
        tier.seconds = 0.3
        loaded = []
        for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[2]):  # tried; too slow; still, though it is fast by now
            assert await one.tokens(request(prompt, COUNT)) == generate(model, prompt, COUNT)
            loaded.append(stamps(one)[-1]["loaded_blocks"])
            if prompt == PROMPTS[1]:
                await until(lambda: stage._exploration is not None and stage._exploration.done())
                tier.seconds = 0.0
        await until(lambda: (stage.reads.rate(time.monotonic()) or 0) > 100)
        assert await one.tokens(request(PROMPTS[3], COUNT)) == generate(model, PROMPTS[3], COUNT)
        assert [*loaded, stamps(one)[-1]["loaded_blocks"]] == [8, 0, 0, 8]


async def test_who_is_preempted_is_loaded_again(model: Path) -> None:
    """Two that do not fit both, to their ends."""
    async with bench(model, only(MemoryTier()), slots=12) as one:
        seen = preemptions(one.rig)
        prompts = [PROMPTS[0][:18], PROMPTS[1][:18]]
        answers = await asyncio.gather(*(one.tokens(request(prompt, 14)) for prompt in prompts))
        assert answers == [generate(model, prompt, 14) for prompt in prompts]
        assert seen
        assert one.hits()["memory"] > 0


async def test_while_a_request_waits_its_blocks_rise_to_the_first_tier(model: Path) -> None:
    async with bench(model, lambda size, _: [HostTier(size, 9 * size), MemoryTier()]) as one:
        await fill(one)
        running = asyncio.create_task(one.tokens(request(PROMPTS[5], 12)))
        await until(lambda: one.rig.counts.leased > 0)
        assert await one.tokens(request(PROMPTS[0], COUNT)) == generate(model, PROMPTS[0], COUNT)
        assert await running == generate(model, PROMPTS[5], 12)
        assert one.hits()["host"] > 0


async def test_a_store_smaller_than_a_request(model: Path) -> None:
    async with bench(model, lambda size, _: [HostTier(size, 3 * size)]) as one:
        for _ in range(2):
            for prompt in PROMPTS[:3]:
                assert await one.tokens(request(prompt, COUNT)) == generate(model, prompt, COUNT)


# -- prefill on one worker, decode on another, and nothing but a tier between them -------------------------------------


def writer(
    *, at_work: bool | None = True, silence: float = 30.0, patience: float = 30.0, longest: float = 30.0
) -> Writer:
    """How the other worker seems; None: gone."""

    async def answers() -> bool:
        if at_work is None:
            raise HandoverFailed("it refused")
        return at_work

    return Writer(answers, silence, patience, longest)


@pytest.mark.parametrize("order", ["concurrent", "prefill first", "decode first"])
async def test_decode_through_the_store(model: Path, order: str) -> None:
    """The second worker loads what the first one writes, while it writes it."""
    shared = MemoryTier()
    async with bench(model, only(shared), 40) as p, bench(model, only(shared), 40) as d:
        sizes = computed(d)
        prefill = asyncio.create_task(p.tokens(request(PROMPTS[0], 1))) if order != "decode first" else None
        if order == "prefill first":
            assert prefill is not None
            await prefill
            await p.offload.store.settle()
        answer = asyncio.create_task(d.tokens(request(PROMPTS[0], COUNT), writer()))
        if prefill is None:
            await asyncio.sleep(0.05)
            prefill = asyncio.create_task(p.tokens(request(PROMPTS[0], 1)))
        assert await answer == generate(model, PROMPTS[0], COUNT)
        await prefill
        assert d.hits()["memory"] == 8
        assert sum(sizes) == 1 + COUNT - 1, "the last token's KV, and one more for each token but the last"


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (writer(at_work=None, silence=0.05), "the producer is gone: it refused"),
        (writer(at_work=False, silence=0.02, patience=0.1), "nothing new for 0 s"),
        (writer(at_work=True, silence=0.02, patience=0.1, longest=1.1), "nothing new for 1 s"),
    ],
)
async def test_decode_goes_on_alone_when_nothing_comes(model: Path, other: Writer, reason: str) -> None:
    """After four blocks, that is."""
    shared = MemoryTier()
    async with bench(model, only(shared), 40) as p, bench(model, only(shared), 40) as d:
        await p.tokens(request(PROMPTS[0][:17], 1))
        await p.offload.store.settle()
        assert await d.tokens(request(PROMPTS[0], COUNT), other) == generate(model, PROMPTS[0], COUNT)
        assert d.hits()["memory"] == 4
        assert stamps(d, "fallback") == [{"reason": reason}]


async def test_a_client_that_leaves_while_nothing_comes(model: Path) -> None:
    async with bench(model, only(MemoryTier()), 40) as d:
        leaving = asyncio.create_task(d.tokens(request(PROMPTS[0], COUNT), writer()))
        await until(lambda: d.rig.counts.leased > 0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert d.rig.counts.leased == 0
        assert not len(d.offload._flights)
