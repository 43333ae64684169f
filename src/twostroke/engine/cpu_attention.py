"""Paged attention on the CPU: reads K and V of a block-major pool through block tables.

Registered with transformers under ``NAME``, so that its model code calls it in every layer. Prefill is
torch's SDPA; decode is a small kernel of our own that reads the blocks where they lie, since SDPA would need them
copied together first.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from twostroke.engine.cpu_decode import paged_decode

NAME = "twostroke-cpu"
_TILE = 192  # rows of a chunk that attend together: SDPA skips nothing that its mask hides, so the tiles must


@dataclass(frozen=True)
class Prefill:
    """Rows ``first .. first + count - 1`` of the step are tokens ``start ..`` of one sequence."""

    first: int
    start: int
    count: int
    table: torch.Tensor  # int64 [blocks]: slots of tokens 0 .. start + count - 1
    _masks: dict[int, torch.Tensor] = field(default_factory=dict)  # by window; the same for all layers of a step

    def mask(self, window: int, dtype: torch.dtype) -> torch.Tensor:
        """What each row may see, as a bias ``[count, start + count]``."""
        if window not in self._masks:
            end = self.start + self.count
            row = torch.arange(self.start, end)[:, None]
            column = torch.arange(end)
            hidden = (column > row) | (column <= row - window)
            self._masks[window] = torch.zeros(self.count, end, dtype=dtype).masked_fill_(hidden, -torch.inf)
        return self._masks[window]


@dataclass(frozen=True)
class Batch:
    """Where each row of one step finds its context. Rows that decode come first, then prefill chunks."""

    kv: torch.Tensor  # the pool: [slots, layers, 2, kv_heads, block_tokens, head_dim]
    slots: torch.Tensor  # int64 [rows]: where each row's own K and V go
    offsets: torch.Tensor  # int64 [rows]: token within the block
    tables: npt.NDArray[np.int32]  # [decode rows, most blocks]
    lengths: npt.NDArray[np.int32]  # [decode rows]: tokens of context, the row itself included
    prefills: Seq[Prefill]


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    twostroke: Batch,
    scaling: float,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Store the step's K and V in the pool, then attend to each row's whole context in it.

    Args:
        module: the attention layer; its ``layer_idx`` says which part of a block is its own.
        query: ``[1, heads, rows, head_dim]``.
        key: ``[1, kv_heads, rows, head_dim]``; ``value`` alike.
        attention_mask: unused: the batch says what each row may see.
        twostroke: the step.
        scaling: factor of the scores.
        sliding_window: tokens a row may look back, itself included; ``None`` is all.

    Returns:
        ``[1, rows, heads, head_dim]``, as transformers expects, and no weights.
    """
    batch, layer = twostroke, int(module.layer_idx)  # type: ignore[arg-type]
    batch.kv[batch.slots, layer, 0, :, batch.offsets] = key[0].transpose(0, 1)
    batch.kv[batch.slots, layer, 1, :, batch.offsets] = value[0].transpose(0, 1)
    rows, decodes = query.shape[2], len(batch.lengths)
    window = sliding_window or np.iinfo(np.int32).max
    out = torch.empty(1, rows, query.shape[1], query.shape[3], dtype=query.dtype)
    if decodes:
        out[0, :decodes] = _decode_rows(batch, layer, query[0, :, :decodes].transpose(0, 1), scaling, window)
    for prefill in batch.prefills:
        rows_of = slice(prefill.first, prefill.first + prefill.count)
        _prefill(batch, layer, prefill, query[:, :, rows_of], out[:, rows_of].transpose(1, 2), scaling, window)
    return out, None


AttentionInterface.register(NAME, attention)


def _prefill(
    batch: Batch,
    layer: int,
    prefill: Prefill,
    query: torch.Tensor,
    out: torch.Tensor,
    scaling: float,
    window: int,
) -> None:
    """One chunk against its whole context, into ``out``; ``query`` and ``out`` are ``[1, heads, count, head_dim]``."""
    context = batch.kv[prefill.table, layer]  # a copy: [blocks, 2, kv_heads, block_tokens, head_dim]
    keys, values = context.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, None]
    mask = prefill.mask(window, query.dtype)
    for first in range(0, prefill.count, _TILE):
        last = min(first + _TILE, prefill.count)
        seen = prefill.start + last
        out[:, :, first:last] = scaled_dot_product_attention(
            query[:, :, first:last],
            keys[:, :, :seen],
            values[:, :, :seen],
            attn_mask=mask[first:last, :seen],
            scale=scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )


def _decode_rows(batch: Batch, layer: int, query: torch.Tensor, scaling: float, window: int) -> torch.Tensor:
    """One token a sequence against its context, read in place; float32 ``[rows, heads, head_dim]``."""
    kv = batch.kv.flatten(4)
    # NumPy has no bfloat16: the kernel takes its bits and widens them.
    raw = kv.view(torch.uint16).numpy() if kv.dtype == torch.bfloat16 else kv.numpy()
    query = query.float().contiguous()
    out = torch.empty_like(query)
    paged_decode(raw, layer, query.numpy(), batch.tables, batch.lengths, out.numpy(), np.float32(scaling), window)
    return out
