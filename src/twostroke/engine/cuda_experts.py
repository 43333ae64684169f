"""A mixture of experts on CUDA. Many tokens: transformers' grouped product. Few tokens, as in decoding: Triton kernels
that read each chosen expert's weights once, since nothing else takes time then. Who is chosen is one kernel, too.
"""

import torch
import triton
import triton.language as tl
from torch import nn
from torch.nn.functional import linear

_FEW = 128  # tokens
_PAIRS = 1024  # tokens times experts of each, at most
_LEAST = 16  # of each side of a matrix product
_OUTER, _INNER = 32, 128  # outputs and inputs of an expert that one program takes at a time


@triton.jit
def _route(logits, index, shares, row, EXPERTS, TOP: tl.constexpr, WIDE: tl.constexpr, NORM: tl.constexpr):
    """The ``TOP`` most probable experts of one token, best first, and their probabilities; of equals the first."""
    token, every = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    left = tl.load(logits + token * row + every, every < EXPERTS, float("-inf")).to(tl.float32)
    best = tl.max(left, 0)
    total = tl.sum(tl.exp(left - best), 0)
    places = tl.arange(0, TOP)
    chosen = tl.zeros([TOP], tl.int32)
    values = tl.zeros([TOP], tl.float32)
    for place in range(TOP):
        top, at = tl.max(left, 0), tl.argmax(left, 0)
        chosen = tl.where(places == place, at, chosen)
        values = tl.where(places == place, tl.exp(top - best) / total, values)
        left = tl.where(every == at, float("-inf"), left)
    if NORM:
        values = values / tl.sum(values, 0)
    tl.store(index + token * TOP + places, chosen.to(tl.int64))
    tl.store(shares + token * TOP + places, values)


@triton.jit
def _mine(index, order, starts, BY_PAIR: tl.constexpr):
    """The expert that a program is for, and its first and last pair. With few pairs there is a program for each, which
    has something to do if it is the first of its expert.
    """
    if BY_PAIR:
        pair = tl.program_id(0)
        expert = tl.load(index + tl.load(order + pair))
        first = tl.load(starts + expert)
        last = tl.where(first == pair, tl.load(starts + expert + 1), first)
    else:
        expert = tl.program_id(0).to(tl.int64)
        first = tl.load(starts + expert)
        last = tl.load(starts + expert + 1)
    return expert, first, last


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
    x, index, order, starts, weight, inner, x_row, HIDDEN, INNER, TOP: tl.constexpr, BY_PAIR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``silu(gate) * up`` of one expert's pairs, some outputs; rows of ``inner`` are in order of experts."""
    expert, begin, last = _mine(index, order, starts, BY_PAIR)
    outs = tl.program_id(1) * BN + tl.arange(0, BN)
    ins = tl.arange(0, BK)
    of_gate = weight + (expert * 2 * INNER + outs[:, None]) * HIDDEN + ins[None, :]
    for first in range(begin, last, BM):
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
    inner, index, order, starts, weight, shares, parts, HIDDEN, INNER, BY_PAIR: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One expert's answers to its pairs, times their shares; rows of ``parts`` are in order of tokens."""
    expert, begin, last = _mine(index, order, starts, BY_PAIR)
    outs = tl.program_id(1) * BN + tl.arange(0, BN)
    ins = tl.arange(0, BK)
    of_weight = weight + (expert * HIDDEN + outs[:, None]) * INNER + ins[None, :]
    for first in range(begin, last, BM):
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
    del shares, gate_up, down
    return x.new_empty(*index.shape, x.shape[1])


def few_experts(
    x: torch.Tensor, index: torch.Tensor, shares: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The experts' weighted answers, ``[tokens, top, hidden]``. Who adds them up is compiled, with what comes next.

    Args:
        x: ``[tokens, hidden]``, the last dimension dense.
        index: ``int64 [tokens, top]``: each token's experts.
        shares: ``[tokens, top]``: their weights.
        gate_up: ``[experts, 2 * inner, hidden]``, dense: gate, then up.
        down: ``[experts, hidden, inner]``, dense.
    """
    (tokens, hidden), top, (experts, _, inner_size) = x.shape, index.shape[1], down.shape
    index, shares, pairs = index.contiguous(), shares.contiguous(), tokens * top
    by_pair = pairs < experts
    programs = pairs if by_pair else experts
    order = torch.empty(pairs, dtype=torch.int32, device=x.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=x.device)
    inner = x.new_empty(pairs, inner_size)
    parts = x.new_empty(tokens, top, hidden)
    _arrange[(triton.cdiv(max(pairs, experts + 1), 32),)](
        index, order, starts, pairs, experts, triton.next_power_of_2(pairs), 32
    )
    _up[(programs, inner_size // _OUTER)](
        x, index, order, starts, gate_up, inner, x.stride(0), hidden, inner_size, top, by_pair, _LEAST, _OUTER, _INNER,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _down[(programs, hidden // _OUTER)](
        inner, index, order, starts, down, shares, parts, hidden, inner_size, by_pair, _LEAST, _OUTER, _INNER,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return parts


def route(logits: torch.Tensor, top: int, norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts, ``int64 [tokens, top]``, and their probabilities among all, or, with ``norm``, among them.

    Args:
        logits: ``[tokens, experts]``, the last dimension dense.
        top: how many; a power of two.
        norm: whether the probabilities of those chosen add up to one.
    """
    tokens, experts = logits.shape
    index = torch.empty(tokens, top, dtype=torch.int64, device=logits.device)
    shares = logits.new_empty(tokens, top)
    _route[(tokens,)](
        logits, index, shares, logits.stride(0), experts, top, triton.next_power_of_2(experts), norm, num_warps=1
    )
    return index, shares


torch.library.define("twostroke::route", "(Tensor logits, int top, bool norm) -> (Tensor, Tensor)")


@torch.library.register_fake("twostroke::route")
def _route_shape(logits: torch.Tensor, top: int, norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    del norm
    size = logits.shape[0], top
    return logits.new_empty(size, dtype=torch.int64), logits.new_empty(size)


torch.library.impl("twostroke::route", "CUDA", route)
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
            return few.sum(1)
        many: torch.Tensor = self.inner(hidden, index, shares)
        return many


class _Router(nn.Module):
    """A router of transformers: torch's ``topk`` sorts in two kernels what one finds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight: torch.Tensor = self.inner.weight  # type: ignore[assignment]
        logits = linear(hidden.reshape(-1, hidden.shape[-1]), weight)
        index, shares = torch.ops.twostroke.route(logits, self.inner.top_k, bool(self.inner.norm_topk_prob))
        return logits, shares, index


def use_few_experts(network: nn.Module, top: int) -> None:
    """Let decode steps of a mixture of experts use our kernels, where these can do what its experts do."""
    if _FEW * top > _PAIRS:
        return
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if _is_usual(child):
                setattr(module, name, _Experts(child))
            elif type(child).__name__ in _ROUTERS and child.top_k == triton.next_power_of_2(child.top_k):
                setattr(module, name, _Router(child))


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
_ROUTERS = ("Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter")  # softmax of all, the largest, added up to one if asked to
