"""How bytes become frames and messages, and how two ends prove that they know the cluster secret. Pure, and the same
for the TCP link and the cache service; what these say is in ``frames.py`` of each.

A frame is ``HEADER`` and a body: a message (MessagePack, typed, bounded), or a block: its own head and its payload.
Nothing is decoded before its size and version are checked.
"""

import hmac
import struct
from enum import IntEnum
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

NONCE = 32  # bytes
HEADER = struct.Struct("!4sHHI")  # magic, version, kind, bytes of the body

Nonce = Annotated[bytes, Meta(min_length=NONCE, max_length=NONCE)]
Wanted = TypeVar("Wanted", bound=Struct)


class Kind(IntEnum):
    """What a frame's body is."""

    MESSAGE = 1
    BLOCK = 2


class Proof(Struct, frozen=True, tag=3, forbid_unknown_fields=True):
    """Client → server, then server → client: ``Framing.prove`` of all that was said."""

    mac: Annotated[bytes, Meta(min_length=32, max_length=32)]


class Refused(Struct, frozen=True, tag=5, forbid_unknown_fields=True):
    """Server → client, instead of any answer; nothing follows."""

    reason: Annotated[str, Meta(max_length=1024)]


class Framing:
    """One protocol: its frames, its messages, and what is raised where the other end does not keep to it."""

    def __init__(
        self,
        magic: bytes,
        version: int,
        messages: object,
        *,
        most: int,
        block: struct.Struct,
        error: type[Exception],
    ) -> None:
        """``messages``: the union of them; ``most``: bytes of one; ``block``: what stands before a block's payload."""
        self.error = error
        self._magic = magic
        self._version = version
        self._most = most
        self._block = block
        self._decoder: msgspec.msgpack.Decoder[object] = msgspec.msgpack.Decoder(messages)

    def message(self, content: Struct) -> bytes:
        """A message's frame."""
        body = msgspec.msgpack.encode(content)
        return HEADER.pack(self._magic, self._version, Kind.MESSAGE, len(body)) + body

    def block_head(self, payload: memoryview, *fields: object) -> bytes:
        """What goes in front of a block's payload."""
        size = self._block.size + len(payload)
        return HEADER.pack(self._magic, self._version, Kind.BLOCK, size) + self._block.pack(*fields)

    def parse_header(self, header: bytes | bytearray | memoryview, block_bytes: int | None = None) -> tuple[Kind, int]:
        """Kind and bytes of a frame's body. A block is only expected where ``block_bytes``, its payload's, is given.

        Raises ``error`` if this is no frame of ours, of another version, or not one that is expected.
        """
        magic, version, kind, size = HEADER.unpack(header)
        if magic != self._magic:
            raise self.error("the other end does not speak this protocol")
        if version != self._version:
            raise self.error(f"the other end speaks version {version} of the protocol, this one {self._version}")
        if kind == Kind.MESSAGE and size <= self._most:
            return Kind.MESSAGE, size
        if kind == Kind.BLOCK and block_bytes is not None and size == self._block.size + block_bytes:
            return Kind.BLOCK, size
        raise self.error(f"a frame of kind {kind} and {size} bytes is not expected")

    def parse_message(self, body: bytes | bytearray, wanted: type[Wanted]) -> Wanted:
        """The message that a frame holds. Raises ``error`` if it is a refusal, none of ours, or not the wanted one."""
        content = self.parse(body)
        if isinstance(content, Refused):
            raise self.error(f"the other end refused: {content.reason}")
        if not isinstance(content, wanted):
            raise self.error(f"the other end sent {type(content).__name__} instead of {wanted.__name__}")
        return content

    def parse(self, body: bytes | bytearray) -> object:
        """Any of our messages. Raises ``error`` if it is none."""
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self.error(f"the other end sent no message: {error}") from error

    def prove(self, side: str, secret: str, hello: Struct, challenge: Struct) -> Proof:
        """That this side knows the secret, bound to both nonces and all else that was said: good for this connection
        only.
        """
        said = side.encode() + self.message(hello) + self.message(challenge)
        return Proof(hmac.digest(secret.encode(), said, "sha256"))

    def check_proof(self, given: Proof, expected: Proof) -> None:
        """Compare in constant time. Raises ``error`` if they differ."""
        if not hmac.compare_digest(given.mac, expected.mac):
            raise self.error("the cluster secret differs: set TWOSTROKE_SECRET to the same value everywhere")
