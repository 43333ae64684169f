"""What clients see, over HTTP, of a real router with real workers."""

import asyncio
import json
import time

import pytest
from openai import AsyncOpenAI

from tests.e2e.conftest import Reference
from tests.e2e.system import System, client, generate, post, stream

QUESTION = "What is the capital of France?"


def openai(system: System) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0)


async def test_chat(system: System) -> None:
    async with openai(system) as api:
        answer = await api.chat.completions.create(
            model="SmolLM2-135M-Instruct", messages=[{"role": "user", "content": QUESTION}], temperature=0
        )
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage
    assert answer.usage.completion_tokens == 8


async def test_streaming_chat_with_usage_and_logprobs(system: System) -> None:
    async with openai(system) as api:
        events = [
            event
            async for event in await api.chat.completions.create(
                model="SmolLM2-135M-Instruct",
                messages=[{"role": "user", "content": QUESTION}],
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                logprobs=True,
                top_logprobs=3,
            )
        ]
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == "The capital of France is Paris."
    logprobs = [
        entry for event in events if event.choices and (lp := event.choices[0].logprobs) for entry in lp.content or ()
    ]
    assert len(logprobs) == 8
    assert all(entry.top_logprobs[0].token == entry.token for entry in logprobs), "greedy picks the most probable"
    assert events[-1].usage
    assert events[-1].usage.completion_tokens == 8


async def test_several_choices_and_prompts(system: System, reference: Reference) -> None:
    prompts = [list(prompt) for prompt in reference.prompts()[3:6]]
    async with openai(system) as api:
        answer = await api.completions.create(
            model="SmolLM2-135M-Instruct", prompt=prompts, n=3, max_tokens=6, temperature=0
        )
        sampled = await api.completions.create(
            model="SmolLM2-135M-Instruct", prompt=prompts[0], n=4, max_tokens=12, temperature=1, seed=3
        )
    expected = [reference.decode(reference.generate(tuple(prompt), 6)) for prompt in prompts for _ in range(3)]
    assert [choice.text for choice in answer.choices] == expected
    assert len({choice.text for choice in sampled.choices}) > 1, "choices of one prompt differ when sampled"


async def test_64_concurrent_requests(system: System, reference: Reference) -> None:
    prompts = (reference.prompts()[:14] * 5)[:64]
    async with client() as session:
        answers = await asyncio.gather(*(generate(session, system.url, prompt, 12) for prompt in prompts))
        await system.idle(session)
    assert answers == [reference.generate(prompt, 12) for prompt in prompts]


async def test_tokens_come_one_by_one(system: System, reference: Reference) -> None:
    body = {"prompt": list(reference.prompts()[14]), "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    async with client() as session:
        events = [event async for event in stream(session, system.url, body)]
    assert len(events) >= 20, "tokens come one by one"


BAD = {
    "empty prompt": ("/v1/completions", {"prompt": ""}, 400),
    "no prompt": ("/v1/completions", {}, 400),
    "empty list": ("/v1/completions", {"prompt": []}, 400),
    "no messages": ("/v1/chat/completions", {"messages": []}, 400),
    "prompt beyond the context": ("/v1/completions", {"prompt": [5] * 9000}, 400),
    "max_tokens 0": ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400),
    "max_tokens beyond the context": ("/v1/completions", {"prompt": "a", "max_tokens": 9000}, 400),
    "unknown model": ("/v1/completions", {"prompt": "a", "model": "gpt-7"}, 404),
    "wrong type": ("/v1/completions", {"prompt": "a", "max_tokens": "many"}, 400),
    "NaN temperature": ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400),
    "unknown field": ("/v1/completions", {"prompt": "a", "temprature": 1}, 400),
    "invalid JSON": ("/v1/completions", b'{"prompt": ', 400),
    "not UTF-8": ("/v1/completions", b'{"prompt": "\xff\xfe"}', 400),
    "unknown token id": ("/v1/completions", {"prompt": [10_000_000]}, 400),
    "negative token id": ("/v1/completions", {"prompt": [-1]}, 400),
    "a million choices": ("/v1/completions", {"prompt": "a", "n": 1_000_000}, 400),
    "tools": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400),
    "no such path": ("/v1/nothing", {}, 404),
    "sglang, unknown parameter": ("/generate", {"text": "a", "sampling_params": {"beams": 4}}, 400),
}


@pytest.mark.parametrize(("path", "body", "status"), BAD.values(), ids=BAD.keys())
async def test_bad_input(system: System, path: str, body: object, status: int) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body)
    async with client() as session:
        async with session.post(f"{system.url}{path}", data=data) as reply:
            assert reply.status == status, await reply.text()
            error = (await reply.json())["error"]
        assert error["message"]
        await system.idle(session)


async def test_huge_body(system: System) -> None:
    async with client() as session:
        async with session.post(f"{system.url}/v1/completions", data=b"x" * 100_000_000) as reply:
            assert reply.status == 413
        status, _ = await post(session, f"{system.url}/v1/completions", {"prompt": "still there?", "max_tokens": 2})
        assert status == 200


async def test_looking_glasses(system: System, reference: Reference) -> None:
    prompt = list(reference.prompts()[15])
    async with client() as session:
        await post(session, f"{system.url}/v1/completions", {"prompt": prompt}, x_request_id="look-1")
        async with session.get(f"{system.url}/debug/requests/look-1") as reply:
            events = (await reply.json())["events"]
        names = {(event["worker"], event["event"]) for event in events}
        assert {("router", "routed"), ("prefill-0", "prefill_started"), ("decode-0", "attached")} <= names
        assert {("decode-0", "first_token"), ("decode-0", "kv_complete"), ("decode-0", "finished")} <= names
        assert [event["time"] for event in events] == sorted(event["time"] for event in events)
        async with session.get(f"{system.url}/workers") as reply:
            workers = {worker["id"]: worker for worker in await reply.json()}
        assert {name: worker["role"] for name, worker in workers.items()} == {
            "prefill-0": "prefill",
            "decode-0": "decode",
        }
        assert all(
            worker["state"] == "ready" and worker["pid"] and worker["link"] == "shm, tcp" for worker in workers.values()
        )
        for url in (system.url, *(worker.url for worker in system.workers.values())):
            for path in ("/health", "/ready", "/v1/models"):
                async with session.get(f"{url}{path}") as reply:
                    assert reply.status == 200
            async with session.get(f"{url}/metrics") as reply:
                assert "twostroke_time_to_first_token_seconds" in await reply.text()


async def test_abort_request(system: System, reference: Reference) -> None:
    body = {
        "input_ids": list(reference.prompts()[14]), "rid": "abort-me",
        "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True},
    }  # fmt: skip
    async with client() as session:
        running = asyncio.create_task(post(session, f"{system.url}/generate", body))
        deadline = time.monotonic() + 30
        while not (await system.info(session, "decode-0"))["running"]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        async with session.post(f"{system.url}/abort_request", json={"rid": "abort-me"}) as reply:
            assert reply.status == 200
        status, reply_body = await running
        assert status == 200
        assert reply_body["meta_info"]["finish_reason"]["type"] == "abort"
        await system.idle(session)
