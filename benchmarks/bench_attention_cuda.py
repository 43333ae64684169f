"""Ways to attend over a block-major pool on a CUDA device, for the choice of the GPU engine's kernels.

Qwen2.5-7B's attention: 28 query heads, 4 KV heads of 128, bfloat16, blocks of 16 tokens of all 28 layers in random
slots. Decode is measured against device memory bandwidth, prefill against a large matrix product, both of the same run.
The spread is from the 0.2 to the 0.8 quantile. Needs only torch and Triton.

    python -m benchmarks.bench_attention_cuda [--quick]
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.common import Row, report, row
from benchmarks.triton_decode import triton_decode

LAYERS, HEADS, KV_HEADS, DIM, BLOCK = 28, 28, 4, 128, 16
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


def milliseconds(work: Callable[[], object], graph: bool = False) -> list[float]:
    """Quantiles 0.2, 0.5, 0.8 of a call's time on the device."""
    bench = triton.testing.do_bench_cudagraph if graph else triton.testing.do_bench
    return list(bench(work, quantiles=[0.5, 0.2, 0.8]))


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
            "Triton, in place": triton_decode(query, kv, table, lengths, layer=LAYER, scale=SCALE),
            "copied, SDPA": gathered_decode(query, kv, table),
        }
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
    """Causal attention of a chunk whose context is gathered already; the floor: its FLOPs at the product's rate."""
    rows = []
    for count, context in cases:
        end = count + context
        query = torch.randn(1, HEADS, count, DIM, device="cuda", dtype=torch.bfloat16)
        keys, values = torch.randn(2, 1, KV_HEADS, end, DIM, device="cuda", dtype=torch.bfloat16)
        wide = [x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values)]
        flops = 4 * HEADS * DIM * (count * context + count * count / 2)

        ways: dict[str, Callable[[], object]] = {
            "SDPA, flash": partial(whole, query, wide[0], wide[1], SDPBackend.FLASH_ATTENTION),
            "SDPA, cuDNN": partial(whole, query, wide[0], wide[1], SDPBackend.CUDNN_ATTENTION),
            "torch varlen": partial(packed, query, wide[0], wide[1]),
        }
        if context:
            ways["cuDNN, context and diagonal"] = partial(in_two, query, wide[0], wide[1])
            right = whole(query, wide[0], wide[1], SDPBackend.FLASH_ATTENTION).float()
            assert error(in_two(query, wide[0], wide[1]), right) < 1e-2
        for name, work in ways.items():
            try:
                rows.append(
                    row(
                        f"prefill {count} after {context}: {name}",
                        "ms",
                        milliseconds(work),
                        [flops / rate * 1e3],
                        "FLOPs / product's rate",
                        "",
                    )
                )
            except (RuntimeError, TypeError, ImportError, NotImplementedError) as failure:
                print(f"prefill {count} after {context}: {name}: {str(failure)[:150]}")
    return rows


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


def packed(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> object:
    """torch's variable-length attention, whose arguments differ between releases."""
    attend: Any = import_module("torch.nn.attention.varlen").varlen_attn
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, keys, values))
    starts = [torch.tensor([0, x.shape[0]], device="cuda", dtype=torch.int32) for x in (q, k)]
    return attend(q, k, v, *starts, q.shape[0], k.shape[0], window_size=(-1, 0))


def limits() -> tuple[float, float]:
    """Bytes/s of a large copy, read and written; FLOP/s of a large bfloat16 product."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))[0] / 1e3
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = milliseconds(lambda: a @ b)[0] / 1e3
    return 2 * source.nbytes / copy, 2 * 8192**3 / product


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
