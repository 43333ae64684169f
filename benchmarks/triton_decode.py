"""Decode attention over a block-major pool in Triton: split over the context, then combined."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl


@triton.jit
def _split_decode(
    query, kv, table, lengths, part, peak, mass, slot_stride, layer_offset, table_stride, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One split of one sequence's context, for the query heads of one KV head: unnormalised sum, peak, and mass."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    tiles = tl.cdiv(length, TILE)
    first = split * tiles // SPLITS
    last = (split + 1) * tiles // SPLITS
    heads = tl.arange(0, 16)
    dims = tl.arange(0, DIM)
    q = tl.load(
        query + (row * HEADS + kv_head * GROUP + heads)[:, None] * DIM + dims[None, :], heads[:, None] < GROUP, 0.0
    )
    top = tl.full([16], float("-inf"), tl.float32)
    total = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, DIM], tl.float32)
    for tile in range(first, last):
        tokens = tile * TILE + tl.arange(0, TILE)
        seen = tokens < length
        slots = tl.load(table + row * table_stride + tokens // BLOCK, seen, 0).to(tl.int64)
        base = slots * slot_stride + layer_offset + (kv_head * BLOCK + tokens % BLOCK) * DIM
        k = tl.load(kv + base[:, None] + dims[None, :], seen[:, None], 0.0)
        v = tl.load(kv + base[:, None] + KV_HEADS * BLOCK * DIM + dims[None, :], seen[:, None], 0.0)
        scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - new[:, None])
        shrink = tl.exp(top - new)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        total = total * shrink + tl.sum(p, 1)
        top = new
    at = ((row * KV_HEADS + kv_head) * SPLITS + split) * 16 + heads
    tl.store(part + at[:, None] * DIM + dims[None, :], acc)
    tl.store(peak + at, top)
    tl.store(mass + at, total)


@triton.jit
def _combine(
    part, peak, mass, out, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    SPLITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The splits of one query head as one."""
    row, head = tl.program_id(0), tl.program_id(1)
    splits, dims = tl.arange(0, WIDTH), tl.arange(0, DIM)
    at = ((row * KV_HEADS + head // GROUP) * SPLITS + splits) * 16 + head % GROUP
    tops = tl.load(peak + at, splits < SPLITS, float("-inf"))
    weight = tl.exp(tops - tl.max(tops, 0))
    total = tl.sum(weight * tl.load(mass + at, splits < SPLITS, 0.0), 0)
    parts = tl.load(part + at[:, None] * DIM + dims[None, :], (splits < SPLITS)[:, None], 0.0)
    tl.store(out + (row * HEADS + head) * DIM + dims, tl.sum(parts * weight[:, None], 0) / total)


def triton_decode(
    query: torch.Tensor, kv: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, *, layer: int, scale: float
) -> Callable[[], torch.Tensor]:
    """Attention of one token a sequence that reads the blocks where they lie; call the result to run it.

    Args:
        query: ``[rows, heads, head_dim]``; at most 16 heads share a KV head.
        kv: the pool, ``[slots, layers, 2, kv_heads, block_tokens, head_dim]``.
        table: ``int32 [rows, blocks]``: slots.
        lengths: ``int32 [rows]``: tokens of context.
        layer: which layer's K and V.
        scale: factor of the scores.
    """
    (rows, heads, dim), (kv_heads, block) = query.shape, kv.shape[3:5]
    splits = max(1, min(64, triton.cdiv(4 * 132, rows * kv_heads), triton.cdiv(int(lengths.max()), 128)))
    part = torch.empty(rows, kv_heads, splits, 16, dim, device="cuda")
    peak, mass = torch.empty(2, rows, kv_heads, splits, 16, device="cuda")
    out = torch.empty_like(query)
    group = heads // kv_heads

    def run() -> torch.Tensor:
        _split_decode[(rows, kv_heads, splits)](
            query, kv, table, lengths, part, peak, mass, kv.stride(0), layer * kv.stride(1), table.stride(0), scale,
            heads, kv_heads, group, dim, block, splits, 64, num_warps=4, num_stages=3,
        )  # fmt: skip
        _combine[(rows, heads)](
            part, peak, mass, out, heads, kv_heads, group, dim, splits, triton.next_power_of_2(splits)
        )
        return out

    return run
