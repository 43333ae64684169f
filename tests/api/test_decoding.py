"""Whatever bytes come as a body, a ticket, or a journal: they are understood or refused, and nothing else happens."""

import asyncio
import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from starlette.types import Message

from tests.api.conftest import MAX_BODY, ScriptedService
from twostroke.api import openai, sglang
from twostroke.api.call import Setting
from twostroke.api.lifecycle import Lifecycle
from twostroke.api.server import build_app
from twostroke.errors import RequestError
from twostroke.messages import JOURNAL_HEADER, TICKET_HEADER, Journal, ModelCard, Output, Request, Ticket, encode
from twostroke.tokenizer import Tokenizer

SOUND = {
    "/generate": b'{"text":"hello","sampling_params":{"max_new_tokens":4,"n":2,"stop":["a"]},"stream":true}',
    "/v1/completions": b'{"prompt":["hello",  "you"],"max_tokens":4,"logprobs":2,"seed":-1,"logit_bias":{"5":1}}',
    "/v1/chat/completions": b'{"messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}],"max_tokens":4}',
}
TRANSLATE = {"/generate": sglang.generate, "/v1/completions": openai.completions, "/v1/chat/completions": openai.chat}
_PIECES = st.binary(max_size=12) | st.sampled_from([b"[" * 5000, b"9" * 400, b"1e999", b"\\ud800", b"NaN", b"\xff"])


@settings(max_examples=300)
@given(path=st.sampled_from(list(SOUND)), at=st.integers(0, 100), drop=st.integers(0, 9), piece=_PIECES)
def test_any_bytes_in_a_body(setting: Setting, path: str, at: int, drop: int, piece: bytes) -> None:
    body = SOUND[path]
    with suppress(RequestError):
        TRANSLATE[path](body[:at] + piece + body[at + drop :], setting)


class Continuing(ScriptedService):
    """Has one more token to say, whatever was said before."""

    def _outputs(self, request: Request) -> list[Output]:
        return [Output([self._token(self.script[0], request.sampling.logprobs)], "length")]


async def status(card: ModelCard, tokenizer: Tokenizer, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    """Status and body of a reply to a completion; no socket."""
    replies: list[Message] = []
    pending = [body]

    async def receive() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop()}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        replies.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "server": ("::1", 1),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
    }  # fmt: skip
    app = build_app(Continuing(card, tokenizer), Lifecycle("w"), max_body=MAX_BODY)
    await app(scope, receive, send)
    return replies[0]["status"], b"".join(reply.get("body", b"") for reply in replies)


PROMPT = b'{"prompt":"hello","max_tokens":3,"stream":true}'
_VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.lists(st.integers(), max_size=2)


@given(
    header=st.sampled_from([TICKET_HEADER, JOURNAL_HEADER]),
    text=st.text(st.characters(max_codepoint=255), max_size=60)
    | st.dictionaries(
        st.sampled_from([*Ticket.__struct_fields__, *Journal.__struct_fields__]), _VALUES, max_size=4
    ).map(json.dumps),
)
def test_any_header(card: ModelCard, tokenizer: Tokenizer, header: str, text: str) -> None:
    found, _ = asyncio.run(status(card, tokenizer, PROMPT, {header: text}))
    assert found in (200, 400, 413)


_TOKENS = st.lists(
    st.integers(-2, 400) | st.integers() | st.tuples(st.integers(-2, 400), st.floats()).map(list) | st.none(),
    max_size=4,
)
_SENT = st.tuples(
    st.integers(-1, 3), _TOKENS, st.sampled_from([None, "stop", "length", "abort", "?"]), st.integers(-1, 9)
).map(list)


@settings(max_examples=200)
@given(lines=st.lists(st.lists(_SENT, max_size=3).map(json.dumps) | st.text(max_size=9), max_size=3))
def test_any_journal(card: ModelCard, tokenizer: Tokenizer, lines: list[str]) -> None:
    """A router sends it back to us as another worker wrote it: if that is no journal of this call, it is refused."""
    journal = "".join(f"{line}\n" for line in lines).encode()
    header = encode(Journal(len(journal), 0)).decode()
    found, text = asyncio.run(status(card, tokenizer, journal + PROMPT, {JOURNAL_HEADER: header}))
    assert found in (200, 400)
    assert b"internal error" not in text


@pytest.mark.parametrize("size", [0, 1, len(PROMPT), len(PROMPT) + 1, 2**26])
def test_a_journal_of_another_size(card: ModelCard, tokenizer: Tokenizer, size: int) -> None:
    header = encode(replace(Journal(0, 0), size=size)).decode()
    found, _ = asyncio.run(status(card, tokenizer, PROMPT, {JOURNAL_HEADER: header}))
    assert found == (200 if size == 0 else 400)
