"""One step as arrays of the host, in the form in which a CUDA device takes them."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from math import isqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from twostroke.engine.scheduler import Chunk, Sequence

Ints = npt.NDArray[np.int32]
TILE = 64  # tokens of context, below which those of a single token are not split
TOGETHER = 8  # tokens that follow each other and read their context together
PARTS = 64  # of one context, at most
BUNDLE = 256  # sequences that are attended to in one call: for more, FlashAttention takes a kernel of its own
_ALONE = 2048  # tokens from which on a chunk is attended to by itself, however many others there are


class Long(NamedTuple):
    """A chunk that is attended to by itself: rows ``first .. first + tokens - 1`` are its tokens ``start ..``."""

    first: int
    tokens: int
    start: int
    table: Ints  # [blocks]: slots of tokens 0 .. start + count - 1


class Short(NamedTuple):
    """Chunks that are attended to together; filled up with empty ones."""

    rows: Ints  # [sequences]: tokens
    keys: Ints  # [sequences]: tokens of context, its own included
    starts: Ints  # [sequences + 1]: first rows
    table: Ints  # [sequences, pages]: slots


class _Read(NamedTuple):
    """Rows of one sequence, behind each other, that read its context together."""

    first: int
    rows: int
    table: int
    length: int  # tokens of context of the last one, its own included


class Room(NamedTuple):
    """The largest step of prompts that a captured graph takes."""

    rows: int  # tokens
    sequences: int
    pages: int  # of one sequence

    def holds(self, chunks: Seq[Chunk], block: int) -> bool:
        """Whether these chunks, none of a single token, fit."""
        pages = -(-max(chunk.start + chunk.size for chunk in chunks) // block)
        return sum(c.size for c in chunks) <= self.rows and len(chunks) <= self.sequences and pages <= self.pages


@dataclass(frozen=True)
class Step:
    """What one step computes. Rows of single tokens come first."""

    ids: Ints  # [rows]: token ids; -1 - i is what the step before sampled as its i-th
    positions: Ints  # [rows]
    places: Ints  # [rows]: slot * block_tokens + offset, where its K and V go; -1: nowhere
    lengths: Ints  # [singles]: tokens of context, the row's own included
    work: Ints  # [items, 5]: (row, rows, table, part, parts): rows of one sequence that follow each other, its table,
    # and which part of their context, of how many; 0 of 0 is nothing
    tables: Ints  # [singles or their sequences, width]: slots
    singles: int  # rows of single tokens, less those that only fill up
    ends: Ints  # rows that are sampled from
    longs: Seq[Long] = field(default=())
    shorts: Seq[Short] = field(default=())

    def arrays(self) -> list[Ints]:
        """All arrays. What comes after ``tables`` can only be found by who knows their size."""
        of_longs = [one.table for one in self.longs]
        of_shorts = [a for one in self.shorts for a in (one.rows, one.keys, one.starts, one.table)]
        sizes = np.array([self.tables.shape[1], self.singles], np.int32)
        return [
            self.ids,
            self.positions,
            self.places,
            self.lengths,
            self.work,
            sizes,
            self.tables,
            self.ends,
            *of_longs,
            *of_shorts,
        ]


def step_of(
    chunks: Seq[Chunk],
    block: int,
    sampled: Mapping[Sequence, int],
    *,
    rows: int = 0,
    items: int = 0,
    together: bool = True,
    apart: bool = False,
) -> Step:
    """The arrays of these chunks, single tokens first.

    Args:
        chunks: at least one.
        block: tokens in a block.
        sampled: which token of the step before is each sequence's, where it is not known yet.
        rows: fill up with copies of the first row, which must be like a single token's, to this many. They are stored
            nowhere.
        items: into how many parts the contexts of single tokens are split, all together; at least one each.
        together: whether short chunks may be attended to together.
        apart: whether every token of a chunk is a row like a single token's, up to ``TOGETHER`` of which read their
            context together.
    """
    ids: list[int] = []
    ranges, places, longs = [], [], []
    tables: list[list[int]] = []
    reads: list[_Read] = []
    for sequence, start, size, _ in chunks:
        end = start + size
        known = sequence.tokens[start:end]
        table = sequence.slots()[: -(-end // block)]
        if size == 1:
            reads.append(_Read(len(ids), 1, len(tables), end))
            ids += known or [-1 - sampled[sequence]]
            tables.append(table)
            places.append(np.array([table[-1] * block + start % block], np.int32))
            ranges.append(np.array([start], np.int32))
        else:
            slots = np.array(table, np.int32)
            at = np.arange(start, end, dtype=np.int32)
            if apart:
                for first in range(0, size, TOGETHER):
                    count = min(TOGETHER, size - first)
                    reads.append(_Read(len(ids) + first, count, len(tables), start + first + count))
                tables.append(table)
            else:
                longs.append(Long(len(ids), size, start, slots))
            ids += known
            ranges.append(at)
            places.append(slots[at // block] * block + at % block)
    ends = np.cumsum([chunk.size for chunk in chunks], dtype=np.int32) - 1
    spare = max(0, rows - len(ids))
    singles = sum(read.rows for read in reads)
    slots = np.zeros((len(tables), max(map(len, tables), default=0)), np.int32)
    for row, table in enumerate(tables):
        slots[row, : len(table)] = table
    positions = np.concatenate([*ranges, *[ranges[0][:1]] * spare])
    alone, shorts = _bundle(longs) if together else (longs, [])
    return Step(
        ids=np.array(ids + ids[:1] * spare, np.int32),
        positions=positions,
        places=np.concatenate([*places, np.full(spare, -1, np.int32)]),
        lengths=positions[: singles + spare] + 1,
        work=_split(reads, max(items, singles + spare)),
        tables=slots,
        singles=singles,
        ends=ends[[chunk.samples for chunk in chunks]],
        longs=alone,
        shorts=shorts,
    )


def prompts_of(chunks: Seq[Chunk], block: int, room: Room) -> Step:
    """The arrays of these chunks, none of a single token, filled up to ``room``, so that their sizes depend on nothing
    else.
    """
    step = step_of(chunks, block, {}, together=False)
    spare = room.rows - len(step.ids)
    return Step(
        ids=np.pad(step.ids, (0, spare)),
        positions=np.pad(step.positions, (0, spare)),
        places=np.pad(step.places, (0, spare), constant_values=-1),
        lengths=step.lengths,
        work=step.work,
        tables=step.tables,
        singles=0,
        ends=np.pad(step.ends, (0, room.sequences - len(step.ends))),
        shorts=[_together(step.longs, room.sequences, room.pages)],
    )


def _split(reads: Seq[_Read], items: int) -> Ints:
    """``Step.work``. No part is longer than need be for there to be no more than ``items``, so that all who compute
    them have like amounts to do.
    """
    work = np.zeros((items, 5), np.int32)
    if not reads:
        return work
    whose = np.array(reads, np.int32)
    tiles = -(-whose[:, 3] // TILE)
    most = int(tiles.max())
    # Joining one part takes about an eighth of the time of computing one tile.
    size = max(-(-int(tiles.sum()) // items), -(-most // min(PARTS, isqrt(8 * most))))
    while (parts := -(-tiles // size)).sum() > items:
        size += 1 + size // 16
    each = np.repeat(np.arange(len(reads)), parts)
    work[: len(each), :3] = whose[each, :3]
    work[: len(each), 3] = np.arange(len(each)) - (np.cumsum(parts) - parts)[each]
    work[: len(each), 4] = parts[each]
    return work


def _bundle(chunks: list[Long]) -> tuple[list[Long], list[Short]]:
    """Those that are attended to alone, and bundles of the others."""
    short = [chunk for chunk in chunks if chunk.tokens < _ALONE]
    if len(short) == 1 and short[0].start == 0:
        return chunks, []
    bundles = [short[first : first + BUNDLE] for first in range(0, len(short), BUNDLE)]
    return [chunk for chunk in chunks if chunk.tokens >= _ALONE], [_together(bundle) for bundle in bundles]


def _together(chunks: Seq[Long], sequences: int = 0, pages: int = 0) -> Short:
    """Filled up to so many ``sequences`` of so many ``pages``."""
    sequences = max(sequences, len(chunks))
    pages = max(pages, *(len(chunk.table) for chunk in chunks))
    rows, keys = np.zeros(sequences, np.int32), np.ones(sequences, np.int32)
    starts = np.zeros(sequences + 1, np.int32)
    table = np.zeros((sequences, pages), np.int32)
    for index, chunk in enumerate(chunks):
        rows[index], keys[index], starts[index] = chunk.tokens, chunk.start + chunk.tokens, chunk.first
        table[index, : len(chunk.table)] = chunk.table
    starts[len(chunks) :] = chunks[-1].first + chunks[-1].tokens
    return Short(rows, keys, starts, table)
