"""What the bytes of a block mean."""

from dataclasses import replace

import pytest

from twostroke.errors import StartupError
from twostroke.kv.layout import DTYPE_BYTES, Layout

LAYOUT = Layout(layers=3, kv_heads=2, head_dim=8, block_tokens=16, dtype="bfloat16", model="weights")


def test_sizes() -> None:
    assert LAYOUT.shape == (3, 2, 2, 16, 8)
    assert LAYOUT.token_bytes == 3 * 2 * 2 * 8 * 2
    assert LAYOUT.block_bytes == 16 * LAYOUT.token_bytes


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_block_bytes_follow_the_dtype(dtype: str) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    elements = 1
    for size in layout.shape:
        elements *= size
    assert layout.block_bytes == elements * DTYPE_BYTES[dtype]


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_blocks_round_up(tokens: int, blocks: int) -> None:
    assert LAYOUT.blocks(tokens) == blocks


def test_equal_layouts_have_equal_fingerprints() -> None:
    assert replace(LAYOUT).fingerprint == LAYOUT.fingerprint
    assert len(bytes.fromhex(LAYOUT.fingerprint)) == 16


def test_every_field_changes_the_fingerprint() -> None:
    others = [
        replace(LAYOUT, layers=4),
        replace(LAYOUT, kv_heads=1),
        replace(LAYOUT, head_dim=16),
        replace(LAYOUT, block_tokens=8),
        replace(LAYOUT, dtype="float16"),  # the same size, another meaning
        replace(LAYOUT, model="other weights"),
        replace(LAYOUT, kv_heads=16, block_tokens=2),  # the same number of bytes
    ]
    fingerprints = {layout.fingerprint for layout in [LAYOUT, *others]}
    assert len(fingerprints) == len(others) + 1


@pytest.mark.parametrize("dtype", ["float64", "int8", "", "BFLOAT16"])
def test_unknown_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(StartupError, match="is not one of"):
        replace(LAYOUT, dtype=dtype)


@pytest.mark.parametrize("size", [0, -1])
def test_empty_block_is_refused(size: int) -> None:
    with pytest.raises(StartupError, match="holds nothing"):
        replace(LAYOUT, block_tokens=size)
