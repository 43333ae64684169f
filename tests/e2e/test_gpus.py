"""Prefill and decode on GPUs, two of them where there are: right in bfloat16 too, and when either is killed."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import FLOAT32, HAND_OVER, ROLES, Reference
from tests.e2e.system import Json, System, client, launch, post, stream
from tests.e2e.test_correctness import NIXL, handed_over
from tests.store.test_service import free_port, process

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOKENS = 24
POOL = 1 << 30  # bytes: what ``launch`` gives each worker


def completion(prompt: Sequence[int], tokens: int, **more: str) -> Json:
    """A greedy one of full length."""
    return {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}


async def ask(system: System, url: str, prompt: Sequence[int], salt: str) -> str:
    """The answer, with nothing of the prompt in any cache."""
    async with client() as session:
        status, reply = await post(session, f"{url}/v1/completions", completion(prompt, TOKENS, cache_salt=salt))
        assert status == 200, reply
        await system.idle(session)
    text: str = reply["choices"][0]["text"]
    return text


@pytest.mark.parametrize("link", ["cuda-ipc", "tcp", NIXL])
async def test_in_bfloat16_disaggregated_is_colocated(tmp_path: Path, reference: Reference, link: str) -> None:
    """The same kernels on the same blocks: one request at a time, every token is the same."""
    prompts = [prompt for prompt in reference.prompts() if len(prompt) > 40]
    engine = ["--dtype", "bfloat16", "--chunk-size", "512", "--link", link]
    with launch(tmp_path, ROLES, engine=engine, router=HAND_OVER) as system:
        for index, prompt in enumerate(prompts):
            apart = await ask(system, system.url, prompt, f"apart-{index}")
            together = await ask(system, system.workers["prefill-0"].url, prompt, f"together-{index}")
            assert apart == together, f"prompt of {len(prompt)} tokens"
        assert await handed_over(system) >= sum(map(len, prompts)) // 16 * 0.9
        async with client() as session:
            assert {(await system.info(session, name))["link"] for name in ROLES} == {link}


@pytest.mark.parametrize(
    ("link", "store"),
    [
        ("auto", "host:256MiB,service:127.0.0.1:{port}"),
        ("store", "service:127.0.0.1:{port}"),
        ("auto", "disk:{path}:1GiB --gds off"),
        ("auto", "disk:{path}:1GiB --gds on"),
        ("store", "dir:{path} --gds on"),
    ],
)
async def test_blocks_go_through_tiers(tmp_path: Path, reference: Reference, link: str, store: str) -> None:
    """Whether loading them is worth it or not: a pool that is too small for all prompts, asked again and again."""
    if store.endswith("on"):
        pytest.importorskip("kvikio")
    laws, port = reference.prompts()[-1], free_port()
    prompts = [laws[:1500], laws[1000:2400], laws[2100:3300]]
    tiers = store.format(port=port, path=tmp_path / "files").split()
    engine = [*FLOAT32, "--chunk-size", "512", "--kv-memory", "84MiB", "--link", link, "--store", *tiers]
    with (
        process(tmp_path / "kv", port, "512MiB", "1GiB"),
        launch(tmp_path, ROLES, engine=engine, router=HAND_OVER) as system,
    ):
        async with client() as session:
            for turn in range(3):
                for prompt in prompts:
                    status, reply = await post(session, f"{system.url}/v1/completions", completion(prompt, TOKENS))
                    assert status == 200, reply
                    right = reference.decode(reference.generate(prompt, TOKENS))
                    assert reply["choices"][0]["text"] == right, f"turn {turn}"
            await system.idle(session)


async def test_the_prefill_worker_is_killed_while_blocks_travel(tmp_path: Path, reference: Reference) -> None:
    """The answer is right, and D's mapping of P's pool does not keep that memory."""
    prompt = reference.prompts()[-1]
    engine = [*FLOAT32, "--chunk-size", "64"]
    with launch(tmp_path, {**ROLES, "decode-1": "decode"}, engine=engine, router=HAND_OVER) as system:
        async with client() as session:
            body = completion(prompt, TOKENS)
            answer = asyncio.create_task(post(session, f"{system.url}/v1/completions", body, x_request_id="killed"))
            moved = 0.0
            async with asyncio.timeout(30):
                while moved < 20:
                    moved = await handed_over(system)
                    assert not answer.done(), "it was too fast to be killed"
            free, _ = torch.cuda.mem_get_info(0)
            system.workers.pop("prefill-0").kill()
            status, reply = await answer
            assert status == 200, reply
            assert reply["choices"][0]["text"] == reference.decode(reference.generate(prompt, TOKENS))
            async with asyncio.timeout(30):
                while torch.cuda.mem_get_info(0)[0] < free + POOL:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.1)
            await system.idle(session)
            async with session.get(f"{system.url}/debug/requests/killed") as timeline:
                events = {event["event"] for event in (await timeline.json())["events"]}
            assert "fallback" in events


async def test_the_decode_worker_is_killed_in_mid_stream(tmp_path: Path, reference: Reference) -> None:
    prompt, tokens = reference.prompts()[18], 150
    with launch(tmp_path, {**ROLES, "decode-1": "decode"}, engine=FLOAT32, router=HAND_OVER) as system:
        async with client() as session:
            text, events = "", 0
            async for event in stream(session, system.url, completion(prompt, tokens)):
                text += event["choices"][0]["text"]
                events += 1
                if events == 10:
                    for name in ("decode-0", "decode-1"):
                        if name in system.workers and (await system.info(session, name))["running"]:
                            system.workers.pop(name).kill()
                            break
                    else:
                        raise AssertionError("nobody decodes it")
            assert text == reference.decode(reference.generate(prompt, tokens))
            await system.idle(session)
