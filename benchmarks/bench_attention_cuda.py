"""Ways to attend over a block-major pool on a CUDA device, for the choice of the GPU engine's kernels.

Qwen2.5-7B's attention: 28 query heads, 4 KV heads of 128, bfloat16, blocks of 16 tokens of all 28 layers in random
slots. Decode is measured against device memory bandwidth, prefill against a large matrix product, both of the same run.
The spread is from the 0.2 to the 0.8 quantile. What the engine uses is marked.

    python -m benchmarks.bench_attention_cuda [--quick]
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.common import Row, filling, report, row
from benchmarks.cuda_limits import limits, milliseconds
from twostroke.engine.cuda_kernels import attend_few, gather
from twostroke.engine.cuda_prefill import FAR, flash_attention, flash_attention_paged
from twostroke.engine.cuda_step import step_of

LAYERS, HEADS, KV_HEADS, DIM, BLOCK = 28, 28, 4, 128, 16
HAS_FLASHINFER = find_spec("flashinfer") is not None  # flashinfer-python; it compiles its kernels at first use
LAYER = 13  # any: the others lie between its blocks
SCALE = DIM**-0.5
DECODES = [
    (1, 1024),
    (8, 1024),
    (32, 1024),
    (128, 1024),
    (256, 1024),
    (1, 8192),
    (8, 8192),
    (32, 8192),
    (1, 51200),
    (8, 51200),
]
PREFILLS = [(1024, 0), (8192, 0), (32768, 0), (51200, 0), (2048, 6144), (8192, 24576), (8192, 43008)]


def gathered_decode(query: torch.Tensor, kv: torch.Tensor, table: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The blocks copied together, then SDPA: what a library without paging leaves one to do."""

    def run() -> torch.Tensor:
        context = kv[table.long(), LAYER]  # [rows, blocks, 2, kv_heads, block, dim]
        keys, values = context.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
        return sdpa(query[:, :, None], keys, values, scale=SCALE, enable_gqa=True)[:, :, 0]

    return run


