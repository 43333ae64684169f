"""Projections that read one input, as one matrix product."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.activations import SiLUActivation

from tests.engine.rig import sequences
from tests.tiny import ARCHITECTURES
from twostroke.engine import model as model_module
from twostroke.engine.cpu import CpuRunner
from twostroke.engine.fusion import _Fused, _Part, fuse, use_product
from twostroke.engine.model import Model
from twostroke.engine.runner import Limits
from twostroke.engine.scheduler import Chunk

Tiny = Callable[[str], Path]


def load(directory: Path) -> Model:
    model = Model(directory, dtype="float32", block_tokens=4, threads=1)
    model.bind(torch.zeros(20, model.layout.block_bytes, dtype=torch.uint8), Limits(8, 64, 64))
    return model


def load_plain(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The model with its projections as they were."""
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "fuse", lambda network: 0)
        return load(directory)


def network(model: Model) -> Any:  # noqa: ANN401 - transformers is untyped
    assert isinstance(model.runner, CpuRunner)
    return model.runner._network


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_projections_change_nothing(tiny_model: Tiny, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = load(tiny_model(architecture)), load_plain(tiny_model(architecture), monkeypatch)
    (sequence,) = sequences([*range(10, 25)], slots=20, block_tokens=4)
    chunk = Chunk(sequence, 0, 15, True)
    torch.testing.assert_close(fused.forward([chunk]), plain.forward([chunk]), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_and_dense_layers_are_fused(
    tiny_model: Tiny, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a mixture of experts, attention alone."""
    model = load_plain(tiny_model(architecture), monkeypatch)
    assert fuse(network(model)) == model.layout.layers * (1 if "Moe" in architecture else 2)
    assert fuse(network(model)) == 0


def test_fused_projections_take_no_more_memory(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def size(model: Model) -> int:
        return sum(parameter.numel() for parameter in network(model).parameters())

    directory = tiny_model("LlamaForCausalLM")
    assert size(load(directory)) == size(load_plain(directory, monkeypatch))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_of_a_step_outlives_it(tiny_model: Tiny, architecture: str) -> None:
    """A step of many tokens would else keep memory that the next one needs."""
    model = load(tiny_model(architecture))
    fused = [module for module in network(model).modules() if isinstance(module, _Fused)]
    parts = [module for module in network(model).modules() if isinstance(module, _Part)]
    assert fused
    assert {part.source[0] for part in parts} == set(fused)
    (sequence,) = sequences([*range(10, 25)], slots=20, block_tokens=4)
    model.forward([Chunk(sequence, 0, 15, True)])
    assert all(module.input is None and module.results == () for module in fused)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_products_compute_every_linear_map(tiny_model: Tiny, architecture: str) -> None:
    """In the order in which their weights are returned: what is fetched ahead must be what is read next."""
    model = load(tiny_model(architecture))
    (sequence,) = sequences([*range(10, 25)], slots=20, block_tokens=4)
    right = model.forward([Chunk(sequence, 0, 15, True)])
    called: list[torch.Tensor] = []

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        called.append(weight)
        return torch.nn.functional.linear(x, weight, bias)

    def gated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        called.append(weight)
        gate, up = (x @ weight.T).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    weights = use_product(network(model), product, gated)
    torch.testing.assert_close(model.forward([Chunk(sequence, 0, 15, True)]), right)
    assert [weight.data_ptr() for weight in called] == [weight.data_ptr() for weight in weights]
    assert len(weights) == (2 if "Moe" in architecture else 4) * network(model).config.num_hidden_layers + 1


def test_only_gates_with_silu_and_without_biases_are_gated() -> None:
    class Layer(torch.nn.Module):
        def __init__(self, act_fn: torch.nn.Module, bias: bool) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(4, 4, bias=bias) for _ in range(3))
            self.act_fn = act_fn

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return result

    def gated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise AssertionError("this one is another function")

    for layer in (Layer(torch.nn.GELU(), bias=False), Layer(SiLUActivation(), bias=True)):
        x = torch.randn(3, 4)
        right, whole = layer(x), torch.nn.Sequential(layer)
        fuse(whole)
        use_product(whole, torch.nn.functional.linear, gated)
        torch.testing.assert_close(whole(x), right)


def test_another_input_is_refused(tiny_model: Tiny) -> None:
    layer = network(load(tiny_model("LlamaForCausalLM"))).base_model.layers[0].self_attn
    layer.q_proj(torch.ones(1, 1, 32))
    with pytest.raises(AssertionError, match="on one input"):
        layer.k_proj(torch.ones(1, 1, 32))


def test_what_differs_in_kind_stays_as_it_is() -> None:
    """A projection with a bias beside ones without, or one of another class, cannot be fused without care."""

    class Layer(torch.nn.Module):
        def __init__(self, **projections: torch.nn.Module) -> None:
            super().__init__()
            for name, projection in projections.items():
                setattr(self, name, projection)

    class Scaled(torch.nn.Linear):
        pass

    def linear(bias: bool = False) -> torch.nn.Linear:
        return torch.nn.Linear(4, 4, bias=bias)

    assert fuse(Layer(q_proj=linear(), k_proj=linear(True), v_proj=linear())) == 0
    assert fuse(Layer(q_proj=linear(), k_proj=Scaled(4, 4, bias=False), v_proj=linear())) == 0
    assert fuse(Layer(q_proj=linear(), v_proj=linear())) == 0
    assert fuse(Layer(gate_proj=linear(True), up_proj=linear(True))) == 1
