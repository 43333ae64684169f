"""The engine on the GPU, thread and all: its greedy tokens are those of ``transformers``' ``generate`` there."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.cuda.case import DEVICE
from tests.engine.rig import Rig, ids, preemptions, request, serving
from tests.tiny import VOCAB, generate, make_model
from twostroke.engine import cuda
from twostroke.engine.model import Model
from twostroke.engine.runner import Limits
from twostroke.engine.sampling import Drawn, Row, draw
from twostroke.errors import OutOfMemory
from twostroke.messages import Output

SLOTS, BLOCK, MAX_BATCH, CONTEXT = 1200, 16, 16, 8192
COUNT = 10
_random = random.Random(5)


def random_prompt(length: int) -> list[int]:
    return [_random.randrange(1, VOCAB) for _ in range(length)]


PREFIX = random_prompt(60)
PROMPTS = [
    *(random_prompt(length) for length in (1, 2, 5, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100, 130, 300)),
    *([*PREFIX[:length], *random_prompt(extra)] for length, extra in ((60, 0), (60, 3), (33, 9), (32, 1), (16, 30))),
]


class Setup(NamedTuple):
    """A model that is bound to a pool, for one engine after the other."""

    directory: Path
    model: Model

    def expected(self, prompt: list[int], count: int = COUNT) -> list[int]:
        """What transformers generates."""
        return generate(self.directory, prompt, count, str(DEVICE))

    @asynccontextmanager
    async def running(self, *, slots: int = SLOTS, budget: int = 512, max_batch: int = MAX_BATCH) -> AsyncIterator[Rig]:
        """An engine that uses some of the pool; it knows of no blocks from before."""
        async with serving(Rig(self.model, slots=slots, budget=budget, max_batch=max_batch)) as rig:
            yield rig


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """Tiny, but with a context that is long enough to need memory. In float32."""
    torch.compiler.reset()
    directory = make_model("LlamaForCausalLM", tmp_path_factory.mktemp("long"), max_position_embeddings=CONTEXT)
    model = Model(directory, dtype="float32", block_tokens=BLOCK, device="cuda")
    pool = torch.empty(SLOTS, model.layout.block_bytes, dtype=torch.uint8, device=DEVICE)
    model.bind(pool, Limits(MAX_BATCH, CONTEXT, CONTEXT))
    return Setup(directory, model)


@contextmanager
def no_more_memory(spare: int) -> Iterator[None]:
    """torch gets ``spare`` bytes more of the GPU's memory than it needs now, and no others."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + spare) / total, DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


# -- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "max_batch"), [(512, MAX_BATCH), (7, 4), (40, 3)], ids=str)
async def test_greedy_is_generate(setup: Setup, budget: int, max_batch: int) -> None:
    async with setup.running(budget=budget, max_batch=max_batch) as rig:
        got = await asyncio.gather(
            *(rig.tokens(request(prompt, COUNT, priority=i % 3)) for i, prompt in enumerate(PROMPTS))
        )
    assert got == [setup.expected(prompt) for prompt in PROMPTS]


async def test_greedy_with_prefix_hits(setup: Setup) -> None:
    async with setup.running() as rig:
        for prompt in (PROMPTS[-1], PROMPTS[13], PREFIX):
            first = await rig.outputs(rig.engine.submit(request(prompt, COUNT)))
            again = await rig.outputs(rig.engine.submit(request(prompt, COUNT)))
            longer = [*prompt, *ids(first), 7, 8]
            more = await rig.outputs(rig.engine.submit(request(longer, COUNT)))
            assert again[0].cached_tokens == (len(prompt) - 1) // BLOCK * BLOCK
            assert more[0].cached_tokens >= (len(prompt) + len(ids(first)) - 1) // BLOCK * BLOCK
            assert ids(first) == ids(again) == setup.expected(prompt)
            assert ids(more) == setup.expected(longer)


async def test_greedy_with_preemption(setup: Setup) -> None:
    prompts = [random_prompt(length) for length in (30, 31, 20, 17, 45, 3)]
    async with setup.running(slots=12, budget=40) as rig:
        preempted = preemptions(rig)
        got = await asyncio.gather(*(rig.tokens(request(prompt, 40)) for prompt in prompts))
    assert len(preempted) > 2
    assert got == [setup.expected(prompt, 40) for prompt in prompts]


