"""Loading a model, its layout and digest, and the fused projections."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from tests.tiny import ARCHITECTURES, VOCAB, reference
from twostroke.engine import model as model_module
from twostroke.engine.model import Model, model_digest
from twostroke.engine.scheduler import Chunk, Sequence
from twostroke.errors import ModelError, StartupError
from twostroke.kv.keys import root_key
from twostroke.kv.pool import Pool
from twostroke.messages import Request, Sampling

Tiny = Callable[[str], Path]


def load(directory: Path, *, block_tokens: int = 4, slots: int = 20) -> Model:
    model = Model(directory, dtype="float32", block_tokens=block_tokens, threads=1)
    model.bind(torch.zeros(slots, model.layout.block_bytes, dtype=torch.uint8))
    return model


def sequences(*prompts: list[int]) -> list[Sequence]:
    """Sequences that hold slots of one pool, out of order."""
    pool, result = Pool(20), []
    for prompt in prompts:
        sequence = Sequence(Request("r/0/0", prompt, Sampling(4, 0)), root_key("", ""))
        sequence.lease = pool.lease()
        sequence.lease.grow(5)
        sequence.lease.slots.reverse()
        result.append(sequence)
    return result


@pytest.fixture
def copy(tiny_model: Tiny, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model("LlamaForCausalLM"), tmp_path / "model")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_transformers(tiny_model: Tiny, architecture: str) -> None:
    """Whole prompts, chunks that continue, and single tokens, in one step; only chunks that end give logits."""
    model, theirs = load(tiny_model(architecture)), reference(tiny_model(architecture))
    whole, halved, last = sequences([5, 6, 7, 8, 9], list(range(20, 37)), list(range(50, 62)))
    assert model.forward([Chunk(halved, 0, 10), Chunk(last, 0, 11)]).shape == (0, VOCAB)
    logits = model.forward([Chunk(last, 11, 1), Chunk(whole, 0, 5), Chunk(halved, 10, 7)])
    for row, sequence in zip(logits, [last, whole, halved], strict=True):
        expected = theirs(torch.tensor([sequence.tokens])).logits[0, -1]
        torch.testing.assert_close(row, expected.detach(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_projections_change_nothing(tiny_model: Tiny, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_model(architecture)
    counted: list[int] = []
    fuse = model_module.fuse
    monkeypatch.setattr(model_module, "fuse", lambda network: counted.append(fuse(network)))
    fused = load(directory)
    monkeypatch.setattr(model_module, "fuse", lambda network: 0)
    plain = load(directory)
    layers = fused.layout.layers
    assert counted == [layers if "Moe" in architecture else 2 * layers]
    (sequence,) = sequences(list(range(10, 25)))
    chunk = Chunk(sequence, 0, 15)
    torch.testing.assert_close(fused.forward([chunk]), plain.forward([chunk]), atol=1e-3, rtol=1e-4)


def test_fused_projections_take_no_more_memory(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def size(model: Model) -> int:
        return sum(parameter.numel() for parameter in model._network.parameters())

    fused = load(tiny_model("LlamaForCausalLM"))
    monkeypatch.setattr(model_module, "fuse", lambda network: 0)
    assert size(fused) == size(load(tiny_model("LlamaForCausalLM")))


def test_fused_projections_refuse_another_input(tiny_model: Tiny) -> None:
    layer = load(tiny_model("LlamaForCausalLM"))._network.base_model.layers[0].self_attn
    layer.q_proj(torch.ones(1, 1, 32))
    with pytest.raises(AssertionError, match="on one input"):
        layer.k_proj(torch.ones(1, 1, 32))


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


def test_digest_names_weights_and_configuration(copy: Path) -> None:
    weights, config = copy / "model.safetensors", copy / "config.json"
    digests = [model_digest(copy)]
    assert model_digest(copy) == digests[0]
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    digests.append(model_digest(copy))
    weights.rename(copy / "model-00001-of-00001.safetensors")
    digests.append(model_digest(copy))
    config.write_text(config.read_text() + " ")
    digests.append(model_digest(copy))
    assert len(set(digests)) == 4


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8"])
def test_dtypes_that_do_not_run_on_a_cpu_are_refused(tiny_model: Tiny, dtype: str) -> None:
    with pytest.raises(StartupError, match="use bfloat16 or float32"):
        Model(tiny_model("LlamaForCausalLM"), dtype=dtype, block_tokens=16)


def test_bfloat16_runs(tiny_model: Tiny) -> None:
    model = Model(tiny_model("Qwen3ForCausalLM"), dtype="bfloat16", block_tokens=4, threads=1)
    model.bind(torch.zeros(20, model.layout.block_bytes, dtype=torch.uint8))
    (sequence,) = sequences(list(range(10, 25)))
    whole = model.forward([Chunk(sequence, 0, 15)])
    model.forward([Chunk(sequence, 0, 14)])
    torch.testing.assert_close(model.forward([Chunk(sequence, 14, 1)]), whole, atol=0.3, rtol=0.05)


@pytest.mark.parametrize("keep", [0, 4, 1000, 0.5, 0.999])
def test_truncated_weights(copy: Path, keep: float) -> None:
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy)


def test_missing_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy)


@pytest.mark.parametrize("text", ["", "{}", "[]", "{", '{"model_type": "no-such"}', '{"model_type": 7}'])
def test_bad_configuration(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy)


def test_weights_of_other_shapes(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy)


def test_an_encoder_decoder_is_no_causal_model(tmp_path: Path) -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        load(tmp_path)


def test_an_encoder_is_no_causal_model(tmp_path: Path) -> None:
    """transformers would load it: its tokens would see those after them."""
    config = BertConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        load(tmp_path)
