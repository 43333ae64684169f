"""The real routers of SGLang and vLLM before our workers: clients get what one worker alone would say."""

import asyncio
import json
from hashlib import sha256

import aiohttp
import pytest

from tests.e2e.system import System
from tests.interop.asking import BLOCK, ask, handed_over

TEXT = "The quick brown fox jumps over the lazy dog. hello world, hello there. " * 3
GREEDY = {"max_tokens": 12, "temperature": 0}
EOS = 0  # of the tiny tokenizer


def body(path: str, prompt: str, **knobs: object) -> dict[str, object]:
    """A request for a continuation of ``prompt``."""
    asked = {**GREEDY, **knobs}
    if path == "/generate":
        names = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
        outside: dict[str, object] = {name: asked.pop(name) for name in ("stream", "return_logprob") if name in asked}
        return {"text": prompt, "sampling_params": {names.get(k, k): v for k, v in asked.items()}, **outside}
    if path == "/v1/completions":
        return {"prompt": prompt, "model": "tiny", **asked}
    return {"messages": [{"role": "user", "content": prompt}], **asked}


PATHS = pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])


@pytest.fixture
def prompt(request: pytest.FixtureRequest) -> str:
    """A prompt of its own for each test: nobody has any block of it."""
    return f"{sha256(request.node.name.encode()).hexdigest()}. {TEXT}"


@PATHS
@pytest.mark.parametrize("stream", [False, True])
async def test_the_answer_is_that_of_a_worker_alone(
    workers: System, router: str, alone: str, prompt: str, path: str, stream: bool,
    session: aiohttp.ClientSession, insider: aiohttp.ClientSession,
) -> None:  # fmt: skip
    asked = body(path, prompt, stream=stream)
    expected = await ask(session, alone, path, body(path, prompt))
    answer = await ask(session, router, path, asked)
    assert answer == expected
    (handover,) = (await handed_over(session, workers, answer)).values()
    assert expected.prompt_tokens is not None
    assert handover["blocks"] == -(-expected.prompt_tokens // BLOCK)
    await workers.idle(insider, ["prefill-0", "decode-0"])


async def test_several_prompts_and_choices(
    workers: System, router: str, alone: str, prompt: str, session: aiohttp.ClientSession
) -> None:
    """Only each prompt is handed over, not each choice."""
    path, prompts = "/v1/completions", [prompt, f"another {prompt}"]
    asked = {**body(path, ""), "prompt": prompts, "n": 2, "temperature": 0.7, "seed": 5}
    expected = await ask(session, alone, path, asked)
    answer = await ask(session, router, path, asked)
    assert len(set(answer.texts)) == 4
    assert answer == expected
    assert set(await handed_over(session, workers, answer)) == {"0/0", "1/0"}


async def test_lists_of_token_ids(
    workers: System, router: str, alone: str, prompt: str, session: aiohttp.ClientSession
) -> None:
    """SGLang's router names a room for each."""
    ids = [[7, *prompt.encode()[:90]], [8, *prompt.encode()[:70]]]
    asked: dict[str, object] = {"input_ids": ids, "sampling_params": {"max_new_tokens": 5, "temperature": 0}}
    answer = await ask(session, router, "/generate", asked)
    assert answer == await ask(session, alone, "/generate", asked)
    assert len(await handed_over(session, workers, answer)) == 2


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])  # vllm-router drops seeds of /generate
async def test_seeded_sampling(router: str, alone: str, prompt: str, path: str, session: aiohttp.ClientSession) -> None:
    asked = body(path, prompt, temperature=1.0, top_p=0.9, seed=11)
    assert await ask(session, router, path, asked) == await ask(session, alone, path, asked)


@pytest.mark.parametrize(("least", "length"), [(0, 1), (3, 4)])
async def test_an_end_is_ruled_out_only_where_the_client_does(
    router: str, alone: str, prompt: str, least: int, length: int, session: aiohttp.ClientSession
) -> None:
    """vLLM's router forbids the prefill worker to end, whatever the client said."""
    knobs = {"min_tokens": least} if least else {}
    asked = body("/v1/completions", prompt, logit_bias={str(EOS): 100}, **knobs)
    answers = []
    for url in (router, alone):
        async with session.post(f"{url}/v1/completions", json=asked) as reply:
            answers.append(await reply.json())
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [length, length]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(router: str, alone: str, prompt: str, stream: bool, session: aiohttp.ClientSession) -> None:
    """SGLang's routers put the two workers' together."""
    asked, found = body("/generate", prompt, stream=stream, return_logprob=True), []
    for url in (router, alone):
        async with session.post(f"{url}/generate", json=asked) as reply:
            text = await reply.text()
            assert reply.status == 200, text
        last = text.split("data: ")[-2] if stream else text
        meta = json.loads(last)["meta_info"]
        assert meta["input_token_logprobs"] == []
        found.append(meta["output_token_logprobs"])
    assert [token for _, token, _ in found[0]] == [token for _, token, _ in found[1]]
    assert [value for value, _, _ in found[0]] == pytest.approx([value for value, _, _ in found[1]], abs=1e-3)


async def test_a_client_that_leaves(
    workers: System, router: str, prompt: str, session: aiohttp.ClientSession, insider: aiohttp.ClientSession
) -> None:
    asked = body("/v1/completions", prompt, stream=True, max_tokens=200, ignore_eos=True)
    async with session.post(f"{router}/v1/completions", json=asked) as reply:
        await reply.content.readuntil(b"\n\n")
    await workers.idle(insider, ["prefill-0", "decode-0"], seconds=20)


async def test_many_at_once(router: str, alone: str, prompt: str, session: aiohttp.ClientSession) -> None:
    prompts = [f"{number} {prompt}" for number in range(12)]
    answers = await asyncio.gather(
        *(ask(session, router, "/v1/completions", body("/v1/completions", each)) for each in prompts)
    )
    for answer, each in zip(answers, prompts, strict=True):
        assert answer == await ask(session, alone, "/v1/completions", body("/v1/completions", each))


@pytest.mark.parametrize("path", ["/health", "/health_generate", "/v1/models", "/get_model_info", "/get_server_info"])
async def test_what_routers_ask_of_workers(router: str, path: str, session: aiohttp.ClientSession) -> None:
    async with session.get(router + path) as reply:
        assert reply.status == 200, await reply.text()
