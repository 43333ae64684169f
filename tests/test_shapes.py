"""The shapes that benchmarks use are those of the public models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.shapes import SHAPES, shape
from transformers import AutoConfig, AutoModelForCausalLM

from twostroke import models


def network(name: str, directory: Path) -> Any:  # noqa: ANN401 - transformers is untyped
    """The model without memory for its weights."""
    config = AutoConfig.from_pretrained(shape(name, directory))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [
        ("Qwen2.5-7B", 7_615_616_512, 57_344),
        ("Llama-3.1-8B", 8_030_261_248, 131_072),
        ("Qwen3-30B-A3B", 30_532_122_624, 98_304),
    ],
)
def test_sizes_are_those_of_the_public_models(tmp_path: Path, name: str, parameters: int, kv_bytes: int) -> None:
    model = network(name, tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    attention = model.model.layers[0].self_attn
    assert 2 * 2 * model.config.num_hidden_layers * attention.k_proj.out_features == kv_bytes  # of one token


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_can_be_served_without_weights(tmp_path: Path, name: str) -> None:
    assert models.resolve(str(shape(name, tmp_path)), print, "dummy") == tmp_path
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.max_position_embeddings >= 40_960
    assert config.rope_parameters["rope_theta"] == SHAPES[name]["rope_theta"]
    assert config.rope_parameters["rope_type"] == ("llama3" if "Llama" in name else "default")
