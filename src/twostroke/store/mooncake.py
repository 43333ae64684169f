"""A tier in a Mooncake Store: one object a block, its header in front. The store's master knows where each object
is, and evicts; its memory is what its clients have added to it. Blocks travel over TCP between the clients.
"""

import asyncio
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from twostroke import config
from twostroke.kv.copying import copy
from twostroke.kv.direct import aligned
from twostroke.kv.keys import BlockKey
from twostroke.store.format import HEADER_BYTES, Corrupt, Header, pack, unseal
from twostroke.store.threads import Threads
from twostroke.store.tier import Source, Target, TierFailed, Usage, leading

if TYPE_CHECKING:
    from mooncake.store import MooncakeDistributedStore

PATIENCE = 2.0  # seconds: to reach the master, and for each of its answers
BATCH_BYTES = 8 << 20  # of one call
_THREADS = 2
_LATE_SECONDS = 60.0  # after which a transfer that was given up is over
_PREFIX = "2stroke:"
# Codes of its ErrorCode in types.h.
_FULL = -200
_LARGER = -600  # than the buffer
_NOT_HERE = frozenset({-703, -704, -707})  # it is being written, is not there, was evicted meanwhile
_NOT_STORED = frozenset({_FULL, -703, -705})  # or somebody else is writing it
Result = TypeVar("Result")


class _Buffer:
    """Memory that the client may send from and receive into, for some objects."""

    def __init__(self, count: int, size: int) -> None:
        self._memory = aligned(count * size)
        self._size = size
        self.length = len(self._memory)
        self.address: int = np.frombuffer(self._memory, np.uint8).ctypes.data

    def object(self, index: int) -> memoryview:
        """The bytes of one."""
        return self._memory[index * self._size : (index + 1) * self._size]

    def addresses(self, count: int) -> list[int]:
        """Where the first ones begin."""
        return [self.address + index * self._size for index in range(count)]


