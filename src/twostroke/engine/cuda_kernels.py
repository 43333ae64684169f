"""Triton kernels: store a step's K and V in a block-major pool, and attend with one or few tokens a sequence.

The pool is read and written where it lies: ``kv`` is ``[slots, layers, 2, kv_heads, block_tokens, head_dim]``. A
*place* is ``slot * block_tokens + offset``, the position of one token in it.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from twostroke.engine.cuda_step import PARTS, TILE, TOGETHER

_TILE_BYTES = 16 << 10  # of K, or V, that a program takes at a time, at most
_BROUGHT = 1024  # numbers that a program brings
_LEAST = 16  # of each side of a matrix product


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


@triton.jit(do_not_specialize=["count"])
def _bring(source, target, count, AT_ONCE: tl.constexpr):
    at = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    tl.store(target + at, tl.load(source + at, at < count), at < count)


@triton.jit
def _gather(kv, table, out, slot_stride, layer_offset, out_head, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """K or V of one head of one block, ``SIZE`` elements in a row on either side."""
    block, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    elements = tl.arange(0, WIDE)
    slot = tl.load(table + block).to(tl.int64)
    found = tl.load(kv + slot * slot_stride + layer_offset + part * SIZE + elements, elements < SIZE)
    tl.store(out + part * out_head + block * SIZE + elements, found, elements < SIZE)


@triton.jit
def _join(
    part, peak, mass, first, parts, stride, GROUP: tl.constexpr, FEW: tl.constexpr, WIDE: tl.constexpr,
    MOST: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """All parts of one context as one: ``[TALL, WIDE]``, of whose every ``FEW`` lines ``GROUP`` are a row's heads."""
    lines, dims = tl.arange(0, TALL), tl.arange(0, WIDE)
    some = tl.arange(0, MOST)[:, None]
    at = first + some * stride + lines[None, :]
    peaks = tl.load(peak + at, some < parts, float("-inf"), cache_modifier=".cg")
    top = tl.max(peaks, 0)  # finite: one of the parts has the row's own token
    total = tl.sum(tl.load(mass + at, some < parts, 0.0, cache_modifier=".cg") * tl.exp2(peaks - top[None, :]), 0)
    acc = tl.zeros([TALL, WIDE], tl.float32)
    for index in tl.range(0, parts, loop_unroll_factor=8 if TALL == FEW else 1):
        its = first + index * stride + lines
        weight = tl.exp2(tl.load(peak + its, cache_modifier=".cg") - top)
        its = its[:, None] * WIDE + dims[None, :]
        acc += weight[:, None] * tl.load(part + its, lines[:, None] % FEW < GROUP, 0.0, cache_modifier=".cg")
    return acc / total[:, None]


