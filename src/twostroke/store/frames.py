"""What goes between a worker and the cache service, pure: frames, and what is refused of what comes.

A frame is ``HEADER`` and a body: a message (MessagePack, typed, at most ``MAX_MESSAGE`` bytes), or a block: ``BLOCK``
and its payload. Nothing is decoded before its size and version are checked.

The client speaks first: ``Hello``, and ``Proof`` that it knows the cluster secret, bound to both nonces; so does the
service. Then each request has one answer: ``Has`` → ``Mask``; ``Get`` → blocks in any order, ``Done``; ``Put`` →
``Mask`` of those that are wanted, which the client sends → ``Done``; on one machine instead ``Borrow`` → ``Lent`` and
``Offer`` → ``Copied``, see there.
"""

import hmac
import struct
from enum import IntEnum
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from twostroke.kv.keys import KEY_BYTES, BlockKey
from twostroke.messages import Count, Manage, Managed, Name, PoolAddress, TierReport
from twostroke.store.format import Sealed
from twostroke.store.tier import TierFailed

VERSION = 2
MAX_MESSAGE = 128 << 10  # bytes
MAX_KEYS = 4096  # in one message
NONCE = 32  # bytes
OPERATOR = bytes(16)  # no layout's fingerprint
MANAGE_SECONDS = 600.0  # that an ``Order`` may take: all blocks are read

_MAGIC = b"2sts"
HEADER = struct.Struct("!4sHHI")  # magic, version, kind, bytes of the body
BLOCK = struct.Struct("!I16s")  # index of the key, xxh3-128 of the payload

Nonce = Annotated[bytes, Meta(min_length=NONCE, max_length=NONCE)]
Keys = Annotated[bytes, Meta(max_length=KEY_BYTES * MAX_KEYS)]  # one after the other


class Kind(IntEnum):
    """What a frame's body is."""

    MESSAGE = 1
    BLOCK = 2


class Hello(Struct, frozen=True, tag=1, forbid_unknown_fields=True):
    """Client → service, first: and whose blocks it means."""

    nonce: Nonce
    fingerprint: Annotated[bytes, Meta(min_length=16, max_length=16)]
    block_bytes: Annotated[int, Meta(ge=1, le=1 << 31)]


class Challenge(Struct, frozen=True, tag=2, forbid_unknown_fields=True):
    """Service → client."""

    nonce: Nonce


class Proof(Struct, frozen=True, tag=3, forbid_unknown_fields=True):
    """Client → service, then service → client: ``prove`` of all that was said."""

    mac: Annotated[bytes, Meta(min_length=32, max_length=32)]


class Has(Struct, frozen=True, tag=4, forbid_unknown_fields=True):
    """Which of these blocks are here?"""

    keys: Keys


class Mask(Struct, frozen=True, tag=5, forbid_unknown_fields=True):
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
    """Hold these blocks in the service's memory, which I can map if I am on its machine."""

    keys: Keys
    host: Name  # ``host_id`` of the client


class Lent(Struct, frozen=True, tag=13, forbid_unknown_fields=True):
    """Service → client: the first blocks are in these slots, and stay there until the client has said ``Done``. That is
    answered by ``Done`` if it came in time; only then do they count. Without slots nothing follows.
    """

    pool: PoolAddress | None  # None: its memory cannot be mapped, from there or at all
    slots: Annotated[list[Count], Meta(max_length=MAX_KEYS)]
    digests: Annotated[bytes, Meta(max_length=16 * MAX_KEYS)]  # one after the other


class Order(Struct, frozen=True, tag=16, forbid_unknown_fields=True):
    """From people, on a connection that was opened for ``OPERATOR`` instead of a layout."""

    manage: Manage


class Outcome(Struct, frozen=True, tag=17, forbid_unknown_fields=True):
    """What became of it, on all layouts that are in use."""

    managed: Managed


class Offer(Struct, frozen=True, tag=14, forbid_unknown_fields=True):
    """I have these blocks: in these slots of memory that you can map if you are on my machine. → ``Copied``"""

    keys: Keys
    pool: PoolAddress
    slots: Annotated[list[Count], Meta(max_length=MAX_KEYS)]
    digests: Annotated[bytes, Meta(max_length=16 * MAX_KEYS)]  # one after the other


