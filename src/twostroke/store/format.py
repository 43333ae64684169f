"""The header that every stored block carries, and the one way to check a block before it is used.

96 bytes, little-endian, in a field of ``HEADER_BYTES``:

======  =====  ===================================================================================
offset  bytes
======  =====  ===================================================================================
0       8      magic
8       4      version of this format
12      4      flags: 1 if the block is pinned, else 0
16      8      length of the payload in bytes
24      8      when it was written, unix seconds
32      24     block key
56      16     layout fingerprint
72      16     xxh3-128 of the payload
88      8      xxh3-64 of the 88 bytes before, so that a damaged header names no block at all
======  =====  ===================================================================================

The digests find damage, not forgery: whoever can write to a tier is trusted like a worker.
"""

import struct
from typing import NamedTuple

import numpy as np
import xxhash

from twostroke.kv.keys import KEY_BYTES, BlockKey

VERSION = 2
HEADER_BYTES = 128
MAGIC = b"2STROKE\n"
PINNED = 1  # a flag
_FIELDS = struct.Struct(f"<8sIIQQ{KEY_BYTES}s16s16s")
_CHECK = struct.Struct("<Q")
FIELDS = np.dtype(  # the same, for many headers at once
    {
        "names": ["magic", "version", "flags", "length", "written", "key", "fingerprint"],
        "formats": ["S8", "<u4", "<u4", "<u8", "<u8", f"V{KEY_BYTES}", "V16"],
        "offsets": [0, 8, 12, 16, 24, 32, 56],
        "itemsize": HEADER_BYTES,
    }
)
_USED = _FIELDS.size + _CHECK.size


class Corrupt(Exception):
    """Bytes from a tier are not the block that they should be. ``str`` says in what way."""


class Sealed(NamedTuple):
    """A block's bytes, and their digest as of when the block was computed: it travels with them through all tiers."""

    payload: memoryview
    digest: bytes  # xxh3-128, 16 bytes


class Header(NamedTuple):
    """What a stored block says of itself."""

    key: BlockKey
    fingerprint: bytes  # of the layout, 16 bytes
    length: int  # bytes of the payload
    written: int  # unix seconds
    digest: bytes  # xxh3-128 of the payload
    pinned: bool = False


def seal(payload: memoryview) -> Sealed:
    """The block, with the digest of its bytes as they are now."""
    return Sealed(payload, xxhash.xxh3_128_digest(payload))


def pack(header: Header) -> bytes:
    """``HEADER_BYTES`` bytes."""
    fields = _FIELDS.pack(
        MAGIC, VERSION, header.pinned, header.length, header.written, header.key, header.fingerprint, header.digest
    )
    return (fields + _CHECK.pack(xxhash.xxh3_64_intdigest(fields))).ljust(HEADER_BYTES, b"\0")


def unpack(raw: bytes | memoryview) -> Header:
    """The header in these ``HEADER_BYTES`` bytes.

    Raises:
        Corrupt: they are no header, a damaged one, or one of another version.
    """
    if len(raw) < _USED:
        raise Corrupt("the header is cut off")
    fields = bytes(raw[: _FIELDS.size])
    magic, version, flags, length, written, key, fingerprint, digest = _FIELDS.unpack(fields)
    if magic != MAGIC:
        raise Corrupt("it is no stored block")
    if version != VERSION:
        raise Corrupt(f"it has format {version}, not {VERSION}")
    if _CHECK.unpack(raw[_FIELDS.size : _USED])[0] != xxhash.xxh3_64_intdigest(fields):
        raise Corrupt("the header is damaged")
    return Header(key, fingerprint, length, written, digest, bool(flags & PINNED))


def check(header: Header, key: BlockKey, fingerprint: bytes, length: int) -> None:
    """Whether this is the header of the block that was asked for.

    Raises:
        Corrupt: it is another one's.
    """
    if header.key != key:
        raise Corrupt("it is another block")
    if header.fingerprint != fingerprint:
        raise Corrupt("it is of another layout")
    if header.length != length:
        raise Corrupt(f"it has {header.length} bytes, not {length}")


def verify(block: Sealed) -> Sealed:
    """The block, if its bytes are those that were sealed.

    Raises:
        Corrupt: they are not.
    """
    if xxhash.xxh3_128_digest(block.payload) != block.digest:
        raise Corrupt("its bytes are damaged")
    return block


def unseal(value: memoryview, key: BlockKey, fingerprint: bytes, length: int) -> Sealed:
    """The verified block in a value that is its header and its payload, one behind the other.

    Raises:
        Corrupt: it is not the block that was asked for, or damaged.
    """
    check(header := unpack(value[:HEADER_BYTES]), key, fingerprint, length)
    if len(value) != HEADER_BYTES + length:
        raise Corrupt("it is cut off")
    return verify(Sealed(value[HEADER_BYTES:], header.digest))