@triton.jit
def _put(
    result, to, row, rows, copies, ROWS, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    FEW: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The result of some rows' query heads to their places, and the first one's to the last ``copies - 1`` rows."""
    lines, dims = tl.arange(0, TALL)[:, None], tl.arange(0, WIDE)[None, :]
    nth, heads = lines // FEW, lines % FEW
    real = (nth < rows) & (heads < GROUP) & (dims < DIM)
    for copy in range(copies):
        at = tl.where(copy == 0, row + nth, ROWS - copy)
        tl.store(to + (at * HEADS + heads) * DIM + dims, result, real & ((copy == 0) | (nth == 0)))


@triton.jit
def _attend(
    query, key, value, kv, places, tables, sizes, lengths, work, out, part, peak, mass, arrived,
    query_row, query_head, key_row, key_head, value_row, value_head, slot_stride, layer_offset, scale, window, ROWS,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, TALL: tl.constexpr, FEW: tl.constexpr, REAL: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, MOST: tl.constexpr, ALONE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One part of one context, for the query heads of one KV head and a row, or several that follow each other: each
    is ``FEW`` lines of the ``TALL`` that are computed. Whoever is the last of a context's parts to be done puts them
    together. Where every row is ``ALONE``, its last part also takes the row's own K and V, and stores them.
    """
    kv_head, item = tl.program_id(0), tl.program_id(1)
    row = tl.load(work + item * 5).to(tl.int64)
    rows = tl.load(work + item * 5 + 1)
    mine = tl.load(work + item * 5 + 3)
    parts = tl.load(work + item * 5 + 4)
    length = tl.load(lengths + row)
    table = tables + tl.load(work + item * 5 + 2).to(tl.int64) * tl.load(sizes)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if parts > 0:
        oldest = tl.maximum(length - window, 0)
        skipped = oldest // TILE
        stored = length - 1 if ALONE else length + rows - 1
        tiles = tl.maximum(tl.cdiv(stored, TILE) - skipped, 0)
        first = skipped + mine * tiles // parts
        last = skipped + (mine + 1) * tiles // parts
        lines = tl.arange(0, TALL)
        nth, heads = lines // FEW, lines % FEW
        dims = tl.arange(0, WIDE)
        q = tl.load(
            query + (row + nth[:, None]) * query_row + (kv_head * GROUP + heads[:, None]) * query_head + dims[None, :],
            (nth[:, None] < rows) & (heads[:, None] < GROUP) & (dims[None, :] < DIM),
            0.0,
        )
        top = tl.full([TALL], float("-inf"), tl.float32)
        total = tl.zeros([TALL], tl.float32)
        acc = tl.zeros([TALL, WIDE], tl.float32)
        if ALONE and mine == parts - 1:
            new_k = tl.load(key + row * key_row + kv_head * key_head + dims, dims < DIM, 0.0)
            new_v = tl.load(value + row * value_row + kv_head * value_head + dims, dims < DIM, 0.0)
            place = tl.load(places + row)
            home = (place // BLOCK).to(tl.int64) * slot_stride + layer_offset + (kv_head * BLOCK + place % BLOCK) * DIM
            tl.store(kv + home + dims, new_k, (dims < DIM) & (place >= 0))
            tl.store(kv + home + KV_HEADS * BLOCK * DIM + dims, new_v, (dims < DIM) & (place >= 0))
            top = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
            total += 1.0
            acc += new_v.to(tl.float32)[None, :]
        for tile in range(first, last):
            tokens = tile * TILE + tl.arange(0, TILE)
            there = (tokens < stored) & (tokens >= oldest)
            slots = tl.load(table + tokens // BLOCK, there, 0).to(tl.int64)
            at = slots * slot_stride + layer_offset + (kv_head * BLOCK + tokens % BLOCK) * DIM
            real = there[:, None] & (dims[None, :] < DIM)
            k = tl.load(kv + at[:, None] + dims[None, :], real, 0.0)
            v = tl.load(kv + at[:, None] + KV_HEADS * BLOCK * DIM + dims[None, :], real, 0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            seen = there[None, :]
            if not ALONE:
                own = (length + nth)[:, None]
                seen = seen & (tokens[None, :] < own) & (tokens[None, :] >= own - window)
            scores = tl.where(seen, scores, float("-inf"))
            new = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(new == float("-inf"), 0.0, new)  # a tile of which nothing is seen
            p = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(top - base)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            total = total * shrink + tl.sum(p, 1)
            top = new
        copies = 1
        if row == 0:
            copies += ROWS - tl.load(sizes + 1)
        to = out + kv_head * GROUP * DIM
        if parts == 1:
            _put(acc / total[:, None], to, row, rows, copies, ROWS, HEADS, GROUP, DIM, FEW, TALL, WIDE)
        else:
            at = (item * KV_HEADS + kv_head) * TALL + lines
            tl.store(part + at[:, None] * WIDE + dims[None, :], acc, (nth[:, None] < rows) & (heads[:, None] < GROUP))
            tl.store(peak + at, top)
            tl.store(mass + at, total)
            tl.debug_barrier()
            done = arrived + row * KV_HEADS + kv_head
            if tl.atomic_add(done, 1, sem="acq_rel", scope="gpu") == parts - 1:
                tl.debug_barrier()
                tl.store(done, 0)
                first_part = ((item - mine) * KV_HEADS + kv_head) * TALL
                joined = _join(part, peak, mass, first_part, parts, KV_HEADS * TALL, GROUP, FEW, WIDE, MOST, REAL)
                _put(joined, to, row, rows, copies, ROWS, HEADS, GROUP, DIM, FEW, REAL, WIDE)


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


def bring(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a few numbers between the GPU and pinned memory, on torch's current stream: unlike a copy of CUDA's, which
    would queue behind the blocks that are on their way.

    Args:
        target: ``[numbers]``, dense.
        source: ``[numbers]``, likewise, of the same type.
    """
    count = len(source)
    _bring[(triton.cdiv(count, _BROUGHT),)](source, target, count, _BROUGHT)


def gather(kv: torch.Tensor, layer: int, table: torch.Tensor) -> torch.Tensor:
    """K and V of one sequence, copied together.

    Args:
        kv: the pool.
        layer: whose.
        table: ``int32 [blocks]``: its slots.

    Returns:
        ``[2, kv_heads, blocks * block_tokens, head_dim]``.
    """
    _, _, _, kv_heads, block, dim = kv.shape
    size = len(table) * block
    out = kv.new_empty(2, kv_heads, size, dim)
    _gather[(len(table), 2 * kv_heads)](
        kv,
        table,
        out,
        kv.stride(0),
        layer * kv.stride(1),
        size * dim,
        block * dim,
        triton.next_power_of_2(block * dim),
    )
    return out


def attend_few(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    places: torch.Tensor,
    tables: torch.Tensor,
    sizes: torch.Tensor,
    lengths: torch.Tensor,
    work: torch.Tensor,
    arrived: torch.Tensor,
    out: torch.Tensor,
    *,
    rows: int,
    alone: bool,
    scale: float,
    window: int,
) -> None:
    """Attend with one or few tokens a sequence to all their context, into ``out``; of single ones, also store K and V.

    Nothing depends on what is in the tensors but the result, so it can be captured in a graph.

    Args:
        query: ``[rows or more, heads, head_dim]``, the last dimension dense.
        key: ``[rows or more, kv_heads, head_dim]``, likewise; ``value`` alike.
        kv: the pool.
        layer: whose K and V to read.
        places: ``int32 [rows]``: where K and V of each row go; negative is nowhere.
        tables: ``int32``: the slots of table ``i`` start at ``i * sizes[0]``.
        sizes: ``int32 [2]``: see there; and how many rows get a result of their own. The others get the first row's.
        lengths: ``int32 [rows]``: tokens of context, the row's own included; at least 1.
        work: ``int32 [items, 5]``: (row, rows, table, part, parts): so many rows from there on, at most ``TOGETHER``,
            are tokens of one sequence behind each other. Their parts, in order, are items that follow each other, at
            most ``PARTS``. Where parts is 0 there is nothing to do.
        arrived: ``int32``, ``rows * kv_heads`` zeros or more; zeros again afterwards.
        out: ``[rows, heads, head_dim]``, dense.
        rows: how many.
        alone: every row is a sequence's only one. If not, K and V of all rows must be in the pool already.
        scale: factor of the scores.
        window: tokens that a row looks back, itself included.
    """
    (heads, dim), (kv_heads, block) = query.shape[1:], kv.shape[3:5]
    group, wide = heads // kv_heads, max(_LEAST, triton.next_power_of_2(dim))
    few, items = triton.next_power_of_2(group), len(work)
    real = few if alone else TOGETHER * few
    tall = max(_LEAST, real)
    assert rows * kv_heads <= len(arrived), "too many rows for their counters"
    part = torch.empty(items, kv_heads, tall, wide, device=query.device)
    peak, mass = torch.empty(2, items, kv_heads, tall, device=query.device)
    _attend[(kv_heads, items)](
        query, key, value, kv, places, tables, sizes, lengths, work, out, part, peak, mass, arrived,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        kv.stride(0), layer * kv.stride(1), scale * 1.4426950408889634, window, rows,
        heads, kv_heads, group, dim, block, min(TILE, _TILE_BYTES // (wide * kv.element_size())), tall, few, real,
        wide, "ieee" if kv.dtype == torch.float32 else "tf32", PARTS, alone, early(),
        num_warps=4, num_stages=2, launch_pdl=early(),
    )  # fmt: skip
