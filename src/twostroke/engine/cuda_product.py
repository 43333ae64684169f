"""Matrix products on CUDA, as operators: Triton kernels for few rows, cuBLAS, and QuACK's for gates of many rows.

With few rows a product takes as long as reading its weight. Between two products the memory would have nothing to do,
so the last programs of one have the beginning of the next one's weight brought into the cache.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import nn
from torch.nn.functional import linear

from twostroke.engine.cuda_attention import current
from twostroke.engine.cuda_kernels import early
from twostroke.engine.cuda_prefill import GENERATIONS, package
from twostroke.engine.fusion import use_product

_LEAST = 16  # of each side of a matrix product
_WIDE = 8192  # outputs, beyond which there is work for all programs however it is cut
_FULL = 0.8  # share of the last wave of programs that must have work
_AHEAD = 6 << 20  # bytes of the next weight: what the memory delivers in the time between two products
_LAST = 528  # programs that have them brought
_LINE = 128  # bytes of a line of the cache
_PAIR = 256  # rows of two tiles of QuACK's, which are computed together
_USED = 0.9  # share of these that must be rows for it to be faster
_WIDTH = 8  # that it wants both sides of a weight to be a multiple of
_WHOLE = 1024  # results of a program that applies a gate


@triton.jit
def _bring(following, index, lines, MOST: tl.constexpr):
    """A program's share of the following weight: so many lines of the cache. Who has a negative index has none."""
    if MOST and index >= 0:
        some = tl.arange(0, MOST)
        at = following + (index.to(tl.int64) * lines + tl.where(some < lines, some, 0)) * 64  # elements of a line
        tl.inline_asm_elementwise(
            "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [at.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _multiply_one(
    x, weight, bias, y, following, since, lines, N, K, HAS_BIAS: tl.constexpr, COPIES: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, MOST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row times some rows of the weight, on the plain cores, into ``COPIES`` rows of ``y``."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    ins = tl.arange(0, BK)
    at = weight + outs[:, None].to(tl.int64) * K + ins[None, :]
    some = (outs < N)[:, None]
    acc = tl.zeros([BN, BK], tl.float32)
    for start in range(0, K, BK):
        real = start + ins < K
        w = tl.load(at + start, some & real[None, :], 0.0)
        acc += w.to(tl.float32) * tl.load(x + start + ins, real, 0.0).to(tl.float32)[None, :]
    _bring(following, tl.program_id(0) - since, lines, MOST)
    result = tl.sum(acc, 1)
    if HAS_BIAS:
        result += tl.load(bias + outs, outs < N, 0.0).to(tl.float32)
    for copy in tl.static_range(COPIES):
        tl.store(y + copy * N + outs, result, outs < N)


@triton.jit
def _multiply_few(
    x, weight, bias, y, following, since, lines, M, N, K, x_row, HAS_BIAS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, MOST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Few rows times some rows of the weight; the weight is the left side, of which a matrix product takes more."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    ins = tl.arange(0, BK)
    real = (rows < M)[None, :]
    at = weight + outs[:, None].to(tl.int64) * K + ins[None, :]
    of_x = x + rows[None, :] * x_row + ins[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    for start in range(0, K, BK):
        acc = tl.dot(tl.load(at + start), tl.load(of_x + start, real, 0.0), acc)
    _bring(following, tl.program_id(0) - since, lines, MOST)
    if HAS_BIAS:
        acc += tl.load(bias + outs).to(tl.float32)[:, None]
    tl.store(y + rows[None, :] * N + outs[:, None], acc, real)


class _Cut(NamedTuple):
    """How a product is divided among programs."""

    rows: int  # of the input, that room is made for
    outs: int  # rows of the weight that one program takes
    ins: int  # of its columns, at a time


def _cut(rows: int, outer: int, inner: int, processors: int) -> _Cut | None:
    """``None`` where cuBLAS is as fast or faster. See ``benchmarks/bench_products_cuda.py``."""
    if outer <= _WIDE:
        cut = _Cut(2 * _LEAST, 32, 256)
    elif rows <= _LEAST:
        cut = _Cut(_LEAST, 32, 256)
    else:
        cut = _Cut(2 * _LEAST if rows <= 2 * _LEAST else 4 * _LEAST, 64, 128)
    waves = outer / cut.outs / processors  # the last one should be nearly full
    is_whole = outer % cut.outs == 0 and inner % cut.ins == 0
    return cut if 0 < rows <= cut.rows and is_whole and waves / -(-waves // 1) >= _FULL else None


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    alone: bool,
    processors: int,
    following: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """``x @ weight.T + bias`` for few rows, at the speed at which the weight can be read; ``None`` where cuBLAS is as
    fast or faster.

    Args:
        x: ``[rows, inner]``, bfloat16, the last dimension dense.
        weight: ``[outer, inner]``, dense.
        bias: ``[outer]``.
        alone: all rows are copies of the first.
        processors: multiprocessors of the device.
        following: the weight, dense, that is read next.
    """
    (rows, inner), outer = x.shape, weight.shape[0]
    cut = _cut(rows, outer, inner, processors)
    if alone:
        cut = _Cut(rows, 8, 512) if outer > _WIDE else _Cut(rows, 4, 1024)
    if cut is None:
        return None
    y = x.new_empty(rows, outer)
    programs = triton.cdiv(outer, cut.outs)
    last = min(programs, _LAST)
    lines = min(_AHEAD, following.nbytes) // _LINE // last if following is not None else 0
    ahead = (weight if following is None else following), programs - last, lines
    most = triton.next_power_of_2(lines) if lines else 0
    if alone:
        _multiply_one[(programs,)](
            x, weight, bias, y, *ahead, outer, inner, bias is not None, rows, cut.outs, cut.ins, most, early(),
            num_warps=4, launch_pdl=early(),
        )  # fmt: skip
    else:
        _multiply_few[(programs,)](
            x, weight, bias, y, *ahead, rows, outer, inner, x.stride(0), bias is not None, *cut, most, early(),
            num_warps=4, num_stages=4, launch_pdl=early(),
        )  # fmt: skip
    return y


@triton.jit
def _gate(x, y, N, WIDE: tl.constexpr, EARLY: tl.constexpr):
    """``silu(left) * right`` of the halves of each row."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    left = tl.load(x + 2 * row * N + at, at < N).to(tl.float32)
    right = tl.load(x + (2 * row + 1) * N + at, at < N).to(tl.float32)
    tl.store(y + row * N + at, left * tl.sigmoid(left) * right, at < N)


def _quack() -> Any:  # noqa: ANN401 - it has no types
    """QuACK's products, where it and a GPU that they are for is there."""
    return package("quack.gemm_interface") if torch.cuda.get_device_capability()[0] in GENERATIONS else None


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias`` for any number of rows, within an entered ``Batch``."""
    batch = current()
    y = multiply(
        x.flatten(0, -2),
        weight,
        bias,
        alone=batch.alone,
        processors=batch.processors,
        following=batch.following.get(weight.data_ptr()),
    )
    return linear(x, weight, bias) if y is None else y.view(*x.shape[:-1], len(weight))


def _pairs(rows: int) -> int:
    """What QuACK computes, for so many."""
    return -(-rows // _PAIR) * _PAIR


def gated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``silu(x @ gate.T) * (x @ up.T)``, within an entered ``Batch``.

    Args:
        x: ``[..., inner]``, the last dimension dense.
        weight: ``[2 * outer, inner]``: that of the gate, then the other.

    Returns:
        ``[..., outer]``.
    """
    rows, inner, outer = x.shape[:-1].numel(), x.shape[-1], len(weight) // 2
    y = x.new_empty(*x.shape[:-1], outer)
    if rows >= _USED * _pairs(rows) and not (inner % _WIDTH or outer % _WIDTH) and (quack := _quack()):
        quack.gemm_gated(
            x.view(rows, inner), weight.T, postact_out=y.view(rows, outer), activation="swiglu", store_preact=False,
            concat_layout=("B",), tuned=False,
        )  # fmt: skip
    else:
        grid = triton.cdiv(outer, _WHOLE), rows
        _gate[grid](product(x, weight, None), y, outer, _WHOLE, early(), num_warps=4, launch_pdl=early())
    return y


torch.library.define("twostroke::product", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.define("twostroke::gated", "(Tensor x, Tensor weight) -> Tensor")


@torch.library.register_fake("twostroke::product")
def _product_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    del bias
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("twostroke::gated")
def _gated_shape(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


torch.library.impl("twostroke::product", "CUDA", product)
torch.library.impl("twostroke::gated", "CUDA", gated)


def _operator(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor = torch.ops.twostroke.product(x, weight, bias)
    return y


def _gated_operator(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.ops.twostroke.gated(x, weight)
    return y


def use_products(network: nn.Module) -> Mapping[int, torch.Tensor]:
    """Have all linear maps of the network, in bfloat16, computed here, within an entered ``Batch``.

    Returns:
        By each weight's address, the weight that is read next: that of the next linear map, as the modules are ordered.
    """
    weights = use_product(network, _operator, _gated_operator)
    return {one.data_ptr(): following for one, following in zip(weights, [*weights[1:], *weights[:1]], strict=True)}
