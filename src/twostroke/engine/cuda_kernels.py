"""Triton kernels: store a step's K and V in a block-major pool, attend with one token a sequence, and multiply few
rows with a large weight.

The pool is read and written where it lies: ``kv`` is ``[slots, layers, 2, kv_heads, block_tokens, head_dim]``. A
*place* is ``slot * block_tokens + offset``, the position of one token in it.
"""

from functools import cache

import torch
import triton
import triton.language as tl

_TILE = 64  # tokens of context that one program takes at a time
_MAX_SPLITS = 64
_LEAST = 16  # of each side of a matrix product
_WIDE_PRODUCT = 8192  # outputs of a product, beyond which there is work for all however it is cut
_FULL = 0.8  # share of the last wave of programs that must have work
_ZEROED = 256  # tokens; attention reads whole tiles, and not even with weight 0 may it meet what is not a number


@cache
def early() -> bool:
    """Whether a kernel may start before the one before it has ended, and wait inside (Hopper and later)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


@triton.jit
def _store(
    key, value, kv, places, key_row, key_head, value_row, value_head, slot_stride, layer_offset,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDE_HEADS: tl.constexpr, WIDE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """K and V of one row, all heads, to its place; a negative place is nowhere."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(places + row)
    if place >= 0:
        heads = tl.arange(0, WIDE_HEADS)[:, None]
        dims = tl.arange(0, WIDE)[None, :]
        real = (heads < KV_HEADS) & (dims < DIM)
        k = tl.load(key + row * key_row + heads * key_head + dims, real)
        v = tl.load(value + row * value_row + heads * value_head + dims, real)
        at = (place // BLOCK).to(tl.int64) * slot_stride + layer_offset + (heads * BLOCK + place % BLOCK) * DIM + dims
        tl.store(kv + at, k, real)
        tl.store(kv + at + KV_HEADS * BLOCK * DIM, v, real)


@triton.jit
def _gather(kv, table, blocks, out, slot_stride, layer_offset, out_head, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """K or V of one head of one block, ``SIZE`` elements in a row on either side; zeros behind the last block."""
    block, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    elements = tl.arange(0, WIDE)
    real = (block < blocks) & (elements < SIZE)
    slot = tl.load(table + block, block < blocks, 0).to(tl.int64)
    found = tl.load(kv + slot * slot_stride + layer_offset + part * SIZE + elements, real, 0.0)
    tl.store(out + part * out_head + block * SIZE + elements, found, elements < SIZE)


@triton.jit
def _attend_split(
    query, kv, tables, width, lengths, part, peak, mass, query_row, query_head, slot_stride, layer_offset, scale,
    window, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    TILE: tl.constexpr, WIDE_GROUP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One split of one sequence's context, for the query heads of one KV head: unnormalised sum, peak and mass."""
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    length = tl.load(lengths + row)
    table = tables + row * tl.load(width)
    oldest = tl.maximum(length - window, 0)
    skipped = oldest // TILE
    tiles = tl.cdiv(length, TILE) - skipped
    first = skipped + split * tiles // SPLITS
    last = skipped + (split + 1) * tiles // SPLITS
    heads = tl.arange(0, WIDE_GROUP)[:, None]
    dims = tl.arange(0, WIDE)[None, :]
    q = tl.load(
        query + row * query_row + (kv_head * GROUP + heads) * query_head + dims, (heads < GROUP) & (dims < DIM), 0.0
    )
    top = tl.full([WIDE_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([WIDE_GROUP], tl.float32)
    acc = tl.zeros([WIDE_GROUP, WIDE], tl.float32)
    for tile in range(first, last):
        tokens = tile * TILE + tl.arange(0, TILE)
        seen = (tokens < length) & (tokens >= oldest)
        slots = tl.load(table + tokens // BLOCK, seen, 0).to(tl.int64)
        at = slots * slot_stride + layer_offset + (kv_head * BLOCK + tokens % BLOCK) * DIM
        real = seen[:, None] & (dims < DIM)
        k = tl.load(kv + at[:, None] + dims, real, 0.0)
        v = tl.load(kv + at[:, None] + KV_HEADS * BLOCK * DIM + dims, real, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a tile of which nothing is seen
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        total = total * shrink + tl.sum(p, 1)
        top = new
    rows = ((row * KV_HEADS + kv_head) * SPLITS + split) * WIDE_GROUP + tl.arange(0, WIDE_GROUP)
    tl.store(part + rows[:, None] * WIDE + dims, acc)
    tl.store(peak + rows, top)
    tl.store(mass + rows, total)


@triton.jit
def _combine(
    part, peak, mass, out,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr,
    WIDE_GROUP: tl.constexpr, WIDE: tl.constexpr, WIDE_SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The splits of one query head as one."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    splits = tl.arange(0, WIDE_SPLITS)
    dims = tl.arange(0, WIDE)
    rows = ((row * KV_HEADS + head // GROUP) * SPLITS + splits) * WIDE_GROUP + head % GROUP
    tops = tl.load(peak + rows, splits < SPLITS, float("-inf"))
    weight = tl.exp2(tops - tl.max(tops, 0))
    total = tl.sum(weight * tl.load(mass + rows, splits < SPLITS, 0.0), 0)
    parts = tl.load(part + rows[:, None] * WIDE + dims[None, :], (splits < SPLITS)[:, None], 0.0)
    result = tl.sum(parts * weight[:, None], 0) / total
    tl.store(out + (row * HEADS + head) * DIM + dims, result, dims < DIM)


def store(key: torch.Tensor, value: torch.Tensor, kv: torch.Tensor, layer: int, places: torch.Tensor) -> None:
    """Put each row's K and V into the pool.

    Args:
        key: ``[rows, kv_heads, head_dim]``, the last dimension dense; ``value`` alike.
        kv: the pool.
        layer: whose K and V these are.
        places: ``int32 [rows]``; a row whose place is negative is not stored.
    """
    rows, kv_heads, dim = key.shape
    _store[(rows,)](
        key, value, kv, places, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        kv.stride(0), layer * kv.stride(1), kv_heads, dim, kv.shape[4],
        triton.next_power_of_2(kv_heads), triton.next_power_of_2(dim), early(), launch_pdl=early(),
    )  # fmt: skip


def gather(kv: torch.Tensor, layer: int, table: torch.Tensor, size: int) -> torch.Tensor:
    """K and V of one sequence, copied together.

    Args:
        kv: the pool.
        layer: whose.
        table: ``int32 [blocks]``: its slots.
        size: tokens that the result has room for; what is ``_ZEROED`` tokens beyond the blocks is anything.

    Returns:
        ``[2, kv_heads, size, head_dim]``.
    """
    _, _, _, kv_heads, block, dim = kv.shape
    out = kv.new_empty(2, kv_heads, size, dim)
    blocks = min(len(table) + triton.cdiv(_ZEROED, block), size // block)
    _gather[(blocks, 2 * kv_heads)](
        kv,
        table,
        len(table),
        out,
        kv.stride(0),
        layer * kv.stride(1),
        size * dim,
        block * dim,
        triton.next_power_of_2(block * dim),
    )
    return out


def attend_one(
    query: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    tables: torch.Tensor,
    width: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int,
    processors: int,
) -> None:
    """Attention of one token a sequence to its context, into ``out``. Nothing depends on what is in the tensors but
    the result, so it can be captured in a graph.

    Args:
        query: ``[rows, heads, head_dim]``, the last dimension dense.
        kv: the pool.
        layer: whose K and V to read.
        tables: ``int32``: the slots of row ``i`` start at ``i * width[0]``.
        width: ``int32 [1]``.
        lengths: ``int32 [rows]``: tokens of context, the row's own included; at least 1.
        out: ``[rows, heads, head_dim]``, dense.
        scale: factor of the scores.
        window: tokens that a row looks back, itself included.
        processors: multiprocessors of the device, which the context is split over.
    """
    (rows, heads, dim), (kv_heads, block) = query.shape, kv.shape[3:5]
    group, wide = heads // kv_heads, max(_LEAST, triton.next_power_of_2(dim))
    wide_group = max(_LEAST, triton.next_power_of_2(group))
    splits = max(1, min(_MAX_SPLITS, triton.cdiv(4 * processors, rows * kv_heads)))
    part = torch.empty(rows, kv_heads, splits, wide_group, wide, device=query.device)
    peak, mass = torch.empty(2, rows, kv_heads, splits, wide_group, device=query.device)
    _attend_split[(rows, kv_heads, splits)](
        query, kv, tables, width, lengths, part, peak, mass, query.stride(0), query.stride(1),
        kv.stride(0), layer * kv.stride(1), scale * 1.4426950408889634, window,
        kv_heads, group, dim, block, splits, _TILE, wide_group, wide,
        "ieee" if kv.dtype == torch.float32 else "tf32", early(), num_warps=4, num_stages=2, launch_pdl=early(),
    )  # fmt: skip
    _combine[(rows, heads)](
        part, peak, mass, out, heads, kv_heads, group, dim, splits, wide_group, wide, triton.next_power_of_2(splits),
        early(), launch_pdl=early(),
    )  # fmt: skip


@triton.jit
def _multiply_one(
    x, weight, bias, y, N, K, HAS_BIAS: tl.constexpr, COPIES: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """One row times some rows of the weight, on the plain cores, into ``COPIES`` rows of ``y``."""
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    ins = tl.arange(0, BK)
    at = weight + outs[:, None].to(tl.int64) * K + ins[None, :]
    some = (outs < N)[:, None]
    acc = tl.zeros([BN, BK], tl.float32)
    for start in range(0, K, BK):
        real = start + ins < K
        w = tl.load(at + start, some & real[None, :], 0.0)
        acc += w.to(tl.float32) * tl.load(x + start + ins, real, 0.0).to(tl.float32)[None, :]
    result = tl.sum(acc, 1)
    if HAS_BIAS:
        result += tl.load(bias + outs, outs < N, 0.0).to(tl.float32)
    for copy in tl.static_range(COPIES):
        tl.store(y + copy * N + outs, result, outs < N)


@triton.jit
def _multiply_few(
    x, weight, bias, y, M, N, K, x_row, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Few rows times some rows of the weight; the weight is the left side, of which a matrix product takes more."""
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    ins = tl.arange(0, BK)
    real = (rows < M)[None, :]
    at = weight + outs[:, None].to(tl.int64) * K + ins[None, :]
    of_x = x + rows[None, :] * x_row + ins[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    for start in range(0, K, BK):
        acc = tl.dot(tl.load(at + start), tl.load(of_x + start, real, 0.0), acc)
    if HAS_BIAS:
        acc += tl.load(bias + outs).to(tl.float32)[:, None]
    tl.store(y + rows[None, :] * N + outs[:, None], acc, real)


def multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, alone: bool, processors: int
) -> torch.Tensor | None:
    """``x @ weight.T + bias`` for few rows, at the speed at which the weight can be read; ``None`` where cuBLAS is as
    fast or faster. See ``benchmarks/bench_products_cuda.py``.

    Args:
        x: ``[rows, inner]``, bfloat16, the last dimension dense.
        weight: ``[outer, inner]``, dense.
        bias: ``[outer]``.
        alone: all rows are copies of the first.
        processors: multiprocessors of the device.
    """
    (rows, inner), outer = x.shape, weight.shape[0]
    if alone:
        y = x.new_empty(rows, outer)
        of, at_once = (8, 512) if outer > _WIDE_PRODUCT else (4, 1024)
        _multiply_one[(triton.cdiv(outer, of),)](
            x, weight, bias, y, outer, inner, bias is not None, rows, of, at_once, num_warps=4
        )
        return y
    of, at_once = (64, 128) if rows > _LEAST and outer > _WIDE_PRODUCT else (32, 256)
    waves = outer / of / processors  # the last one should be nearly full
    if rows == 0 or rows > 2 * _LEAST or outer % of or inner % at_once or waves / -(-waves // 1) < _FULL:
        return None
    y = x.new_empty(rows, outer)
    _multiply_few[(outer // of,)](
        x, weight, bias, y, rows, outer, inner, x.stride(0), bias is not None, _LEAST if rows <= _LEAST else 2 * _LEAST,
        of, at_once, num_warps=4, num_stages=4,
    )  # fmt: skip
    return y
