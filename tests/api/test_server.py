"""The API over a real socket, with the openai client and by hand."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import pairwise

import aiohttp
import msgspec
import openai
import pytest

from tests.api.conftest import MAX_BODY, Running, ScriptedService, running
from twostroke.errors import EngineFailed, Overloaded
from twostroke.messages import (
    ATTEMPT_HEADER,
    JOURNAL_HEADER,
    REQUEST_ID_HEADER,
    SECRET_HEADER,
    TICKET_HEADER,
    Bootstrap,
    Journal,
    KvTransfer,
    ModelCard,
    Sent,
    Ticket,
    encode,
)
from twostroke.tokenizer import Tokenizer

MODEL = "tiny"
HELLO = "hello"
WAIT = 10.0  # seconds; a bound for what should take milliseconds
CONSUME = encode(Ticket("h", "consume", peer="http://p")).decode()
PRODUCE = encode(Ticket("h", "produce")).decode()


async def events(response: aiohttp.ClientResponse) -> list[str]:
    text = await response.text()
    assert text.endswith("\n\n")
    return [event.removeprefix("data: ") for event in text[:-2].split("\n\n")]


# -- answers -----------------------------------------------------------------------------------------------------


async def test_completion(server: Running) -> None:
    reply = await server.openai.completions.create(model=MODEL, prompt=HELLO)
    assert reply.object == "text_completion"
    assert reply.choices[0].text == "hello world"
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(server.service.tokenizer.encode(HELLO))
    assert reply.usage.completion_tokens == len(server.service.script)
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 1


async def test_streamed_completion(server: Running) -> None:
    stream = await server.openai.completions.create(
        model=MODEL, prompt=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "hello world"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(server.service.script)


async def test_chat(server: Running) -> None:
    reply = await server.openai.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": HELLO}])
    assert reply.object == "chat.completion"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == "hello world"


async def test_streamed_chat(server: Running) -> None:
    stream = await server.openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": HELLO}], stream=True, n=2
    )
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == "hello world"
        assert own[-1].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


async def test_choices_run_at_the_same_time(server: Running) -> None:
    """Streamed choices interleave; prompts keep their order in a whole reply."""
    stream = await server.openai.completions.create(model=MODEL, prompt=[HELLO, "world"], n=2, stream=True)
    indices = [chunk.choices[0].index async for chunk in stream]
    assert set(indices) == {0, 1, 2, 3}
    assert indices != sorted(indices)
    reply = await server.openai.completions.create(model=MODEL, prompt=[HELLO, "world"], n=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert len({request.sampling.seed for request in server.service.requests[-4:]}) == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(server: Running, stream: bool) -> None:
    count = len(server.service.script)
    if stream:
        chunks = await server.openai.completions.create(model=MODEL, prompt=HELLO, logprobs=2, stream=True)
        lists = [chunk.choices[0].logprobs async for chunk in chunks]
    else:
        reply = await server.openai.completions.create(model=MODEL, prompt=HELLO, logprobs=2)
        lists = [reply.choices[0].logprobs]
    tokens = [token for one in lists if one for token in one.tokens or []]
    offsets = [offset for one in lists if one for offset in one.text_offset or []]
    assert "".join(tokens) == "hello world"
    assert offsets == [sum(map(len, tokens[:i])) for i in range(count)]
    assert sum(len(one.top_logprobs or []) for one in lists if one) == count


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(server: Running, stream: bool) -> None:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": HELLO}]
    create = server.openai.chat.completions.create
    if stream:
        chunks = await create(model=MODEL, messages=messages, logprobs=True, top_logprobs=2, stream=True)
        streamed = [chunk.choices[0].logprobs async for chunk in chunks]
        content = [entry for one in streamed if one for entry in one.content or []]
    else:
        reply = await create(model=MODEL, messages=messages, logprobs=True, top_logprobs=2)
        whole = reply.choices[0].logprobs
        content = list(whole.content or []) if whole else []
    assert b"".join(bytes(entry.bytes or []) for entry in content) == b"hello world"
    assert {len(entry.top_logprobs) for entry in content} == {2}
    assert {entry.logprob for entry in content} == {-0.5}


async def test_stop_string_ends_the_generation(server: Running) -> None:
    server.service.script = server.service.tokenizer.encode("hello world STOP hello there")
    server.service.hang_after = len(server.service.script) - 1
    reply = await server.openai.completions.create(model=MODEL, prompt=HELLO, stop=" STOP", max_tokens=100)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("hello world", "stop")
    await asyncio.wait_for(server.service.closed.wait(), WAIT)


async def test_models(server: Running) -> None:
    page = await server.openai.models.list()
    assert [(model.id, model.owned_by) for model in page.data] == [(MODEL, "twostroke")]


async def test_generate(server: Running) -> None:
    body = {"text": HELLO, "sampling_params": {"max_new_tokens": 2}}
    async with server.http.post(f"{server.url}/generate", json=body) as response:
        reply = await response.json()
    assert reply["output_ids"] == server.service.script[:2]
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 2}
    assert reply["meta_info"]["id"] == response.headers[REQUEST_ID_HEADER]


async def test_streamed_generate_carries_the_whole_text(server: Running) -> None:
    body = {"text": HELLO, "stream": True, "max_new_tokens": 64}
    async with server.http.post(f"{server.url}/generate", json=body) as response:
        *chunks, done = await events(response)
    texts = [json.loads(chunk)["text"] for chunk in chunks]
    assert done == "[DONE]"
    assert texts[-1] == "hello world"
    assert all(after.startswith(before) for before, after in pairwise(texts))
    assert json.loads(chunks[-1])["output_ids"] == server.service.script


async def test_abort_by_rid(server: Running) -> None:
    server.service.hang_after = 1
    body = {"text": HELLO, "rid": "mine", "stream": True}
    async with server.http.post(f"{server.url}/generate", json=body) as response:
        await response.content.readuntil(b"\n\n")
        async with server.http.post(f"{server.url}/abort_request", json={"rid": "mine"}) as aborted:
            assert aborted.status == 200
        *_, last, _ = await events(response)
    assert json.loads(last)["meta_info"]["finish_reason"]["type"] == "abort"


async def test_an_abort_of_our_router_ends_one_attempt(server: Running) -> None:
    """The next one may have come to the same worker before it."""
    server.service.hang_after = 1
    body = {"text": HELLO, "rid": "mine", "stream": True}
    async with AsyncExitStack() as stack:
        first, second = [
            await stack.enter_async_context(
                server.http.post(
                    f"{server.url}/generate",
                    json=body,
                    headers={REQUEST_ID_HEADER: "one", JOURNAL_HEADER: encode(Journal(0, 1, attempt)).decode()},
                )
            )
            for attempt in range(2)
        ]
        for stream in (first, second):
            await stream.content.readuntil(b"\n\n")
        url, mine, only = f"{server.url}/abort_request", {"rid": "mine"}, {ATTEMPT_HEADER: "0"}
        async with server.http.post(url, json=mine, headers=only) as aborted:
            assert aborted.status == 200
        assert b'"abort"' in await asyncio.wait_for(first.read(), WAIT)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(second.content.readuntil(b"abort"), 0.2)
        async with server.http.post(url, json=mine):
            assert b'"abort"' in await asyncio.wait_for(second.read(), WAIT)


async def test_sglang_information(server: Running) -> None:
    for path in ("/get_model_info", "/model_info", "/get_server_info", "/server_info"):
        async with server.http.get(server.url + path) as response:
            assert (await response.json())["model_path"] == MODEL
    async with server.http.get(f"{server.url}/health_generate") as response:
        assert response.status == 200
    assert server.service.requests[-1].sampling.max_tokens == 1
    async with server.http.get(f"{server.url}/get_load") as response:
        assert await response.json() == [{"dp_rank": 0, "num_reqs": 3, "num_waiting_reqs": 1, "num_tokens": 50}]


# -- states ------------------------------------------------------------------------------------------------------


async def test_starting(server: Running) -> None:
    server.service.state = "starting"
    for path in ("/health", "/ready"):  # SGLang's router registers a worker when its health is good, and never again
        async with server.http.get(server.url + path) as response:
            assert response.status == 503
            assert await response.json() == {"state": "starting", "detail": "loading weights"}
    async with server.http.post(f"{server.url}/v1/completions", json={"prompt": HELLO}) as response:
        assert response.status == 503
        assert response.headers["retry-after"] == "1"
        assert (await response.json())["error"]["type"] == "unavailable_error"
    server.service.state = "ready"
    async with server.http.get(f"{server.url}/ready") as response:
        assert response.status == 200


async def test_metrics_and_timeline(server: Running) -> None:
    server.lifecycle.stamp("known/0/0", "received", prompt_tokens=1)
    async with server.http.get(f"{server.url}/debug/requests/known") as response:
        timeline = await response.json()
    assert (timeline["id"], timeline["events"][0]["event"]) == ("known", "received")
    async with server.http.get(f"{server.url}/debug/requests/unknown") as response:
        assert response.status == 404
    async with server.http.get(f"{server.url}/metrics") as response:
        assert "twostroke_time_to_first_token_seconds" in await response.text()


async def test_request_id(server: Running) -> None:
    url = f"{server.url}/v1/completions"
    async with server.http.post(url, json={"prompt": HELLO}, headers={REQUEST_ID_HEADER: "mine-1"}) as response:
        assert response.headers[REQUEST_ID_HEADER] == "mine-1"
        assert (await response.json())["id"] == "cmpl-mine-1"
    assert server.service.requests[-1].id == "mine-1/0/0"
    host = f"{'h' * 250}:8000"
    given = f"___prefill_addr_{host}___decode_addr_{host}_{'0' * 32}"  # as vLLM's router names requests
    async with server.http.post(url, json={"prompt": HELLO}, headers={REQUEST_ID_HEADER: given}) as response:
        assert response.headers[REQUEST_ID_HEADER] == given
    for bad in ("a/b", "x" * 601, "a b"):
        async with server.http.post(url, json={"prompt": HELLO}, headers={REQUEST_ID_HEADER: bad}) as response:
            assert response.status == 400
            assert response.headers[REQUEST_ID_HEADER] != bad


async def test_a_running_request_id_is_refused(server: Running) -> None:
    server.service.hang_after = 1
    url, headers = f"{server.url}/v1/completions", {REQUEST_ID_HEADER: "twice"}
    async with server.http.post(url, json={"prompt": HELLO, "stream": True}, headers=headers) as first:
        await first.content.readuntil(b"\n\n")
        async with server.http.post(url, json={"prompt": HELLO}, headers=headers) as second:
            assert second.status == 409


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b'{"prompt": ""}', 400, "prompt"),
        (b'{"prompt": "hello", "n": 1000000}', 400, "n"),
        (b'{"prompt": "hello", "temperature": NaN}', 400, None),
        (b'{"prompt": "hello", "model": "other"}', 404, "model"),
        (b'{"prompt": "hello", "max_tokens": 0}', 400, "max_tokens"),
        (b'{"prompt": "hello", "what": 0}', 400, "what"),
        (b'{"prompt": [999999]}', 400, "prompt"),
        (b'{"prompt": "\xff"}', 400, None),
        (b"not json", 400, None),
        (b"[" * 100_000, 400, None),
        (b'{"prompt": "' + b"hello " * 100_000 + b'"}', 400, "prompt"),
        (b" " * (MAX_BODY + 1), 413, None),
    ],
)
async def test_bad_input(server: Running, body: bytes, status: int, param: str | None) -> None:
    async with server.http.post(f"{server.url}/v1/completions", data=body) as response:
        assert response.status == status
        error = (await response.json())["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    await test_completion(server)


async def test_a_chunked_body_is_bounded_too(server: Running) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b" " * (MAX_BODY // 16)

    async with server.http.post(f"{server.url}/v1/completions", data=endless()) as response:
        assert response.status == 413
    await test_completion(server)


async def test_no_such_path_or_method(server: Running) -> None:
    async with server.http.get(f"{server.url}/v2") as response:
        assert response.status == 404
        assert (await response.json())["error"]["type"] == "not_found_error"
    async with server.http.get(f"{server.url}/v1/completions") as response:
        assert response.status == 405
        assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_the_openai_client_understands_errors(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await server.openai.completions.create(model=MODEL, prompt=HELLO, extra_body={"what": 1})
    assert caught.value.param == "what"
    with pytest.raises(openai.NotFoundError) as missing:
        await server.openai.completions.create(model="other", prompt=HELLO)
    assert missing.value.code == "model_not_found"


# -- failures ----------------------------------------------------------------------------------------------------


async def test_an_error_before_the_first_token_has_its_status(server: Running) -> None:
    server.service.fail_after, server.service.error = 0, Overloaded("the queue is full", retry_after=7)
    for stream in (False, True):
        async with server.http.post(
            f"{server.url}/v1/completions", json={"prompt": HELLO, "stream": stream}
        ) as response:
            assert response.status == 429
            assert response.headers["retry-after"] == "7"


async def test_an_error_in_mid_stream_is_an_event(server: Running) -> None:
    server.service.fail_after, server.service.error = 1, EngineFailed("the model run failed")
    body = {"prompt": HELLO, "stream": True, "n": 3}
    async with server.http.post(f"{server.url}/v1/completions", json=body) as response:
        *_, error, done = await events(response)
    assert json.loads(error)["error"]["code"] == "engine_failed"
    assert done == "[DONE]"
    assert server.service.open == 0
    stream = await server.openai.completions.create(model=MODEL, prompt=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="the model run failed"):
        _ = [chunk async for chunk in stream]


async def test_an_unexpected_error_is_logged_without_text(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    server.service.fail_after, server.service.error = 0, ZeroDivisionError("secret prompt")
    with caplog.at_level(logging.ERROR):
        async with server.http.post(
            f"{server.url}/v1/completions", json={"prompt": HELLO}, headers={REQUEST_ID_HEADER: "find-me"}
        ) as response:
            assert response.status == 500
            assert "secret" not in await response.text()
    assert "find-me" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_ends_every_generation(server: Running, stream: bool) -> None:
    server.service.hang_after = 1
    body = json.dumps({"prompt": [HELLO, HELLO], "n": 2, "stream": stream}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
    for _ in range(4):
        await asyncio.wait_for(server.service.opened.get(), WAIT)
    if stream:
        await reader.readuntil(b"data: ")
    writer.close()
    await asyncio.wait_for(server.service.closed.wait(), WAIT)
    server.service.hang_after = None
    await test_completion(server)


async def test_shutdown_ends_a_stream_with_an_event(card: ModelCard, tokenizer: Tokenizer) -> None:
    service = ScriptedService(card, tokenizer)
    service.hang_after = 1
    async with aiohttp.ClientSession() as http, asyncio.timeout(60):
        async with running(service, shutdown_seconds=1) as server:
            response = await http.post(f"{server.url}/v1/completions", json={"prompt": HELLO, "stream": True})
            await response.content.readuntil(b"\n\n")
        *_, error, done = await events(response)
    assert json.loads(error)["error"]["type"] == "unavailable_error"
    assert done == "[DONE]"
    assert service.open == 0


# -- hand-over ---------------------------------------------------------------------------------------------------


async def test_the_ends_of_a_hand_over(server: Running) -> None:
    url, body = f"{server.url}/v1/completions", {"prompt": HELLO, "n": 2}
    async with server.http.post(
        url, json=body, headers={TICKET_HEADER: PRODUCE, REQUEST_ID_HEADER: "both"}
    ) as response:
        (choice,) = (await response.json())["choices"]  # the first one: only its blocks are handed over
        assert (choice["index"], choice["finish_reason"]) == (0, "length")
        assert "hello world".startswith(choice["text"])
    (produced,) = server.service.requests
    async with server.http.post(
        url, json=body, headers={TICKET_HEADER: CONSUME, REQUEST_ID_HEADER: "both"}
    ) as response:
        assert (await response.json())["choices"][1]["text"] == "hello world"
    assert server.service.requests[1] == produced
    assert server.service.tickets[-1] == Ticket("h", "consume", peer="http://p")


BOOTSTRAP = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 8100, "bootstrap_room": 7}
REMOTE_DECODE = {"do_remote_decode": True, "do_remote_prefill": False, "remote_host": None, "remote_block_ids": None}


@pytest.mark.parametrize("stream", [False, True])
async def test_the_producer_answers_another_router_as_it_would_a_client(server: Running, stream: bool) -> None:
    """SGLang's mini_lb reads fields of the prefill worker's reply, and events if that is a stream."""
    body = {"text": HELLO, "stream": stream, "return_logprob": True, **BOOTSTRAP}
    async with server.http.post(f"{server.url}/generate", json=body) as response:
        assert response.content_type == ("text/event-stream" if stream else "application/json")
        text = await response.text()
    reply = json.loads(text.removeprefix("data: ").partition("\n")[0])
    assert len(reply["output_ids"]) == 1
    assert reply["meta_info"]["input_token_logprobs"] == []
    assert server.service.words == [(Bootstrap("10.0.0.1", 8100, 7), False)]
    assert server.service.tickets == [Ticket("foreign", "produce")]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_producer_tells_the_consumer_by_way_of_the_router(server: Running, stream: bool) -> None:
    body = {"prompt": HELLO, "max_tokens": 1, "min_tokens": 1, "stream": stream, "kv_transfer_params": REMOTE_DECODE}
    async with server.http.post(f"{server.url}/v1/completions", json=body) as response:
        reply = await response.json()
    assert len(reply["choices"]) == 1
    params = reply["kv_transfer_params"]
    assert (params["do_remote_prefill"], f"http://{params['remote_host']}:{params['remote_port']}") == (
        True,
        server.url,
    )
    server.service.produces = False
    body = {"prompt": HELLO, "kv_transfer_params": params}
    async with server.http.post(f"{server.url}/v1/completions", json=body) as response:
        assert (await response.json())["choices"][0]["text"] == "hello world"
    assert server.service.words[1] == (msgspec.convert(params, KvTransfer), False)
    assert server.service.tickets[1] == Ticket("foreign", "consume")


async def test_a_list_of_replies_is_left_out_of_what_the_producer_tells(server: Running) -> None:
    body = {"text": [HELLO, HELLO], "kv_transfer_params": REMOTE_DECODE}
    async with server.http.post(f"{server.url}/generate", json=body) as response:
        assert set(await response.json()) == {"kv_transfer_params"}


async def test_one_router_too_many(server: Running) -> None:
    """The body has another router's hand-over. Its prefill has no journal, and answers nobody here."""
    ours = {TICKET_HEADER: CONSUME}, {JOURNAL_HEADER: encode(Journal(0, 0)).decode()}
    bodies: tuple[dict[str, object], ...] = ({**BOOTSTRAP}, {"kv_transfer_params": REMOTE_DECODE})
    for headers, theirs in zip(ours, bodies, strict=True):
        body: dict[str, object] = {"prompt": HELLO} | theirs
        async with server.http.post(f"{server.url}/v1/completions", json=body, headers=headers) as response:
            assert response.status == 400
            assert "one router too many" in (await response.json())["error"]["message"]


