"""A mixture of experts on CUDA. Many tokens: transformers' grouped product. Few tokens, as in decoding: Triton kernels
that read each chosen expert's weights once, since nothing else takes time then.
"""

import torch
import triton
import triton.language as tl
from torch import nn

_FEW = 128  # tokens
_PAIRS = 1024  # tokens times experts of each, at most
_LEAST = 16  # of each side of a matrix product
_OUTER, _INNER = 32, 128  # outputs and inputs of an expert that one program takes at a time


@triton.jit
def _arrange(index, order, starts, PAIRS, EXPERTS, WIDE: tl.constexpr, STEP: tl.constexpr):
    """Sort (token, expert) pairs by expert, by counting for each how many come before it."""
    mine = tl.program_id(0) * STEP + tl.arange(0, STEP)
    every = tl.arange(0, WIDE)
    chosen = tl.load(index + every, every < PAIRS, EXPERTS)
    own = tl.load(index + mine, mine < PAIRS, EXPERTS)
    less = chosen[None, :] < own[:, None]
    tied = (chosen[None, :] == own[:, None]) & (every[None, :] < mine[:, None])
    rank = tl.sum((less | tied).to(tl.int32), 1)
    tl.store(order + rank, mine, mine < PAIRS)
    first = tl.sum((chosen[None, :] < mine[:, None]).to(tl.int32), 1)
    tl.store(starts + mine, first, mine <= EXPERTS)


@triton.jit
def _up(
    x, order, starts, weight, inner, x_row, HIDDEN, INNER, TOP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """``silu(gate) * up`` of one expert's pairs, some outputs; rows of ``inner`` are in order of experts."""
    expert = tl.program_id(0).to(tl.int64)
    outs = tl.program_id(1) * BN + tl.arange(0, BN)
    ins = tl.arange(0, BK)
    last = tl.load(starts + expert + 1)
    of_gate = weight + (expert * 2 * INNER + outs[:, None]) * HIDDEN + ins[None, :]
    for first in range(tl.load(starts + expert), last, BM):
        at = first + tl.arange(0, BM)
        real = (at < last)[None, :]
        token = tl.load(order + at, at < last, 0) // TOP
        of_x = x + token[None, :] * x_row + ins[:, None]
        gate = tl.zeros([BN, BM], tl.float32)
        up = tl.zeros([BN, BM], tl.float32)
        for start in range(0, HIDDEN, BK):
            part = tl.load(of_x + start, real, 0.0)
            gate = tl.dot(tl.load(of_gate + start), part, gate)
            up = tl.dot(tl.load(of_gate + INNER * HIDDEN + start), part, up)
        tl.store(inner + at[None, :] * INNER + outs[:, None], gate * tl.sigmoid(gate) * up, real)


@triton.jit
def _down(
    inner, order, starts, weight, shares, parts, HIDDEN, INNER, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """One expert's answers to its pairs, times their shares; rows of ``parts`` are in order of tokens."""
    expert = tl.program_id(0).to(tl.int64)
    outs = tl.program_id(1) * BN + tl.arange(0, BN)
    ins = tl.arange(0, BK)
    last = tl.load(starts + expert + 1)
    of_weight = weight + (expert * HIDDEN + outs[:, None]) * INNER + ins[None, :]
    for first in range(tl.load(starts + expert), last, BM):
        at = first + tl.arange(0, BM)
        real = (at < last)[None, :]
        pair = tl.load(order + at, at < last, 0)
        acc = tl.zeros([BN, BM], tl.float32)
        for start in range(0, INNER, BK):
            acc = tl.dot(
                tl.load(of_weight + start),
                tl.load(inner + at[None, :] * INNER + (start + ins)[:, None], real, 0.0),
                acc,
            )
        share = tl.load(shares + pair, at < last, 0.0).to(tl.float32)
        tl.store(parts + pair[None, :] * HIDDEN + outs[:, None], acc * share[None, :], real)


torch.library.define(
    "twostroke::experts", "(Tensor x, Tensor index, Tensor shares, Tensor gate_up, Tensor down) -> Tensor"
)


@torch.library.register_fake("twostroke::experts")
def _experts_shape(
    x: torch.Tensor, index: torch.Tensor, shares: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    del index, shares, gate_up, down
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def few_experts(
    x: torch.Tensor, index: torch.Tensor, shares: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The experts' answers, weighted and summed.

    Args:
        x: ``[tokens, hidden]``, the last dimension dense.
        index: ``int64 [tokens, top]``: each token's experts.
        shares: ``[tokens, top]``: their weights.
        gate_up: ``[experts, 2 * inner, hidden]``, dense: gate, then up.
        down: ``[experts, hidden, inner]``, dense.
    """
    (tokens, hidden), top, (experts, _, inner_size) = x.shape, index.shape[1], down.shape
    index, shares, pairs = index.contiguous(), shares.contiguous(), tokens * top
    order = torch.empty(pairs, dtype=torch.int32, device=x.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=x.device)
    inner = x.new_empty(pairs, inner_size)
    parts = x.new_empty(tokens, top, hidden)
    _arrange[(triton.cdiv(max(pairs, experts + 1), 32),)](
        index, order, starts, pairs, experts, triton.next_power_of_2(pairs), 32
    )
    _up[(experts, inner_size // _OUTER)](
        x, order, starts, gate_up, inner, x.stride(0), hidden, inner_size, top, _LEAST, _OUTER, _INNER,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _down[(experts, hidden // _OUTER)](
        inner, order, starts, down, shares, parts, hidden, inner_size, _LEAST, _OUTER, _INNER, num_warps=4, num_stages=3
    )
    return parts.sum(1)


torch.library.impl("twostroke::experts", "CUDA", few_experts)


class _Experts(nn.Module):
    """Experts of transformers, computed by our kernels where tokens are few."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        if hidden.shape[0] <= _FEW:
            weights = self.inner.gate_up_proj, self.inner.down_proj
            few: torch.Tensor = torch.ops.twostroke.experts(hidden, index, shares, *weights)
            return few
        many: torch.Tensor = self.inner(hidden, index, shares)
        return many


def use_few_experts(network: nn.Module, top: int) -> None:
    """Let decode steps of a mixture of experts use our kernels, where these can do what its experts do."""
    if _FEW * top > _PAIRS:
        return
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if _is_usual(child):
                setattr(module, name, _Experts(child))


def _is_usual(module: nn.Module) -> bool:
    """Whether these are experts as our kernels know them: gate and up in one tensor, SiLU, no biases."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter) or gate_up.ndim != 3:
        return False
    experts, hidden, inner = down.shape
    usual = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
    unusual = getattr(module, "has_bias", True) or getattr(module, "is_transposed", True)
    sizes = gate_up.shape == (experts, 2 * inner, hidden) and hidden % _INNER == 0 and inner % _INNER == 0
    return bool(usual and not unusual and sizes and type(getattr(module, "act_fn", None)).__name__ in _SILU)


_SILU = ("SiLUActivation", "SiLU")