class MooncakeTier:
    """See ``Tier``."""

    def __init__(self, host: str, port: int, block_bytes: int, fingerprint: str, memory: int = 0) -> None:
        """``host``, ``port``: of the master. ``memory``: bytes that we add to the store's, for as long as we are there.

        Raises:
            ImportError: Mooncake is not installed.
        """
        config.quieten_mooncake(PATIENCE)
        from mooncake.store import MooncakeDistributedStore

        self._make = MooncakeDistributedStore
        self.name = "mooncake"
        self._master = (host, port)
        self._memory = memory
        self._block_bytes = block_bytes
        self._fingerprint = bytes.fromhex(fingerprint)
        self._size = HEADER_BYTES + block_bytes  # of an object
        self._batch = max(1, BATCH_BYTES // self._size)  # objects
        self._client: MooncakeDistributedStore | None = None
        self._threads = Threads(_THREADS, self.name)
        self._lock = threading.Lock()  # of the buffers and counters
        self._free: list[_Buffer] = []
        self._late: deque[tuple[float, _Buffer]] = deque()  # since when; a transfer may still write into them
        self._stored = 0
        self._damaged = 0
        self._using = 0  # calls in threads
        self._idle = asyncio.Event()
        self._idle.set()

    async def open(self) -> None:
        """See ``Tier.open``. The client finds a master that was restarted by itself."""
        await self._run(self._open)

    async def contains(self, keys: Sequence[BlockKey]) -> Sequence[bool]:
        """See ``Tier.contains``."""
        return await self._run(lambda: self._exist(keys))

    async def get(self, keys: Sequence[BlockKey], target: Target) -> int:
        """See ``Tier.get``."""
        parts = range(0, len(keys), self._batch)
        came = await self._each(lambda part: self._get(keys, parts[part], target), len(parts))
        return leading(chain.from_iterable(came))

    async def put(self, keys: Sequence[BlockKey], source: Source) -> int:
        """See ``Tier.put``."""
        here = await self.contains(keys)
        missing = [index for index, one in enumerate(here) if not one]
        parts = [missing[first : first + self._batch] for first in range(0, len(missing), self._batch)]
        stored = sum(await self._each(lambda part: self._set(keys, parts[part], source), len(parts)))
        self._stored += stored
        return len(keys) - len(missing) + stored

    def usage(self) -> Usage:
        """See ``Tier.usage``: the memory that we have added, and the blocks that we have stored anywhere. A client is
        not told what the master has evicted of them.
        """
        return Usage(self._memory, self._stored * self._size, self._stored, 0, self._damaged)

    async def close(self) -> None:
        """See ``Tier.close``. What lies in our memory goes with it."""
        await self._idle.wait()  # the client's code must not end under a call
        await self._threads.run(self._shut)
        self._threads.close()

    # -- in threads ----------------------------------------------------------------------------------------------

    def _open(self) -> None:
        with socket.create_connection(self._master, PATIENCE) as probe:  # the client itself would try for a minute
            own = probe.getsockname()[0]
        if self._client is None:
            config.bind_mooncake(own)
            client = self._make()
            code = client.setup(
                {
                    "local_hostname": own,
                    "metadata_server": "P2PHANDSHAKE",
                    "global_segment_size": str(self._memory),
                    "local_buffer_size": "0",
                    "protocol": "tcp",
                    "master_server_addr": f"{self._master[0]}:{self._master[1]}",
                }
            )
            if code:
                raise TierFailed(f"Mooncake's client does not start: error {code}")
            self._client = client
        self._exist([bytes(16)])

    def _exist(self, keys: Sequence[BlockKey]) -> list[bool]:
        answers = self._open_client.batch_is_exist([self._name(key) for key in keys])
        for answer in answers:
            if answer < 0:
                raise TierFailed(f"Mooncake's master does not answer: error {answer}")
        return [answer == 1 for answer in answers]

    def _get(self, keys: Sequence[BlockKey], first: int, target: Target) -> list[bool]:
        """Which of the blocks of a batch came whole."""
        some = keys[first : first + self._batch]
        with self._buffer() as buffer:
            names, count = [self._name(key) for key in some], len(some)
            sizes = self._open_client.batch_get_into(names, buffer.addresses(count), [self._size] * count)
            _check(sizes, _NOT_HERE | {_LARGER})
            return [
                size not in _NOT_HERE and self._give(key, buffer.object(at)[: max(0, size)], target, first + at)
                for at, (key, size) in enumerate(zip(some, sizes, strict=True))
            ]

    def _give(self, key: BlockKey, value: memoryview, target: Target, index: int) -> bool:
        try:
            block = unseal(value, key, self._fingerprint, self._block_bytes)
        except Corrupt:
            with self._lock:
                self._damaged += 1
            self._open_client.remove(self._name(key), True)
            return False
        return target.place(index, block)

    def _set(self, keys: Sequence[BlockKey], indices: Sequence[int], source: Source) -> int:
        """Store a batch; how many blocks of it are there now."""
        names: list[str] = []
        with self._buffer() as buffer:
            for index in indices:
                block = source.block(index)
                if block is None:
                    continue
                value = buffer.object(len(names))
                header = Header(keys[index], self._fingerprint, self._block_bytes, int(time.time()), block.digest)
                value[:HEADER_BYTES] = pack(header)
                copy(value[HEADER_BYTES:], block.payload)
                names.append(self._name(keys[index]))
            if not (count := len(names)):
                return 0
            codes: list[int] = self._open_client.batch_put_from(names, buffer.addresses(count), [self._size] * count)
            _check(codes, _NOT_STORED)
        return codes.count(0)

    @contextmanager
    def _buffer(self) -> Iterator[_Buffer]:
        """A buffer, for one call. After one that failed a transfer may go on: it must not write what was verified."""
        with self._lock:
            if self._late and self._late[0][0] + _LATE_SECONDS < time.monotonic():
                self._free.append(self._late.popleft()[1])
            buffer = self._free.pop() if self._free else None
        if buffer is None:
            buffer = _Buffer(self._batch, self._size)
            if code := self._open_client.register_buffer(buffer.address, buffer.length):
                raise TierFailed(f"Mooncake's client does not take a buffer: error {code}")
        try:
            yield buffer
        except BaseException:
            with self._lock:
                self._late.append((time.monotonic(), buffer))
            raise
        with self._lock:
            self._free.append(buffer)

    def _shut(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    @property
    def _open_client(self) -> "MooncakeDistributedStore":
        if self._client is None:
            raise TierFailed("it is not open")
        return self._client

    def _name(self, key: BlockKey) -> str:
        return f"{_PREFIX}{self._fingerprint.hex()}:{key.hex()}"

    async def _run(self, work: Callable[[], Result]) -> Result:
        return (await self._each(lambda _: work(), 1))[0]

    async def _each(self, work: Callable[[int], Result], count: int) -> list[Result]:
        self._use(1)
        try:
            return await self._threads.each(work, count)
        except OSError as error:
            raise TierFailed(str(error)) from error
        finally:
            self._use(-1)

    def _use(self, change: int) -> None:
        self._using += change
        self._idle.clear() if self._using else self._idle.set()


def _check(codes: Sequence[int], harmless: frozenset[int]) -> None:
    """``TierFailed`` if one of them is an error that is not ``harmless``."""
    for code in codes:
        if code < 0 and code not in harmless:
            raise TierFailed(f"Mooncake failed: error {code}")
