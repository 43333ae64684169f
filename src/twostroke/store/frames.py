"""What goes between a worker and the cache service, pure: messages and blocks. How they are framed, and how both ends
prove that they know the cluster secret, is in ``links/framing.py``.

Each request has one answer: ``Has`` → ``Mask``; ``Get`` → blocks in any order, ``Done``; ``Put`` → ``Mask`` of those
that are wanted, which the client sends → ``Done``; on one machine instead ``Borrow`` → ``Lent`` and ``Offer`` →
``Copied``, see there.
"""

import struct
from typing import Annotated

from msgspec import Meta, Struct

from twostroke.kv.keys import KEY_BYTES, BlockKey
from twostroke.links.framing import Framing, Nonce, Proof, Refused
from twostroke.messages import Count, Manage, Managed, Name, PoolAddress, TierReport
from twostroke.store.tier import TierFailed

VERSION = 4
MAX_MESSAGE = 128 << 10  # bytes
MAX_KEYS = 4096  # in one message
OPERATOR = bytes(16)  # no layout's fingerprint
MANAGE_SECONDS = 600.0  # that an ``Order`` may take: all blocks are read
BLOCK = struct.Struct("!I16s")  # index of the key, xxh3-128 of the payload

Keys = Annotated[bytes, Meta(max_length=KEY_BYTES * MAX_KEYS)]  # one after the other


class Hello(Struct, frozen=True, tag=1, forbid_unknown_fields=True):
    """Client → service, first: and whose blocks it means."""

    nonce: Nonce
    fingerprint: Annotated[bytes, Meta(min_length=16, max_length=16)]
    block_bytes: Annotated[int, Meta(ge=1, le=1 << 31)]


class Challenge(Struct, frozen=True, tag=2, forbid_unknown_fields=True):
    """Service → client."""

    nonce: Nonce


class Has(Struct, frozen=True, tag=4, forbid_unknown_fields=True):
    """Which of these blocks are here?"""

    keys: Keys


class Mask(Struct, frozen=True, tag=11, forbid_unknown_fields=True):
    """One byte for each key: 1 for those that are here, or wanted."""

    mask: Annotated[bytes, Meta(max_length=MAX_KEYS)]


class Get(Struct, frozen=True, tag=6, forbid_unknown_fields=True):
    """Send those of these blocks that are here."""

    keys: Keys


class Put(Struct, frozen=True, tag=7, forbid_unknown_fields=True):
    """I have these blocks."""

    keys: Keys


class Done(Struct, frozen=True, tag=8, forbid_unknown_fields=True):
    """How many blocks were sent, or are stored now."""

    count: Annotated[int, Meta(ge=0, le=MAX_KEYS)]


class Borrow(Struct, frozen=True, tag=12, forbid_unknown_fields=True):
    """Hold these blocks in the service's memory, which I read there if I am on its machine."""

    keys: Keys
    host: Name | None  # ``host_id`` of the client; None: it cannot map that memory


class Lent(Struct, frozen=True, tag=13, forbid_unknown_fields=True):
    """Service → client: the first blocks are in these slots, and stay there until the client has said ``Returned``.
    That is answered by ``Done`` if it came in time; only then do they count. Without slots nothing follows.
    """

    pool: PoolAddress | None  # None: it cannot be mapped; their payloads follow, in this order
    slots: Annotated[list[Count], Meta(max_length=MAX_KEYS)]
    digests: Annotated[bytes, Meta(max_length=16 * MAX_KEYS)]  # one after the other


class Returned(Struct, frozen=True, tag=18, forbid_unknown_fields=True):
    """I have read what was lent."""

    damaged: Annotated[list[Count], Meta(max_length=MAX_KEYS)]  # which of it did not verify: look for yourself


class Order(Struct, frozen=True, tag=16, forbid_unknown_fields=True):
    """From people, on a connection that was opened for ``OPERATOR`` instead of a layout."""

    manage: Manage


class Outcome(Struct, frozen=True, tag=17, forbid_unknown_fields=True):
    """What became of it, on all layouts that are in use."""

    managed: Managed


class Offer(Struct, frozen=True, tag=14, forbid_unknown_fields=True):
    """I have these blocks: in these slots of memory that you can map if you are on my machine. → ``Copied``

    Without digests the service takes them, and asks what it has read by ``Copied``: the client's ``Kept`` is answered
    by ``Done``.
    """

    keys: Keys
    pool: PoolAddress
    slots: Annotated[list[Count], Meta(max_length=MAX_KEYS)]
    digests: Annotated[bytes, Meta(max_length=16 * MAX_KEYS)]  # one after the other; or none


class Copied(Struct, frozen=True, tag=15, forbid_unknown_fields=True):
    """How many of them are here now; none yet that came without digests. Whether the memory could be mapped: if not,
    they must be sent.
    """

    count: Annotated[int, Meta(ge=0, le=MAX_KEYS)]
    mapped: bool


class Kept(Struct, frozen=True, tag=19, forbid_unknown_fields=True):
    """Whether the slots held these blocks all the time: only then they count."""

    kept: bool


class Ask(Struct, frozen=True, tag=9, forbid_unknown_fields=True):
    """How are you?"""


class Answer(Struct, frozen=True, tag=10, forbid_unknown_fields=True):
    """The tiers of this layout."""

    tiers: Annotated[list[TierReport], Meta(max_length=8)]


Request = Has | Get | Put | Ask | Borrow | Offer | Order
FRAMING = Framing(
    b"2sts",
    VERSION,
    Request | Hello | Challenge | Proof | Mask | Done | Answer | Refused | Lent | Returned | Copied | Kept | Outcome,
    most=MAX_MESSAGE,
    block=BLOCK,
    error=TierFailed,
)


def parse_request(body: bytes | bytearray) -> Request:
    """What a client asks. ``TierFailed`` if it is none of our requests."""
    content = FRAMING.parse(body)
    if not isinstance(content, Request):
        raise TierFailed(f"the other end sent {type(content).__name__} instead of a request")
    return content


def split(keys: bytes) -> list[BlockKey]:
    """The keys of a message. ``TierFailed`` if they are not whole."""
    if len(keys) % KEY_BYTES:
        raise TierFailed("a key is cut off")
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]
