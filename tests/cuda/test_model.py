"""Logits of every architecture on the GPU, however a prompt is computed, against those of transformers there."""

import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cuda.case import DEVICE, distance
from tests.engine.rig import sequences
from tests.tiny import ARCHITECTURES, VOCAB, reference
from twostroke.engine.cuda import CudaRunner
from twostroke.engine.model import Model
from twostroke.engine.runner import Limits
from twostroke.engine.scheduler import Chunk, Sequence

SLOTS, BLOCK, MAX_BATCH, BUDGET = 400, 16, 9, 512
LENGTHS = [1, 2, 5, 16, 17, 33, 64, 100, 129]
Tiny = Callable[[str], Path]
Part = tuple[Sequence, int, int]  # its tokens from, to


@dataclass(frozen=True)
class Loaded:
    """A model with its pool, and what the right logits after each prompt are."""

    model: Model
    prompts: list[list[int]]
    right: torch.Tensor  # float32 [prompts, vocabulary]

    @property
    def runner(self) -> CudaRunner:
        assert isinstance(self.model.runner, CudaRunner)
        return self.model.runner

    def sequences(self) -> list[Sequence]:
        """All prompts, with slots of their own."""
        return sequences(*self.prompts, slots=SLOTS, block_tokens=BLOCK)

    def compute(self, parts: Seq[Part]) -> dict[Sequence, torch.Tensor]:
        """One step; the logits of those that reach their last token."""
        chunks = [Chunk(one, start, end - start, end == len(one.tokens)) for one, start, end in parts]
        chunks.sort(key=lambda chunk: chunk.size > 1)
        logits = self.model.forward(chunks)
        return dict(zip((chunk.sequence for chunk in chunks if chunk.samples), logits, strict=True))

    def compute_before_last(self, asked: Seq[Sequence]) -> None:
        """Everything but the last token of each."""
        for one in asked:
            if len(one.tokens) > 1:
                assert not self.compute([(one, 0, len(one.tokens) - 1)])


def load(directory: Path, dtype: str) -> Model:
    torch.compiler.reset()  # compiled code is counted over all models of a process
    model = Model(directory, dtype=dtype, block_tokens=BLOCK, device="cuda")
    pool = torch.empty(SLOTS, model.layout.block_bytes, dtype=torch.uint8, device=DEVICE)
    model.bind(pool, Limits(MAX_BATCH, BUDGET, 512))
    return model


@torch.inference_mode()
def logits_of(network: Any, prompts: Seq[list[int]]) -> torch.Tensor:  # noqa: ANN401 - transformers is untyped
    """What transformers says after each prompt, computed alone."""
    return torch.stack([network(torch.tensor([prompt], device=DEVICE)).logits[0, -1].float() for prompt in prompts])


