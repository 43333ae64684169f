"""xxh3-128 of blocks in a GPU's memory, where reading them costs next to nothing; the same as the library's on a CPU.

XXH3 (xxhash.com) for long inputs: eight 64-bit sums take in 64 bytes at a time, a *stripe*, and are scrambled after
each kibibyte. Only that has to happen in order, so one kernel computes what each kibibyte adds, and another puts that
together, a program for each block. The end, a few multiplications, is NumPy's.
"""

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

_STRIPE = 64  # bytes
_AT_ONCE = 8  # kibibytes that a program sums up
_UNROLLED = 16  # kibibytes whose parts are under way from memory at once

_SECRET = np.frombuffer(  # XXH3's own
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
        "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
        "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
        "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
    ),
    np.uint8,
)
_PRIME_1, _PRIME_2 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F
_START = [0xC2B2AE3D, _PRIME_1, _PRIME_2, 0x165667B19E3779F9]
_START += [0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, 0x9E3779B1]
_LAST = 121  # where in the secret the keys of the last stripe begin
_LOW, _HIGH = 11, 117  # and those of both halves of the result
_MIX = np.uint64(0x165667919E3779F9)
_MASK, _HALF = 0xFFFFFFFF, np.uint64(32)
Words = npt.NDArray[np.uint64]


def _secret(start: int, count: int) -> Words:
    """So many 64-bit numbers of the secret from this byte on."""
    words: Words = np.frombuffer(_SECRET[start : start + 8 * count].tobytes(), np.uint64)
    return words


@triton.jit
def _parts(slots, index, keys, parts, WORDS, FULL, AT_ONCE: tl.constexpr):
    """What some kibibytes of a block add to its sums, each by itself."""
    block = slots + tl.load(index + tl.program_id(0)) * WORDS
    lanes, stripes = tl.arange(0, 8), tl.arange(0, 16)
    which = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    some = which[:, None, None]
    at = some * 128 + stripes[None, :, None] * 8 + lanes[None, None, :]
    key = tl.load(keys + stripes[:, None] + lanes[None, :])
    mixed = tl.load(block + at, some < FULL, 0) ^ key[None, :, :]
    product = (mixed & 0xFFFFFFFF) * ((mixed >> 32) & 0xFFFFFFFF)
    sums = tl.sum(tl.load(block + (at ^ 1), some < FULL, 0) + product, 1)
    out = parts + tl.program_id(0).to(tl.int64) * FULL * 8 + which[:, None] * 8 + lanes[None, :]
    tl.store(out, sums, which[:, None] < FULL)


@triton.jit
def _sums(slots, index, keys, parts, out, WORDS, FULL, REST, AT_ONCE: tl.constexpr):
    """The sums of one block of ``WORDS`` 64-bit words: ``FULL`` kibibytes, whose parts are there, ``REST`` stripes, and
    the last one.
    """
    block = slots + tl.load(index + tl.program_id(0)) * WORDS
    lanes, stripes = tl.arange(0, 8), tl.arange(0, 16)
    key = tl.load(keys + stripes[:, None] + lanes[None, :])
    scramble = tl.load(keys + 16 + lanes)
    sums = tl.load(keys + 32 + lanes)
    mine = parts + tl.program_id(0).to(tl.int64) * FULL * 8 + lanes
    for first in range(0, FULL, AT_ONCE):
        for one in tl.static_range(AT_ONCE):
            new = sums + tl.load(mine + (first + one) * 8, first + one < FULL, 0)
            new = (new ^ ((new >> 47) & 0x1FFFF) ^ scramble) * 0x9E3779B1
            sums = tl.where(first + one < FULL, new, sums)
    rest = (stripes < REST)[:, None]
    at = FULL * 128 + stripes[:, None] * 8 + lanes[None, :]
    mixed = tl.load(block + at, rest, 0) ^ key
    product = (mixed & 0xFFFFFFFF) * ((mixed >> 32) & 0xFFFFFFFF)
    sums += tl.sum(tl.where(rest, tl.load(block + (at ^ 1), rest, 0) + product, 0), 0)
    at = WORDS - 8 + lanes
    mixed = tl.load(block + at) ^ tl.load(keys + 24 + lanes)
    sums += tl.load(block + (at ^ 1)) + (mixed & 0xFFFFFFFF) * ((mixed >> 32) & 0xFFFFFFFF)
    tl.store(out + tl.program_id(0) * 8 + lanes, sums)


def keys(device: torch.device) -> torch.Tensor:
    """What ``start`` needs on the device: ``int64 [40]``."""
    words = np.concatenate([_secret(0, 24), _secret(_LAST, 8), np.array(_START, np.uint64)])
    return torch.from_numpy(words.view(np.int64).copy()).to(device)


def start(slots: torch.Tensor, index: torch.Tensor, keys: torch.Tensor, out: torch.Tensor) -> None:
    """Sum up blocks, on torch's current stream.

    Args:
        slots: ``uint8 [num_slots, block_bytes]``, dense; 256 bytes or more, a multiple of 64.
        index: ``int64 [count]``: which.
        keys: see ``keys``.
        out: ``int64 [count or more, 8]``, for ``finish``.
    """
    size = slots.shape[1]
    full = (size - 1) // 1024
    rest = (size - 1 - 1024 * full) // _STRIPE
    words, count = slots.view(torch.int64), len(index)
    parts = torch.empty(count, full, 8, dtype=torch.int64, device=slots.device)
    if full:
        _parts[(count, triton.cdiv(full, _AT_ONCE))](words, index, keys, parts, size // 8, full, _AT_ONCE, num_warps=4)
    _sums[(count,)](words, index, keys, parts, out, size // 8, full, rest, _UNROLLED, num_warps=1)


def finish(sums: Words, size: int) -> list[bytes]:
    """The digests of blocks of ``size`` bytes with these sums, ``[count, 8]``."""
    low = _merged(sums, _secret(_LOW, 8), np.uint64(size * _PRIME_1 & 2**64 - 1))
    high = _merged(sums, _secret(_HIGH, 8), np.uint64(~(size * _PRIME_2) & 2**64 - 1))
    digests = np.stack([high, low], 1).astype(">u8").tobytes()
    return [digests[at : at + 16] for at in range(0, len(digests), 16)]


def _merged(sums: Words, secret: Words, begin: np.uint64) -> Words:
    mixed = sums ^ secret
    total: Words = begin + _folded(mixed[:, 0::2], mixed[:, 1::2]).sum(1, dtype=np.uint64)
    total ^= total >> np.uint64(37)
    total *= _MIX
    return total ^ (total >> _HALF)


def _folded(a: Words, b: Words) -> Words:
    """Both halves of the 128-bit products, combined by exclusive or."""
    a_low, a_high, b_low, b_high = a & _MASK, a >> _HALF, b & _MASK, b >> _HALF
    low, high, one = a_low * b_low, a_high * b_high, a_high * b_low
    two = a_low * b_high + (low >> _HALF) + (one & _MASK)
    folded: Words = (a * b) ^ (high + (one >> _HALF) + (two >> _HALF))
    return folded
