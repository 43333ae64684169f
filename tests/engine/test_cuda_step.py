"""One step as arrays, against a plain reading of its chunks, row by row."""

import random
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.rig import sequences
from twostroke.engine.cuda_step import BUNDLE, PARTS, TILE, TOGETHER, Room, Step, prompts_of, step_of
from twostroke.engine.scheduler import Chunk, Sequence
from twostroke.kv.keys import root_key
from twostroke.kv.pool import Lease, Pool
from twostroke.messages import Request, Sampling

ALONE = 2048  # tokens from which on a chunk is attended to by itself


class Row(NamedTuple):
    """What one row of a step is."""

    id: int
    position: int
    place: int


def chunk(start: int, size: int, *, block: int = 16, unknown: bool = False, samples: bool = True) -> Chunk:
    """A chunk of a sequence whose tokens are random and whose slots are anywhere."""
    chance, end = random.Random(f"{start} {size}"), start + size
    tokens = [chance.randrange(1000) for _ in range(end - unknown)]
    sequence = Sequence(Request("r/0/0", tokens or [0], Sampling(1, 0)), root_key("", ""))
    sequence.tokens = tokens
    sequence.lease = Lease(Pool(1))
    sequence.lease.slots = chance.sample(range(10**6), -(-end // block) + chance.randrange(3))
    return Chunk(sequence, start, size, samples)


def rows_of(chunks: Seq[Chunk], block: int, sampled: dict[Sequence, int]) -> list[Row]:
    """All rows that the chunks ask for."""
    rows = []
    for sequence, start, size, _ in chunks:
        for at in range(start, start + size):
            id_ = sequence.tokens[at] if at < len(sequence.tokens) else -1 - sampled[sequence]
            rows.append(Row(id_, at, sequence.slots()[at // block] * block + at % block))
    return rows


def found(step: Step) -> list[Row]:
    """All rows of a step."""
    return [
        Row(int(id_), int(position), int(place))
        for id_, position, place in zip(step.ids, step.positions, step.places, strict=True)
    ]


def table_of(chunk: Chunk, block: int) -> list[int]:
    """Slots of the chunk's tokens and all before them."""
    return chunk.sequence.slots()[: -(-(chunk.start + chunk.size) // block)]


def check_singles(step: Step, chunks: Seq[Chunk], block: int) -> None:
    """Single tokens know their context."""
    singles = [chunk for chunk in chunks if chunk.size == 1]
    assert step.lengths[: len(singles)].tolist() == [chunk.start + 1 for chunk in singles]
    for row, chunk in zip(step.tables, singles, strict=False):
        table = table_of(chunk, block)
        assert row[: len(table)].tolist() == table


def check_prompts(step: Step, chunks: Seq[Chunk], block: int) -> None:
    """Every chunk of several tokens is attended to once, and bundles are as FlashAttention wants them."""
    at, expected = 0, []
    for one in chunks:
        if one.size > 1:
            expected.append((at, one.size, one.start + one.size, table_of(one, block)))
        at += one.size
    seen = [(one.first, one.tokens, one.start + one.tokens, one.table.tolist()) for one in step.longs]
    for short in step.shorts:
        count = int((short.rows > 0).sum())
        assert short.rows[count:].tolist() == [0] * (len(short.rows) - count)
        assert (short.keys[count:] == 1).all()
        assert short.starts.shape == (len(short.rows) + 1,)
        assert (np.diff(short.starts) >= 0).all()
        assert short.starts[count] >= short.starts[count - 1] + short.rows[count - 1]
        assert short.table.shape[0] == len(short.rows) == len(short.keys)
        for index in range(count):
            pages = -(-int(short.keys[index]) // block)
            assert not short.table[index, pages:].any()
            seen.append(
                (
                    int(short.starts[index]),
                    int(short.rows[index]),
                    int(short.keys[index]),
                    short.table[index, :pages].tolist(),
                )
            )
    assert sorted(seen) == sorted(expected)


# -- by example ------------------------------------------------------------------------------------------------------


def test_places_are_slots_and_offsets() -> None:
    one, two = sequences([*range(30, 63)], [7] * 5, slots=20, block_tokens=16)
    assert one.lease is not None
    assert two.lease is not None
    one.lease.slots[:], two.lease.slots[:] = [9, 2, 5], [4]
    step = step_of([Chunk(one, 32, 1, True), Chunk(two, 1, 3, False)], 16, {}, together=False)
    assert found(step) == [Row(62, 32, 5 * 16), Row(7, 1, 65), Row(7, 2, 66), Row(7, 3, 67)]
    assert step.lengths.tolist() == [33]
    assert step.tables.tolist() == [[9, 2, 5]]
    assert step.ends.tolist() == [0]
    ((first, tokens, start, table),) = step.longs
    assert (first, tokens, start, table.tolist()) == (1, 3, 1, [4])
    assert not step.shorts


def test_an_unknown_token_is_named_by_the_row_that_samples_it() -> None:
    chunks = [chunk(20, 1, unknown=True), chunk(16, 1), chunk(31, 1, unknown=True)]
    step = step_of(chunks, 16, {chunks[0].sequence: 3, chunks[1].sequence: 1, chunks[2].sequence: 0})
    assert step.ids.tolist() == [-4, chunks[1].sequence.tokens[16], -1]
    assert found(step) == rows_of(chunks, 16, {chunks[0].sequence: 3, chunks[2].sequence: 0})


def test_who_is_unknown_must_have_been_sampled() -> None:
    with pytest.raises(KeyError):
        step_of([chunk(20, 1, unknown=True)], 16, {})


@pytest.mark.parametrize(("rows", "spare"), [(0, 0), (1, 0), (2, 0), (3, 1), (8, 6)])
def test_padding_repeats_the_first_row_and_is_stored_nowhere(rows: int, spare: int) -> None:
    chunks = [chunk(40, 1, unknown=True), chunk(3, 1)]
    step = step_of(chunks, 16, {chunks[0].sequence: 5}, rows=rows)
    assert step.ids.tolist() == [-6, chunks[1].sequence.tokens[3], *[-6] * spare]
    assert step.positions.tolist() == [40, 3, *[40] * spare]
    assert step.places[2:].tolist() == [-1] * spare
    assert step.lengths.tolist() == [41, 4, *[41] * spare]
    assert step.tables.shape == (2, 3)
    assert step.ends.tolist() == [0, 1]


def test_tokens_apart_are_rows_of_which_few_read_together() -> None:
    chunks = [chunk(40, 1, unknown=True), chunk(30, TOGETHER + 2), chunk(0, 2, samples=False)]
    step = step_of(chunks, 16, {chunks[0].sequence: 5}, rows=15, items=15, apart=True)
    assert found(step)[:13] == rows_of(chunks, 16, {chunks[0].sequence: 5})
    assert step.places[13:].tolist() == [-1, -1]
    assert step.lengths.tolist() == [41, *range(31, 41), 1, 2, 41, 41]
    assert [row.tolist() for row in step.tables] == [[*table_of(one, 16), 0, 0][:3] for one in chunks]
    check_work(step, [(0, 1, 0), (1, TOGETHER, 1), (1 + TOGETHER, 2, 1), (3 + TOGETHER, 2, 2)], 15)
    assert step.ends.tolist() == [0, 2 + TOGETHER]
    assert not step.longs
    assert not step.shorts


def test_rows_that_fill_up_behind_tokens_apart_repeat_the_first_of_them() -> None:
    step = step_of([chunk(30, 4), chunk(40, 1)], 16, {}, rows=8, items=9, apart=True)
    assert step.positions.tolist() == [30, 31, 32, 33, 40, 30, 30, 30]
    assert step.lengths.tolist() == [31, 32, 33, 34, 41, 31, 31, 31]
    assert step.places[5:].tolist() == [-1] * 3
    assert len(step.ids) == 8
    assert step.ids[5:].tolist() == step.ids[:1].tolist() * 3


def test_arrays_of_a_decode_step_lie_where_only_its_rows_decide() -> None:
    """A captured graph reads all but the tables' width from the same places, so the tables must come after the rest."""
    near, far = (step_of([chunk(start, 1), chunk(1, 1)], 16, {}, rows=4, items=9).arrays() for start in (2, 900))
    assert [array.size for array in near[:6]] == [array.size for array in far[:6]] == [4, 4, 4, 4, 45, 2]
    assert [array[5].tolist() for array in (near, far)] == [[1, 2], [57, 2]]
    assert [array[6].shape for array in (near, far)] == [(2, 1), (2, 57)]
    assert all(array.dtype == np.int32 for array in far)


@pytest.mark.parametrize(
    ("starts", "items", "parts"),
    [
        ([0, 5, 63], 3, [1, 1, 1]),
        ([0, 64, 200], 7, [1, 2, 4]),
        ([64 * 16 - 1], 66, [8]),  # with one tile each, joining them would take longer than computing
        ([64 * 128 - 1], 66, [32]),
        ([64000], 66, [63]),
        ([64 * 31] * 2, 66, [16, 16]),
        ([64 * 16 - 1] * 32, 66, [2] * 32),
        ([64 * 16 - 1] * 128, 66, [1] * 128),
        ([64 * 100, 10], 9, [8, 1]),
    ],
)
def test_contexts_are_split_for_all_to_have_like_amounts_to_do(starts: list[int], items: int, parts: list[int]) -> None:
    step = step_of([chunk(start, 1) for start in starts], 16, {}, items=items)
    assert [int(step.work[step.work[:, 0] == row, 4].max()) for row in range(len(starts))] == parts


def check_work(step: Step, reads: list[tuple[int, int, int]], items: int) -> None:
    """Every part of the context of these (row, rows, table), in order, and nothing else."""
    assert step.work.shape == (max(items, len(step.lengths)), 5)
    expected = []
    for row, rows, table in reads:
        parts = max(int(p) for r, _, _, _, p in step.work if r == row)
        assert 1 <= parts <= PARTS
        assert parts <= -(-int(step.lengths[row + rows - 1]) // TILE)
        expected += [[row, rows, table, part, parts] for part in range(parts)]
    assert step.work.tolist() == expected + [[0] * 5] * (len(step.work) - len(expected))


def test_ends_are_the_last_rows_of_chunks_that_sample() -> None:
    chunks = [chunk(9, 1), chunk(0, 1, samples=False), chunk(0, 5), chunk(3, 7, samples=False), chunk(1, 2)]
    assert step_of(chunks, 16, {}).ends.tolist() == [0, 6, 15]
    assert step_of(chunks[3:4], 16, {}).ends.tolist() == []


def test_one_short_chunk_is_alone() -> None:
    step = step_of([chunk(50, 1), chunk(0, 20)], 16, {})
    assert [one.tokens for one in step.longs] == [20]
    assert not step.shorts


def test_short_chunks_are_bundled() -> None:
    sizes = [2, 128, 100, 129, 256, 500, ALONE, 3, ALONE + 1, 300]
    chunks = [chunk(7, 1), *(chunk(40, size) for size in sizes)]
    step = step_of(chunks, 16, {})
    assert [one.tokens for one in step.longs] == [ALONE, ALONE + 1]
    assert [short.rows.tolist() for short in step.shorts] == [[2, 128, 100, 129, 256, 500, 3, 300]]
    check_prompts(step, chunks, 16)


def test_a_bundle_has_a_table_of_the_longest() -> None:
    chunks = [chunk(start, 10) for start in (0, 16 * 9, 30)]
    (short,) = step_of(chunks, 16, {}).shorts
    assert short.rows.tolist() == [10, 10, 10]
    assert short.keys.tolist() == [10, 154, 40]
    assert short.starts.tolist() == [0, 10, 20, 30]
    assert short.table.shape == (3, 10)
    check_prompts(step_of(chunks, 16, {}), chunks, 16)


def test_very_many_chunks_are_several_bundles() -> None:
    chunks = [chunk(16, 2) for _ in range(BUNDLE + 3)]
    step = step_of(chunks, 16, {})
    assert [len(short.rows) for short in step.shorts] == [BUNDLE, 3]
    check_prompts(step, chunks, 16)


def test_nothing_is_bundled_unless_allowed() -> None:
    chunks = [chunk(0, 10), chunk(0, 20), chunk(0, 30)]
    step = step_of(chunks, 16, {}, together=False)
    assert [one.tokens for one in step.longs] == [10, 20, 30]
    assert not step.shorts


def test_a_room_holds_what_fits() -> None:
    room = Room(rows=64, sequences=2, pages=4)
    assert room.holds([chunk(0, 64)], 16)
    assert room.holds([chunk(0, 32), chunk(32, 32)], 16)
    assert not room.holds([chunk(0, 65)], 16)
    assert not room.holds([chunk(0, 2)] * 3, 16)
    assert not room.holds([chunk(60, 5)], 16)


@pytest.mark.parametrize("shapes", [[(0, 64)], [(0, 2)], [(10, 20), (0, 30), (50, 3)], [(0, 16), (3, 48)]])
def test_prompts_in_a_room_have_the_sizes_of_the_room(shapes: list[tuple[int, int]]) -> None:
    room = Room(rows=64, sequences=3, pages=4)
    chunks = [chunk(*shape, samples=index != 1) for index, shape in enumerate(shapes)]
    step = prompts_of(chunks, 16, room)
    full = prompts_of([chunk(0, 64)], 16, room)
    assert [array.shape for array in step.arrays()] == [array.shape for array in full.arrays()]
    rows = rows_of(chunks, 16, {})
    assert found(step)[: len(rows)] == rows
    assert found(step)[len(rows) :] == [Row(0, 0, -1)] * (64 - len(rows))
    ends = (np.cumsum([size for _, size in shapes]) - 1).tolist()
    sampled = [end for end, one in zip(ends, chunks, strict=True) if one.samples]
    assert step.ends.tolist() == [*sampled, *[0] * (3 - len(sampled))]
    check_prompts(step, chunks, 16)


# -- whatever the step -----------------------------------------------------------------------------------------------

_singles = st.lists(st.tuples(st.integers(0, 400), st.booleans(), st.booleans()), max_size=9)
_prompts = st.lists(
    st.tuples(
        st.integers(0, 300),
        st.one_of(st.integers(2, 40), st.integers(100, 600), st.integers(2000, 2100)),
        st.booleans(),
    ),
    max_size=9,
)


@given(_singles, _prompts, st.sampled_from([1, 5, 16, 32]), st.integers(0, 20), st.integers(0, 40), st.booleans())
def test_any_step(
    singles: list[tuple[int, bool, bool]],
    prompts: list[tuple[int, int, bool]],
    block: int,
    rows: int,
    items: int,
    together: bool,
) -> None:
    chunks = [chunk(start, 1, block=block, unknown=unknown, samples=samples) for start, unknown, samples in singles]
    chunks += [chunk(start, size, block=block, samples=samples) for start, size, samples in prompts]
    if not chunks:
        return
    sampled = {one.sequence: row for row, one in enumerate(reversed(chunks))}
    rows = 0 if prompts else rows
    step = step_of(chunks, block, sampled, rows=rows, items=items, together=together)
    expected = rows_of(chunks, block, sampled)
    assert found(step)[: len(expected)] == expected
    padding = max(0, rows - len(expected))
    assert found(step)[len(expected) :] == [expected[0]._replace(place=-1)] * padding
    ends = (np.cumsum([one.size for one in chunks]) - 1).tolist()
    assert step.ends.tolist() == [end for end, one in zip(ends, chunks, strict=True) if one.samples]
    assert len(step.lengths) == len(singles) + padding
    assert len(step.tables) == len(singles)
    assert step.singles == len(singles)
    check_work(step, [(row, 1, row) for row in range(len(singles))], items)
    check_singles(step, chunks, block)
    check_prompts(step, chunks, block)
    assert together or not step.shorts
    for short in step.shorts:
        assert (short.rows > 0).sum() > 1 or short.keys[0] > short.rows[0], "who is alone and has no context stays so"
        assert short.rows.max() < ALONE
    assert all(array.dtype == np.int32 for array in step.arrays())
