"""Which leases are alive, as the owner says and as a reader sees."""

import os
import random

from twostroke.kv import board as boards
from twostroke.kv.board import Board, alive
from twostroke.kv.memory import map_peer
from twostroke.messages import Posted


def test_a_reader_sees_a_lease_until_it_ends() -> None:
    board = Board("owner")
    first, second = board.post(), board.post()
    assert first is not None
    assert second is not None
    cells = map_peer(first.board)
    assert alive(cells, first)
    assert alive(cells, second)
    board.clear(first)
    assert not alive(cells, first)
    assert alive(cells, second)
    board.close()


def test_whoever_has_the_cell_next_is_somebody_else() -> None:
    board = Board("owner")
    seen: list[Posted] = []
    for _ in range(100):
        posted = board.post()
        assert posted is not None
        assert not any(alive(board.cells, old) for old in seen)
        assert alive(board.cells, posted)
        board.clear(posted)
        seen.append(posted)
    assert len({posted.number for posted in seen}) == 100
    board.close()


def test_with_every_cell_taken_readers_have_to_ask() -> None:
    board, rng = Board("owner"), random.Random(1)
    taken = [board.post() for _ in range(boards.CELLS)]
    assert board.post() is None
    for posted in rng.sample(taken, 10):
        assert posted is not None
        board.clear(posted)
        assert not alive(board.cells, posted)
    assert sum(posted is not None and alive(board.cells, posted) for posted in taken) == boards.CELLS - 10
    assert board.post() is not None
    board.close()


def test_a_cell_outside_the_board_is_not_alive() -> None:
    board = Board("owner")
    posted = board.post()
    assert posted is not None
    assert not alive(board.cells, Posted(posted.board, boards.CELLS, posted.number))
    assert not alive(board.cells[:, :-1], posted), "that is no board"
    board.close()


def test_closing_leaves_no_file() -> None:
    before = len(os.listdir("/proc/self/fd"))
    Board("owner").close()
    assert len(os.listdir("/proc/self/fd")) == before
