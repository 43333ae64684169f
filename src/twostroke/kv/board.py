"""Which leases are alive, in memory that same-host peers map: who has read blocks looks there, instead of asking.

A lease that is exported has a cell with a number that no other lease of the board has had. The owner clears it before
the lease ends, so before anything can be written into its slots; whoever still finds the number, after a read, has read
what was leased. That the owner is dead does no harm: it writes nothing any more.
"""

import secrets

import numpy as np
import numpy.typing as npt

from twostroke.kv.memory import Bytes, PoolMemory
from twostroke.messages import Posted

CELLS = 4096  # leases at once; those beyond have none, and their readers ask
_BYTES = 8  # of a cell
_BITS = 62  # of a number


class Board:
    """The owner's end. On the event loop."""

    def __init__(self, instance: str) -> None:
        """``instance``: of the worker, as in the address of its pool. ``MemoryTooSmall``."""
        self._memory = PoolMemory(1, CELLS * _BYTES, instance)
        self.cells = self._memory.slots
        self._numbers = _numbers(self.cells)
        self._free = list(range(CELLS))

    def post(self) -> Posted | None:
        """Of a lease that is alive; None if there is no cell left."""
        if not self._free:
            return None
        cell, number = self._free.pop(), self._number()
        self._numbers[cell] = number
        return Posted(self._memory.address, cell, number)

    def clear(self, posted: Posted) -> None:
        """The lease is about to end."""
        self._numbers[posted.cell] = 0
        self._free.append(posted.cell)

    def _number(self) -> int:
        return secrets.randbits(_BITS) | 1

    def close(self) -> None:
        """Give the memory back."""
        self.cells = np.empty((0, 0), np.uint8)
        self._numbers = _numbers(self.cells)
        self._memory.close()


def alive(cells: Bytes, posted: Posted) -> bool:
    """Whether the lease is alive. ``cells``: the board's, as ``map_peer`` makes them of its address."""
    if cells.shape != (1, CELLS * _BYTES) or posted.cell >= CELLS:
        return False
    return int(_numbers(cells)[posted.cell]) == posted.number


def _numbers(cells: Bytes) -> npt.NDArray[np.uint64]:
    return cells.reshape(-1).view(np.uint64)
