"""Copies of blocks between memories: past the caches, where the block is too long to be read from there afterwards.

An ordinary store first reads the line that it is about to overwrite, and drives out of the cache what somebody else
needs there. A non-temporal store does neither, and the memory bus, which is what limits a copy, carries two thirds. The
digest of what is copied costs nothing beside that, and half a copy by itself.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from twostroke.kv.memory import Bytes
from twostroke.kv.xxh3 import SECRET

log = logging.getLogger(__name__)
LINE = 64  # bytes
_LEAST = 64 << 10  # bytes; fewer stay in the cache


def copy(target: memoryview | Bytes, source: memoryview | Bytes) -> None:
    """Copy bytes between equally long, contiguous memories that do not overlap, without holding the GIL. When it
    returns, other threads and processes see them.
    """
    to, from_ = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
    if len(to) != len(from_):
        raise ValueError(f"{len(from_)} bytes do not fit into {len(to)}")
    if not to.flags.writeable:
        raise ValueError("the target is read-only")
    loops = kernels() if len(to) >= _LEAST else None
    if loops is None:
        np.copyto(to, from_)
    else:
        loops.copy(to, from_)


def copy_digested(target: memoryview | Bytes, source: memoryview | Bytes) -> bytes:
    """``copy``, and the xxh3-128 of what was copied."""
    to, from_ = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
    if len(to) == len(from_) >= _LEAST and to.flags.writeable and (loops := kernels()):
        words = np.empty(10, np.uint64)
        if loops.copy_digested(to, from_, SECRET, words):
            return words[8:].byteswap().tobytes()
    digest = xxhash.xxh3_128_digest(from_.data)  # before, so that the copy finds the bytes in the cache
    copy(to, from_)
    return digest


class _Kernels(NamedTuple):
    """See ``lines.py``."""

    copy: Callable[[Bytes, Bytes], None]
    copy_digested: Callable[[Bytes, Bytes, Bytes, npt.NDArray[np.uint64]], bool]


@cache
def kernels() -> _Kernels | None:
    """The loops; None without Numba, as in other systems' processes. The first call takes some seconds, once on a
    machine: make it before somebody waits for a copy.
    """
    try:
        from twostroke.kv.lines import copy_bytes, copy_digested
    except ImportError:
        log.info("without Numba, blocks are copied through the caches")
        return None
    return _Kernels(copy_bytes, copy_digested)
