"""Real workers whose pool is too small for what they have computed: it comes back from the store, and is right."""

import asyncio
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from tests.e2e.conftest import FLOAT32, HAND_OVER, ROLES, Reference
from tests.e2e.system import Process, client, generate, launch, post
from tests.store.test_service import free_port, process
from twostroke import cli

TOKENS = 8
CPU = (*FLOAT32, "--device", "cpu")  # on a GPU, computing so small a model beats loading what it has computed
SMALL = (*CPU, "--kv-memory", "42MiB", "--chunk-size", "256")  # 59 blocks: none of the prompts fits beside another
PATIENCE = 20.0


def prompts(reference: Reference) -> list[tuple[int, ...]]:
    """Three of about 500 tokens."""
    laws = reference.prompts()[-1]
    return [reference.prompts()[18], laws[1200:1700], laws[2000:2500]]


async def metrics(session: aiohttp.ClientSession, worker: Process) -> dict[str, float]:
    """Of the store, by name and tier: "hits disk"."""
    async with session.get(f"{worker.url}/metrics") as reply:
        lines = [line for line in (await reply.text()).splitlines() if line.startswith("twostroke_store_")]
    values = {}
    for line in lines:
        name, _, rest = line.removeprefix("twostroke_store_").partition('{tier="')
        tier, _, value = rest.partition('"} ')
        values[f"{name.removesuffix('_total')} {tier}"] = float(value)
    return values


async def settled(session: aiohttp.ClientSession, worker: Process, what: str, least: float) -> None:
    """Wait until a metric has come so far."""
    async with asyncio.timeout(PATIENCE):
        while (await metrics(session, worker)).get(what, 0) < least:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)


async def ask(session: aiohttp.ClientSession, url: str, reference: Reference, asked: Sequence[tuple[int, ...]]) -> None:
    """One after the other; each answer is what transformers says."""
    for prompt in asked:
        assert await generate(session, url, prompt, TOKENS) == reference.generate(prompt, TOKENS)


async def test_a_worker_that_is_killed_finds_its_blocks_again(tmp_path: Path, reference: Reference) -> None:
    asked = prompts(reference)
    blocks = sum(len(prompt) // 16 for prompt in asked)
    store = ["--store", f"host:64MiB,disk:{tmp_path}/kv:512MiB"]
    with launch(tmp_path, {"w": "both"}, engine=[*SMALL, *store]) as system:
        worker = system.workers["w"]
        async with client() as session:
            await ask(session, system.url, reference, asked)
            await settled(session, worker, "blocks disk", blocks)
            await ask(session, system.url, reference, asked)
            found = await metrics(session, worker)
            assert found["hits host"] + found["hits disk"] >= 0.8 * blocks
            _, reply = await post(
                session,
                f"{system.url}/v1/completions",
                {"prompt": list(asked[0]), "max_tokens": 1},
                x_request_id="store-1",
            )
            assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(asked[0]) // 16 * 16 - 16
            async with session.get(f"{worker.url}/debug/requests/store-1") as timeline:
                stamps = {event["event"]: event["detail"] for event in (await timeline.json())["events"]}
            assert stamps["store"]["loaded_blocks"] > 0
            assert "to load a block takes" in stamps["store"]["why"]
            await system.idle(session)

            worker.kill()
            worker = system.workers["w"] = worker.again()
            async with asyncio.timeout(120):
                while (await status(session, f"{worker.url}/ready")) != 200:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.2)
            assert (await metrics(session, worker))["blocks disk"] >= blocks
            await ask(session, worker.url, reference, asked)
            assert (await metrics(session, worker))["hits disk"] >= 0.8 * blocks
            await system.idle(session)


async def status(session: aiohttp.ClientSession, url: str) -> int:
    """Of a GET; 0 if nobody answers."""
    try:
        async with session.get(url) as reply:
            return reply.status
    except aiohttp.ClientError:
        return 0


