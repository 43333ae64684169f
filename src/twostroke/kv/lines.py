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


@numba.njit("void(uintp, uintp, uintp)", nogil=True, cache=True)  # type: ignore[untyped-decorator]
def copy_lines(target: Any, source: Any, count: Any) -> None:  # pragma: no cover - compiled
    """Copy ``count`` lines between addresses; ``target`` is a multiple of ``LINE``."""
    for _ in range(count):
        _copy_line(target, source)
        target += types.uintp(LINE)
        source += types.uintp(LINE)
    _fence()
