"""xxh3-128 of blocks in a GPU's memory, where reading them costs next to nothing; the same as the library's on a CPU.

Of what is in ``xxh3.py``, only scrambling has to happen in order, so one kernel computes what each kibibyte adds, and
another puts that together, a program for each block.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from twostroke.kv.xxh3 import HIGH, LAST, LOW, PRIME_1, PRIME_2, SECRET, START, STRIPE

_AT_ONCE = 8  # kibibytes that a program sums up: it is soon done, since a decode step's have to wait for it
_UNROLLED = 16  # kibibytes whose parts are under way from memory at once


def _keys(size: int) -> torch.Tensor:
    """The numbers that blocks of ``size`` bytes are combined with, ``int64 [58]``."""
    secret = [SECRET[start : start + 8 * count] for start, count in ((0, 24), (LAST, 8), (LOW, 8), (HIGH, 8))]
    begin = [size * PRIME_1 % 2**64, ~(size * PRIME_2) % 2**64]
    numbers = np.concatenate([np.concatenate(secret).view(np.uint64), np.array([*START, *begin], np.uint64)])
    return torch.from_numpy(numbers.view(np.int64))


@triton.jit
def _parts(slots, index, keys, parts, WORDS, FULL, AT_ONCE: tl.constexpr):
    """What some kibibytes of a block add to its sums, each by itself."""
    block = slots + tl.load(index + tl.program_id(0)) * WORDS
    which = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    some, stripes = which[:, None, None, None], tl.arange(0, 16)[None, :, None, None]
    pairs = (tl.arange(0, 4) * 2)[:, None] + tl.arange(0, 2)[None, :]
    at = stripes * 8 + pairs[None, None, :, :]
    a, b = tl.split(tl.load(block + some * 128 + at, some < FULL, 0))
    key_a, key_b = tl.split(tl.load(keys + stripes + pairs[None, None, :, :]))
    # A lane also takes in its neighbour's word.
    sums = tl.join(tl.sum(b + _product(a ^ key_a), 1), tl.sum(a + _product(b ^ key_b), 1))
    out = parts + tl.program_id(0).to(tl.int64) * FULL * 8 + which[:, None, None] * 8 + pairs[None, :, :]
    tl.store(out, sums, which[:, None, None] < FULL)


@triton.jit
def _product(mixed):
    """Of both halves of each word."""
    return (mixed & 0xFFFFFFFF) * ((mixed >> 32) & 0xFFFFFFFF)


@triton.jit
def _merged(sums, secret, begin):
    """Half of a digest."""
    a, b = tl.split(tl.reshape((sums ^ secret).to(tl.uint64, bitcast=True), (4, 2)))
    folded = (a * b) ^ tl.umulhi(a, b)
    total = begin + tl.sum(folded.to(tl.int64, bitcast=True), 0)
    total = (total ^ ((total >> 37) & 0x7FFFFFF)) * 0x165667919E3779F9
    return total ^ ((total >> 32) & 0xFFFFFFFF)


@triton.jit
def _whole(slots, index, keys, parts, out, WORDS, FULL, REST, AT_ONCE: tl.constexpr):
    """The digest of one block of ``WORDS`` 64-bit words: ``FULL`` kibibytes, whose parts are there, ``REST`` stripes,
    and the last one.
    """
    block = slots + tl.load(index + tl.program_id(0)) * WORDS
    lanes, stripes = tl.arange(0, 8), tl.arange(0, 16)
    key = tl.load(keys + stripes[:, None] + lanes[None, :])
    scramble = tl.load(keys + 16 + lanes)
    sums = tl.load(keys + 48 + lanes)
    mine = parts + tl.program_id(0).to(tl.int64) * FULL * 8 + lanes
    for first in range(0, FULL, AT_ONCE):
        for one in tl.static_range(AT_ONCE):
            new = sums + tl.load(mine + (first + one) * 8, first + one < FULL, 0)
            new = (new ^ ((new >> 47) & 0x1FFFF) ^ scramble) * 0x9E3779B1
            sums = tl.where(first + one < FULL, new, sums)
    rest = (stripes < REST)[:, None]
    at = FULL * 128 + stripes[:, None] * 8 + lanes[None, :]
    mixed = tl.load(block + at, rest, 0) ^ key
    sums += tl.sum(tl.where(rest, tl.load(block + (at ^ 1), rest, 0) + _product(mixed), 0), 0)
    at = WORDS - 8 + lanes
    mixed = tl.load(block + at) ^ tl.load(keys + 24 + lanes)
    sums += tl.load(block + (at ^ 1)) + _product(mixed)
    digest = out + tl.program_id(0) * 2
    tl.store(digest, _merged(sums, tl.load(keys + 40 + lanes), tl.load(keys + 57)))
    tl.store(digest + 1, _merged(sums, tl.load(keys + 32 + lanes), tl.load(keys + 56)))


class Digests:
    """Computes digests on torch's current stream. What the host gives and gets lies in its own memory: a copy would
    queue behind those of blocks.
    """

    MOST = 64  # blocks at once

    def __init__(self, slots: torch.Tensor) -> None:
        """``slots``: ``uint8 [num_slots, block_bytes]``, dense; 256 bytes or more.

        Raises:
            ValueError: ``block_bytes`` is not a multiple of 64.
        """
        self._size = slots.shape[1]
        if self._size % STRIPE:
            raise ValueError(f"blocks of {self._size} bytes: no multiple of {STRIPE}")
        self._full = (self._size - 1) // 1024
        self._words = slots.view(torch.int64)
        self._index = torch.empty(self.MOST, dtype=torch.int64, pin_memory=slots.is_cuda)
        self._digests = torch.empty(self.MOST, 2, dtype=torch.int64, pin_memory=slots.is_cuda)
        self._parts = torch.empty(self.MOST, self._full, 8, dtype=torch.int64, device=slots.device)
        self._keys = _keys(self._size).to(slots.device)

    def start(self, slots: Sequence[int]) -> None:
        """Begin with the blocks in these slots, at most ``MOST``."""
        count, rest = len(slots), (self._size - 1 - 1024 * self._full) // STRIPE
        self._index.numpy()[:count] = slots
        arrays, sizes = (self._words, self._index, self._keys, self._parts), (self._size // 8, self._full)
        _parts[(count, triton.cdiv(self._full, _AT_ONCE) or 1)](*arrays, *sizes, _AT_ONCE, num_warps=2)
        _whole[(count,)](*arrays, self._digests, *sizes, rest, _UNROLLED, num_warps=1)

    def finish(self, count: int) -> list[bytes]:
        """Their digests, once the stream has come that far."""
        digests = self._digests[:count].numpy().byteswap().tobytes()
        return [digests[at : at + 16] for at in range(0, len(digests), 16)]