async def test_stop_tokens_end(setup: Setup) -> None:
    """The token after it is being computed by then, in vain."""
    expected = [setup.expected(prompt) for prompt in PROMPTS]
    stops = [tokens[len(tokens) // 2] for tokens in expected]
    async with setup.running() as rig:
        pairs = zip(PROMPTS, stops, strict=True)
        asked = [request(prompt, COUNT, stop_token_ids=frozenset([stop])) for prompt, stop in pairs]
        got = await asyncio.gather(*(rig.tokens(one) for one in asked))
    assert got == [tokens[: tokens.index(stop) + 1] for tokens, stop in zip(expected, stops, strict=True)]


# -- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.0, 0.3])
async def test_seeded_sampling_is_the_same_in_any_company(setup: Setup, penalty: float) -> None:
    knobs: list[dict[str, Any]] = [
        {"seed": seed, "temperature": 1.5, "top_p": 0.95, "top_k": 50, "frequency_penalty": penalty, "logprobs": 2}
        for seed in range(6)
    ]
    prompts = [random_prompt(length) for length in (3, 20, 33, 50, 17, 8)]
    alone = []
    async with setup.running() as rig:
        for prompt, knob in zip(prompts, knobs, strict=True):
            alone.append(await rig.tokens(request(prompt, 20, **knob)))
    for slots, budget in [(SLOTS, 512), (SLOTS, 11), (8, 40)]:
        async with setup.running(slots=slots, budget=budget) as rig:
            preempted = preemptions(rig)
            asked = [request(prompt, 20, **knob) for prompt, knob in zip(prompts, knobs, strict=True)]
            assert await asyncio.gather(*(rig.tokens(one) for one in asked)) == alone
            assert bool(preempted) == (slots < SLOTS)
    assert len({tuple(tokens) for tokens in alone}) == 6
    assert alone[0] != setup.expected(prompts[0], 20)


async def test_penalties_and_biases_beside_greedy_requests(setup: Setup) -> None:
    """Where one row of a step wants something, the others still get their most probable tokens."""
    knobs: dict[str, Any] = {"logit_bias": {7: 1000.0, 8: 900.0}, "repetition_penalty": 2.0}
    async with setup.running() as rig:
        odd, *plain = await asyncio.gather(
            rig.tokens(request([5, 6], 4, **knobs)), *(rig.tokens(request(prompt, COUNT)) for prompt in PROMPTS[:8])
        )
    assert odd == [7, 8, 7, 7]
    assert plain == [setup.expected(prompt) for prompt in PROMPTS[:8]]


async def test_reported_log_probabilities(setup: Setup) -> None:
    async with setup.running() as rig:
        outputs = await rig.outputs(rig.engine.submit(request(PREFIX, 4, logprobs=3)))
    for output in outputs:
        (token,) = output.tokens
        assert token.top is not None
        names, values = zip(*token.top, strict=True)
        assert names[0] == token.id
        assert values[0] == pytest.approx(token.logprob)
        assert len(values) == 3
        assert list(values) == sorted(values, reverse=True)


# -- ends ------------------------------------------------------------------------------------------------------------


async def test_random_aborts_leave_the_others_alone(setup: Setup) -> None:
    chance = random.Random(3)
    async with setup.running(slots=80, budget=60) as rig:

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

        asked = [(prompt, chance.choice([1, 2, 5, 99])) for prompt in PROMPTS for _ in range(2)]
        got = await asyncio.gather(*(ask(*one) for one in asked))
    assert any(tokens is None for tokens in got)
    for (prompt, _), tokens in zip(asked, got, strict=True):
        assert tokens in (None, setup.expected(prompt))


async def test_out_of_memory_ends_the_request_that_is_too_large_and_no_other(setup: Setup) -> None:
    """For real: the allocator refuses."""
    large, small, count = random_prompt(6000), PROMPTS[5], 150
    expected, expected_small = setup.expected(PREFIX, count), setup.expected(small)
    async with setup.running(budget=CONTEXT) as rig:
        job = rig.engine.submit(request(PREFIX, count, ignore_eos=True))
        updates, outputs = job.updates(), []
        async for update in updates:
            if isinstance(update, Output):
                outputs.append(update)
                if len(outputs) == 2:
                    break
        with no_more_memory(16 << 20):
            failing = asyncio.create_task(rig.tokens(request(large, 3)))
            async for update in updates:
                if isinstance(update, Output):
                    outputs.append(update)
            with pytest.raises(OutOfMemory, match="not enough memory"):
                await failing
            # What is small goes on, also while there is no more memory.
            assert await rig.tokens(request(small, COUNT)) == expected_small
        tokens = ids(outputs)
        assert tokens[: len(expected)] == expected
        assert len(tokens) == count
        assert await rig.tokens(request(large, 5)) == setup.expected(large, 5)
        assert not rig.died.is_set()


async def test_out_of_memory_in_sampling_leaves_the_others_their_tokens(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step was computed by then, but it is computed again, after the one before it."""
    prompts = [random_prompt(length) for length in (3, 20, 33, 50)]
    knobs: dict[str, Any] = {"temperature": 1.5, "ignore_eos": True}
    async with setup.running() as rig:
        alone = [await rig.tokens(request(prompt, 20, **knobs)) for prompt in prompts]
    calls = iter(range(10**6))

    def refuse_once(logits: torch.Tensor, rows: Seq[Row]) -> Drawn:
        if len(rows) == len(prompts) and next(calls) == 5:
            raise torch.OutOfMemoryError("refused")
        return draw(logits, rows)

    monkeypatch.setattr(cuda, "draw", refuse_once)
    async with setup.running() as rig:
        asked = [rig.tokens(request(prompt, 20, **knobs)) for prompt in prompts]
        got = await asyncio.gather(*asked, return_exceptions=True)
    failed = [isinstance(tokens, OutOfMemory) for tokens in got]
    assert failed.count(True) == 1
    for index, tokens in enumerate(got):
        assert failed[index] or tokens == alone[index]