class Copied(Struct, frozen=True, tag=15, forbid_unknown_fields=True):
    """How many of them are here now. Whether the memory could be mapped: if not, they must be sent."""

    count: Annotated[int, Meta(ge=0, le=MAX_KEYS)]
    mapped: bool


class Ask(Struct, frozen=True, tag=9, forbid_unknown_fields=True):
    """How are you?"""


class Answer(Struct, frozen=True, tag=10, forbid_unknown_fields=True):
    """The tiers of this layout."""

    tiers: Annotated[list[TierReport], Meta(max_length=8)]


class Refused(Struct, frozen=True, tag=11, forbid_unknown_fields=True):
    """Service → client, instead of any answer; nothing follows."""

    reason: Annotated[str, Meta(max_length=1024)]


Message = (
    Hello
    | Challenge
    | Proof
    | Has
    | Mask
    | Get
    | Put
    | Done
    | Ask
    | Answer
    | Refused
    | Borrow
    | Lent
    | Offer
    | Copied
    | Order
    | Outcome
)
Request = Has | Get | Put | Ask | Borrow | Offer | Order
Wanted = TypeVar("Wanted", bound=Message)
_request: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_message: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def message(content: Message) -> bytes:
    """A message's frame."""
    body = msgspec.msgpack.encode(content)
    return HEADER.pack(_MAGIC, VERSION, Kind.MESSAGE, len(body)) + body


def block_head(index: int, block: Sealed) -> bytes:
    """What goes in front of a block's payload."""
    size = BLOCK.size + len(block.payload)
    return HEADER.pack(_MAGIC, VERSION, Kind.BLOCK, size) + BLOCK.pack(index, block.digest)


def parse_header(header: bytes | bytearray, block_bytes: int | None = None) -> tuple[Kind, int]:
    """Kind and bytes of a frame's body. A block is only expected where ``block_bytes`` is given.

    Raises:
        TierFailed: this is no frame of ours, of another version, or not one that is expected.
    """
    magic, version, kind, size = HEADER.unpack(header)
    if magic != _MAGIC:
        raise TierFailed("the other end does not speak the cache service's protocol")
    if version != VERSION:
        raise TierFailed(f"the other end speaks version {version}, this one {VERSION}")
    if kind == Kind.MESSAGE and size <= MAX_MESSAGE:
        return Kind.MESSAGE, size
    if kind == Kind.BLOCK and block_bytes is not None and size == BLOCK.size + block_bytes:
        return Kind.BLOCK, size
    raise TierFailed(f"a frame of kind {kind} and {size} bytes is not expected")


def parse_message(body: bytes | bytearray, wanted: type[Wanted]) -> Wanted:
    """The message that a frame holds.

    Raises:
        TierFailed: it is a refusal, none of our messages, or not a wanted one.
    """
    try:
        content = _message.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TierFailed(f"the other end sent no message: {error}") from error
    if isinstance(content, Refused):
        raise TierFailed(f"the service refused: {content.reason}")
    if not isinstance(content, wanted):
        raise TierFailed(f"the other end sent {type(content).__name__} instead of {wanted.__name__}")
    return content


def parse_request(body: bytes | bytearray) -> Request:
    """What a client asks. ``TierFailed`` if it is none of our requests."""
    try:
        return _request.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TierFailed(f"the other end sent no request: {error}") from error


def split(keys: bytes) -> list[BlockKey]:
    """The keys of a message. ``TierFailed`` if they are not whole."""
    if len(keys) % KEY_BYTES:
        raise TierFailed("a key is cut off")
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


def prove(side: str, secret: str, hello: Hello, challenge: Challenge) -> Proof:
    """That this side knows the secret, bound to both nonces and the layout: good for this connection only."""
    said = b"store " + side.encode() + message(hello) + message(challenge)
    return Proof(hmac.digest(secret.encode(), said, "sha256"))


def check_proof(given: Proof, expected: Proof) -> None:
    """Compare in constant time. ``TierFailed`` if they differ."""
    if not hmac.compare_digest(given.mac, expected.mac):
        raise TierFailed("the cluster secret differs: set TWOSTROKE_SECRET to the same value everywhere")
