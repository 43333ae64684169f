"""Memory that direct I/O takes as it is."""

import os
from pathlib import Path

import numpy as np
import pytest
import xxhash

from twostroke.kv.direct import (
    _HUGE,
    _LONG,
    _RING,
    PAGE,
    Extent,
    File,
    aligned,
    open_direct,
    pages,
)

SIZES = [0, 1, PAGE, PAGE + 1, _LONG - 1, _LONG, 368_640, _HUGE, _HUGE + 1, 3 * _HUGE]


@pytest.mark.parametrize("size", SIZES)
def test_it_is_zeros_in_whole_pages(size: int) -> None:
    memory = aligned(size)
    assert len(memory) == max(PAGE, pages(size))
    assert np.frombuffer(memory, np.uint8).ctypes.data % PAGE == 0
    assert not any(memory)
    memory[:] = b"x" * len(memory)
    assert bytes(memory[-3:]) == b"xxx"


@pytest.mark.parametrize("size", [1000, 3 * PAGE, _LONG, 368_640, _HUGE + 5, _RING + 1])
def test_what_is_read_is_what_was_written_many_times_round(tmp_path: Path, size: int) -> None:
    """By way of a thread's buffers: what becomes of the payload meanwhile does not matter."""
    file = File(open_direct(str(tmp_path / "blocks"), os.O_RDWR | os.O_CREAT))
    for turn in range(12):
        extent = Extent(file, turn * pages(size), size)
        payload = bytearray([turn + 1]) * size
        assert extent.load(memoryview(payload)) == xxhash.xxh3_128_digest(payload)
        payload[:] = bytes(size)
        extent.flush()
        assert extent.read() == bytes([turn + 1]) * size
    assert Extent(file, 0, size).read() == b"\x01" * size
    file.close()