def reference(query: torch.Tensor, kv: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The first two rows in float32."""
    context = kv[table[:2].long(), LAYER].float()
    keys, values = context.permute(2, 0, 3, 1, 4, 5).flatten(3, 4).repeat_interleave(HEADS // KV_HEADS, 2)
    weights = (query[:2, :, None].float() @ keys.transpose(-1, -2) * SCALE).softmax(-1)
    right: torch.Tensor = (weights @ values)[:, :, 0]
    return right


def error(out: torch.Tensor, right: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((out.float() - right).norm() / right.norm())


def in_place(
    query: torch.Tensor, kv: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """The engine's kernel, which also stores the row's own K and V."""
    rows, processors = len(query), torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty_like(query)
    chunks = [filling(slots, BLOCK) for slots in table.tolist()]
    step = step_of(chunks, BLOCK, {}, items=max(rows, 2 * processors // KV_HEADS))
    _, _, places, _, work, sizes, *_ = (torch.from_numpy(array).cuda() for array in step.arrays())
    last, arrived = table[:, -1].long(), torch.zeros(rows * KV_HEADS, device="cuda", dtype=torch.int32)
    key, value = kv[last, LAYER, :, :, -1].unbind(1)

    def run() -> torch.Tensor:
        attend_few(
            query, key, value, kv, LAYER, places, table, sizes, lengths, work, arrived, out, rows=rows, alone=True,
            scale=SCALE, window=1 << 30,
        )  # fmt: skip
        return out

    return run


def flashinfer_decode(
    query: torch.Tensor, kv: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """FlashInfer, in place: its kernels take any stride from page to page."""
    wrapper = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(_workspace(), "HND", use_tensor_cores=True)
    wrapper.plan(
        *_pages(table, lengths), HEADS, KV_HEADS, DIM, BLOCK, q_data_type=query.dtype, kv_data_type=query.dtype
    )
    pool = kv[:, LAYER]
    return lambda: wrapper.run(query, (pool[:, 0], pool[:, 1]))


def flashinfer_prefill(
    query: torch.Tensor, kv: torch.Tensor, table: torch.Tensor, backend: str
) -> Callable[[], torch.Tensor]:
    """FlashInfer, in place, by its kernels for Ampere ("fa2") or Hopper ("fa3"). ``query``: ``[heads, rows, dim]``."""
    rows = query.transpose(0, 1).contiguous()
    wrapper = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper(_workspace(), "HND", backend=backend)
    starts = torch.tensor([0, len(rows)], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([table.numel() * BLOCK], dtype=torch.int32, device="cuda")
    pages = _pages(table[None], lengths)
    wrapper.plan(
        starts, *pages, HEADS, KV_HEADS, DIM, BLOCK, causal=True, q_data_type=query.dtype, kv_data_type=query.dtype
    )
    pool = kv[:, LAYER]
    return lambda: wrapper.run(rows, (pool[:, 0], pool[:, 1]))


def _workspace() -> torch.Tensor:
    return torch.empty(512 << 20, dtype=torch.uint8, device="cuda")


def _pages(table: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
    """Tables and lengths as FlashInfer has them: first pages of each sequence, all pages, tokens in the last pages."""
    starts = torch.arange(len(table) + 1, dtype=torch.int32, device="cuda") * table.shape[1]
    return [starts, table.reshape(-1), (lengths - 1) % BLOCK + 1]


def decodes(cases: list[tuple[int, int]], bandwidth: float) -> list[Row]:
    """Every way for every batch and context; the floor is one read of K and V."""
    rows = []
    slots = max(batch * context for batch, context in cases) // BLOCK
    kv = torch.empty(slots, LAYERS, 2, KV_HEADS, BLOCK, DIM, dtype=torch.bfloat16, device="cuda")
    for start in range(0, slots, 1024):
        kv[start : start + 1024].normal_()
    for batch, context in cases:
        table = torch.randperm(slots, device="cuda")[: batch * context // BLOCK].view(batch, -1).int()
        lengths = torch.full((batch,), context, device="cuda", dtype=torch.int32)
        query = torch.randn(batch, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        floor = batch * context * 2 * KV_HEADS * DIM * 2 / bandwidth * 1e3
        right = reference(query, kv, table)
        ways = {
            "Triton, in place (used)": in_place(query, kv, table, lengths),
            "copied, SDPA": gathered_decode(query, kv, table),
        }
        if HAS_FLASHINFER:
            ways["FlashInfer, in place"] = flashinfer_decode(query, kv, table, lengths)
        for name, way in ways.items():
            wrong = error(way()[:2], right)
            assert wrong < 1e-2, f"{name}: {wrong}"
            rows.append(
                row(
                    f"decode {batch} x {context}: {name}",
                    "ms",
                    milliseconds(way, graph=True),
                    [floor],
                    "KV / bandwidth",
                    "",
                )
            )
    return rows


def prefills(cases: list[tuple[int, int]], rate: float) -> list[Row]:
    """Causal attention of a chunk behind its context; the floor: its FLOPs at the product's rate. What does not read
    the pool finds its context gathered already; the engine's way gathers it.
    """
    rows = []
    most = max(count + context for count, context in cases) // BLOCK
    kv = torch.randn(most, LAYERS, 2, KV_HEADS, BLOCK, DIM, device="cuda", dtype=torch.bfloat16)
    for count, context in cases:
        end = count + context
        query = torch.randn(1, HEADS, count, DIM, device="cuda", dtype=torch.bfloat16)
        query = query.transpose(1, 2).contiguous().transpose(1, 2)  # rows first, as the model gives them
        table = torch.randperm(most, device="cuda")[: end // BLOCK].int()
        keys, values = gather(kv, LAYER, table)[:, None]
        wide = [x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values)]
        flops = 4 * HEADS * DIM * (count * context + count * count / 2)
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "FlashAttention 4, gathered (used)": partial(gathered, query[0], kv, table),
            "FlashAttention 4, in place (used for short chunks)": partial(paged, query[0], kv, table),
            "SDPA, flash": partial(whole, query, wide[0], wide[1], SDPBackend.FLASH_ATTENTION),
            "SDPA, cuDNN": partial(whole, query, wide[0], wide[1], SDPBackend.CUDNN_ATTENTION),
            "torch varlen": partial(packed, query, wide[0], wide[1]),
            "FlexAttention": partial(flexible(count, context), query, keys, values),
        }
        if HAS_FLASHINFER:
            for backend in ("fa2", "fa3"):
                try:
                    ways[f"FlashInfer {backend}, in place"] = flashinfer_prefill(query[0], kv, table, backend)
                except RuntimeError as failure:
                    print(f"FlashInfer {backend}: {str(failure)[:150]}")
        if context:
            ways["SDPA, cuDNN, context and diagonal"] = partial(in_two, query, wide[0], wide[1])
        right = whole(query, wide[0], wide[1], SDPBackend.FLASH_ATTENTION)[0].transpose(0, 1).float()
        for name, work in ways.items():
            what = f"prefill {count} after {context}: {name}"
            try:
                wrong = error(work().reshape(right.shape) if "in place" in name or "gathered" in name else right, right)
                assert wrong < 1e-2, f"{what}: {wrong}"
                times = milliseconds(work)
            except (RuntimeError, TypeError, ImportError, NotImplementedError) as failure:
                print(f"{what}: {str(failure)[:150]}")
                continue
            rows.append(row(what, "ms", times, [flops / rate * 1e3], "FLOPs / product's rate", ""))
    return rows


def gathered(query: torch.Tensor, kv: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The engine's way with a long chunk behind a context. Without one it does not gather."""
    rows = query.transpose(0, 1)
    out = query.new_empty(rows.shape)
    keys, values = gather(kv, LAYER, table).transpose(1, 2)
    flash_attention(rows, keys, values, out, scale=SCALE, window=FAR)
    return out


def paged(query: torch.Tensor, kv: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The engine's way with many short chunks, here with one."""
    rows = query.transpose(0, 1)
    out = query.new_empty(rows.shape)
    count, starts, keys = (
        torch.tensor(value, device="cuda", dtype=torch.int32)
        for value in ([len(rows)], [0, len(rows)], [len(table) * BLOCK])
    )
    lengths = {"starts": starts, "rows": count, "keys": keys, "table": table[None]}
    flash_attention_paged(rows, kv[:, LAYER], out, **lengths, scale=SCALE, window=FAR)
    return out


def flexible(count: int, context: int) -> Callable[..., torch.Tensor]:
    """FlexAttention, compiled, causal and aligned at the end."""
    mask = create_block_mask(
        lambda _batch, _head, row, key: key <= row + context, None, None, count, count + context, device="cuda"
    )
    attend: Any = torch.compile(flex_attention)
    return lambda query, keys, values: attend(query, keys, values, block_mask=mask, scale=SCALE, enable_gqa=True)


def whole(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
    """Causal SDPA, aligned at the end."""
    count, end = query.shape[2], keys.shape[2]
    with sdpa_kernel(backend):
        if count < end:
            return sdpa(query, keys, values, attn_mask=causal_lower_right(count, end), scale=SCALE)
        return sdpa(query, keys, values, is_causal=True, scale=SCALE)


def in_two(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The context, which every row sees whole, and the chunk itself, causal; merged by their log-sum-exps."""
    attend: Any = torch.ops.aten._scaled_dot_product_cudnn_attention
    context = keys.shape[2] - query.shape[2]
    before, before_mass = attend(
        query, keys[:, :, :context], values[:, :, :context], None, True, 0.0, False, scale=SCALE
    )[:2]
    within, within_mass = attend(
        query, keys[:, :, context:], values[:, :, context:], None, True, 0.0, True, scale=SCALE
    )[:2]
    share = torch.sigmoid(before_mass - within_mass).view(*query.shape[:3], 1).to(query.dtype)
    merged: torch.Tensor = torch.lerp(within, before, share)
    return merged


def packed(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """torch's variable-length attention, whose arguments differ between releases."""
    attend: Any = import_module("torch.nn.attention.varlen").varlen_attn
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, keys, values))
    starts = [torch.tensor([0, x.shape[0]], device="cuda", dtype=torch.int32) for x in (q, k)]
    out: torch.Tensor = attend(q, k, v, *starts, q.shape[0], k.shape[0], window_size=(-1, 0))
    return out


def main() -> None:
    """Measure all ways."""
    quick = "--quick" in sys.argv  # a look whether it runs
    bandwidth, rate = limits()
    torch.cuda.empty_cache()
    print(f"copy {bandwidth / 1e12:.2f} TB/s, product {rate / 1e12:.0f} TFLOP/s")
    rows = decodes(DECODES[:2] if quick else DECODES, bandwidth)
    torch.cuda.empty_cache()
    rows += prefills(PREFILLS[:1] if quick else PREFILLS, rate)
    report("attention_cuda", rows, device=torch.cuda.get_device_name(), copy_bytes_per_s=bandwidth, product_flops=rate)


if __name__ == "__main__":
    main()
