"""Tiny random models of several architectures, and what transformers itself says to a prompt."""

from collections.abc import Sequence as Seq
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from tests.tiny_tokenizer import build_tokenizer

VOCAB = 320
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,  # large, so that every token of the context matters to the answer
    "tie_word_embeddings": False,
}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {"num_key_value_heads": 4},
    "Qwen3ForCausalLM": {"head_dim": 16, "num_hidden_layers": 3},
    "Qwen3MoeForCausalLM": {"head_dim": 8, "num_key_value_heads": 1, **_MOE},
    "MistralForCausalLM": {"sliding_window": None},
    "MistralForCausalLM+sliding_window": {"sliding_window": 7, "head_dim": 16},
}


def make_model(architecture: str, directory: Path, **changes: object) -> Path:
    """Save a model and its tokenizer. The same weights each time. ``changes``: of its configuration."""
    name = architecture.partition("+")[0]
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))
    torch.manual_seed(1)
    network = getattr(transformers, name)(config(**{**_COMMON, **ARCHITECTURES[architecture], **changes}))
    (eos,) = build_tokenizer(directory).special_ids
    network.config.eos_token_id = network.generation_config.eos_token_id = eos
    network.save_pretrained(directory)
    return directory


@cache
def reference(directory: Path, device: str = "cpu") -> Any:  # noqa: ANN401 - transformers is untyped
    """The model as transformers runs it, in float32 and with plain attention."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(directory, dtype=torch.float32, attn_implementation="eager").to(device)


@cache
def _generate(directory: Path, prompt: tuple[int, ...], count: int, device: str, ends: bool) -> list[int]:
    network = reference(directory, device)
    eos = network.generation_config.eos_token_id if ends else VOCAB  # no such token
    config = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=eos, pad_token_id=0)
    ids = torch.tensor([prompt], device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so little work is only slowed down by more
    output = network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    torch.set_num_threads(threads)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def generate(directory: Path, prompt: Seq[int], count: int, device: str = "cpu", *, ends: bool = True) -> list[int]:
    """The greedy continuation by ``transformers``' own ``generate`` in float32; it ends with EOS if ``ends``, or
    ``count``.
    """
    return _generate(directory, tuple(prompt), count, device, ends)
