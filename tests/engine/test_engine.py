"""The engine, thread and all: its greedy tokens are those of ``transformers``, whatever it does to get there."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import pytest

from tests.engine.ahead import AheadRunner
from tests.engine.rig import Rig, ids, preemptions, request, running, until
from tests.tiny import ARCHITECTURES, VOCAB, generate
from twostroke.engine.engine import Admitted, Engine, Progress, Update, _Step
from twostroke.engine.model import Model
from twostroke.engine.runner import Launched
from twostroke.engine.scheduler import Chunk
from twostroke.errors import DeviceLost, EngineFailed, OutOfMemory, Overloaded, Unavailable
from twostroke.kv.pool import Pool
from twostroke.messages import Output, Token

Tiny = Callable[[str], Path]
COUNT = 10
DEPTHS = pytest.mark.parametrize("depth", [1, 2])
_random = random.Random(5)


def random_prompt(length: int) -> list[int]:
    return [_random.randrange(1, VOCAB) for _ in range(length)]


PREFIX = random_prompt(40)
PROMPTS = [
    *(random_prompt(length) for length in (1, 2, 4, 5, 6, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100, 130)),
    *([*PREFIX[:length], *random_prompt(extra)] for length, extra in ((40, 0), (40, 3), (33, 9), (32, 1), (16, 30))),
]


@pytest.fixture
def llama(tiny_model: Tiny) -> Path:
    return tiny_model("LlamaForCausalLM")


@contextmanager
def paused(rig: Rig) -> Iterator[threading.Event]:
    """The next step stops in the middle until the event is set."""
    go, launch = threading.Event(), rig.model.launch

    def wait(chunks: Seq[Chunk]) -> Launched:
        assert go.wait(30)
        return launch(chunks)

    rig.model.launch = wait  # type: ignore[method-assign]
    try:
        yield go
    finally:
        go.set()


# -- greedy ----------------------------------------------------------------------------------------------------------


def test_the_reference_depends_on_all_of_the_prompt(tiny_model: Tiny) -> None:
    """Else the tests below could not fail."""
    for architecture in ARCHITECTURES:
        directory = tiny_model(architecture)
        answers = {tuple(generate(directory, [first, *PREFIX[1:6]], COUNT)) for first in range(1, 5)}
        assert len(answers) == 4
        assert len({token for answer in answers for token in answer}) > 15


@DEPTHS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("block_tokens", "budget", "max_batch"),
    [(16, 512, 32), (16, 7, 4), (5, 33, 8)],
    ids=["whole prompts", "small chunks", "blocks of 5"],
)
async def test_greedy_is_generate(
    tiny_model: Tiny, architecture: str, block_tokens: int, budget: int, max_batch: int, depth: int
) -> None:
    directory = tiny_model(architecture)
    async with running(
        directory, block_tokens=block_tokens, budget=budget, max_batch=max_batch, slots=300, depth=depth
    ) as rig:
        got = await asyncio.gather(
            *(rig.tokens(request(prompt, COUNT, priority=i % 3)) for i, prompt in enumerate(PROMPTS))
        )
    assert got == [generate(directory, prompt, COUNT) for prompt in PROMPTS]


@DEPTHS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_greedy_with_prefix_hits(tiny_model: Tiny, architecture: str, depth: int) -> None:
    directory = tiny_model(architecture)
    async with running(directory, block_tokens=5, depth=depth) as rig:
        for prompt in (PROMPTS[-1], PROMPTS[12], PREFIX):
            first = await rig.outputs(rig.engine.submit(request(prompt, COUNT)))
            again = await rig.outputs(rig.engine.submit(request(prompt, COUNT)))
            longer = [*prompt, *ids(first), 7, 8]
            more = await rig.outputs(rig.engine.submit(request(longer, COUNT)))
            assert again[0].cached_tokens == (len(prompt) - 1) // 5 * 5
            # Two steps deep, the KV of a last token that ends it by surprise is computed, too: in vain until now.
            computed = len(prompt) + len(first) - (depth == 1 or first[-1].finish == "length")
            assert more[0].cached_tokens == computed // 5 * 5
            assert ids(first) == ids(again) == generate(directory, prompt, COUNT)
            assert ids(more) == generate(directory, longer, COUNT)


@DEPTHS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_greedy_with_preemption(tiny_model: Tiny, architecture: str, depth: int) -> None:
    directory, prompts = tiny_model(architecture), [random_prompt(length) for length in (14, 15, 11, 9, 20, 3)]
    async with running(directory, block_tokens=4, slots=14, budget=20, depth=depth) as rig:
        preempted = preemptions(rig)
        got = await asyncio.gather(*(rig.tokens(request(prompt, 24)) for prompt in prompts))
    assert len(preempted) > 2
    assert got == [generate(directory, prompt, 24) for prompt in prompts]


async def test_priorities_decide_who_is_served_first(llama: Path) -> None:
    async with running(llama, max_batch=1) as rig:
        order: list[int] = []

        async def ask(priority: int) -> None:
            await rig.tokens(request([5, priority + 10], 2, priority=priority))
            order.append(priority)

        with paused(rig) as go:
            first = asyncio.create_task(ask(9))
            await until(lambda: rig.engine.load().running == 1)
            others = [asyncio.create_task(ask(priority)) for priority in (3, 1, 2)]
            await until(lambda: rig.engine.load().waiting == 3)
            go.set()
            await asyncio.gather(first, *others)
    assert order == [9, 1, 2, 3]


@DEPTHS
async def test_eos_ends_and_ignore_eos_goes_on(llama: Path, depth: int) -> None:
    async with running(llama, depth=depth) as rig:
        biased: dict[str, Any] = {"logit_bias": {0: 1000.0}}
        (only,) = await rig.outputs(rig.engine.submit(request([5, 6], 4, **biased)))
        assert (only.tokens[0].id, only.finish) == (0, "stop")
        outputs = await rig.outputs(rig.engine.submit(request([5, 6], 4, ignore_eos=True, **biased)))
        assert (ids(outputs), outputs[-1].finish) == ([0] * 4, "length")


@DEPTHS
async def test_a_stop_token_ends(llama: Path, depth: int) -> None:
    """Two steps deep, the token after it is being computed by then: in vain."""
    expected = [generate(llama, prompt, COUNT) for prompt in PROMPTS]
    stops = [tokens[len(tokens) // 2] for tokens in expected]
    async with running(llama, depth=depth) as rig:
        pairs = zip(PROMPTS, stops, strict=True)
        asked = [request(prompt, COUNT, stop_token_ids=frozenset([stop])) for prompt, stop in pairs]
        outputs = await asyncio.gather(*(rig.outputs(rig.engine.submit(one)) for one in asked))
    assert [ids(one) for one in outputs] == [
        tokens[: tokens.index(stop) + 1] for tokens, stop in zip(expected, stops, strict=True)
    ]
    assert {one[-1].finish for one in outputs} == {"stop"}


# -- sampling --------------------------------------------------------------------------------------------------------


@DEPTHS
@pytest.mark.parametrize("penalty", [0.0, 0.3])
async def test_seeded_sampling_is_the_same_in_any_company(llama: Path, penalty: float, depth: int) -> None:
    knobs: list[dict[str, Any]] = [
        {"seed": seed, "temperature": 1.5, "top_p": 0.95, "top_k": 50, "frequency_penalty": penalty, "logprobs": 0}
        for seed in range(6)
    ]
    prompts = [random_prompt(length) for length in (3, 20, 33, 50, 17, 8)]
    alone, crowded, preempting = [], [], []
    async with running(llama) as rig:
        for prompt, knob in zip(prompts, knobs, strict=True):
            alone.append(await rig.tokens(request(prompt, 20, **knob)))
    async with running(llama, budget=11, max_batch=11, block_tokens=5, depth=depth) as rig:
        asked = [request(prompt, 20, **knob) for prompt, knob in zip(prompts, knobs, strict=True)]
        crowded = await asyncio.gather(*(rig.tokens(one) for one in asked))
    async with running(llama, block_tokens=4, slots=22, depth=depth) as rig:
        preempted = preemptions(rig)
        asked = [request(prompt, 20, **knob) for prompt, knob in zip(prompts, knobs, strict=True)]
        preempting = await asyncio.gather(*(rig.tokens(one) for one in asked))
        assert preempted
    assert alone == crowded == preempting
    assert len({tuple(tokens) for tokens in alone}) == 6
    assert alone[0] != generate(llama, prompts[0], 20)


@DEPTHS
async def test_penalties_see_what_was_said_before(llama: Path, depth: int) -> None:
    async with running(llama, depth=depth) as rig:
        tokens = await rig.tokens(request([5, 6], 4, logit_bias={7: 1000.0, 8: 900.0}, repetition_penalty=2.0))
    assert tokens == [7, 8, 7, 7]


@DEPTHS
@pytest.mark.parametrize(
    "knobs",
    [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.3, "frequency_penalty": 0.5}, {"min_tokens": 9}],
    ids=str,
)
async def test_what_was_generated_elsewhere_is_continued(llama: Path, knobs: dict[str, Any], depth: int) -> None:
    prompt = random_prompt(37)
    whole = request(prompt, 20, logprobs=1, **knobs)
    async with running(llama, depth=depth) as rig:
        tokens = [token for output in await rig.outputs(rig.engine.submit(whole)) for token in output.tokens]
    for have in (1, 10, 11, 12, 19):  # ends of blocks are at 11
        async with running(llama, depth=depth) as rig:
            begun = msgspec.structs.replace(whole, output=[token.id for token in tokens[:have]])
            outputs = await rig.outputs(rig.engine.submit(begun))
        rest = [token for output in outputs for token in output.tokens]
        assert [token.id for token in rest] == [token.id for token in tokens[have:]]
        assert [t.logprob for t in rest] == pytest.approx([t.logprob for t in tokens[have:]], abs=1e-4)
        assert outputs[-1].finish == "length"
        assert outputs[0].cached_tokens == 0


async def test_continued_sequences_survive_preemption(llama: Path) -> None:
    prompts = [random_prompt(length) for length in (14, 15, 11, 9, 20, 3)]
    expected = [generate(llama, prompt, 24) for prompt in prompts]
    asked = [
        msgspec.structs.replace(request(prompt, 24), output=tokens[:7])
        for prompt, tokens in zip(prompts, expected, strict=True)
    ]
    async with running(llama, block_tokens=4, slots=14, budget=20) as rig:
        preempted = preemptions(rig)
        got = await asyncio.gather(*(rig.tokens(one) for one in asked))
    assert preempted
    assert got == [tokens[7:] for tokens in expected]


async def test_draws_differ_by_position(llama: Path) -> None:
    """Two tokens, equally probable: each position has noise of its own."""
    async with running(llama) as rig:
        bias = dict.fromkeys((7, 8), 100_000.0)  # the model's own opinion is lost to rounding
        tokens = await rig.tokens(request([5, 6], 30, seed=1, temperature=1e6, top_k=2, logit_bias=bias))
    assert set(tokens) == {7, 8}


async def test_salts_keep_tenants_apart(llama: Path) -> None:
    async with running(llama) as rig:
        for salt, cached in (("", 0), ("a", 0), ("b", 0), ("a", 32), ("", 32)):
            outputs = await rig.outputs(rig.engine.submit(request(PREFIX, 2, salt=salt)))
            assert outputs[0].cached_tokens == cached


# -- what a job says -------------------------------------------------------------------------------------------------


async def test_updates_of_a_job(llama: Path) -> None:
    async with running(llama, budget=16) as rig:
        job = rig.engine.submit(request(PREFIX, 3))
        updates: list[Update] = [update async for update in job.updates()]
    admitted, *progress, first, second, last = updates
    assert isinstance(admitted, Admitted)
    assert (len(admitted.slots), admitted.computed) == (3, 0)
    assert progress == [Progress(0), Progress(16), Progress(32)]
    assert [type(update) for update in (first, second, last)] == [Output] * 3
    assert isinstance(last, Output)
    assert last.finish == "length"


async def test_a_request_is_admitted_while_a_step_runs(llama: Path) -> None:
    """A load can start at once."""
    async with running(llama) as rig:
        with paused(rig) as go:
            one = rig.engine.submit(request([5], 1))
            await until(lambda: one.started)
            two = rig.engine.submit(request([6], 1), loads=True)
            update = await asyncio.wait_for(anext(two.updates()), 5)
            assert isinstance(update, Admitted)
            assert not go.is_set()
        rig.engine.abort(two)
        await rig.outputs(one)


async def test_load_tells_what_is_to_be_done(llama: Path) -> None:
    async with running(llama, max_batch=1) as rig:
        with paused(rig):
            jobs = [rig.engine.submit(request(prompt, 1)) for prompt in ([5] * 10, [6] * 20)]
            load = rig.engine.load()
        assert (load.running, load.waiting, load.queued_tokens) == (1, 1, 30)
        assert load.slots.leased == 1
        for job in jobs:
            await rig.outputs(job)
        assert rig.engine.load().queued_tokens == 0


# -- ends ------------------------------------------------------------------------------------------------------------


@DEPTHS
async def test_abort_frees_everything_and_lets_the_next_in(llama: Path, depth: int) -> None:
    async with running(llama, slots=4, depth=depth) as rig:
        long = rig.engine.submit(request(PREFIX, 20, ignore_eos=True))
        next_ = rig.engine.submit(request(PREFIX[5:], 3))
        updates = long.updates()
        async for update in updates:
            if isinstance(update, Output):
                break
        rig.engine.abort(long)
        rig.engine.abort(long)
        assert ids(await rig.outputs(next_)) == generate(llama, PREFIX[5:], 3)
        assert long.sequence.finish == "abort"


@DEPTHS
async def test_abort_during_a_step(llama: Path, depth: int) -> None:
    async with running(llama, depth=depth) as rig:
        with paused(rig) as go:
            job, other = rig.engine.submit(request(PREFIX, 4)), rig.engine.submit(request(PREFIX[3:], 4))
            await until(lambda: job.started)
            rig.engine.abort(job)
            assert rig.counts.leased > 0
            go.set()
            assert ids(await rig.outputs(other)) == generate(llama, PREFIX[3:], 4)
        # Its own updates stop: nothing more came than what was there before.
        await asyncio.sleep(0)
        left = [job._updates.get_nowait() for _ in range(job._updates.qsize())]
        assert not any(isinstance(update, Output) for update in left)


@DEPTHS
async def test_a_step_that_fails_ends_its_requests_and_no_others(
    llama: Path, caplog: pytest.LogCaptureFixture, depth: int
) -> None:
    async with running(llama, max_batch=1 + depth, depth=depth) as rig:  # two deep, the gate is there meanwhile
        launch = rig.model.launch

        def fail_once(chunks: Seq[Chunk]) -> Launched:
            rig.model.launch = launch  # type: ignore[method-assign]
            raise RuntimeError("out of luck")

        with paused(rig) as go:
            gate = rig.engine.submit(request([1], 1))
            await until(lambda: gate.started)
            jobs = [rig.engine.submit(request([5 + number] * 20, 5)) for number in range(4)]
            rig.model.launch = fail_once  # type: ignore[method-assign]
            go.set()
            results = await asyncio.gather(*(rig.outputs(job) for job in jobs), return_exceptions=True)
        failed = [result for result in results if isinstance(result, EngineFailed)]
        assert failed == results[:2]
        for number, result in list(enumerate(results))[2:]:
            assert not isinstance(result, BaseException)
            assert ids(result) == generate(llama, [5 + number] * 20, 5)
        assert "out of luck" in caplog.text
        assert "out of luck" not in failed[0].message
        assert not rig.died.is_set()
        assert await rig.tokens(request(PREFIX, 5)) == generate(llama, PREFIX, 5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_the_end_of_the_thread_is_reported(llama: Path) -> None:
    async with running(llama) as rig:

        def broken() -> list[Chunk]:
            raise MemoryError("the scheduler itself is broken")

        rig.engine.scheduler.plan = broken  # type: ignore[method-assign]
        rig.engine.abort(rig.engine.submit(request([1, 2], 1)))
        await asyncio.wait_for(rig.died.wait(), 5)


async def test_stopping_is_not_dying(llama: Path) -> None:
    async with running(llama) as rig:
        await rig.tokens(request([1, 2], 2))
    await asyncio.sleep(0.01)
    assert not rig.died.is_set()


# -- two steps deep --------------------------------------------------------------------------------------------------


async def test_the_next_step_is_launched_before_the_present_one_is_waited_for(llama: Path) -> None:
    async with running(llama, depth=2) as rig:
        runner = rig.model.runner
        assert isinstance(runner, AheadRunner)
        assert await rig.tokens(request(PREFIX[:20], 4, ignore_eos=True)) == generate(llama, PREFIX[:20], 4)
        assert runner.log == ["launch", "launch", "tokens", "launch", "tokens", "launch", "tokens", "tokens"]
        assert runner.unknown == 3


async def test_who_needs_history_is_not_computed_ahead_but_others_are(llama: Path) -> None:
    knobs: dict[str, Any] = {"logit_bias": {7: 1000.0, 8: 900.0}, "repetition_penalty": 2.0, "ignore_eos": True}
    async with running(llama, depth=2) as rig:
        runner = rig.model.runner
        assert isinstance(runner, AheadRunner)
        assert await rig.tokens(request([5, 6], 4, **knobs)) == [7, 8, 7, 7]
        assert runner.unknown == 0
        both = await asyncio.gather(rig.tokens(request([5, 6], 8, **knobs)), rig.tokens(request(PREFIX, COUNT)))
        assert runner.unknown > 0
    assert list(both) == [[7, 8, 7, 7, 7, 7, 7, 7], generate(llama, PREFIX, COUNT)]


async def test_random_aborts_leave_the_others_alone(llama: Path) -> None:
    """Whoever is aborted, between steps or in the middle of two, the others get their tokens."""
    chance = random.Random(3)
    async with running(llama, block_tokens=4, slots=60, budget=20, depth=2) as rig:

        async def ask(prompt: list[int], patience: int) -> list[int] | None:
            job = rig.engine.submit(request(prompt, COUNT))
            outputs: list[Output] = []
            async for update in job.updates():
                if isinstance(update, Output):
                    outputs.append(update)
                    if len(outputs) == patience:
                        rig.engine.abort(job)
                        return None
            return ids(outputs)

        asked = [(prompt, chance.choice([1, 2, 5, 99])) for prompt in PROMPTS for _ in range(3)]
        got = await asyncio.gather(*(ask(*one) for one in asked))
    assert any(tokens is None for tokens in got)
    for (prompt, _), tokens in zip(asked, got, strict=True):
        assert tokens in (None, generate(llama, prompt, COUNT))


@DEPTHS
async def test_out_of_memory_ends_the_largest_chunks_request_alone(llama: Path, depth: int) -> None:
    large = random_prompt(100)
    async with running(llama, budget=512, depth=depth) as rig:
        launch, refused = rig.model.launch, 0

        def limited(chunks: Seq[Chunk]) -> Launched:
            nonlocal refused
            if any(chunk.size > 50 for chunk in chunks):
                refused += 1
                raise OutOfMemory("too much")
            return launch(chunks)

        rig.model.launch = limited  # type: ignore[method-assign]
        decoding = [rig.engine.submit(request(prompt, 30)) for prompt in PROMPTS[:3]]
        heads = [aiter(job.updates()) for job in decoding]
        for updates in heads:
            while not isinstance(await anext(updates), Output):
                pass
        with pytest.raises(OutOfMemory, match="too much"):
            await rig.tokens(request(large, 3))
        with paused(rig) as go:  # prefills in the step that fails, another one that is too large among them
            others = [asyncio.create_task(rig.tokens(request(prompt, COUNT))) for prompt in PROMPTS[3:6]]
            failing = [asyncio.create_task(rig.tokens(request([*large, *[7] * n], 3))) for n in range(2)]
            await until(lambda: rig.engine.load().running + rig.engine.load().waiting >= 5)
            go.set()
            assert await asyncio.gather(*others) == [generate(llama, prompt, COUNT) for prompt in PROMPTS[3:6]]
            failed = await asyncio.gather(*failing, return_exceptions=True)
        assert [type(error) for error in failed] == [OutOfMemory] * 2
        assert refused == 3
        for job, prompt in zip(decoding, PROMPTS, strict=False):
            await until(lambda job=job: job.sequence.finish is not None)  # type: ignore[misc]
            assert job.sequence.tokens[len(prompt) :] == generate(llama, prompt, 30)
        rig.model.launch = launch  # type: ignore[method-assign]
        assert await rig.tokens(request(large, COUNT)) == generate(llama, large, COUNT)
        assert not rig.died.is_set()


async def test_the_speed_of_prefill_is_known_from_steps_that_are_long_enough(llama: Path) -> None:
    async with running(llama) as rig:
        await rig.tokens(request([1, 2, 3], 40))
        assert rig.engine.speed == 0
        await rig.tokens(request(list(range(64)), 2))
        assert rig.engine.speed > 0


def test_steps_that_overlap_are_not_counted_twice(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is launched while the first computes, and takes as long."""
    rig = Engine(Model(llama, dtype="float32", block_tokens=16, threads=1), Pool(4), max_batch=4, token_budget=64)
    launched, clock = cast(Launched, None), iter([12.0, 14.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    rig._measure(_Step(launched, 100, begun=10.0))
    rig._measure(_Step(launched, 100, begun=11.0))
    assert rig.speed == pytest.approx(50 * rig.model.layout.token_bytes)


@DEPTHS
@pytest.mark.parametrize("at_launch", [True, False])
async def test_a_lost_device_ends_every_request(
    llama: Path, depth: int, at_launch: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also those that wait, and those that load: nothing will ever be computed for them."""
    async with running(llama, max_batch=3, depth=depth) as rig:
        launch, left = rig.model.launch, iter(range(4, -1, -1))

        class Lost(NamedTuple):
            step: Launched

            def tokens(self) -> list[Token]:
                if not at_launch and next(left) == 0:
                    raise DeviceLost("it fell off the bus")
                return self.step.tokens()

        def lose(chunks: Seq[Chunk]) -> Launched:
            if at_launch and next(left) == 0:
                raise DeviceLost("it fell off the bus")
            return Lost(launch(chunks))

        rig.model.launch = lose  # type: ignore[method-assign]
        loading = rig.engine.submit(request(PREFIX, 5), loads=True)
        jobs = [loading, *(rig.engine.submit(request(prompt, 50, ignore_eos=True)) for prompt in PROMPTS[:4])]
        waited = asyncio.gather(*(rig.outputs(job) for job in jobs), return_exceptions=True)
        results = await asyncio.wait_for(waited, 10)
        assert [type(result) for result in results] == [Unavailable] * len(jobs)  # another worker can take over
        assert "it fell off the bus" in caplog.text
        await asyncio.wait_for(rig.died.wait(), 5)


# -- blocks from elsewhere -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM+sliding_window"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 40])
async def test_a_request_goes_on_elsewhere_from_its_blocks(tiny_model: Tiny, architecture: str, length: int) -> None:
    """The whole idea: who holds the blocks, and the first token, continues. Here with memcpy for a link."""
    directory, prompt = tiny_model(architecture), PREFIX[:length]
    async with running(directory, budget=16) as p, running(directory) as d:
        lease = p.engine.lease()
        (first,) = await p.outputs(p.engine.submit(request(prompt, 1), exports=lease))
        job = d.engine.submit(request(prompt, COUNT), loads=True)
        admitted = await anext(job.updates())
        assert isinstance(admitted, Admitted)
        d.memory.slots[admitted.slots] = p.memory.slots[lease.slots]
        d.engine.loaded(job, length)
        d.engine.resume(job, first.tokens[0])
        rest = ids(await d.outputs(job))
        p.engine.release(lease)
    assert [first.tokens[0].id, *rest] == generate(directory, prompt, COUNT)


@pytest.mark.parametrize("length", [16, 40])
@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("known", [False, True])
async def test_what_did_not_come_is_computed(llama: Path, length: int, blocks: int, known: bool) -> None:
    prompt = PREFIX[:length]
    tokens = min(blocks * 16, length)
    expected = generate(llama, prompt, COUNT)
    async with running(llama) as p, running(llama) as d:
        lease = p.engine.lease()
        await p.outputs(p.engine.submit(request(prompt, 1), exports=lease))
        job = d.engine.submit(request(prompt, COUNT), loads=True)
        admitted = await anext(job.updates())
        assert isinstance(admitted, Admitted)
        d.memory.slots[admitted.slots[:blocks]] = p.memory.slots[lease.slots[:blocks]]
        d.engine.loaded(job, tokens)
        d.engine.resume(job, Token(expected[0]) if known else None)
        rest = ids(await asyncio.wait_for(d.outputs(job), 10))
        p.engine.release(lease)
    assert (expected[:1] if known else []) + rest == expected


async def test_a_released_export_makes_room(llama: Path) -> None:
    async with running(llama, slots=3) as rig:
        lease = rig.engine.lease()
        await rig.outputs(rig.engine.submit(request(PREFIX, 1), exports=lease))
        waiting = rig.engine.submit(request(PREFIX[1:], 3))
        assert rig.engine.load().waiting == 1
        rig.engine.release(lease)
        assert ids(await asyncio.wait_for(rig.outputs(waiting), 10)) == generate(llama, PREFIX[1:], 3)


async def test_who_gets_no_slots_in_time_is_told(llama: Path) -> None:
    async with running(llama, slots=4) as rig:
        everything = rig.engine.lease()
        assert everything.grow(4)
        job = rig.engine.submit(request([5, 6, 7], 4))
        with pytest.raises(Overloaded, match="no slots"):
            await anext(aiter(job.updates(patience=0.05)))
        rig.engine.abort(job)
        rig.engine.release(everything)
        assert rig.engine.load().waiting == 0
        assert len(await rig.tokens(request([5, 6, 7], 4))) >= 1
