"""Loading networks, making dummy ones, and the digest of weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from tests.tiny import ARCHITECTURES, VOCAB, reference
from twostroke.engine.weights import load_network, model_digest
from twostroke.errors import MemoryTooSmall, ModelError

Tiny = Callable[[str], Path]

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def load(directory: Path, load_format: str = "auto", experts: str | None = None) -> Any:  # noqa: ANN401 - untyped
    return load_network(
        directory,
        dtype=torch.float32,
        device=torch.device("cpu"),
        load_format=load_format,
        attention="sdpa",
        experts=experts,
    )


def configuration(source: Path, directory: Path, **changes: object) -> Path:
    """The configuration alone of a model, changed."""
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


@pytest.fixture
def copy(tiny_model: Tiny, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model("LlamaForCausalLM"), tmp_path / "model")


# -- weights that are read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_network_is_what_transformers_loads(tiny_model: Tiny, architecture: str) -> None:
    network = load(tiny_model(architecture))
    theirs = reference(tiny_model(architecture)).state_dict()
    assert network.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in network.state_dict().items())
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


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


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("text", ["", "{}", "[]", "{", '{"model_type": "no-such"}', '{"model_type": 7}'])
def test_bad_configuration(copy: Path, text: str, load_format: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy, load_format)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"hidden_act": "no"}, {"rope_parameters": {"rope_type": "no"}}],
)
def test_bad_fields_of_a_configuration(copy: Path, change: dict[str, object], load_format: str) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(configuration(copy, copy, **change), load_format)


def test_weights_of_other_shapes(copy: Path) -> None:
    configuration(copy, copy, hidden_size=64)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_an_encoder_decoder_is_no_causal_model(tmp_path: Path, load_format: str) -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        load(tmp_path, load_format)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_an_encoder_is_no_causal_model(tmp_path: Path, load_format: str) -> None:
    """transformers would load it: its tokens would see those after them."""
    config = BertConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        load(tmp_path, load_format)


def test_a_device_that_is_too_small(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(MemoryTooSmall, match="do not fit into the memory of cpu"):
        load(copy)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_experts_are_computed_as_asked(tiny_model: Tiny, load_format: str) -> None:
    mixture = tiny_model("Qwen3MoeForCausalLM")
    for experts in ("eager", "grouped_mm", "batched_mm"):
        assert load(mixture, load_format, experts).config._experts_implementation == experts
    with pytest.raises(ModelError, match="no_such_experts"):
        load(mixture, load_format, "no_such_experts")
    load(tiny_model("LlamaForCausalLM"), load_format, "grouped_mm")  # there are none


# -- weights that are made up ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}}),
        ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
        ("Qwen3ForCausalLM", {}),
        ("Qwen3MoeForCausalLM", {}),
    ],
)
def test_a_dummy_is_whole(tiny_model: Tiny, tmp_path: Path, architecture: str, changes: dict[str, object]) -> None:
    """Like a network that was saved and loaded, but for the values of its weights; its answers depend on the prompt."""
    dummy = load(configuration(tiny_model(architecture), tmp_path, **changes), "dummy")
    normal = getattr(transformers, architecture)(dummy.config)
    normal.save_pretrained(tmp_path)
    normal = load(tmp_path)
    assert type(dummy) is type(normal)
    assert {name: value.shape for name, value in dummy.named_parameters()} == {
        name: value.shape for name, value in normal.named_parameters()
    }
    buffers = dict(normal.named_buffers())
    assert {name for name, _ in dummy.named_buffers()} == buffers.keys() != set()
    for name, buffer in dummy.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=0, atol=0)
    for name, parameter in dummy.named_parameters():
        assert name.endswith("bias") or parameter.abs().max() > 0
    with torch.inference_mode():
        logits = dummy(input_ids=torch.arange(2, 42).view(4, 10)).logits
    assert torch.isfinite(logits).all()
    assert len(set(logits.argmax(-1).flatten().tolist())) > 10


def test_a_dummy_is_the_same_each_time_and_leaves_the_generator_alone(tiny_model: Tiny, tmp_path: Path) -> None:
    directory = configuration(tiny_model("Qwen3MoeForCausalLM"), tmp_path)
    torch.manual_seed(3)
    first = load(directory, "dummy").state_dict()
    drawn = torch.rand(1)
    second = load(directory, "dummy").state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)


def test_a_dummy_has_the_dtype_and_attention_that_were_asked_for(tiny_model: Tiny) -> None:
    network = load_network(
        tiny_model("LlamaForCausalLM"),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        load_format="dummy",
        attention="eager",
    )
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert network.model.rotary_emb.inv_freq.dtype == torch.float32
    assert network.config._attn_implementation == "eager"
    assert torch.get_default_dtype() == torch.float32
    assert not network.training


def test_a_dummy_ends_where_the_generation_configuration_says(tiny_model: Tiny, tmp_path: Path) -> None:
    configuration(tiny_model("LlamaForCausalLM"), tmp_path, eos_token_id=5)
    assert load(tmp_path, "dummy").generation_config.eos_token_id == 5
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, VOCAB - 1]}))
    assert load(tmp_path, "dummy").generation_config.eos_token_id == [6, VOCAB - 1]


# -- the digest ------------------------------------------------------------------------------------------------------


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


def test_digest_of_a_dummy_names_the_configuration_alone(copy: Path, tmp_path: Path) -> None:
    whole = model_digest(copy, "dummy")
    assert whole != model_digest(copy)
    (copy / "model.safetensors").unlink()
    assert model_digest(copy, "dummy") == whole != model_digest(copy)
    assert model_digest(configuration(copy, tmp_path, vocab_size=7), "dummy") != whole
