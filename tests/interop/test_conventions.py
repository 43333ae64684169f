"""What the routers do, done by hand: any proxy that keeps to a convention works, and clients cannot misuse it."""

import asyncio
from uuid import uuid4

import aiohttp
import pytest

from tests.e2e.system import System
from tests.interop.asking import Answer, Json, ask, events, handed_over

COMPLETIONS = "/v1/completions"
TEXT = "hello world, hello there. The quick brown fox jumps over the lazy dog. " * 3


@pytest.fixture
def prompt() -> str:
    """A prompt of which nobody has any block."""
    return f"{uuid4().hex} {TEXT}"


def greedy(prompt: str, **fields: object) -> dict[str, object]:
    return {"prompt": prompt, "max_tokens": 12, "temperature": 0, **fields}


class Proxy:
    """vLLM's convention: prefill, and then decode with what the prefill worker's reply says."""

    def __init__(self, session: aiohttp.ClientSession, workers: System, producer: str, consumer: str) -> None:
        self._session = session
        self._urls = [workers.workers[name].url for name in (producer, consumer)]

    async def prefill(self, body: dict[str, object]) -> Json:
        """``kv_transfer_params`` for the decode worker."""
        nothing = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
        params = {"do_remote_decode": True, "do_remote_prefill": False, **nothing}
        changed = {"stream": False, "max_tokens": 1, "kv_transfer_params": params}
        async with self._session.post(self._urls[0] + COMPLETIONS, json=body | changed) as reply:
            assert reply.status == 200, await reply.text()
            return (await reply.json())["kv_transfer_params"]

    async def decode(self, body: dict[str, object], params: Json) -> Answer:
        """The answer."""
        return await ask(self._session, self._urls[1], COMPLETIONS, body | {"kv_transfer_params": params})

    async def refusal(self, body: dict[str, object]) -> tuple[int, str]:
        """How the decode worker refuses."""
        async with self._session.post(self._urls[1] + COMPLETIONS, json=body) as reply:
            return reply.status, (await reply.json())["error"]["message"]


@pytest.fixture
def proxy(session: aiohttp.ClientSession, workers: System) -> Proxy:
    return Proxy(session, workers, "prefill-0", "decode-0")


# -- vLLM's ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_proxy_of_vllm_workers(
    proxy: Proxy, workers: System, alone: str, prompt: str, stream: bool,
    session: aiohttp.ClientSession, insider: aiohttp.ClientSession,
) -> None:  # fmt: skip
    body = greedy(prompt, stream=stream)
    params = await proxy.prefill(body)
    assert params["do_remote_prefill"] is True
    answer = await proxy.decode(body, params)
    assert len(await handed_over(session, workers, answer)) == 1
    assert answer == await ask(session, alone, COMPLETIONS, body)
    await workers.idle(insider, ["prefill-0", "decode-0"])


async def test_roles_are_the_proxys(session: aiohttp.ClientSession, workers: System, prompt: str) -> None:
    """The words say which end is meant, whatever a worker was started for."""
    back = Proxy(session, workers, "decode-0", "prefill-0")
    body = greedy(prompt)
    answer = await back.decode(body, await back.prefill(body))
    stamps = await events(session, workers, "prefill-0", answer.id)
    assert "kv_complete" in [stamp["event"] for stamp in stamps]
    assert answer == await ask(session, workers.workers["decode-0"].url, COMPLETIONS, body)


async def test_a_hand_over_is_used_once(
    proxy: Proxy, workers: System, prompt: str, session: aiohttp.ClientSession, insider: aiohttp.ClientSession
) -> None:
    body = greedy(prompt)
    params = await proxy.prefill(body)
    first, again = [await proxy.decode(body, params) for _ in range(2)]
    assert first == again
    stamps = await events(session, workers, "decode-0", again.id)
    (fallback,) = [stamp for stamp in stamps if stamp["event"] == "fallback"]
    assert "is over" in fallback["detail"]["reason"]
    await workers.idle(insider, ["prefill-0", "decode-0"])


async def test_the_blocks_of_one_prompt_never_answer_another(
    proxy: Proxy, workers: System, alone: str, prompt: str,
    session: aiohttp.ClientSession, insider: aiohttp.ClientSession,
) -> None:  # fmt: skip
    """A client could bring any two requests together: not even its own answer may come from another prompt's KV."""
    theirs, mine = greedy(f"A{prompt}"), greedy(f"B{prompt}")
    expected = await ask(session, alone, COMPLETIONS, mine)
    params = await proxy.prefill(theirs)
    answer = await proxy.decode(mine, params)
    assert answer == expected
    stamps = await events(session, workers, "decode-0", answer.id)
    assert "different prompts" in str(stamps)
    assert await ask(session, workers.workers["decode-0"].url, COMPLETIONS, mine) == expected, "nor what is cached"
    answer = await proxy.decode(theirs, params)
    assert answer == await ask(session, alone, COMPLETIONS, theirs)
    assert len(await handed_over(session, workers, answer)) == 1, "whom it is for still gets it"
    await workers.idle(insider, ["prefill-0", "decode-0"])


@pytest.mark.parametrize("change", [{"remote_port": 9}, {"remote_host": "127.0.0.2"}, {"signature": None}])
async def test_words_that_no_worker_signed(proxy: Proxy, prompt: str, change: dict[str, object]) -> None:
    """The host is none that the operator allowed: it would need no signature."""
    body = greedy(prompt)
    params = await proxy.prefill(body)
    forged = params | change | {"remote_host": "127.0.0.2"}
    status, message = await proxy.refusal(body | {"kv_transfer_params": forged})
    assert (status, "--bootstrap-hosts" in message) == (401, True)
    await proxy.decode(body, params)


# -- SGLang's --------------------------------------------------------------------------------------------------------


def rooms(workers: System, *, host: str = "127.0.0.1", room: int) -> dict[str, object]:
    """The fields for a producer that is our prefill worker."""
    port = int(workers.workers["prefill-0"].url.rsplit(":", 1)[1])
    return {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": room}


@pytest.mark.parametrize("first", ["prefill-0", "decode-0"])
async def test_whoever_comes_first(
    workers: System, alone: str, prompt: str, first: str,
    session: aiohttp.ClientSession, insider: aiohttp.ClientSession,
) -> None:  # fmt: skip
    body = greedy(prompt) | rooms(workers, room=len(first))
    later = {"prefill-0": "decode-0", "decode-0": "prefill-0"}[first]
    asking = asyncio.create_task(ask(session, workers.workers[first].url, COMPLETIONS, body))
    await asyncio.sleep(0.3)
    answers = {later: await ask(session, workers.workers[later].url, COMPLETIONS, body), first: await asking}
    assert answers["decode-0"] == await ask(session, alone, COMPLETIONS, greedy(prompt))
    assert len(await handed_over(session, workers, answers["decode-0"])) == 1
    await workers.idle(insider, ["prefill-0", "decode-0"])


async def test_a_host_that_nobody_allowed(proxy: Proxy, workers: System, prompt: str) -> None:
    status, message = await proxy.refusal(greedy(prompt) | rooms(workers, host="127.0.0.2", room=1))
    assert (status, "--bootstrap-hosts 127.0.0.2" in message) == (401, True)
