"""Shapes of public models, two layers of them: logits in bfloat16 at all lengths against those of transformers.

The weights are random, the same ones in both. What is right is computed by transformers in float32 from the weights as
they are in bfloat16; ours may be no more than twice as far from it as transformers itself is in bfloat16.
"""

import gc
import json
import random
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from benchmarks.shapes import SHAPES, shape
from transformers import AttentionInterface

from tests.cuda.case import DEVICE
from tests.engine.rig import sequences
from twostroke.engine.model import Model
from twostroke.engine.runner import Limits
from twostroke.engine.scheduler import Chunk, Sequence
from twostroke.engine.weights import DUMMY, load_network

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LENGTHS = [1, 300, 1000, 1001, 8192, 20000, 50000]
SLOTS, BLOCK, MAX_BATCH, BUDGET = 6000, 16, 8, 8192
ROWS = 1024  # that attention in float32 takes at a time
Part = tuple[Sequence, int, int]  # its tokens from, to


@dataclass(frozen=True)
class Loaded:
    """A model, prompts, and the right logits after each."""

    model: Model
    prompts: list[list[int]]
    right: torch.Tensor  # float32 [prompts, vocabulary]
    theirs: list[float]  # relative error of transformers in bfloat16
    forgetful: list[float]  # relative error if the first half of a prompt were another

    def sequences(self) -> list[Sequence]:
        """All prompts, with slots of their own."""
        return sequences(*self.prompts, slots=SLOTS, block_tokens=BLOCK)

    def compute(self, parts: Seq[Part]) -> dict[Sequence, torch.Tensor]:
        """One step; the logits of those that reach their last token."""
        chunks = [Chunk(one, start, end - start, end == len(one.tokens)) for one, start, end in parts]
        chunks.sort(key=lambda chunk: chunk.size > 1)
        logits = self.model.forward(chunks)
        return dict(zip((chunk.sequence for chunk in chunks if chunk.samples), logits, strict=True))

    def compute_until(self, sequence: Sequence, end: int) -> None:
        """The first tokens, as the engine would: no more than the budget in one step."""
        for cut in pairwise([*range(0, end, BUDGET), end]):
            self.compute([(sequence, *cut)])

    def check(self, asked: Seq[Sequence], logits: Mapping[Sequence, torch.Tensor]) -> None:
        """As good as transformers, all in all, and nowhere bad."""
        ours, theirs = [], []
        for sequence, row in logits.items():
            index = asked.index(sequence)
            ours.append(errors(row[None], self.right[index : index + 1])[0])
            theirs.append(self.theirs[index])
            assert ours[-1] < 4 * theirs[-1], f"{len(sequence.tokens)} tokens"
        assert mean_square(ours) < 4 * mean_square(theirs), f"{ours} against {theirs}"


def errors(logits: torch.Tensor, right: torch.Tensor) -> list[float]:
    """The relative error of each row."""
    found: list[float] = ((logits.float() - right).norm(dim=1) / right.norm(dim=1)).tolist()
    return found


def mean_square(values: Seq[float]) -> float:
    return sum(value * value for value in values) / len(values)


