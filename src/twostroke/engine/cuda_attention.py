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
from twostroke.engine.cuda_prefill import COARSE, CudnnAttention, Shape, masked_attention

NAME = "twostroke-cuda"
_REGULAR = 1024  # tokens
_FAR = 1 << 30  # a window that hides nothing
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
    rows: torch.Tensor  # int32 [1]: count
    keys: torch.Tensor  # int32 [1]: start + count


@dataclass(frozen=True)
class Bundle:
    """Chunks of many sequences that are attended to in one call, their context read in place."""

    most: int  # tokens of the longest, or more
    reach: int  # row up to which whole tiles of the longest may be read, from wherever a sequence starts
    rows: torch.Tensor  # int32 [sequences]; 0 for those that only fill up
    keys: torch.Tensor  # int32 [sequences]
    starts: torch.Tensor  # int32 [sequences + 1]: element of each sequence's first row
    table: torch.Tensor  # int32 [sequences, pages]


@dataclass(frozen=True)
class Batch:
    """Where each row of one step finds its context. Rows of single tokens come first."""

    kv: torch.Tensor  # the pool: [slots, layers, 2, kv_heads, block_tokens, head_dim]
    places: torch.Tensor  # int32 [rows]: slot * block_tokens + offset of each row's own K and V; negative: nowhere
    singles: Singles | None
    chunks: Seq[Chunk]
    bundles: Seq[Bundle]
    cudnn: CudnnAttention | None
    processors: int  # of the device
    arrived: torch.Tensor  # int32, zeros between kernels: how many of those who share a result are done
    following: Mapping[int, torch.Tensor]  # by a weight's address, the weight that is read next
    alone: bool = False  # all rows are copies of the first
    apart: bool = False  # some rows are tokens of the same sequence

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Attention in this thread is that of this step."""
        _here.batch = self
        if self.cudnn is not None:
            self.cudnn.enter_stream()
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
    window = _FAR if sliding_window is None else sliding_window
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
    # cuDNN writes whole tiles: some rows beyond a chunk's last.
    spare = COARSE if batch.chunks and batch.cudnn else 0
    out = torch.empty(rows + spare, heads, dim, dtype=query.dtype, device=query.device)
    for chunk in batch.chunks:  # in order of rows: the next one overwrites those beyond
        _attend_chunk(batch, chunk, index, query, key, value, out, scaling, window)
    if batch.bundles:
        _attend_bundles(batch, index, query, out, scaling, window)
    if singles is not None:
        attend_few(
            query, key, value, batch.kv, index, batch.places, singles.tables, singles.sizes, singles.lengths,
            singles.work, batch.arrived, out, rows=singles.rows, alone=not batch.apart, scale=scaling, window=window,
        )  # fmt: skip
    return out[None, :rows]


def _attend_chunk(
    batch: Batch,
    chunk: Chunk,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    scaling: float,
    window: int,
) -> None:
    """One chunk by itself: its context is copied together, if it has any before it."""
    kv_heads, dim = key.shape[1:]
    end = chunk.start + chunk.count
    shown = window if window < end else None
    of_chunk = slice(chunk.first, chunk.first + chunk.count)
    if batch.cudnn is None:
        size = len(chunk.table) * batch.kv.shape[4]
        keys, values = gather(batch.kv, layer, chunk.table, size)[:, :, :end]
        out[of_chunk] = masked_attention(query[of_chunk], keys, values, scale=scaling, window=shown)
        return
    rows = CudnnAttention.rows(chunk.count, whole=not chunk.start)
    # Plans for just these sizes are a little faster. Only those that come again and again are worth their time.
    exact = chunk.count >= _REGULAR and chunk.count.bit_count() == 1 and chunk.start % chunk.count == 0
    inside = chunk.first + rows <= len(query)  # it reads whole tiles
    query = query[chunk.first :] if inside else _padded(query[of_chunk], rows)
    if chunk.start:
        size = end if exact else 1 << (end - 1).bit_length()
        keys, values = gather(batch.kv, layer, chunk.table, size)
        key_strides: tuple[int, ...] = (kv_heads * size * dim, size * dim, dim, 1)
        value_strides = key_strides
    else:
        size = rows
        keys, values = (x[chunk.first :] if inside else _padded(x[of_chunk], rows) for x in (key, value))
        key_strides, value_strides = _strides(keys, size), _strides(values, size)
    shape = Shape(1, rows, size, _strides(query, rows), key_strides, value_strides, window=shown, exact=exact)
    batch.cudnn.run(shape, scaling, q=query, k=keys, v=values, out=out[chunk.first :], rows=chunk.rows, keys=chunk.keys)


def _attend_bundles(
    batch: Batch, layer: int, query: torch.Tensor, out: torch.Tensor, scaling: float, window: int
) -> None:
    assert batch.cudnn is not None, "chunks are bundled for cuDNN"
    heads, dim = query.shape[1:]
    pool = batch.kv[:, layer]
    reach = max(bundle.reach for bundle in batch.bundles)
    if reach > len(query) or not query.is_contiguous():
        query = _padded(query, max(reach, len(query)))
    for bundle in batch.bundles:
        rows = CudnnAttention.rows(bundle.most)
        sequences, pages = bundle.table.shape
        keys = pages * pool.shape[3]
        shape = Shape(
            sequences, rows, keys, (rows * heads * dim, dim, heads * dim, 1), tuple(pool[:, 0].stride()),
            tuple(pool[:, 1].stride()), packed=True, slots=len(pool), pages=pages,
            window=window if window < keys else None,
        )  # fmt: skip
        batch.cudnn.run(
            shape, scaling, q=query, k=pool[:, 0], v=pool[:, 1], out=out,
            rows=bundle.rows, keys=bundle.keys, starts=bundle.starts, table=bundle.table,
        )  # fmt: skip


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """A dense copy with zeros up to ``rows`` rows: not even with weight 0 may attention meet what is not a number."""
    padded = tensor.new_empty(rows, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    padded[len(tensor) :] = 0
    return padded


def _strides(tensor: torch.Tensor, rows: int) -> tuple[int, ...]:
    """Strides of ``[rows, heads, dim]`` as cuDNN's (batch, head, token, dim)."""
    token, head, dim = tensor.stride()
    return (rows * token, head, token, dim)
