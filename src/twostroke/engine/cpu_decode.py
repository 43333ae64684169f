"""The CPU's decode kernel, compiled by Numba: attention of single tokens over blocks where they lie in the pool.

Numba runs it on the OpenMP threads that torch has started already: two pools of threads on the same cores would fight.
"""

from typing import Any

import numba
import numpy as np
import torch  # noqa: F401 - loads the OpenMP library that Numba then finds
from numba.extending import overload

numba.config.THREADING_LAYER = "omp"


def _widen(source: Any, bits: Any, tile: Any, count: Any) -> Any:
    """Copy ``count`` elements of ``source`` into ``tile`` as float32; ``bits`` is the same memory as uint32."""
    raise NotImplementedError("only called inside the kernel")


@overload(_widen, inline="always")  # type: ignore[untyped-decorator]
def _widen_in_kernel(source: Any, bits: Any, tile: Any, count: Any) -> Any:
    if source.dtype == numba.uint16:  # bfloat16 is the upper half of a float32

        def shift(source: Any, bits: Any, tile: Any, count: Any) -> Any:
            for i in range(count):
                bits[i] = np.uint32(source[i]) << np.uint32(16)

        return shift

    def copy(source: Any, bits: Any, tile: Any, count: Any) -> Any:
        for i in range(count):
            tile[i] = source[i]

    return copy


_compile = numba.njit(parallel=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, nogil=True, cache=True)


@_compile  # type: ignore[untyped-decorator]
def paged_decode(
    kv: Any, layer: int, query: Any, tables: Any, lengths: Any, out: Any, scaling: float, window: int
) -> None:  # pragma: no cover - compiled
    """Attention of one token a sequence: online softmax over the blocks of each (row, kv head), for its query heads.

    The slices in the inner loops are what lets LLVM vectorise them: three times as fast as indices.

    kv: [slots, layers, 2, kv_heads, block_tokens * head_dim]; query and out: [rows, heads, head_dim].
    """
    rows, heads, dim = query.shape
    kv_heads, block = kv.shape[3], kv.shape[4] // dim
    group = heads // kv_heads
    for task in numba.prange(rows * kv_heads):
        row, kv_head = task // kv_heads, task % kv_heads
        length = lengths[row]
        first = max(0, length - window)
        bits = np.empty(block * dim, np.uint32)
        tile = bits.view(np.float32)
        scores = np.empty((group, block), np.float32)
        total = np.zeros((group, dim), np.float32)
        highest = np.full(group, -np.inf, np.float32)
        mass = np.zeros(group, np.float32)
        for index in range(first // block, (length + block - 1) // block):
            slot = tables[row, index]
            begin, end = max(0, first - index * block), min(block, length - index * block)
            _widen(kv[slot, layer, 0, kv_head], bits, tile, end * dim)
            for t in range(begin, end):
                key = tile[t * dim : (t + 1) * dim]
                for g in range(group):
                    q = query[row, kv_head * group + g]
                    dot = np.float32(0)
                    for d in range(dim):
                        dot += q[d] * key[d]
                    scores[g, t] = dot * scaling
            _widen(kv[slot, layer, 1, kv_head], bits, tile, end * dim)
            for g in range(group):
                top = highest[g]
                for t in range(begin, end):
                    top = max(top, scores[g, t])
                shrink = np.exp(highest[g] - top)
                highest[g] = top
                mass[g] *= shrink
                for d in range(dim):
                    total[g, d] *= shrink
                for t in range(begin, end):
                    scores[g, t] = np.exp(scores[g, t] - top)
                    mass[g] += scores[g, t]
                sum_ = total[g]
                for t in range(begin, end):
                    weight, value = scores[g, t], tile[t * dim : (t + 1) * dim]
                    for d in range(dim):
                        sum_[d] += weight * value[d]
        for g in range(group):
            for d in range(dim):
                out[row, kv_head * group + g, d] = total[g, d] / mass[g]
