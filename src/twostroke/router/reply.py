"""The client's end of a relayed request: its body in, the answering worker's bytes out."""

import secrets

from msgspec import Struct
from starlette.types import Receive, Scope, Send

from twostroke.api.http import read_body
from twostroke.messages import REQUEST_ID_HEADER

_PASSED_ON = (b"content-type", b"content-encoding", b"accept", b"traceparent")
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n")


class Call(Struct, frozen=True):
    """One client request, as it is sent on: the router does not look into the body."""

    target: str  # path and query
    body: bytes
    id: str  # x-request-id
    handover: str  # of every ticket of this request; unlike ``id`` it is never used twice
    headers: dict[str, str]


async def read_call(scope: Scope, receive: Receive, max_body: int) -> Call:
    """Read the request to its end. ``Boundary`` has named it.

    Raises:
        TooLarge: the body has more than ``max_body`` bytes.
        ClientGone: the client went away.
    """
    id_: str = scope["twostroke.http_id"]
    query: str = scope["query_string"].decode("latin-1")
    passed = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _PASSED_ON}
    return Call(
        target=scope["path"] + ("?" + query if query else ""),
        body=await read_body(scope, receive, max_body),
        id=id_,
        handover=secrets.token_hex(16),
        headers={**passed, REQUEST_ID_HEADER: id_},
    )


class Reply:
    """The one reply to a request. ``started`` says whether the client has seen any of it."""

    def __init__(self, send: Send) -> None:
        self.started = False
        self._send = send
        self._torn = b""  # the beginning of an event whose end has not arrived

    async def whole(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """Send a reply that is complete already."""
        await self._start(status, {**headers, "content-length": str(len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def stream(self, status: int, headers: dict[str, str], piece: bytes) -> None:
        """Pass on the next bytes of an event stream, up to the end of the last whole event in them.

        Holding the rest back costs nothing, since it is no event yet; and when the stream breaks, the error event that
        ``Boundary`` adds stands by itself instead of in the middle of another.
        """
        if not self.started:
            await self._start(status, headers)
        if self._torn or not piece.endswith(_EVENT_ENDS):
            piece = self._torn + piece
            end = max(piece.rfind(mark) + len(mark) if mark in piece else 0 for mark in _EVENT_ENDS)
            piece, self._torn = piece[:end], piece[end:]
        if piece:
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end_stream(self) -> None:
        """The event stream ended as it should."""
        await self._send({"type": "http.response.body", "body": self._torn})

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.started = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
