"""Projections that read the same input become one matrix product, under transformers' unchanged model code."""

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import nn
from transformers.activations import SiLUActivation

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]  # input, weight, bias
Gated = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # input, weight [2 * inner, outer]
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}  # of all such modules: down(act(gate(x)) * up(x))


class _Fused(nn.Module):
    """Several linear maps of one input as one product. It returns the first map's result and keeps the others'."""

    def __init__(self, parts: Seq[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([part.weight.data for part in parts]), requires_grad=False)
        biases = [part.bias.data for part in parts if part.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self.sizes = [part.out_features for part in parts]
        self.results: tuple[torch.Tensor, ...] = ()  # of the other maps, until each was taken
        self.input: torch.Tensor | None = None
        self.product: Product = nn.functional.linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.input = input
        first, *rest = torch.split(self.product(input, self.weight, self.bias), self.sizes, dim=-1)
        self.results = tuple(rest)
        return first


class _Part(nn.Module):
    """Hands out what a ``_Fused`` has computed already, for the same input and no other."""

    def __init__(self, fused: _Fused) -> None:
        super().__init__()
        self.source = (fused,)  # a tuple, so that it does not become a submodule twice

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        fused = self.source[0]
        assert input is fused.input, "fused projections must be called in order, on one input"
        result, *rest = fused.results
        fused.results = tuple(rest)
        if not rest:
            fused.input = None  # so that nothing of this step outlives it
        return result


def fuse(network: nn.Module) -> int:
    """Let projections that read the same input be one matrix product each; returns how many there are.

    transformers' model code stays as it is: it still calls each projection by its name.
    """
    count = 0
    for module in list(network.modules()):
        for names in _TOGETHER:
            parts = [getattr(module, name, None) for name in names]
            linears = [part for part in parts if type(part) is nn.Linear]
            if len(linears) != len(names) or len({part.bias is None for part in linears}) != 1:
                continue
            fused = _Fused(linears)
            setattr(module, names[0], fused)
            for name in names[1:]:
                setattr(module, name, _Part(fused))
            count += 1
    return count


class _Linear(nn.Module):
    """A linear map by another product."""

    def __init__(self, linear: nn.Linear, product: Product) -> None:
        super().__init__()
        self.weight, self.bias, self.product = linear.weight, linear.bias, product

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.product(input, self.weight, self.bias)


class _Gated(nn.Module):
    """A feed-forward layer whose first product and activation are one."""

    def __init__(self, weight: nn.Parameter, down: nn.Module, gated: Gated) -> None:
        super().__init__()
        self.weight, self.down_proj, self.gated = weight, down, gated

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(self.gated(input, self.weight))
        return result


def use_product(network: nn.Module, product: Product, gated: Gated) -> list[torch.Tensor]:
    """Have all linear maps of the network computed by ``product``, and gates with SiLU of fused feed-forward layers by
    ``gated``: ``silu(x @ gate.T) * (x @ up.T)``, for ``weight`` of both. Returns their weights, in the modules' order.
    """
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if {part for part, _ in child.named_children()} == _GATED and isinstance(child.act_fn, SiLUActivation):
                gate, down = child.get_submodule("gate_proj"), child.get_submodule("down_proj")
                if isinstance(gate, _Fused) and gate.bias is None:
                    setattr(module, name, _Gated(gate.weight, down, gated))
    for module in list(network.modules()):
        if isinstance(module, _Fused):
            module.product = product
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, _Linear(child, product))
    return [module.weight for module in network.modules() if isinstance(module, _Fused | _Linear | _Gated)]
