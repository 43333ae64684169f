"""Prefill attention on CUDA: FlashAttention's kernels for Hopper and Blackwell.

They are compiled at the first use, in two or three seconds, for all lengths, and kept on disk. float32, odd head sizes,
other GPUs, and machines without the package get torch's SDPA, a sequence at a time.
"""

import os
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

FAR = 1 << 30  # a window that hides nothing
GENERATIONS = (9, 10)  # Hopper and Blackwell: on others, its kernels cannot read pages


@cache
def package(name: str) -> Any:  # noqa: ANN401 - they have no types
    """A module of kernels that CuTe compiles; ``None`` if it is not there."""
    keep_compiled()
    try:
        return import_module(name)
    except ImportError:
        return None


def keep_compiled() -> None:
    """What CuTe compiles stays in a folder of the user's, or nowhere: the packages' own places for it are ones that
    others can write to. They look at this when they are imported.
    """
    warnings.filterwarnings("ignore", ".* cannot be converted to a JitArgument", UserWarning)  # at each compilation
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twostroke"
        folder.mkdir(parents=True, exist_ok=True)
        kept = os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # nobody's home
        kept = False
    for name, part in (("FLASH_ATTENTION_CUTE_DSL", "flash-attention"), ("QUACK", "quack")):
        os.environ.setdefault(f"{name}_CACHE_ENABLED", str(int(kept)))
        if kept:
            os.environ.setdefault(f"{name}_CACHE_DIR", str(folder / part))


def _flash() -> Any:  # noqa: ANN401
    return package("flash_attn.cute.interface")


def is_supported(dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether FlashAttention can do this, and is there."""
    fits = dtype in (torch.bfloat16, torch.float16) and dim % 16 == 0 and (dim <= 128 or dim == 256)
    return fits and torch.cuda.get_device_capability(device)[0] in GENERATIONS and _flash() is not None


def flash_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor, *, scale: float, window: int
) -> None:
    """Causal attention of one sequence, aligned at the last key.

    Args:
        query: ``[rows, heads, head_dim]``, like ``out``, which it writes.
        keys: ``[tokens, kv_heads, head_dim]``, like ``values``. Only the last dimension need be dense.
        out: of the same type.
        scale: factor of the scores.
        window: tokens that a row looks back, itself included; ``FAR`` is all.
    """
    # Its public functions cannot write where they are told.
    _flash()._flash_attn_fwd(query[None], keys[None], values[None], out=out[None], softmax_scale=scale, **_seen(window))


def flash_attention_paged(
    query: torch.Tensor,
    pool: torch.Tensor,
    out: torch.Tensor,
    *,
    starts: torch.Tensor,
    rows: torch.Tensor,
    keys: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    window: int,
) -> None:
    """The same for many sequences, whose keys and values are read in place.

    Args:
        query: ``[rows, heads, head_dim]``, like ``out``, of which it writes these sequences' rows.
        pool: ``[slots, 2, kv_heads, block_tokens, head_dim]``.
        out: of the same type.
        starts: int32 ``[sequences + 1]``: first row of each; they ascend.
        rows: int32 ``[sequences]``: how many each has.
        keys: int32 ``[sequences]``: how many each attends to.
        table: int32 ``[sequences, pages]``: slots.
        scale: factor of the scores.
        window: see ``flash_attention``.
    """
    _flash()._flash_attn_fwd(
        query,
        pool[:, 0].transpose(1, 2),
        pool[:, 1].transpose(1, 2),
        out=out,
        cu_seqlens_q=starts,
        seqused_q=rows,
        seqused_k=keys,
        page_table=table,
        softmax_scale=scale,
        **_seen(window),
    )


def _seen(window: int) -> dict[str, int | bool]:
    """Each way is a kernel: one with a window takes it also where it hides nothing."""
    return {"causal": True} if window >= FAR else {"window_size_left": window - 1, "window_size_right": 0}


def masked_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, window: int | None
) -> torch.Tensor:
    """The same by torch's SDPA, for what FlashAttention does not do. A window takes a mask as large as the scores.

    Args:
        query: ``[rows, heads, head_dim]``; ``keys`` and ``values``: ``[kv_heads, tokens, head_dim]``.
        scale: factor of the scores.
        window: tokens that a row looks back, itself included; ``None`` is all.
    """
    rows, tokens = query.shape[0], keys.shape[1]
    if window is None:
        seen: torch.Tensor = causal_lower_right(rows, tokens)
    else:
        at = torch.arange(tokens - rows, tokens, device=query.device)[:, None]
        column = torch.arange(tokens, device=query.device)
        seen = (column <= at) & (column > at - window)
    out: torch.Tensor = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=seen,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[0],
    )
    return out[0].transpose(0, 1)