async def test_disaggregated_over_a_shared_directory(tmp_path: Path, reference: Reference) -> None:
    """The prefill worker loads its prompts; the directory vanishes, comes back, and P is replaced: always right."""
    asked = prompts(reference)
    store = ["--store", f"dir:{tmp_path}/shared"]
    with launch(tmp_path, ROLES, engine=[*SMALL, *store]) as system:
        async with client() as session:
            p = system.workers["prefill-0"]
            await ask(session, system.url, reference, asked)
            await settled(session, p, "blocks dir", sum(len(prompt) // 16 for prompt in asked))
            await ask(session, system.url, reference, asked)
            hits = (await metrics(session, p))["hits dir"]
            assert hits >= 0.8 * sum(len(prompt) // 16 for prompt in asked)

            (tmp_path / "prompt").write_text("Never forget this. " * 20)
            before = (await metrics(session, p))["blocks dir"]
            await post(session, f"{p.url}/v1/completions", {"prompt": "Never forget this. " * 20, "max_tokens": 1})
            await settled(session, p, "blocks dir", before + 5)
            for words in (["stats", p.url], ["pin", p.url, "--prompt", str(tmp_path / "prompt")], ["verify", p.url]):
                assert await asyncio.to_thread(cli.run, ["kv", *words]) == 0
            assert len(list((tmp_path / "shared").glob("*/pinned/*"))) >= 5

            await asyncio.to_thread(shutil.rmtree, tmp_path / "shared")
            await ask(session, system.url, reference, asked)
            await settled(session, p, "faults dir", 1)
            await settled(session, p, "in_service dir", 1)
            await ask(session, system.url, reference, asked)
            await settled(session, p, "blocks dir", len(asked[-1]) // 16)
            await system.idle(session)


async def test_decoding_goes_on_while_the_worker_that_shares_the_directory_is_stopped(
    tmp_path: Path, reference: Reference
) -> None:
    """Two workers, one directory, no locks between them: one is stopped while it may be writing."""
    asked = prompts(reference)
    store = ["--store", f"dir:{tmp_path}/shared:512MiB"]
    with launch(tmp_path, {"a": "both", "b": "both"}, engine=[*SMALL, *store]) as system:
        a, b = system.workers["a"], system.workers["b"]
        async with client() as session:
            await ask(session, a.url, reference, asked[:1])
            await settled(session, a, "blocks dir", len(asked[0]) // 16)
            writing = asyncio.create_task(generate(session, a.url, asked[1], TOKENS))
            await asyncio.sleep(0.3)
            a.signal(signal.SIGSTOP)
            await ask(session, b.url, reference, asked[:2])
            assert (await metrics(session, b))["hits dir"] >= len(asked[0]) // 16 - 1
            a.signal(signal.SIGCONT)
            assert await writing == reference.generate(asked[1], TOKENS)
            await system.idle(session)


async def test_prefill_and_decode_meet_only_in_the_store(tmp_path: Path, reference: Reference) -> None:
    """``--link store`` over a cache service, also when P is killed in the middle of a prompt, and then the service."""
    prompt, other = reference.prompts()[-1][:1000], reference.prompts()[18]
    port = free_port()
    engine = [*CPU, "--chunk-size", "128", "--store", f"service:127.0.0.1:{port}", "--link", "store"]
    with (
        process(tmp_path / "kv", port, "64MiB", "256MiB") as service,
        launch(tmp_path, ROLES, engine=engine, router=HAND_OVER) as system,
    ):
        async with client() as session:
            await ask(session, system.url, reference, [prompt[:500]])
            d = system.workers["decode-0"]
            assert (await metrics(session, d))["hits service"] == 31
            assert (await system.info(session, "decode-0"))["link"] == "store"
            answer = asyncio.create_task(generate(session, system.url, prompt, TOKENS))
            await settled(session, d, "hits service", 31 + 8)
            system.workers["prefill-0"].kill()
            assert await answer == reference.generate(prompt, TOKENS)
            await system.idle(session, ["decode-0"])
            service.kill()
            await ask(session, d.url, reference, [other])
            await settled(session, d, "faults service", 1)
            await system.idle(session, ["decode-0"])
