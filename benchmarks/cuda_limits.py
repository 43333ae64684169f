"""What a GPU can do, measured: the references of the CUDA benchmarks."""

from collections.abc import Callable

import torch
import triton


def milliseconds(work: Callable[[], object], graph: bool = False) -> list[float]:
    """Quantiles 0.5, 0.2, 0.8 of a call's time on the device."""
    bench = triton.testing.do_bench_cudagraph if graph else triton.testing.do_bench
    return list(bench(work, quantiles=[0.5, 0.2, 0.8]))


def limits() -> tuple[float, float]:
    """Bytes/s of a large copy, read and written; FLOP/s of a large bfloat16 product."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))[0] / 1e3
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = milliseconds(lambda: a @ b)[0] / 1e3
    return 2 * source.nbytes / copy, 2 * 8192**3 / product