async def test_an_answer_that_has_begun_is_not_handed_over_again(server: Running) -> None:
    """Our router sends the same body to the worker that continues."""
    body, line = json.dumps({"prompt": HELLO, "stream": True, **BOOTSTRAP}).encode(), encode([Sent(0, [])]) + b"\n"
    headers = {JOURNAL_HEADER: encode(Journal(len(line), 0)).decode()}
    async with server.http.post(f"{server.url}/v1/completions", data=line + body, headers=headers) as response:
        assert response.status == 200
        await response.read()
    assert server.service.tickets == [None]
    assert server.service.words == []


async def test_who_knows_the_secret_is_an_insider(
    card: ModelCard, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOSTROKE_SECRET", "s3cret")
    async with running(ScriptedService(card, tokenizer)) as server:
        for secret in ("", "wrong", "s3cret"):
            url, body = f"{server.url}/v1/completions", {"prompt": HELLO, **BOOTSTRAP}
            async with server.http.post(url, json=body, headers={SECRET_HEADER: secret}) as response:
                assert response.status == 200
        assert [insider for _, insider in server.service.words] == [False, False, True]


async def test_a_broken_ticket(server: Running) -> None:
    for ticket in ("{", '{"id": "h", "side": "both"}', "[" * 5000):
        async with server.http.post(
            f"{server.url}/v1/completions", json={"prompt": HELLO}, headers={TICKET_HEADER: ticket}
        ) as response:
            assert response.status == 400


async def test_a_ticket_needs_the_secret(
    card: ModelCard, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOSTROKE_SECRET", "s3cret")
    async with running(ScriptedService(card, tokenizer)) as server:
        for secret, status in (("", 401), ("wrong", 401), ("s3cret", 200)):
            headers = {TICKET_HEADER: CONSUME, SECRET_HEADER: secret}
            async with server.http.post(
                f"{server.url}/v1/completions", json={"prompt": HELLO}, headers=headers
            ) as response:
                assert response.status == status
        await test_completion(server)
