"""What the cache service's tiers read blocks from and hand them to: its clients."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from twostroke.kv.copying import copy_digested
from twostroke.kv.direct import Extent
from twostroke.kv.memory import Bytes
from twostroke.links.wire import Wire
from twostroke.store.format import Sealed, seal
from twostroke.store.frames import FRAMING
from twostroke.store.service import PATIENCE, SLOWEST
from twostroke.store.slots import Provisional
from twostroke.store.tier import Place, Source, Target


class Outlet(Target):
    """See ``Target``: sends blocks as they are read, from several threads."""

    def __init__(self, wire: Wire) -> None:
        """``wire``: whereto."""
        self.first = 0  # index of the first block of the present call
        self.sent = 0
        self._wire = wire
        self._lock = threading.Lock()
        self._open = True

    def place(self, index: int, block: Sealed) -> bool:
        """See ``Target.place``."""
        with self._lock:
            if not self._open:
                return False
            try:
                seconds = PATIENCE + len(block.payload) / SLOWEST
                head = FRAMING.block_head(block.payload, self.first + index, block.digest)
                self._wire.send(head, block.payload, seconds=seconds)
            except OSError:
                self._open = False
                return False
            self.sent += 1
            return True

    def close(self) -> None:
        """Nothing more is sent. ``OSError`` if the client is gone or too slow."""
        with self._lock:
            gone, self._open = not self._open, False
        if gone:
            raise ConnectionError("the client is gone, or too slow")


class Offered(Provisional):
    """See ``Provisional``: blocks in a client's memory, of which it has to say afterwards that it held them there."""

    def __init__(self, payloads: Sequence[memoryview]) -> None:
        """``payloads``: in that memory."""
        self.read = threading.Event()  # nothing more of them is read
        self.held = Future[bool]()  # what the client says then
        self._payloads = payloads

    def block(self, index: int) -> Sealed | None:
        """See ``Source.block``."""
        return seal(self._payloads[index])

    def fill(self, indexes: Sequence[int], memory: Bytes, slots: Sequence[int]) -> list[bytes | None]:
        """See ``Source.fill``."""
        pairs = zip(indexes, slots, strict=True)
        return [copy_digested(memory[slot], self._payloads[index]) for index, slot in pairs]

    def save(self, index: int, extent: Extent, head: Callable[[bytes], None] | None = None) -> bytes | None:
        """See ``Source.save``."""
        digest = extent.load(self._payloads[index])
        if head is not None:
            head(digest)
        extent.flush()
        return digest

    def where(self, index: int) -> Place | None:
        """See ``Source.where``."""
        return None

    async def kept(self) -> bool:
        """See ``Provisional.kept``."""
        self.read.set()
        return await asyncio.wrap_future(self.held)


class Taken(Source):
    """See ``Source``: blocks that a client has sent, or let us map."""

    def __init__(self, blocks: Sequence[Sealed]) -> None:
        """``blocks``: by number."""
        self._blocks = blocks

    def block(self, index: int) -> Sealed | None:
        """See ``Source.block``."""
        return self._blocks[index]

    def where(self, index: int) -> Place | None:
        """See ``Source.where``."""
        return None