def in_slices(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Plain causal attention, for some rows at a time: torch's own would need the scores of 50,000 tokens at once."""
    del module, attention_mask
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    out = torch.empty_like(query)
    for start in range(0, query.shape[2], ROWS):
        end = min(start + ROWS, query.shape[2])
        scores = query[:, :, start:end] @ key[:, :, :end].transpose(2, 3) * scaling
        hidden = torch.arange(end, device=DEVICE) > torch.arange(start, end, device=DEVICE)[:, None]
        out[:, :, start:end] = scores.masked_fill_(hidden, -torch.inf).softmax(-1) @ value[:, :, :end]
    return out.transpose(1, 2), None


AttentionInterface.register("in-slices", in_slices)


@torch.inference_mode()
def logits_of(network: Any, prompts: Seq[list[int]]) -> torch.Tensor:  # noqa: ANN401 - transformers is untyped
    """What transformers says after each prompt."""
    rows = []
    for prompt in prompts:
        hidden = network.base_model(torch.tensor([prompt], device=DEVICE), use_cache=False).last_hidden_state[0, -1]
        rows.append(network.get_output_embeddings()(hidden).float())
    return torch.stack(rows)


@pytest.fixture(scope="module", params=SHAPES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    directory = shape(request.param, tmp_path_factory.mktemp("shape"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    chance, most = random.Random(1), config["max_position_embeddings"]
    prompts = [[chance.randrange(config["vocab_size"]) for _ in range(length)] for length in LENGTHS if length <= most]
    network = load_network(
        directory, dtype=torch.bfloat16, device=DEVICE, load_format=DUMMY, attention="sdpa", experts="eager"
    )
    theirs = logits_of(network, prompts)
    network.set_attn_implementation("in-slices")
    right = logits_of(network.float(), prompts)
    forgetful = logits_of(network, [[*reversed(one[: len(one) // 2]), *one[len(one) // 2 :]] for one in prompts])
    del network
    free()
    torch.compiler.reset()
    model = Model(directory, dtype="bfloat16", block_tokens=BLOCK, device="cuda", load_format=DUMMY)
    pool = torch.empty(SLOTS, model.layout.block_bytes, dtype=torch.uint8, device=DEVICE)
    model.bind(pool, Limits(MAX_BATCH, BUDGET, max(map(len, prompts)) + 1))
    yield Loaded(model, prompts, right, errors(theirs, right), errors(forgetful, right))
    del model, pool
    free()


def free() -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    torch.cuda.empty_cache()


def test_the_reference_means_something(loaded: Loaded) -> None:
    """What is far back in a prompt matters, far beyond the error of bfloat16."""
    assert max(loaded.theirs) < 0.1
    assert min(loaded.forgetful[1:]) > 0.3


def test_whole_prompts(loaded: Loaded) -> None:
    asked, logits = loaded.sequences(), {}
    for one in asked:
        logits.update(loaded.compute([(one, 0, len(one.tokens))]))
    loaded.check(asked, logits)


@pytest.mark.parametrize("size", [8192, 3000, 1024])
def test_prompts_in_chunks(loaded: Loaded, size: int) -> None:
    asked, logits = loaded.sequences(), {}
    for one in asked:
        length = len(one.tokens)
        for cut in pairwise([*range(0, length, size), length]):
            logits.update(loaded.compute([(one, *cut)]))
    loaded.check(asked, logits)


@pytest.mark.parametrize("rows", [1, 3, MAX_BATCH])
def test_single_tokens(loaded: Loaded, rows: int) -> None:
    asked, logits = loaded.sequences(), {}
    for one in asked:
        loaded.compute_until(one, len(one.tokens) - 1)
    for first in range(0, len(asked), rows):
        logits.update(loaded.compute([(o, len(o.tokens) - 1, len(o.tokens)) for o in asked[first : first + rows]]))
    loaded.check(asked, logits)


@pytest.mark.parametrize("left", [2, 100, 250])
def test_the_ends_of_long_prompts_together(loaded: Loaded, left: int) -> None:
    """Their beginnings are there: as with a common prefix."""
    asked = loaded.sequences()
    long = [one for one in asked if len(one.tokens) > left]
    for one in long:
        loaded.compute_until(one, len(one.tokens) - left)
    logits = loaded.compute([(one, len(one.tokens) - left, len(one.tokens)) for one in long])
    assert set(logits) == set(long)
    loaded.check(asked, logits)


def test_everything_in_one_step(loaded: Loaded) -> None:
    """Single tokens, ends of prompts, and whole ones."""
    asked = loaded.sequences()
    one, *whole = asked[:4]
    single, longer, *longest = asked[4:]
    loaded.compute_until(single, len(single.tokens) - 1)
    loaded.compute_until(longer, len(longer.tokens) - 3000)
    for other in longest:
        loaded.compute_until(other, len(other.tokens) - 77)
    parts = [(one, 0, 1), (single, len(single.tokens) - 1, len(single.tokens))]
    parts += [(other, 0, len(other.tokens)) for other in whole]
    parts += [(longer, len(longer.tokens) - 3000, len(longer.tokens))]
    parts += [(other, len(other.tokens) - 77, len(other.tokens)) for other in longest]
    logits = loaded.compute(parts)
    assert set(logits) == set(asked)
    loaded.check(asked, logits)