def random_prompts(lengths: Seq[int]) -> list[list[int]]:
    chance = random.Random(11)
    return [[chance.randrange(1, VOCAB) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request: pytest.FixtureRequest, tiny_model: Tiny) -> Loaded:
    """In float32."""
    assert not torch.backends.cuda.matmul.allow_tf32, "the reference must be exact"
    directory, prompts = tiny_model(request.param), random_prompts(LENGTHS)
    right = logits_of(reference(directory, str(DEVICE)), prompts)
    return Loaded(load(directory, "float32"), prompts, right)


def check(loaded: Loaded, asked: Seq[Sequence], logits: Mapping[Sequence, torch.Tensor]) -> None:
    """Logits of some of the prompts."""
    assert logits
    for sequence, row in logits.items():
        assert row.shape == (VOCAB,)
        assert distance(row, loaded.right[asked.index(sequence)]) < 1e-4


# -- in float32 ------------------------------------------------------------------------------------------------------


def test_whole_prompts_in_one_step(loaded: Loaded) -> None:
    asked = loaded.sequences()
    logits = loaded.compute([(one, 0, len(one.tokens)) for one in asked])
    assert set(logits) == set(asked)
    check(loaded, asked, logits)


def test_whole_prompts_one_by_one(loaded: Loaded) -> None:
    asked = loaded.sequences()
    for one in asked:
        check(loaded, asked, loaded.compute([(one, 0, len(one.tokens))]))


def test_chunks_that_continue(loaded: Loaded) -> None:
    """Cut anywhere, in the middle of blocks, too; all of them side by side."""
    asked = loaded.sequences()
    cuts = {one: sorted({0, len(one.tokens) // 3, len(one.tokens) * 2 // 3, len(one.tokens)}) for one in asked}
    logits: dict[Sequence, torch.Tensor] = {}
    for turn in range(3):
        logits |= loaded.compute([(one, *cuts[one][turn : turn + 2]) for one in asked if turn + 1 < len(cuts[one])])  # type: ignore[misc]
    assert set(logits) == set(asked)
    check(loaded, asked, logits)


@pytest.mark.parametrize(
    ("rows", "captured"), [(1, True), (2, True), (3, True), (MAX_BATCH, True), (2, False), (3, False)]
)
def test_single_tokens(loaded: Loaded, rows: int, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded.runner._decodes
    if not captured:
        monkeypatch.setattr(loaded.runner, "_decodes", [])
    asked = loaded.sequences()
    loaded.compute_before_last(asked)
    for first in range(0, len(asked) - rows + 1, rows):
        some = asked[first : first + rows]
        logits = loaded.compute([(one, len(one.tokens) - 1, len(one.tokens)) for one in some])
        assert list(logits) == some
        check(loaded, asked, logits)


@pytest.mark.parametrize("captured", [True, False])
def test_ends_of_prompts_beside_single_tokens(loaded: Loaded, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded.runner._tails
    if not captured:
        monkeypatch.setattr(loaded.runner, "_tails", [])
    asked = loaded.sequences()
    left = dict(zip(asked[-5:], (1, 1, 16, 5, 41), strict=True))
    starts = {one: len(one.tokens) - count for one, count in left.items()}
    loaded.compute([(one, 0, start) for one, start in starts.items()])
    for some in (asked[-5:], asked[-3:-2], asked[-2:]):
        logits = loaded.compute([(one, starts[one], len(one.tokens)) for one in some])
        assert list(logits) == some
        check(loaded, asked, logits)


def test_everything_in_one_step(loaded: Loaded) -> None:
    """Single tokens, chunks that continue and whole prompts."""
    asked = loaded.sequences()
    loaded.compute_before_last(asked[1:4])
    loaded.compute([(one, 0, 20) for one in asked[5:7]])
    singles = [(one, len(one.tokens) - 1, len(one.tokens)) for one in asked[:4]]
    others = [(asked[4], 0, 17), (asked[5], 20, 33), (asked[6], 20, 60), (asked[7], 0, 100), (asked[8], 0, 129)]
    logits = loaded.compute([*singles, *others])
    assert set(logits) == {*asked[:6], *asked[7:]}
    check(loaded, asked, logits)
    check(loaded, asked, loaded.compute([(asked[6], 60, 64)]))


def test_a_single_token_that_is_not_sampled_from(loaded: Loaded) -> None:
    """It comes last: what the budget had left for a prompt."""
    asked = loaded.sequences()
    loaded.compute_before_last(asked[1:3])
    loaded.compute([(asked[7], 0, 50)])
    logits = loaded.compute([(asked[1], 1, 2), (asked[2], 4, 5), (asked[7], 50, 51)])
    assert list(logits) == asked[1:3]
    check(loaded, asked, logits)
    check(loaded, asked, loaded.compute([(asked[7], 51, 100)]))


@pytest.mark.parametrize("captured", [True, False])
def test_the_second_step_knows_what_the_first_one_sampled(
    loaded: Loaded, tiny_model: Tiny, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without us: its tokens are asked for before the first one's are known."""
    if not captured:
        monkeypatch.setattr(loaded.runner, "_decodes", [])
    asked = loaded.sequences()[2:]
    chunks = [Chunk(one, 0, len(one.tokens), True) for one in asked]
    first = loaded.model.launch(chunks)
    # In another order, and not all of them.
    ahead = [asked[index] for index in (3, 0, 2)]
    second = loaded.model.launch([Chunk(one, len(one.tokens), 1, True) for one in ahead])
    tokens = dict(zip(asked, (token.id for token in first.tokens()), strict=True))
    assert list(tokens.values()) == loaded.right[2:].argmax(-1).tolist()
    following = [token.id for token in second.tokens()]
    longer = Loaded(loaded.model, [[*one.tokens, tokens[one]] for one in ahead], torch.empty(0))
    alone = [longer.compute([(one, 0, len(one.tokens))])[one] for one in longer.sequences()]
    assert following == [int(row.argmax()) for row in alone]


def test_small_steps_after_large_ones(loaded: Loaded) -> None:
    """What a larger step left behind is not read."""
    asked = loaded.sequences()
    loaded.compute_before_last(asked)
    some = [(one, len(one.tokens) - 1, len(one.tokens)) for one in asked]
    for few in (some[1:3], some[5:6], some[6:]):
        loaded.compute(some)
        check(loaded, asked, loaded.compute(few))


# -- in bfloat16 -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rough:
    """A model in bfloat16, and how far transformers itself is off."""

    loaded: Loaded
    theirs: float

    def check(self, logits: Mapping[int, torch.Tensor]) -> None:
        """Logits by prompt: as good as transformers' own, all in all."""
        assert len(logits) == len(self.loaded.prompts)
        assert error(torch.stack([logits[index] for index in sorted(logits)]), self.loaded.right) < 2 * self.theirs


def error(logits: torch.Tensor, right: torch.Tensor) -> float:
    """Root mean square over prompts of the relative error."""
    return float(((logits.float() - right).norm(dim=1) / right.norm(dim=1)).square().mean().sqrt())


@pytest.fixture(scope="module", params=["Qwen2ForCausalLM", "Qwen3MoeForCausalLM", "MistralForCausalLM+sliding_window"])
def rough(request: pytest.FixtureRequest, tiny_model: Tiny) -> Rough:
    """The right logits are those of the same rounded weights, computed in float32."""
    directory, chance = tiny_model(request.param), random.Random(2)
    prompts = random_prompts([1, 2, 3, 128, *(chance.randrange(4, 100) for _ in range(32))])
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="sdpa")
    network = network.to(DEVICE)
    theirs = logits_of(network, prompts)
    right = logits_of(network.float(), prompts)
    return Rough(Loaded(load(directory, "bfloat16"), prompts, right), error(theirs, right))


def test_bfloat16_whole_prompts(rough: Rough) -> None:
    """Alone, and several at once."""
    for together in (1, 4, 12):
        asked, logits = rough.loaded.sequences(), {}
        for first in range(0, len(asked), together):
            logits.update(rough.loaded.compute([(one, 0, len(one.tokens)) for one in asked[first : first + together]]))
        rough.check({asked.index(one): row for one, row in logits.items()})


@pytest.mark.parametrize("captured", [True, False])
def test_bfloat16_prompts_with_a_prefix(rough: Rough, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rough.loaded.runner._prompts or not rough.loaded.runner._flash
    if not captured:
        monkeypatch.setattr(rough.loaded.runner, "_prompts", [])
    asked, logits = rough.loaded.sequences(), {}
    for first in range(0, len(asked), 5):
        some = asked[first : first + 5]
        cut = {one: len(one.tokens) * 2 // 3 for one in some}
        if begun := [(one, 0, cut[one]) for one in some if cut[one]]:
            rough.loaded.compute(begun)
        logits.update(rough.loaded.compute([(one, cut[one], len(one.tokens)) for one in some]))
    rough.check({asked.index(one): row for one, row in logits.items()})


@pytest.mark.parametrize("rows", [1, 3, MAX_BATCH])
def test_bfloat16_single_tokens(rough: Rough, rows: int) -> None:
    asked, logits = rough.loaded.sequences(), {}
    rough.loaded.compute_before_last(asked)
    for first in range(0, len(asked), rows):
        parts = [(one, len(one.tokens) - 1, len(one.tokens)) for one in asked[first : first + rows]]
        logits.update(rough.loaded.compute(parts))
    rough.check({asked.index(one): row for one, row in logits.items()})
