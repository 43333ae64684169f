"""The client's end of a relayed request: its body in, the answering worker's bytes out."""

import asyncio
import secrets
import time
from typing import NamedTuple

from msgspec import Struct
from starlette.types import Receive, Scope, Send

from twostroke.api.alive import AtOnce
from twostroke.api.http import DONE, read_body
from twostroke.errors import NoRoom, TooSlow, Unavailable
from twostroke.messages import MAX_JOURNAL, REQUEST_ID_HEADER, TENANT_HEADER

_PASSED_ON = (b"authorization", b"content-type", b"content-encoding", b"accept", b"traceparent")
_DIGITS = 9  # of the size of a frame
_MAX_EVENT = 64 << 20  # bytes of an event, or of the events of a frame; a journal's line counts in
_TOO_LONG = "its events are too long"
_UNAVAILABLE = b'"type":"%b"' % Unavailable.kind.encode()
_NO_ROOM = b'"code":"%b"' % (NoRoom.code or "").encode()
_BODY_SECONDS = 60.0  # in which a client must have sent its request


class Call(Struct, frozen=True):
    """One client request, as it is sent on: the router does not look into the body."""

    target: str  # path and query
    body: bytes
    id: str  # x-request-id
    handover: str  # of every ticket of this request; unlike ``id`` it is never used twice
    headers: dict[str, str]
    created: int  # unix seconds
    tenant: str = ""  # the salt of the request, if its body names none


async def read_call(scope: Scope, receive: Receive, max_body: int) -> Call:
    """Read the request to its end. ``Boundary`` has named it.

    Raises:
        TooLarge: the body has more than ``max_body`` bytes.
        TooSlow: it did not arrive within ``_BODY_SECONDS``.
        ClientGone: the client went away.
    """
    id_: str = scope["twostroke.http_id"]
    tenant: str = scope.get("twostroke.tenant", "")
    query: str = scope["query_string"].decode("latin-1")
    passed = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _PASSED_ON}
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            body = await read_body(scope, receive, max_body)
    except TimeoutError:
        raise TooSlow(f"the body did not arrive within {_BODY_SECONDS:.0f} s") from None
    return Call(
        target=scope["path"] + ("?" + query if query else ""),
        body=body,
        id=id_,
        handover=secrets.token_hex(16),
        headers={**passed, REQUEST_ID_HEADER: id_, **({TENANT_HEADER: tenant} if tenant else {})},
        created=int(time.time()),
        tenant=tenant,
    )


class Refusal(Struct, frozen=True):
    """A worker's reply that it does not serve this request, or not now."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def no_room(self) -> bool:
        """Whether the worker only lacks slots at the moment."""
        return self.status == NoRoom.status and _NO_ROOM in self.body


class Part(NamedTuple):
    """Whole events of a stream, and the lines of the journal that they add."""

    events: bytes
    lines: bytes


class _Torn:
    """What may not be passed on yet, in pieces: joining them each time would take time with the square of its size."""

    def __init__(self) -> None:
        self.size = 0  # bytes
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        """Keep it. ``ConnectionError`` if that is too much."""
        self._pieces.append(piece)
        self.size += len(piece)
        if self.size > _MAX_EVENT:
            raise ConnectionError(_TOO_LONG)

    def take(self) -> bytes:
        """All of it, which is then passed on."""
        whole = b"".join(self._pieces)
        self._pieces.clear()
        self.size = 0
        return whole


class Frames:
    """Cuts a stream where nothing is torn, however it arrives, and takes its journal (``messages.Journal``) out.

    Holding the rest back costs nothing, since it is no event yet; and when the stream breaks, what follows (another
    worker's events, or the error event that ``Boundary`` adds) stands by itself instead of in the middle of an event.
    Where a frame should begin, the error event of the worker's ``Boundary`` can stand, and is the last; unless it only
    says that this worker goes away.
    """

    def __init__(self) -> None:
        self._torn = _Torn()
        self._needed = 0  # bytes, before there is a whole frame
        self._done = False
        self._over = False  # with an event outside of frames

    def feed(self, piece: bytes) -> Part:
        """What is whole now.

        Raises:
            ConnectionError: this is no such stream.
        """
        if self._over:
            raise ConnectionError("its stream goes on after its end")
        buffer = piece
        if self._torn.size:
            self._torn.add(piece)
            if self._torn.size < self._needed:
                return Part(b"", b"")
            buffer = self._torn.take()
        start, events, lines = 0, b"", b""
        self._needed = 0
        while (head := buffer.find(b"\n", start) + 1) and buffer.startswith(b":", start):
            size, _, line = buffer[start + 1 : head].partition(b" ")
            if not size.isdigit() or len(size) > _DIGITS:
                raise ConnectionError("its stream is broken")
            end = head + int(size)
            if end > len(buffer):
                self._needed = end - start
                if self._needed > _MAX_EVENT:
                    raise ConnectionError(_TOO_LONG)
                break
            events += buffer[head:end]
            lines += line if len(line) > 1 else b""
            start = end
        torn = buffer[start:]
        self._done = events.endswith(DONE) if events else self._done
        if not self._done and torn.startswith(b"data: ") and torn.endswith(DONE) and torn.count(DONE) == 1:
            if _UNAVAILABLE in torn:
                raise ConnectionError("it goes away")
            events, torn, self._done, self._over = events + torn, b"", True, True
        if torn:
            self._torn.add(torn)
        return Part(events, lines)

    def end(self) -> None:
        """The stream has ended.

        Raises:
            ConnectionError: the answer has not.
        """
        if not self._done or self._torn.size:
            raise ConnectionError("the stream ended before the answer did")


class Reply:
    """The one reply to a request: ``started`` when the client has seen any of it, ``done`` when it has seen the end."""

    def __init__(self, send: Send, at_once: AtOnce | None, *, keeps: bool) -> None:
        """``at_once``: the HTTP server's own way, if it has one. ``keeps`` a journal, so that the answer can be
        continued.
        """
        self.started = False
        self.done = False
        self.journal = bytearray()  # of what the client has seen, as far as the worker keeps one
        self._send = send
        self._at_once = at_once
        self._keeps = keeps

    @property
    def can_continue(self) -> bool:
        """Whether the journal is enough for another worker to continue the stream that has begun."""
        return 0 < len(self.journal) <= MAX_JOURNAL

    async def whole(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """Send a reply that is complete already."""
        await self._start(status, {**headers, "content-length": str(len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def stream(self, status: int, headers: dict[str, str], part: Part) -> None:
        """Pass on the next events of a stream. Unless this is cancelled, the client has seen them."""
        if not part.events:
            return
        if not self.started:
            await self._start(status, headers)
        await self._send({"type": "http.response.body", "body": part.events, "more_body": True})
        self._seen(part)

    def pass_on(self, frames: Frames, piece: bytes) -> bool:
        """The same at once with what is whole with this piece of a stream that has begun. False if it has to wait; then
        nothing has happened.

        Raises:
            ConnectionError: this is no such stream.
        """
        if self._at_once is None or not self._at_once.can_write():
            return False
        part = frames.feed(piece)
        if part.events:
            self._at_once.write_now(part.events)
            self._seen(part)
        return True

    async def end_stream(self) -> None:
        """The event stream ended as it should."""
        await self._send({"type": "http.response.body", "body": b""})

    def _seen(self, part: Part) -> None:
        if self._keeps and len(self.journal) <= MAX_JOURNAL:
            self.journal += part.lines
        self.done = part.events.endswith(DONE)

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.started = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
