"""Copies of blocks between memories: past the caches, where the block is too long to be read from there afterwards.

An ordinary store first reads the line that it is about to overwrite, and drives out of the cache what somebody else
needs there. A non-temporal store does neither, and the memory bus, which is what limits a copy, carries two thirds.
"""

import logging
from collections.abc import Callable
from functools import cache

import numpy as np

from twostroke.kv.memory import Bytes

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
    copy_bytes = kernel() if len(to) >= _LEAST else None
    if copy_bytes is None:
        np.copyto(to, from_)
    else:
        copy_bytes(to, from_)


@cache
def kernel() -> Callable[[Bytes, Bytes], None] | None:
    """What copies the second of two equally long memories to the first; None without Numba, as in other systems'
    processes. The first call takes up to a second: make it before somebody waits for a copy.
    """
    try:
        from twostroke.kv.lines import copy_bytes
    except ImportError:
        log.info("without Numba, blocks are copied through the caches")
        return None
    found: Callable[[Bytes, Bytes], None] = copy_bytes
    return found
