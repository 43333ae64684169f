"""The loops of ``copying.py``, compiled by Numba: loads as usual, and non-temporal stores."""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from twostroke.kv.copying import LINE
from twostroke.kv.xxh3 import HIGH, LAST, LOW, PRIME_1, PRIME_2, SCRAMBLE, SECRET, START

_LINE = ir.VectorType(ir.IntType(8), LINE)
_WORDS = ir.VectorType(ir.IntType(64), 8)
_KIBIBYTE = 16 * LINE
_KEYS = np.array([SECRET[at : at + 8].view(np.uint64)[0] for at in range(len(SECRET) - 7)])  # a word at each byte
_START = np.array(START, np.uint64)
_SCRAMBLING, _AVALANCHE = np.uint64(0x9E3779B1), np.uint64(0x165667919E3779F9)


def _store(builder: Any, line: Any, to: Any) -> None:
    store = builder.store(line, to, align=LINE)
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))


@intrinsic  # type: ignore[untyped-decorator]
def _copy_line(typing: Any, target: Any, source: Any) -> Any:  # pragma: no cover - compiled
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, from_ = (builder.inttoptr(address, _LINE.as_pointer()) for address in arguments)
        _store(builder, builder.load(from_, align=1), to)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp), generate


@intrinsic  # type: ignore[untyped-decorator]
def _fence(typing: Any) -> Any:  # pragma: no cover - compiled
    """Non-temporal stores are not ordered with others: whoever hears that it is done shall see them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _take_in(lines: int) -> Any:
    """Code that copies so many lines, and adds them as stripes to eight sums."""

    @intrinsic  # type: ignore[untyped-decorator]
    def take_in(typing: Any, target: Any, source: Any, sums: Any, keys: Any) -> Any:  # pragma: no cover - compiled
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def all_of(number: int) -> Any:
                return ir.Constant(_WORDS, [number] * 8)

            def at(address: Any, offset: int) -> Any:
                moved = builder.add(address, ir.Constant(address.type, offset))
                return builder.inttoptr(moved, _WORDS.as_pointer())

            to, from_, sums, keys = arguments
            total = builder.load(at(sums, 0), align=8)
            order = ir.Constant(ir.VectorType(ir.IntType(32), 8), [1, 0, 3, 2, 5, 4, 7, 6])
            for line in range(lines):
                words = builder.load(at(from_, LINE * line), align=1)
                _store(builder, words, at(to, LINE * line))
                mixed = builder.xor(words, builder.load(at(keys, 8 * line), align=1))
                low, high = builder.and_(mixed, all_of(0xFFFFFFFF)), builder.lshr(mixed, all_of(32))
                total = builder.add(total, builder.mul(low, high))
                total = builder.add(total, builder.shuffle_vector(words, words, order))
            builder.store(total, at(sums, 0), align=8)
            return context.get_dummy_value()

        return types.void(*[types.uintp] * 4), generate

    return take_in


_take_kibibyte, _take_line = _take_in(_KIBIBYTE // LINE), _take_in(1)


@intrinsic  # type: ignore[untyped-decorator]
def _folded(typing: Any, left: Any, right: Any) -> Any:  # pragma: no cover - compiled
    """Both halves of the 128 bits of a product, combined."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(argument, wide) for argument in arguments))
        high = builder.lshr(product, ir.Constant(wide, 64))
        return builder.trunc(builder.xor(product, high), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


_TARGET = types.Array(types.uint8, 1, "C")
_READ_ONLY = types.Array(types.uint8, 1, "C", readonly=True)


@numba.njit([types.void(_TARGET, _TARGET), types.void(_TARGET, _READ_ONLY)], nogil=True, cache=True)  # type: ignore[untyped-decorator]
def copy_bytes(target: Any, source: Any) -> None:  # pragma: no cover - compiled
    """Copy all bytes of ``source`` to ``target``, which is as long."""
    size, to, from_ = len(target), target.ctypes.data, source.ctypes.data
    first = min(types.uintp(-to % LINE), types.uintp(size))
    for byte in range(first):
        target[byte] = source[byte]
    count = (size - first) // LINE
    to, from_ = to + first, from_ + first
    for _ in range(count):
        _copy_line(to, from_)
        to += types.uintp(LINE)
        from_ += types.uintp(LINE)
    for byte in range(first + count * LINE, size):
        target[byte] = source[byte]
    _fence()


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _merged(sums: Any, first: Any, total: Any) -> Any:  # pragma: no cover - compiled
    """Half of a digest: its keys begin at ``first``, and it at ``total``."""
    for pair in range(4):
        keys = first + 16 * pair
        total += _folded(sums[2 * pair] ^ _KEYS[keys], sums[2 * pair + 1] ^ _KEYS[keys + 8])
    total = (total ^ (total >> np.uint64(37))) * _AVALANCHE
    return total ^ (total >> np.uint64(32))


@numba.njit(  # type: ignore[untyped-decorator]
    [types.boolean(_TARGET, one, _READ_ONLY, types.Array(types.uint64, 1, "C")) for one in (_TARGET, _READ_ONLY)],
    nogil=True,
    cache=True,
)
def copy_digested(target: Any, source: Any, secret: Any, words: Any) -> Any:  # pragma: no cover - compiled
    """The same, of more than 240 bytes; the last two of ten ``words`` are then the xxh3-128 of what was copied, its
    upper half first. False, and nothing is done, if these are not whole lines of ``target``.
    """
    size, to, from_ = len(target), target.ctypes.data, source.ctypes.data
    sums, keys = words.ctypes.data, secret.ctypes.data
    if to % LINE or size % LINE:
        return False
    for lane in range(8):
        words[lane] = _START[lane]
    for _ in range((size - 1) // _KIBIBYTE):
        _take_kibibyte(to, from_, sums, keys)
        for lane in range(8):
            mixed = words[lane] ^ (words[lane] >> np.uint64(47)) ^ _KEYS[SCRAMBLE + 8 * lane]
            words[lane] = mixed * _SCRAMBLING
        to += types.uintp(_KIBIBYTE)
        from_ += types.uintp(_KIBIBYTE)
    for line in range((size - 1) % _KIBIBYTE // LINE):
        _take_line(to, from_, sums, keys + types.uintp(8 * line))
        to += types.uintp(LINE)
        from_ += types.uintp(LINE)
    _take_line(to, from_, sums, keys + types.uintp(LAST))
    length = np.uint64(size)
    words[8] = _merged(words, HIGH, ~(length * np.uint64(PRIME_2)))
    words[9] = _merged(words, LOW, length * np.uint64(PRIME_1))
    _fence()
    return True
