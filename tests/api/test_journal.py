"""The journal of a stream, and answers that are continued where it ends."""

import json
import re
from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec
import pytest

from tests.api.conftest import Running, ScriptedService, running
from twostroke.messages import (
    JOURNAL_HEADER,
    REQUEST_ID_HEADER,
    SECRET_HEADER,
    TICKET_HEADER,
    Journal,
    ModelCard,
    Ticket,
    encode,
)
from twostroke.router.reply import Frames, Part
from twostroke.tokenizer import Tokenizer

CREATED = 1_234_567_890
CHAT = [{"role": "user", "content": "hello"}]
USAGE = {"include_usage": True}
COMPLETIONS, CONVERSATION, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
TEXT = "naïve café 🙂 你好世界, hello world"


async def post(
    server: Running, path: str, body: bytes, journal: bytes | None, **headers: str
) -> aiohttp.ClientResponse:
    """Ask for a stream; ``journal`` so far, or none."""
    sent = {REQUEST_ID_HEADER: "mine", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if journal is not None:
        sent[JOURNAL_HEADER] = encode(Journal(len(journal), CREATED)).decode()
    return await server.http.post(server.url + path, data=(journal or b"") + body, headers=sent)


async def frames(server: Running, path: str, body: dict[str, Any], journal: bytes = b"") -> list[Part]:
    """The frames of a stream that continues ``journal``."""
    async with await post(server, path, json.dumps({**body, "stream": True}).encode(), journal) as response:
        text = await response.read()
        assert response.status == 200, text
        assert JOURNAL_HEADER in response.headers
    parts, cutter = [], Frames()
    for byte in range(len(text)):
        part = cutter.feed(text[byte : byte + 1])
        if part.events:
            parts.append(part)
    cutter.end()
    return parts


def seen(parts: Sequence[Part]) -> list[str]:
    """The events, without what tells the time, by choice."""
    text = b"".join(part.events for part in parts).decode()
    events = re.sub(r'"e2e_latency":[^,}]*', "", text).split("\n\n")

    def choice(event: str) -> int:
        found = re.search(r'"index":(\d+)', event)
        return int(found[1]) if found else 1000

    return sorted(events, key=choice)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "hello", "max_tokens": 60, "stream_options": USAGE}),
        (COMPLETIONS, {"prompt": "hello", "max_tokens": 60, "stop": ["好世", "llo w"]}),
        (COMPLETIONS, {"prompt": "hello", "max_tokens": 60, "stop": ["hello world!", "worlds"], "min_tokens": 5}),
        (COMPLETIONS, {"prompt": ["hello", "world"], "n": 2, "max_tokens": 60, "logprobs": 2, "stream_options": USAGE}),
        (COMPLETIONS, {"prompt": "hello", "max_tokens": 60, "logprobs": 0, "seed": 5, "stop_token_ids": [1]}),
        (CONVERSATION, {"messages": CHAT, "n": 2, "stream_options": USAGE}),
        (CONVERSATION, {"messages": CHAT, "logprobs": True, "top_logprobs": 2}),
        (GENERATE, {"text": "hello"}),
        (GENERATE, {"text": ["hello", "world"], "return_logprob": True, "top_logprobs_num": 1}),
        (GENERATE, {"text": "hello", "sampling_params": {"n": 2, "stop": "世界", "max_new_tokens": 60}}),
    ],
    ids=str,
)
async def test_a_stream_goes_on_where_it_ended(server: Running, path: str, body: dict[str, Any]) -> None:
    """To the byte, wherever that was."""
    server.service.script = server.service.tokenizer.encode(TEXT)
    whole = await frames(server, path, body)
    for have in range(len(whole)):
        rest = await frames(server, path, body, b"".join(part.lines for part in whole[:have]))
        assert seen([*whole[:have], *rest]) == seen(whole)
    assert f'"created":{CREATED}' in seen(whole)[0] or path == GENERATE


async def test_the_events_are_those_without_a_journal(server: Running) -> None:
    body = json.dumps({"prompt": "hello", "n": 2, "stream": True}).encode()
    async with await post(server, COMPLETIONS, body, None) as response:
        text = await response.text()
        assert JOURNAL_HEADER not in response.headers
    events = "".join(part.events.decode() for part in await frames(server, COMPLETIONS, json.loads(body)))
    created = re.compile(r'"created":\d+')
    assert created.sub("", text) == created.sub("", events)


async def test_choices_that_have_ended_are_not_generated_again(server: Running) -> None:
    body = {"prompt": "hello", "n": 2, "stream_options": USAGE}
    whole = await frames(server, COMPLETIONS, body)
    journal = b"".join(part.lines for part in whole)
    server.service.requests.clear()
    (last,) = await frames(server, COMPLETIONS, body, journal)
    assert last.events == whole[-1].events
    assert not server.service.requests


async def test_a_call_that_is_not_streamed_has_no_journal(server: Running) -> None:
    async with await post(server, COMPLETIONS, b'{"prompt": "hello"}', b"") as response:
        assert response.status == 200
        assert JOURNAL_HEADER not in response.headers
        assert (await response.json())["choices"][0]["text"] == "hello world"


@pytest.mark.parametrize(
    ("journal", "says"),
    [
        (b"[[0,[-1]]]\n", "not in the vocabulary"),
        (b"[[0,[999999]]]\n", "not in the vocabulary"),
        (b"[[0,[5,5]]]\n", "more tokens than were asked for"),
        (b"[[-1,[5]]]\n", "journal"),
        (b'[[0,[5],"why"]]\n', "journal"),
        (b"[[0,[5]\n", "journal"),
        (b"\xff\n", "journal"),
        (b"[" * 10_000 + b"\n", "journal"),
    ],
)
async def test_a_journal_that_cannot_be_is_refused(server: Running, journal: bytes, says: str) -> None:
    body = b'{"prompt": "hello", "max_tokens": 2, "stream": true}'
    async with await post(server, COMPLETIONS, body, journal) as response:
        assert response.status == 400
        assert says in (await response.json())["error"]["message"]
    assert server.service.open == 0


async def test_an_answer_that_has_begun_is_not_handed_over(server: Running) -> None:
    body = b'{"prompt": "hello", "stream": true}'
    ticket = encode(Ticket("h", "consume", peer="http://p")).decode()
    async with await post(server, COMPLETIONS, body, b"[[0,[5]]]\n", **{TICKET_HEADER: ticket}) as response:
        assert response.status == 400


@pytest.mark.parametrize(("given", "status"), [("", 401), ("guess", 401), ("right", 200)])
async def test_a_journal_needs_the_cluster_secret(
    given: str, status: int, card: ModelCard, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOSTROKE_SECRET", "right")
    async with running(ScriptedService(card, tokenizer)) as server:
        body = b'{"prompt": "hello", "stream": true}'
        async with await post(server, COMPLETIONS, body, b"", **{SECRET_HEADER: given}) as response:
            assert response.status == status


async def test_a_frame_says_what_it_sends(server: Running) -> None:
    """Tokens that show nothing yet are in the next frame that shows something."""
    server.service.script = server.service.tokenizer.encode("🙂")
    assert len(server.service.script) > 1
    whole = await frames(server, COMPLETIONS, {"prompt": "hello"})
    assert len(whole) == 2
    lines = msgspec.json.decode(whole[0].lines)
    assert [token for _, ids, *_ in lines for token in ids] == server.service.script
