"""Matrix products on CUDA, as one operator for all linear maps: a kernel of ours for few rows, else cuBLAS."""

import torch
from torch.nn.functional import linear

from twostroke.engine.cuda_attention import current
from twostroke.engine.cuda_kernels import multiply

torch.library.define("twostroke::product", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.register_fake("twostroke::product")  # type: ignore[untyped-decorator]
def _product_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    del bias
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.impl("twostroke::product", "CUDA")
def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    batch = current()
    y = multiply(x.flatten(0, -2), weight, bias, alone=batch.alone, processors=batch.processors)
    return linear(x, weight, bias) if y is None else y.view(*x.shape[:-1], len(weight))


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias``, within an entered ``Batch``; bfloat16."""
    y: torch.Tensor = torch.ops.twostroke.product(x, weight, bias)
    return y
