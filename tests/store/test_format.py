"""Headers and digests: nothing but the very block passes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.blocks import BYTES, FINGERPRINT, key, payload
from twostroke.store.format import HEADER_BYTES, Corrupt, Header, Sealed, check, pack, seal, unpack, verify

LAYOUT = bytes.fromhex(FINGERPRINT)
HEADER = Header(key(1), LAYOUT, BYTES, 1_700_000_000, bytes(range(16)))


def test_a_header_is_read_as_it_was_written() -> None:
    raw = pack(HEADER)
    assert len(raw) == HEADER_BYTES
    assert unpack(raw) == HEADER
    assert unpack(memoryview(raw)) == HEADER


@given(st.integers(0, 96 * 8 - 1))
def test_any_flipped_bit_is_found(bit: int) -> None:
    raw = bytearray(pack(HEADER))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Corrupt):
        unpack(bytes(raw))


@given(st.binary(max_size=200))
def test_anything_else_is_no_header(raw: bytes) -> None:
    with pytest.raises(Corrupt):
        unpack(raw)


def test_another_version() -> None:
    raw = bytearray(pack(HEADER))
    raw[8] += 1
    with pytest.raises(Corrupt, match="format 3"):
        unpack(bytes(raw))


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("another block", (key(2), LAYOUT, BYTES)),
        ("another layout", (key(1), b"x" * 16, BYTES)),
        ("bytes", (key(1), LAYOUT, 9)),
    ],
)
def test_a_header_of_something_else(what: str, other: tuple[bytes, bytes, int]) -> None:
    check(HEADER, key(1), LAYOUT, BYTES)
    with pytest.raises(Corrupt, match=what):
        check(HEADER, *other)


@given(st.integers(0, BYTES * 8 - 1))
def test_any_flipped_bit_of_a_block_is_found(bit: int) -> None:
    block = seal(memoryview(payload(key(3))))
    assert verify(block) is block
    damaged = bytearray(block.payload)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Corrupt):
        verify(Sealed(memoryview(damaged), block.digest))
