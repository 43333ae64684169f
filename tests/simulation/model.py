"""A model whose next token depends on every KV entry before it, an engine without a thread, and a link in memory.

A KV entry is one number: a hash of its token, its position, and all entries before it, as they are read from the slots.
So a block that is stale, torn, missing or another request's shows in every token that is sampled after it.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING

import numpy as np

from tests.simulation.clock import Dice, Stuck
from twostroke.engine.engine import Engine, _Step
from twostroke.engine.scheduler import Chunk
from twostroke.errors import HandoverFailed
from twostroke.kv.board import CELLS, Board, alive
from twostroke.kv.layout import Layout
from twostroke.kv.pool import Pool, Slot
from twostroke.links.link import Claim, check_read, settled
from twostroke.messages import MemoryFile, PoolAddress, Token

if TYPE_CHECKING:
    from tests.simulation.world import World

BLOCK_TOKENS = 4
VOCAB = 251
LAYOUT = Layout(layers=1, kv_heads=1, head_dim=1, block_tokens=BLOCK_TOKENS, dtype="float32", model="simulated")
_MASK = (1 << 64) - 1


def entry(token: int, position: int, before: int) -> int:
    """The KV entry of a token; ``before`` is the sum of all entries before it."""
    mixed = (token * 0x9E3779B97F4A7C15 + position * 0xC2B2AE3D27D4EB4F + before * 0xFF51AFD7ED558CCD + 1) & _MASK
    return (mixed ^ (mixed >> 29)) & _MASK


def sampled(total: int) -> int:
    """The next token, by the sum of all entries."""
    return ((total * 0xD6E8FEB86659FD93 & _MASK) >> 32) % VOCAB


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """What anybody must answer."""
    total, output = 0, []
    for position, token in enumerate(prompt):
        total += entry(token, position, total)
    for position in range(len(prompt), len(prompt) + count):
        output.append(sampled(total))
        total += entry(output[-1], position, total)
    return output


@dataclass
class Step:
    """A step under way. It reads and writes the slots as it is launched."""

    sampled: list[Token]

    def tokens(self) -> list[Token]:
        return self.sampled


class SimModel:
    """What the engine needs of ``Model``."""

    layout = LAYOUT
    vocab_size = VOCAB
    eos: frozenset[int] = frozenset()
    device = "simulated"
    threads = 1
    depth = 1

    def __init__(self, memory: list[list[int]]) -> None:
        self._memory = memory

    def launch(self, chunks: Sequence[Chunk]) -> Step:
        out = []
        for sequence, start, size, samples in chunks:
            slots, tokens = sequence.slots(), sequence.tokens
            total = sum(self._memory[slots[at // BLOCK_TOKENS]][at % BLOCK_TOKENS] for at in range(start))
            for position in range(start, start + size):
                new = entry(tokens[position], position, total)
                self._memory[slots[position // BLOCK_TOKENS]][position % BLOCK_TOKENS] = new
                total += new
            if samples:
                out.append(Token(sampled(total)))
        return Step(out)


class _Bell:
    """Instead of the engine's lock: there is one thread, and whoever notifies it wakes the task that steps."""

    def __init__(self) -> None:
        self.rung = asyncio.Event()

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...

    def notify(self) -> None:
        self.rung.set()


class SimEngine(Engine):
    """The real engine, whose steps a task takes."""

    def __init__(self, model: SimModel, pool: Pool, dice: Dice, seconds: float) -> None:
        """``seconds``: of a step, about."""
        super().__init__(model, pool, max_batch=4, token_budget=8)  # type: ignore[arg-type]
        self._seconds = seconds
        self._bell = _Bell()
        self._lock = self._bell  # type: ignore[assignment]
        self._dice = dice
        self._loop = asyncio.get_running_loop()

    async def step_for_ever(self) -> None:
        """As the engine's thread does, but that a step takes virtual time."""
        flying: deque[_Step] = deque()
        while True:
            self._bell.rung.clear()
            chunks = self._plan(wait=False)
            if not chunks:
                counts = self._pool.counts()
                if counts.free + counts.cached + counts.leased != counts.total:
                    raise Stuck(f"slots do not add up: {counts}")
                await self._bell.rung.wait()
                continue
            self._launch(chunks, flying)
            await asyncio.sleep(self._dice.delay(self._seconds))
            self._commit(flying.popleft())


class SimLink:
    """Reads other pools slot by slot, each at its own time: what is overwritten meanwhile arrives torn."""

    name = "memory"

    def __init__(self, own: list[list[int]], pools: dict[str, list[list[int]]], world: "World") -> None:
        self._own = own
        self._pools = pools
        self._world = world

    def reaches(self, peer: PoolAddress) -> bool:
        return peer.instance in self._pools

    async def read(self, peer: PoolAddress, remote: Sequence[Slot], local: Sequence[Slot], claim: Claim) -> bool | None:
        check_read(LAYOUT.block_bytes, peer, remote)
        theirs = self._pools.get(peer.instance)
        if theirs is None:
            raise HandoverFailed("the peer's process is gone")
        stopped = False

        def stop() -> None:
            nonlocal stopped
            stopped = not self._world.copies_whole

        async def copy() -> None:
            dice, faults = self._world.dice, self._world.network.faults
            for source, target in zip(remote, local, strict=True):
                await asyncio.sleep(dice.delay(self._world.copy_seconds))
                if stopped or (faults.cut and dice.chance(faults.cut)):
                    raise HandoverFailed("the link broke")
                self._own[target][:] = theirs[source]

        await settled(asyncio.ensure_future(copy()), stop)
        board = self._world.boards[peer.instance]
        if claim.posted is None or board is None or peer.instance not in self._pools:
            return None
        return alive(board.cells, claim.posted)

    def close(self) -> None: ...


class SimBoard(Board):
    """Memory of this process."""

    def __init__(self, instance: str) -> None:
        self.cells = np.zeros((1, 8 * CELLS), np.uint8)
        self._memory = SimpleNamespace(address=address(instance, 1), close=lambda: None)  # type: ignore[assignment]
        self._numbers = self.cells.reshape(-1).view(np.uint64)
        self._free = list(range(len(self._numbers)))
        self._count = 0

    def _number(self) -> int:
        self._count += 1
        return self._count


def address(instance: str, slots: int) -> PoolAddress:
    """Of a simulated pool."""
    return PoolAddress("simulated", 1, instance, slots, LAYOUT.block_bytes, MemoryFile(0))
