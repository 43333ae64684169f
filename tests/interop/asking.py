"""Asking a worker, or a router before workers, in either dialect; and what a decode worker knows of it afterwards."""

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.e2e.system import System

BLOCK = 16  # tokens
Json = Any


@dataclass
class Answer:
    """The choices of a reply, whole or put together again."""

    id: str  # x-request-id at the worker that answered
    texts: list[str]
    finishes: list[str | None]
    prompt_tokens: int | None  # where the reply says so

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Answer) and (self.texts, self.finishes) == (other.texts, other.finishes)


async def ask(session: aiohttp.ClientSession, url: str, path: str, body: dict[str, object]) -> Answer:
    """Post a request; the reply must be a good one."""
    async with session.post(url + path, json=body) as reply:
        text = await reply.text()
        assert reply.status == 200, text
        assert reply.content_type == ("text/event-stream" if body.get("stream") else "application/json")
    if not body.get("stream"):
        replies = [json.loads(text)]
    else:
        *events, done = [event.removeprefix("data: ") for event in text.removesuffix("\n\n").split("\n\n")]
        assert done == "[DONE]"
        replies = [json.loads(event) for event in events]
    return _generated(replies) if path == "/generate" else _completed(replies)


def _generated(replies: list[Json]) -> Answer:
    """Every chunk of ``/generate`` repeats what was before it."""
    last: dict[int, Json] = {}
    for reply in replies:
        for choice in reply if isinstance(reply, list) else [reply]:
            last[choice.get("index", 0)] = choice
    choices = [last[index] for index in sorted(last)]
    metas = [choice["meta_info"] for choice in choices]
    return Answer(
        metas[0]["id"].rpartition("_")[0] if len(metas) > 1 else metas[0]["id"],
        [choice["text"] for choice in choices],
        [meta["finish_reason"]["type"] for meta in metas],
        sum(meta["prompt_tokens"] for meta in metas) if len(metas) == 1 else None,
    )


def _completed(replies: list[Json]) -> Answer:
    texts: defaultdict[int, str] = defaultdict(str)
    finishes: dict[int, str | None] = {}
    for reply in replies:
        for choice in reply["choices"]:
            said = choice.get("message") or choice.get("delta") or {}
            texts[choice["index"]] += choice.get("text") or said.get("content") or ""
            finishes[choice["index"]] = choice["finish_reason"]
    usage = replies[-1].get("usage") or {}
    indices = sorted(texts)
    return Answer(
        replies[0]["id"].partition("-")[2],
        [texts[index] for index in indices],
        [finishes[index] for index in indices],
        usage.get("prompt_tokens"),
    )


async def events(session: aiohttp.ClientSession, system: System, worker: str, http_id: str) -> list[Json]:
    """The timeline of a request at a worker."""
    async with session.get(f"{system.workers[worker].url}/debug/requests/{http_id}") as reply:
        assert reply.status == 200, await reply.text()
        return list((await reply.json())["events"])


async def handed_over(session: aiohttp.ClientSession, system: System, answer: Answer) -> dict[str, Json]:
    """The hand-overs behind an answer, by prompt. They were complete, and their prompts not computed a second time."""
    stamps = await events(session, system, "decode-0", answer.id)
    names = [stamp["event"] for stamp in stamps]
    assert "fallback" not in names, stamps
    handovers = {
        stamp["detail"].get("sequence", "0/0"): stamp["detail"] for stamp in stamps if stamp["event"] == "kv_complete"
    }
    computed = {stamp["detail"].get("sequence", "0/0") for stamp in stamps if stamp["event"] == "prefill_ended"}
    assert not computed & handovers.keys(), stamps
    return handovers
