"""Few rows times a large weight on a CUDA device: the engine's kernels against cuBLAS, in CUDA graphs, and against
one read of the weight at the bandwidth of a large copy. Qwen2.5-7B's weights, 28 layers in turn: no cache holds them.

    python -m benchmarks.bench_products_cuda
"""

import torch
from torch.nn.functional import linear

from benchmarks.common import Row, report, row
from benchmarks.cuda_limits import limits, milliseconds
from twostroke.engine.cuda_product import multiply

SHAPES = {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}
LAYERS = 28
ROWS = [1, 2, 8, 16, 32]


def products(name: str, outer: int, inner: int, bandwidth: float) -> list[Row]:
    """One weight, all numbers of rows."""
    weights = [torch.randn(outer, inner, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(LAYERS)]
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    floor = outer * inner * 2 / bandwidth * 1e6
    rows = []
    for count in ROWS:
        x = torch.randn(max(2, count), inner, device="cuda", dtype=torch.bfloat16)
        x[1:] = x[0] if count == 1 else x[1:]

        def ours(x: torch.Tensor = x, count: int = count) -> list[torch.Tensor | None]:
            return [multiply(x, weight, None, alone=count == 1, processors=processors) for weight in weights]

        def theirs(x: torch.Tensor = x, count: int = count) -> list[torch.Tensor]:
            return [linear(x[:count], weight) for weight in weights]

        times = {"cuBLAS": [t / LAYERS * 1e3 for t in milliseconds(theirs, graph=True)]}
        (mine, *_), (right, *_) = ours(), theirs()
        if mine is not None:
            wrong = float((mine[:count].float() - right.float()).norm() / right.float().norm())
            assert wrong < 1e-2, f"{name}, {count} rows: {wrong}"
            times["ours"] = [t / LAYERS * 1e3 for t in milliseconds(ours, graph=True)]
        rows += [
            row(f"{name}, {count} rows: {way}", "us", t, [floor], "weight / bandwidth", "") for way, t in times.items()
        ]
    return rows


def main() -> None:
    """Measure all."""
    bandwidth, _ = limits()
    torch.cuda.empty_cache()
    rows = []
    for name, (outer, inner) in SHAPES.items():
        rows += products(name, outer, inner, bandwidth)
        torch.cuda.empty_cache()
    report("products_cuda", rows, device=torch.cuda.get_device_name(), copy_bytes_per_s=bandwidth)


if __name__ == "__main__":
    main()
