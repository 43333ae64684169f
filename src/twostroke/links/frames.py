"""The TCP link's frames, pure: what goes over the wire, and what is refused of what comes.

A frame is ``HEADER`` and a body: a message (MessagePack, typed, at most ``MAX_MESSAGE`` bytes), or a block: ``BLOCK``
and the slot's bytes. Nothing is decoded before its size and version are checked.
"""

import hmac
import struct
from enum import IntEnum
from typing import Annotated, TypeVar

import msgspec
import xxhash
from msgspec import Meta, Struct

from twostroke.errors import HandoverFailed
from twostroke.messages import PROTOCOL, Count, Name

MAX_MESSAGE = 16 << 10  # bytes
MAX_SLOTS = 1024  # in one ``Read``
NONCE = 32  # bytes

_MAGIC = b"2stk"
HEADER = struct.Struct("!4sHHI")  # magic, protocol, kind, bytes of the body
BLOCK = struct.Struct("!II16s")  # serial of the ``Read``, slot, xxh3-128 of the slot's bytes

Nonce = Annotated[bytes, Meta(min_length=NONCE, max_length=NONCE)]


class Kind(IntEnum):
    """What a frame's body is."""

    MESSAGE = 1
    BLOCK = 2


class Hello(Struct, frozen=True, tag=1, forbid_unknown_fields=True):
    """Client → server, first."""

    nonce: Nonce


class Challenge(Struct, frozen=True, tag=2, forbid_unknown_fields=True):
    """Server → client: prove that you know the secret. And what is served here."""

    nonce: Nonce
    instance: Name
    num_slots: Count
    block_bytes: Count


class Proof(Struct, frozen=True, tag=3, forbid_unknown_fields=True):
    """Client → server, then server → client: ``prove`` of all that was said."""

    mac: Annotated[bytes, Meta(min_length=32, max_length=32)]


class Read(Struct, frozen=True, tag=4, forbid_unknown_fields=True):
    """Client → server: send these slots, which the hand-over exports to me. Answered by as many blocks, in order."""

    serial: Count  # 1, 2, 3 … on each connection
    handover: Name
    attempt: Count
    slots: Annotated[list[Count], Meta(min_length=1, max_length=MAX_SLOTS)]


class Refused(Struct, frozen=True, tag=5, forbid_unknown_fields=True):
    """Server → client, instead of any answer; nothing follows."""

    reason: Annotated[str, Meta(max_length=1024)]


Message = Hello | Challenge | Proof | Read | Refused
Wanted = TypeVar("Wanted", Hello, Challenge, Proof, Read)
_message: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def message(content: Message) -> bytes:
    """A message's frame."""
    body = msgspec.msgpack.encode(content)
    return HEADER.pack(_MAGIC, PROTOCOL, Kind.MESSAGE, len(body)) + body


def block_head(serial: int, slot: int, content: memoryview) -> bytes:
    """What goes in front of a slot's bytes."""
    digest = xxhash.xxh3_128_digest(content)
    return HEADER.pack(_MAGIC, PROTOCOL, Kind.BLOCK, BLOCK.size + len(content)) + BLOCK.pack(serial, slot, digest)


def parse_header(header: bytes | bytearray, block_bytes: int | None = None) -> tuple[Kind, int]:
    """Kind and bytes of a frame's body. A block is only expected where ``block_bytes``, its slot's size, is given.

    Raises:
        HandoverFailed: this is no frame of ours, of another protocol, or not one that is expected.
    """
    magic, protocol, kind, size = HEADER.unpack(header)
    if magic != _MAGIC:
        raise HandoverFailed("the peer does not speak the TCP link's protocol")
    if protocol != PROTOCOL:
        raise HandoverFailed(f"the peer speaks protocol {protocol}, this worker {PROTOCOL}")
    if kind == Kind.MESSAGE and size <= MAX_MESSAGE:
        return Kind.MESSAGE, size
    if kind == Kind.BLOCK and block_bytes is not None and size == BLOCK.size + block_bytes:
        return Kind.BLOCK, size
    raise HandoverFailed(f"a frame of kind {kind} and {size} bytes is not expected")


def parse_message(body: bytes | bytearray, wanted: type[Wanted]) -> Wanted:
    """The message that a frame holds.

    Raises:
        HandoverFailed: it is a refusal, none of our messages, or not the wanted one.
    """
    try:
        content = _message.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise HandoverFailed(f"the peer sent no message: {error}") from error
    if isinstance(content, Refused):
        raise HandoverFailed(f"the producer refused: {content.reason}")
    if not isinstance(content, wanted):
        raise HandoverFailed(f"the peer sent {type(content).__name__} instead of {wanted.__name__}")
    return content


def prove(side: str, secret: str, hello: Hello, challenge: Challenge) -> Proof:
    """That this side knows the secret, bound to both nonces and to what is served: good for this connection only."""
    said = side.encode() + message(hello) + message(challenge)
    return Proof(hmac.digest(secret.encode(), said, "sha256"))


def check_proof(given: Proof, expected: Proof) -> None:
    """Compare in constant time. ``HandoverFailed`` if they differ."""
    if not hmac.compare_digest(given.mac, expected.mac):
        raise HandoverFailed("the cluster secret differs: set TWOSTROKE_SECRET to the same value on every worker")
