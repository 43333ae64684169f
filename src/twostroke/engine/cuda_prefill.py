"""Prefill attention on CUDA: cuDNN's fused attention, through its frontend.

It takes the lengths of queries and keys from tensors, so that one plan serves all lengths up to its own; a plan takes
some 40 ms to build, and is kept. float32, odd head sizes, and machines without the frontend get torch's SDPA, which
needs a mask as large as the scores.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

_FINE, COARSE = 128, 512  # a plan's rows are a multiple of one of them; cuDNN takes 128 at a time
_SHORT = 2048  # tokens, up to which whole prompts have plans by fine steps
_WORKSPACE = 1 << 20  # bytes; these plans ask for 256


@cache
def _frontend() -> Any:  # noqa: ANN401 - it has no types
    try:
        return import_module("cudnn")
    except ImportError:
        return None


@dataclass(frozen=True)
class Shape:
    """What a plan is built for. Strides are in elements, of (batch, head, token, dim)."""

    batch: int
    rows: int  # most query tokens of one sequence
    keys: int  # most keys of one sequence
    query: tuple[int, ...]  # strides
    key: tuple[int, ...]  # strides; of (slot, head, token, dim) where keys lie in pages
    value: tuple[int, ...]
    packed: bool = False  # queries of all sequences lie one after the other
    exact: bool = False  # every sequence has just ``rows`` and ``keys``
    slots: int = 0  # pages to choose from; 0: keys are dense
    pages: int = 0  # most pages of one sequence
    window: int | None = None


@dataclass(frozen=True)
class _Plan:
    graph: Any
    tensors: dict[str, Any]


class CudnnAttention:
    """Causal attention, aligned at the last key, of query heads that share ``kv_heads`` key heads."""

    def __init__(
        self, heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        cudnn = _frontend()
        assert cudnn is not None, "is_supported says whether it is there"
        self._cudnn = cudnn
        self._heads, self._kv_heads, self._dim, self._page = heads, kv_heads, dim, page
        self._type = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}[dtype]
        with torch.cuda.device(device):
            self._handle = cudnn.create_handle()
        self._workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
        self._plans: dict[tuple[Shape, float], _Plan] = {}

    @staticmethod
    def is_supported(dim: int, page: int, dtype: torch.dtype) -> bool:
        """Whether cuDNN can do this, and is there."""
        fits = dim % 8 == 0 and dim <= 256 and page % 16 == 0
        return fits and dtype in (torch.bfloat16, torch.float16) and _frontend() is not None

    @staticmethod
    def rows(count: int, *, whole: bool = True) -> int:
        """Rows of the plan for ``count`` query tokens: of ``whole`` prompts, all can be built at start."""
        step = _FINE if whole and count <= _SHORT else COARSE
        return -(-count // step) * step

    def build_smaller(self, most: int) -> None:
        """Have plans for prompts of all lengths up to ``most``, like those that there are for one of just that many."""
        rows = self.rows(most)
        for shape, scale in list(self._plans):
            if shape.rows == shape.keys == rows and not shape.slots:
                for less in sorted({self.rows(count) for count in range(1, most + 1, _FINE)}):
                    strides = [(less * own[2], *own[1:]) for own in (shape.query, shape.key, shape.value)]
                    query, key, value = strides
                    smaller = replace(shape, rows=less, keys=less, query=query, key=key, value=value, exact=False)
                    if (smaller, scale) not in self._plans:
                        self._build(smaller, scale)

    def enter_stream(self) -> None:
        """Compute on torch's current stream from now on."""
        self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)

    def run(self, shape: Shape, scale: float, **tensors: torch.Tensor) -> None:
        """Attend. ``q``, ``k``, ``v``, ``out``; ``rows``, ``keys``: ``int32 [batch]``, lengths of each sequence;
        ``starts``: ``int32 [batch + 1]`` if packed, of each sequence's first element in ``q`` and ``out``;
        ``table``: ``int32 [batch, pages]``.

        Writes zeros to the rows of ``out`` beyond a sequence's, unless packed.
        """
        plan = self._plans.get((shape, scale)) or self._build(shape, scale)
        bound = {plan.tensors[name]: tensor for name, tensor in tensors.items() if name in plan.tensors}
        if shape.slots:
            bound[plan.tensors["value_table"]] = tensors["table"]
        plan.graph.execute(bound, self._workspace, handle=self._handle)

    def _build(self, shape: Shape, scale: float) -> _Plan:
        types = self._cudnn.data_type
        graph = self._cudnn.pygraph(
            handle=self._handle,
            io_data_type=self._type,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
        )
        tensors: dict[str, Any] = {}

        def tensor(name: str, dims: Seq[int], strides: Seq[int], kind: Any = self._type) -> Any:  # noqa: ANN401
            tensors[name] = graph.tensor(name=name, dim=list(dims), stride=list(strides), data_type=kind)
            return tensors[name]

        def numbers(name: str, *dims: int) -> Any:  # noqa: ANN401
            whole = [*dims, *[1] * (4 - len(dims))]
            strides = [whole[1] * whole[2], whole[2], 1, 1]
            return tensor(name, whole, strides, types.INT32)

        query = tensor("q", (shape.batch, self._heads, shape.rows, self._dim), shape.query)
        options: dict[str, Any] = {}
        if shape.slots:
            key = tensor("k", (shape.slots, self._kv_heads, self._page, self._dim), shape.key)
            value = tensor("v", (shape.slots, self._kv_heads, self._page, self._dim), shape.value)
            options["paged_attention_k_table"] = numbers("table", shape.batch, 1, shape.pages)
            options["paged_attention_v_table"] = numbers("value_table", shape.batch, 1, shape.pages)
            options["paged_attention_max_seq_len_kv"] = shape.keys
        else:
            key = tensor("k", (shape.batch, self._kv_heads, shape.keys, self._dim), shape.key)
            value = tensor("v", (shape.batch, self._kv_heads, shape.keys, self._dim), shape.value)
        if not shape.exact:
            options["use_padding_mask"] = True
            options["seq_len_q"], options["seq_len_kv"] = numbers("rows", shape.batch), numbers("keys", shape.batch)
        if shape.window is not None:
            options["diagonal_band_left_bound"] = shape.window
        out, _ = graph.sdpa(
            name="sdpa",
            q=query,
            k=key,
            v=value,
            generate_stats=False,
            attn_scale=scale,
            diagonal_alignment=self._cudnn.diagonal_alignment.BOTTOM_RIGHT,
            diagonal_band_right_bound=0,
            **options,
        )
        size = self._heads * self._dim
        dense = [shape.rows * size, self._dim, size, 1]
        out.set_output(True).set_dim([shape.batch, self._heads, shape.rows, self._dim]).set_stride(dense)
        tensors["out"] = out
        if shape.packed:
            starts = numbers("starts", shape.batch + 1)
            query.set_ragged_offset(starts)
            out.set_ragged_offset(starts)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([self._cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        assert graph.get_workspace_size() <= _WORKSPACE, f"a plan wants {graph.get_workspace_size()} bytes"
        plan = self._plans[shape, scale] = _Plan(graph, tensors)
        return plan


def masked_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, window: int | None
) -> torch.Tensor:
    """The same by torch's SDPA, for what cuDNN does not do.

    Args:
        query: ``[rows, heads, head_dim]``; ``keys`` and ``values``: ``[kv_heads, tokens, head_dim]``.
        scale: factor of the scores.
        window: tokens that a row looks back, itself included; ``None`` is all.
    """
    rows, tokens = query.shape[0], keys.shape[1]
    at = torch.arange(tokens - rows, tokens, device=query.device)[:, None]
    column = torch.arange(tokens, device=query.device)
    seen = column <= at
    if window is not None:
        seen &= column > at - window
    out: torch.Tensor = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=seen,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[0],
    )
    return out[0].transpose(0, 1)
