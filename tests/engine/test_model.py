"""A model's logits and its layout."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.rig import sequences
from tests.tiny import ARCHITECTURES, VOCAB, reference
from twostroke.engine.model import Model
from twostroke.engine.runner import Limits
from twostroke.engine.scheduler import Chunk
from twostroke.errors import StartupError

Tiny = Callable[[str], Path]


def load(directory: Path, dtype: str = "float32") -> Model:
    model = Model(directory, dtype=dtype, block_tokens=4, threads=1)
    model.bind(torch.zeros(20, model.layout.block_bytes, dtype=torch.uint8), Limits(8, 64, 64))
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_transformers(tiny_model: Tiny, architecture: str) -> None:
    """Whole prompts, chunks that continue, and single tokens, in one step; only chunks that end give logits."""
    model, theirs = load(tiny_model(architecture)), reference(tiny_model(architecture))
    prompts = [5, 6, 7, 8, 9], [*range(20, 37)], [*range(50, 62)]
    whole, halved, last = sequences(*prompts, slots=20, block_tokens=4)
    assert model.forward([Chunk(halved, 0, 10, False), Chunk(last, 0, 11, False)]).shape == (0, VOCAB)
    logits = model.forward([Chunk(last, 11, 1, True), Chunk(whole, 0, 5, True), Chunk(halved, 10, 7, True)])
    for row, sequence in zip(logits, [last, whole, halved], strict=True):
        expected = theirs(torch.tensor([sequence.tokens])).logits[0, -1]
        torch.testing.assert_close(row, expected.detach(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        ("LlamaForCausalLM", (2, 2, 2, 4, 8)),
        ("Qwen2ForCausalLM", (2, 2, 4, 4, 8)),
        ("Qwen3ForCausalLM", (3, 2, 2, 4, 16)),
        ("Qwen3MoeForCausalLM", (2, 2, 1, 4, 8)),
    ],
)
def test_layout(tiny_model: Tiny, architecture: str, shape: tuple[int, ...]) -> None:
    model = load(tiny_model(architecture))
    assert model.layout.shape == shape
    assert (model.vocab_size, model.max_position, model.eos) == (VOCAB, 512, frozenset([0]))


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8"])
def test_dtypes_that_do_not_run_on_a_cpu_are_refused(tiny_model: Tiny, dtype: str) -> None:
    with pytest.raises(StartupError, match="use bfloat16 or float32"):
        Model(tiny_model("LlamaForCausalLM"), dtype=dtype, block_tokens=16)


@pytest.mark.parametrize(
    ("instructions", "dtype"),
    [("AVX512", "bfloat16"), ("SVE256", "bfloat16"), ("AVX2", "float32"), ("DEFAULT", "float32")],
)
def test_the_dtype_is_by_default_what_the_cpu_computes_faster(
    tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch, instructions: str, dtype: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    assert load(tiny_model("LlamaForCausalLM"), "auto").layout.dtype == dtype


def test_bfloat16_runs(tiny_model: Tiny) -> None:
    model = load(tiny_model("Qwen3ForCausalLM"), "bfloat16")
    (sequence,) = sequences([*range(10, 25)], slots=20, block_tokens=4)
    whole = model.forward([Chunk(sequence, 0, 15, True)])
    model.forward([Chunk(sequence, 0, 14, False)])
    torch.testing.assert_close(model.forward([Chunk(sequence, 14, 1, True)]), whole, atol=0.3, rtol=0.05)


def test_chunks_that_do_not_sample_have_no_row(tiny_model: Tiny) -> None:
    """Not even if they end where the sequence does."""
    model = load(tiny_model("LlamaForCausalLM"))
    one, two, three = sequences([5, 6, 7], [8, 9, 10, 11], [12, 13], slots=20, block_tokens=4)
    everything = model.forward([Chunk(one, 0, 3, True), Chunk(two, 0, 4, True), Chunk(three, 0, 2, True)])
    some = model.forward([Chunk(one, 0, 3, True), Chunk(two, 0, 4, False), Chunk(three, 0, 2, True)])
    torch.testing.assert_close(some, everything[[0, 2]])


def test_a_launch_samples_for_each_chunk_that_samples(tiny_model: Tiny) -> None:
    model = load(tiny_model("LlamaForCausalLM"))
    one, two, three = sequences([5, 6, 7], [8, 9, 10, 11], [12, 13], slots=20, block_tokens=4)
    chunks = [Chunk(one, 0, 3, True), Chunk(two, 0, 2, False), Chunk(three, 0, 2, True)]
    tokens = model.launch(chunks).tokens()
    assert [token.id for token in tokens] == model.forward(chunks).argmax(-1).tolist()
    assert len(tokens) == 2
