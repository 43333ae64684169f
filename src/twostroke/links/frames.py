"""The TCP link's messages and blocks, pure. How they are framed is in ``framing.py``."""

import struct
from typing import Annotated

from msgspec import Meta, Struct

from twostroke.errors import HandoverFailed
from twostroke.links.framing import Framing, Nonce, Proof, Refused
from twostroke.messages import PROTOCOL, Count, Name

MAX_MESSAGE = 16 << 10  # bytes
MAX_SLOTS = 1024  # in one ``Read``
BLOCK = struct.Struct("!II16s")  # serial of the ``Read``, slot, xxh3-128 of the slot's bytes


class Hello(Struct, frozen=True, tag=1, forbid_unknown_fields=True):
    """Client → server, first."""

    nonce: Nonce


class Challenge(Struct, frozen=True, tag=2, forbid_unknown_fields=True):
    """Server → client: prove that you know the secret. And what is served here."""

    nonce: Nonce
    instance: Name
    num_slots: Count
    block_bytes: Count


class Read(Struct, frozen=True, tag=4, forbid_unknown_fields=True):
    """Client → server: send these slots, which the hand-over exports to me. Answered by as many blocks, in order."""

    serial: Count  # 1, 2, 3 … on each connection
    handover: Name
    attempt: Count
    slots: Annotated[list[Count], Meta(min_length=1, max_length=MAX_SLOTS)]


FRAMING = Framing(
    b"2stk", PROTOCOL, Hello | Challenge | Proof | Read | Refused, most=MAX_MESSAGE, block=BLOCK, error=HandoverFailed
)
