"""The one loop of ``copying.py``, compiled by Numba: loads as usual, and non-temporal stores."""

from typing import Any

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from twostroke.kv.copying import LINE


@intrinsic  # type: ignore[untyped-decorator]
def _copy_line(typing: Any, target: Any, source: Any) -> Any:  # pragma: no cover - compiled
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line = ir.VectorType(ir.IntType(8), LINE)
        to, from_ = (builder.inttoptr(address, line.as_pointer()) for address in arguments)
        store = builder.store(builder.load(from_, align=1), to, align=LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp), generate


@intrinsic  # type: ignore[untyped-decorator]
def _fence(typing: Any) -> Any:  # pragma: no cover - compiled
    """Non-temporal stores are not ordered with others: whoever hears that it is done shall see them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


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
