"""Paged attention on CUDA, as one operator that transformers' model code calls in every layer.

To torch.compile and CUDA graphs the operator is opaque: what each row attends to is not among its arguments but in the
``Batch`` that the engine's thread has entered.
"""

import threading
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AttentionInterface

from twostroke.engine.cuda_kernels import attend_few, gather, store
from twostroke.engine.cuda_prefill import FAR, flash_attention, flash_attention_paged, masked_attention

NAME = "twostroke-cuda"
_here = threading.local()


@dataclass(frozen=True)
class Singles:
    """The first ``rows`` rows: one token of a sequence each, or few."""

    rows: int
    tables: torch.Tensor  # int32: slots of table i start at i * sizes[0]
    sizes: torch.Tensor  # int32 [2]: slots of a table, and rows that do not only fill up
    lengths: torch.Tensor  # int32 [rows]: tokens of context, the row's own included
    work: torch.Tensor  # int32 [items, 5]: see ``attend_few``


@dataclass(frozen=True)
class Chunk:
    """Rows ``first .. first + count - 1`` are tokens ``start ..`` of one sequence."""

    first: int
    count: int
    start: int
    table: torch.Tensor  # int32 [blocks]: slots of tokens 0 .. start + count - 1


@dataclass(frozen=True)
class Bundle:
    """Chunks of many sequences that are attended to in one call, their context read in place."""

    rows: torch.Tensor  # int32 [sequences]; 0 for those that only fill up
    keys: torch.Tensor  # int32 [sequences]
    starts: torch.Tensor  # int32 [sequences + 1]: each sequence's first row
    table: torch.Tensor  # int32 [sequences, pages]


@dataclass(frozen=True)
class Batch:
    """Where each row of one step finds its context. Rows of single tokens come first."""

    kv: torch.Tensor  # the pool: [slots, layers, 2, kv_heads, block_tokens, head_dim]
    places: torch.Tensor  # int32 [rows]: slot * block_tokens + offset of each row's own K and V; negative: nowhere
    singles: Singles | None
    chunks: Seq[Chunk]
    bundles: Seq[Bundle]
    flash: bool  # FlashAttention is there
    processors: int  # of the device
    arrived: torch.Tensor  # int32, zeros between kernels: how many of those who share a result are done
    following: Mapping[int, torch.Tensor]  # by a weight's address, the weight that is read next
    alone: bool = False  # all rows are copies of the first
    apart: bool = False  # some rows are tokens of the same sequence

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Attention in this thread is that of this step."""
        _here.batch = self
        try:
            yield
        finally:
            del _here.batch


def current() -> Batch:
    """The step that this thread computes."""
    batch: Batch = _here.batch
    return batch


def mark_layers(network: torch.nn.Module) -> None:
    """Give each attention layer its index as a tensor: compiled code is the same for all layers, which an integer would
    prevent.
    """
    for module in network.modules():
        if isinstance(index := getattr(module, "layer_idx", None), int):
            module.twostroke_layer = torch.tensor(index)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Store the step's K and V in the pool, then attend to each row's whole context in it.

    Arguments and result are as transformers has them: ``query`` is ``[1, heads, rows, head_dim]``, ``key`` and
    ``value`` ``[1, kv_heads, rows, head_dim]``, the result ``[1, rows, heads, head_dim]``.
    """
    window = FAR if sliding_window is None else sliding_window
    return torch.ops.twostroke.attend(query, key, value, module.twostroke_layer, scaling, window), None


AttentionInterface.register(NAME, attention)
torch.library.define(
    "twostroke::attend",
    "(Tensor query, Tensor key, Tensor value, Tensor layer, float scaling, int window) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


@torch.library.register_fake("twostroke::attend")  # type: ignore[untyped-decorator]
def _attend_shape(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: torch.Tensor, scaling: float, window: int
) -> torch.Tensor:
    del key, value, layer, scaling, window
    _, heads, rows, dim = query.shape
    return query.new_empty(1, rows, heads, dim)


@torch.library.impl("twostroke::attend", "CUDA")
def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: torch.Tensor, scaling: float, window: int
) -> torch.Tensor:
    batch = current()
    index = int(layer)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [rows, heads, dim]
    rows, heads, dim = query.shape
    singles = batch.singles
    if (first := singles.rows if singles and not batch.apart else 0) < rows:
        store(key[first:], value[first:], batch.kv, index, batch.places[first:])
    out = torch.empty(rows, heads, dim, dtype=query.dtype, device=query.device)
    for chunk in batch.chunks:
        of_chunk = slice(chunk.first, chunk.first + chunk.count)
        step = (x[of_chunk] for x in (query, key, value))
        _attend_chunk(batch, chunk, index, *step, out=out[of_chunk], scale=scaling, window=window)
    for bundle in batch.bundles:
        flash_attention_paged(
            query, batch.kv[:, index], out, starts=bundle.starts, rows=bundle.rows, keys=bundle.keys,
            table=bundle.table, scale=scaling, window=window,
        )  # fmt: skip
    if singles is not None:
        attend_few(
            query, key, value, batch.kv, index, batch.places, singles.tables, singles.sizes, singles.lengths,
            singles.work, batch.arrived, out, rows=singles.rows, alone=not batch.apart, scale=scaling, window=window,
        )  # fmt: skip
    return out[None]


def _attend_chunk(
    batch: Batch,
    chunk: Chunk,
    layer: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    out: torch.Tensor,
    scale: float,
    window: int,
) -> None:
    """One chunk by itself: its context is copied together, if it has any before it."""
    end = chunk.start + chunk.count
    if chunk.start:
        keys, values = gather(batch.kv, layer, chunk.table)[:, :, :end].transpose(1, 2)
    if batch.flash:
        flash_attention(query, keys, values, out, scale=scale, window=window)
    else:
        keys, values = (x.transpose(0, 1) for x in (keys, values))
        out[:] = masked_attention(query, keys, values, scale=scale, window=window if window < end else None)
