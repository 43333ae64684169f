"""Many copies in one call of CUDA's driver.

It is called past ``cuda.bindings``, which converts three lists to C, 2.3 us a copy: longer than a block takes from one
GPU to another. Here they are arrays that the driver reads as they are.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from twostroke.errors import StartupError

Addresses = NDArray[np.uint64]

_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
_BESIDE_KERNELS = 1  # CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE


class _Location(ctypes.Structure):
    """``CUmemLocation``; all zeros is none, which is right for anything but managed memory."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """``CUmemcpyAttributes``."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("source", _Location),
        ("target", _Location),
        ("flags", ctypes.c_uint),
    )


_EVERY = _Attributes(_IN_STREAM_ORDER, _Location(), _Location(), _BESIDE_KERNELS)
_FIRST = ctypes.c_size_t(0)


def addresses(base: int, places: Sequence[int] | NDArray[np.uint64], size: int) -> Addresses:
    """Where ``places`` of ``size`` bytes each are, the first of them at ``base``."""
    return np.asarray(places, np.uint64) * np.uint64(size) + np.uint64(base)


def copy(targets: Addresses, sources: Addresses, sizes: NDArray[np.uint64], stream: int) -> None:
    """Start copying, pairwise, on a stream of this thread's current device. The arrays may change once this returns.

    Raises:
        RuntimeError: the driver refuses, or the device has failed.
    """
    assert targets.dtype == sources.dtype == sizes.dtype == np.uint64, "as the driver reads them"
    assert len(targets) == len(sources) == len(sizes), "copies are pairs"
    if not len(targets):
        return
    pointers = (targets.ctypes.data, sources.ctypes.data, sizes.ctypes.data)
    status = _batch()(*pointers, len(targets), ctypes.byref(_EVERY), ctypes.byref(_FIRST), 1, stream)
    if status:
        raise RuntimeError(f"cuMemcpyBatchAsync: CUDA error {status}")


def check_driver() -> None:
    """``StartupError`` if the driver is too old to copy."""
    try:
        _batch()
    except (OSError, AttributeError) as error:
        raise StartupError(f"the GPU's driver is too old: twostroke needs one for CUDA 13 ({error})") from error


@cache
def _batch() -> Callable[..., int]:
    function = ctypes.CDLL("libcuda.so.1").cuMemcpyBatchAsync_v2  # CUDA 13
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = (pointer, pointer, pointer, size, pointer, pointer, size, pointer)
    function.restype = ctypes.c_int
    return function
