"""Every byte comes, and no other is touched, wherever target and source begin and end."""

import sys
import threading

import numpy as np
import pytest
import xxhash

from twostroke.kv.copying import _LEAST, LINE, copy, copy_digested, kernels
from twostroke.kv.direct import aligned

LENGTHS = [0, 1, _LEAST - 1, _LEAST, _LEAST + 1, _LEAST + LINE - 1, 3 * _LEAST + 17]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("to", [0, 1, LINE - 1])
@pytest.mark.parametrize("from_", [0, 31])
def test_the_bytes_come_and_no_other_is_touched(length: int, to: int, from_: int) -> None:
    source = np.random.default_rng(length).integers(1, 256, length + from_, dtype=np.uint8)[from_:]
    around = np.zeros(length + 4 * LINE, np.uint8)
    copy(around[to : to + length], source)
    assert np.array_equal(around[to : to + length], source)
    assert not around[:to].any()
    assert not around[to + length :].any()


def test_a_read_only_source_will_do_and_a_read_only_target_will_not() -> None:
    target = bytearray(_LEAST)
    copy(memoryview(target), memoryview(b"x" * _LEAST))
    assert target == b"x" * _LEAST
    with pytest.raises(ValueError, match="read-only"):
        copy(memoryview(bytes(_LEAST)), memoryview(target))
    with pytest.raises(ValueError, match="read-only"):
        copy(memoryview(bytes(8)), memoryview(bytes(8)))


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        copy(memoryview(bytearray(10)), memoryview(bytes(11)))


def test_another_thread_sees_all_of_it_when_it_is_told() -> None:
    source, target = np.empty(1 << 20, np.uint8), np.empty(1 << 20, np.uint8)
    asked, answered, seen = threading.Event(), threading.Event(), []

    def look() -> None:
        for _ in range(50):
            asked.wait(10)
            asked.clear()
            seen.append(np.unique(target).tolist())
            answered.set()

    thread = threading.Thread(target=look)
    thread.start()
    for turn in range(50):
        source.fill(turn)
        copy(target, source)
        answered.clear()
        asked.set()
        assert answered.wait(10)
    thread.join()
    assert seen == [[turn] for turn in range(50)]


@pytest.mark.parametrize("length", [*LENGTHS, 368_640, *(_LEAST + LINE * lines for lines in (1, 15, 16, 17, 4096))])
@pytest.mark.parametrize("to", [0, LINE // 2])
def test_the_digest_of_what_is_copied_is_the_librarys(length: int, to: int) -> None:
    source = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8)
    around = aligned(length + 3 * LINE)
    target = around[LINE + to : LINE + to + length]
    source.flags.writeable = length % 2 == 0
    assert copy_digested(target, source) == xxhash.xxh3_128_digest(source.data)
    assert bytes(target) == source.tobytes()
    assert not any(around[: LINE + to])
    assert not any(around[LINE + to + length : length + 3 * LINE])


def test_a_digest_too_wants_equal_lengths_and_a_target_that_can_be_written() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        copy_digested(memoryview(bytearray(_LEAST)), memoryview(bytes(_LEAST + LINE)))
    with pytest.raises(ValueError, match="read-only"):
        copy_digested(memoryview(bytes(_LEAST)), memoryview(bytes(_LEAST)))


def test_it_goes_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "twostroke.kv.lines", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    kernels.cache_clear()
    try:
        assert kernels() is None
        target = bytearray(_LEAST + 1)
        copy(memoryview(target), memoryview(b"y" * (_LEAST + 1)))
        assert target == b"y" * (_LEAST + 1)
        whole = np.full(_LEAST, 7, np.uint8)
        assert copy_digested(memoryview(target)[:_LEAST], whole) == xxhash.xxh3_128_digest(whole.data)
        assert target == whole.tobytes() + b"y"
    finally:
        kernels.cache_clear()
