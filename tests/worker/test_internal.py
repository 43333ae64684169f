"""Whatever is sent to the internal endpoints, it is understood or refused."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.routing import Router
from starlette.types import Message

from twostroke.api.server import Boundary
from twostroke.errors import Unavailable
from twostroke.messages import Abandon, Attach, Confirm, Manage, Managed, Role, WorkerInfo, Writing, encode
from twostroke.worker.internal import internal_routes

ATTACH, CONFIRM = "/internal/handover/attach", "/internal/handover/confirm"
ABANDON, WRITING = "/internal/handover/abandon", "/internal/handover/writing"
SOUND: dict[str, bytes] = {
    ATTACH: encode(Attach("h/0", 0, "f" * 32, 0, "p" * 32)),
    CONFIRM: encode(Confirm("h/0", 0, "i" * 32, 3)),
    ABANDON: encode(Abandon("h", 0)),
    WRITING: encode(Writing("h/0", 0)),
}
BODIES = {
    "UTF-8": b'{"handover":"\xff"}',
    "surrogate": b'{"handover":"\xed\xa0\x80"}',
    "deep": b"[" * 60_000,
    "deep inside": b'{"handover":' + b"[" * 60_000,
    "large": b" " * (65 << 10),
    "large number": b'{"attempt":' + b"9" * 5000 + b"}",
}


class Starting:
    """A worker that has no producer yet: who gets so far has sent a sound message."""

    producer = None

    def info(self) -> WorkerInfo:
        raise AssertionError("nobody asks")

    async def manage(self, order: Manage) -> Managed:
        raise AssertionError("nobody asks")

    def drain(self, seconds: float | None = None) -> None:
        raise AssertionError("nobody asks")

    def assign(self, role: Role) -> None:
        raise AssertionError("nobody asks")

    def writes(self, message: Writing) -> bool:
        raise Unavailable("the worker is starting")


async def post(path: str, body: bytes) -> int:
    """The status of the reply."""
    statuses: list[int] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "server": ("::1", 1)}
    await Boundary(Router(internal_routes(Starting(), "")))(scope, receive, send)
    (status,) = statuses
    return status


@pytest.mark.parametrize("path", SOUND)
async def test_a_sound_message(path: str) -> None:
    assert await post(path, SOUND[path]) == 503


@pytest.mark.parametrize("path", SOUND)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_an_unsound_one(path: str, body: bytes) -> None:
    assert await post(path, body) in (400, 413)


_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300) | st.lists(st.integers())
_NAMES = st.sampled_from([*Attach.__struct_fields__, *Confirm.__struct_fields__]) | st.text(max_size=5)


@settings(max_examples=200, deadline=None)
@given(path=st.sampled_from([ATTACH, CONFIRM]), changes=st.dictionaries(_NAMES, _VALUES, max_size=3))
def test_any_fields(path: str, changes: dict[str, Any]) -> None:
    fields = {**json.loads(SOUND[path]), **changes}
    assert asyncio.run(post(path, json.dumps(fields).encode())) in (400, 503)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), path=st.sampled_from([ATTACH, CONFIRM]))
def test_any_bytes(data: st.DataObject, path: str) -> None:
    """From anywhere on in a sound message."""
    start = data.draw(st.integers(0, len(SOUND[path])))
    body = SOUND[path][:start] + data.draw(st.binary(max_size=60)) + SOUND[path][start + data.draw(st.integers(0, 9)) :]
    assert asyncio.run(post(path, body)) in (400, 503)
