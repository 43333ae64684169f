"""A tier in Valkey or Redis: one value a block, its header in front. The server evicts by its own ``maxmemory``."""

import threading
import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from twostroke.kv.keys import BlockKey
from twostroke.store.format import Corrupt, Header, pack, unseal
from twostroke.store.threads import Threads
from twostroke.store.tier import Source, Target, TierFailed, Usage, leading

PATIENCE = 2.0  # seconds: to connect, and without a byte
BATCH_BYTES = 8 << 20  # of one reply: the client library holds all of it
_THREADS = 2
_PREFIX = b"2stroke:"
Result = TypeVar("Result")


class ValkeyTier:
    """See ``Tier``. Each thread has a connection."""

    def __init__(self, host: str, port: int, block_bytes: int, fingerprint: str, password: str = "") -> None:
        """``password``: of the server, if it asks for one."""
        self.name = "valkey"
        self._block_bytes = block_bytes
        self._fingerprint = bytes.fromhex(fingerprint)
        self._batch = max(1, BATCH_BYTES // block_bytes)  # blocks
        self._client = redis.Redis(
            host=host,
            port=port,
            password=password or None,
            socket_timeout=PATIENCE,
            socket_connect_timeout=PATIENCE,
            max_connections=_THREADS,
            retry=Retry(NoBackoff(), 0),  # the store knows when to try again
            protocol=2,
        )
        self._threads = Threads(_THREADS, self.name)
        self._lock = threading.Lock()
        self._damaged = 0
        self._usage = Usage(0, 0, 0, 0, 0)

    async def open(self) -> None:
        """See ``Tier.open``."""
        await self._run(self._look)

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
        stored = await self._each(lambda index: here[index] or self._set(keys[index], source, index), len(keys))
        await self._run(self._look)
        return sum(stored)

    def usage(self) -> Usage:
        """See ``Tier.usage``: the server's, whatever else it is used for, when it was last asked."""
        return self._usage

    async def close(self) -> None:
        """See ``Tier.close``."""
        self._threads.close()
        self._client.close()

    # -- in threads ----------------------------------------------------------------------------------------------

    def _exist(self, keys: Sequence[BlockKey]) -> list[bool]:
        with self._client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.exists(self._key(key))
            return [bool(here) for here in pipeline.execute()]

    def _get(self, keys: Sequence[BlockKey], first: int, target: Target) -> list[bool]:
        """Which of the blocks of a batch came whole."""
        some = keys[first : first + self._batch]
        values = self._client.mget([self._key(key) for key in some])
        return [
            isinstance(value, bytes) and self._give(key, memoryview(value), target, index)
            for index, (key, value) in enumerate(zip(some, values, strict=True), first)
        ]

    def _give(self, key: BlockKey, value: memoryview, target: Target, index: int) -> bool:
        try:
            block = unseal(value, key, self._fingerprint, self._block_bytes)
        except Corrupt:
            with self._lock:
                self._damaged += 1
            self._client.delete(self._key(key))
            return False
        return target.place(index, block)

    def _set(self, key: BlockKey, source: Source, index: int) -> bool:
        block = source.block(index)
        if block is None:
            return False
        header = pack(Header(key, self._fingerprint, self._block_bytes, int(time.time()), block.digest))
        try:
            self._client.set(self._key(key), header + bytes(block.payload))
        except redis.exceptions.OutOfMemoryError:  # a server that evicts nothing
            return False
        return True

    def _look(self) -> None:
        about = {**self._client.info("memory"), **self._client.info("stats")}
        self._usage = Usage(
            capacity=int(about.get("maxmemory", 0)),
            used=int(about.get("used_memory", 0)),
            blocks=int(self._client.dbsize()),
            evictions=int(about.get("evicted_keys", 0)),
            damaged=self._damaged,
        )

    def _key(self, key: BlockKey) -> bytes:
        return _PREFIX + self._fingerprint + key

    async def _run(self, work: Callable[[], Result]) -> Result:
        try:
            return await self._threads.run(work)
        except (redis.RedisError, OSError) as error:
            raise TierFailed(str(error)) from error

    async def _each(self, work: Callable[[int], Result], count: int) -> list[Result]:
        try:
            return await self._threads.each(work, count)
        except (redis.RedisError, OSError) as error:
            raise TierFailed(str(error)) from error
