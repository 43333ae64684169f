"""Blocks for tests, and what stands in for a pool."""

import asyncio
import hashlib
from collections.abc import Sequence

from twostroke.kv.keys import KEY_BYTES, NOBODY, TENANT_BYTES
from twostroke.store.format import Sealed, seal
from twostroke.store.tier import Place, Source, Target, Tier

BYTES = 1000  # of a block: no whole number of pages
FINGERPRINT = "ab" * 16
OTHER = "cd" * 16


def key(number: int) -> bytes:
    """A block key without a tenant."""
    return NOBODY + hashlib.blake2b(b"key %d" % number, digest_size=KEY_BYTES - TENANT_BYTES).digest()


def keys(*numbers: int) -> list[bytes]:
    """Block keys."""
    return [key(number) for number in numbers]


def owned(tenant: str, *numbers: int) -> list[bytes]:
    """Block keys of a tenant."""
    tag = hashlib.blake2b(tenant.encode(), digest_size=TENANT_BYTES).digest()
    return [tag + one[TENANT_BYTES:] for one in keys(*numbers)]


def payload(one: bytes, size: int = BYTES) -> bytes:
    """What belongs to a key."""
    return (one[::-1] * (size // len(one) + 1))[:size]


class Given(Source):
    """A source that has every block but those that are ``gone``."""

    def __init__(self, asked: Sequence[bytes], gone: Sequence[int] = (), size: int = BYTES) -> None:
        self._asked = asked
        self._gone = gone
        self._size = size

    def block(self, index: int) -> Sealed | None:
        return None if index in self._gone else seal(memoryview(payload(self._asked[index], self._size)))

    def where(self, index: int) -> Place | None:
        return None


class Taken(Target):
    """A target that keeps what it gets, and wants no more than ``most``."""

    def __init__(self, most: int = 1 << 30) -> None:
        self.blocks: dict[int, bytes] = {}
        self._most = most

    def place(self, index: int, block: Sealed) -> bool:
        if len(self.blocks) >= self._most:
            return False
        self.blocks[index] = bytes(block.payload)
        return True

    def right(self, asked: Sequence[bytes], size: int = BYTES) -> bool:
        """Whether every block that came is the one that was asked for."""
        return all(block == payload(asked[index], size) for index, block in self.blocks.items())


async def many_at_once(tier: Tier) -> None:
    """Readers and writers of overlapping prefixes get right blocks, or none."""

    async def one(first: int) -> None:
        some = keys(*range(first % 30, first % 30 + 12))
        await tier.put(some, Given(some))
        target = Taken()
        got = await tier.get(some, target)
        assert target.right(some)
        assert set(range(got)) <= set(target.blocks)

    await asyncio.gather(*(one(7 * i) for i in range(40)))
