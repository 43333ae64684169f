"""A router over real workers whose pools are far too small for what is asked at once: everybody is served, in turn."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest

from tests.engine.rig import until
from tests.tiny import generate, make_model
from twostroke.api.server import build_app
from twostroke.api.serving import bind, serve
from twostroke.config import DirectoryTier, EngineConfig, RouterConfig, WorkerConfig
from twostroke.engine.runner import Launched
from twostroke.engine.scheduler import Chunk
from twostroke.messages import Writing
from twostroke.router.router import Router
from twostroke.worker import worker as workers
from twostroke.worker.internal import internal_routes
from twostroke.worker.worker import Worker

BLOCK_BYTES = 16 * 2 * 2 * 2 * 8 * 4  # tokens · layers · K and V · heads · head_dim · float32
REQUESTS, TOKENS = 24, 12


def prompt(number: int) -> list[int]:
    """60 tokens, 4 blocks, of which nobody else has any."""
    return [(number * 31 + 7 * i) % 300 + 10 for i in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("LlamaForCausalLM", tmp_path_factory.mktemp("tiny"))


@asynccontextmanager
async def serving(model: Path, name: str, slots: int, **more: object) -> AsyncIterator[tuple[Worker, str]]:
    """``more``: of the worker's configuration."""
    engine = EngineConfig(device="cpu", dtype="float32", kv_memory=slots * BLOCK_BYTES, token_budget=32, threads=1)
    sock = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    config = WorkerConfig(str(model), name=name, served_name="tiny", engine=engine)
    worker = Worker(msgspec.structs.replace(config, **more), url, "")
    stop = asyncio.Event()
    app = build_app(worker, worker.lifecycle, max_body=1 << 20, routes=internal_routes(worker, ""))
    task = asyncio.create_task(serve(app, sock, shutdown_seconds=1, stop=stop))
    await worker.start(asyncio.Event())
    try:
        yield worker, url
    finally:
        stop.set()
        await task
        await worker.stop()


@asynccontextmanager
async def routing(config: RouterConfig, session: aiohttp.ClientSession) -> AsyncIterator[tuple[Router, str]]:
    router = Router(config, session, secret="")
    sock, stop = bind("127.0.0.1", 0), asyncio.Event()
    task = asyncio.create_task(serve(router.app, sock, shutdown_seconds=1, stop=stop))
    await router.registry.look()
    watching = asyncio.create_task(router.watch())
    try:
        yield router, f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        watching.cancel()
        stop.set()
        await task
        router.close()


async def ask(session: aiohttp.ClientSession, url: str, ids: list[int]) -> tuple[list[int], int]:
    """The greedy answer, and how many tokens of the prompt were not computed."""
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    async with session.post(f"{url}/generate", json={"input_ids": ids, "sampling_params": sampling}) as reply:
        assert reply.status == 200, await reply.text()
        answer = await reply.json()
        return answer["output_ids"], answer["meta_info"]["cached_tokens"]


@pytest.mark.parametrize("schedule", ["concurrent", "serial"])
@pytest.mark.parametrize(("p_slots", "d_slots"), [(60, 6), (6, 60), (6, 6)])
async def test_nobody_waits_for_ever(model: Path, p_slots: int, d_slots: int, schedule: str) -> None:
    async with AsyncExitStack() as stack:
        p, p_url = await stack.enter_async_context(serving(model, "p", p_slots))
        d, d_url = await stack.enter_async_context(serving(model, "d", d_slots))
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        config = RouterConfig((p_url,), (d_url,), schedule=schedule, short_prompt=0)  # type: ignore[arg-type]
        router, url = await stack.enter_async_context(routing(config, session))
        async with asyncio.timeout(60):
            answers = await asyncio.gather(*(ask(session, url, prompt(number)) for number in range(REQUESTS)))
        expected = [generate(model, prompt(number), TOKENS) for number in range(REQUESTS)]
        assert [ids for ids, _ in answers] == expected
        if d_slots < p_slots:
            assert router._relay.counts["queued"]
        for worker in (p, d):
            await until(lambda worker=worker: worker.info().slots.leased == 0)  # type: ignore[misc]
            assert not worker.info().running


async def test_decode_waits_for_a_prefill_worker_with_a_queue(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the store, where nothing but P's answer to D's question tells that its blocks will come."""
    shared = {"link": "store", "store": (DirectoryTier(tmp_path),), "handover_timeout": 0.4}
    monkeypatch.setattr(workers, "_PATIENCE", 2)  # silences
    async with AsyncExitStack() as stack:
        p, p_url = await stack.enter_async_context(serving(model, "p", 6, **shared))
        d, d_url = await stack.enter_async_context(serving(model, "d", 60, **shared))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        _, url = await stack.enter_async_context(routing(RouterConfig((p_url,), (d_url,), short_prompt=0), session))
        monkeypatch.setattr(d._ready().engine, "_speed", 0.0)  # else this model would be computed, not loaded, at times
        monkeypatch.setattr(d._ready().engine, "_measure", lambda step: None)
        asked, writes = [], p.writes

        def note(message: Writing) -> bool:
            asked.append(writes(message))
            return asked[-1]

        monkeypatch.setattr(p, "writes", note)
        computing = p._ready().engine.model
        launch = computing.launch

        def slow(chunks: Sequence[Chunk]) -> Launched:
            time.sleep(0.03)
            return launch(chunks)

        monkeypatch.setattr(computing, "launch", slow)
        queue = [asyncio.create_task(ask(session, p_url, prompt(number))) for number in range(4)]
        await until(lambda: p.info().waiting == 3)
        async with asyncio.timeout(30):
            ids, cached = await ask(session, url, prompt(9))
        assert ids == generate(model, prompt(9), TOKENS)
        assert cached == 48, "all that need not be computed"
        assert len(asked) > 2, "by then D would have given up a P that is not at work"
        assert all(asked)
        assert not any(e.event == "fallback" for timeline in d.lifecycle._timelines.values() for e in timeline.events)
        await asyncio.gather(*queue)


async def test_conversations_go_on_where_they_are_known(model: Path) -> None:
    """Computed tokens are what is measured: by load alone, about every second turn lands on the wrong worker."""
    computed: dict[str, int] = {}
    async with AsyncExitStack() as stack:
        urls = [(await stack.enter_async_context(serving(model, f"c{i}", 400)))[1] for i in range(2)]
        session = await stack.enter_async_context(aiohttp.ClientSession())
        for number, policy in enumerate(("least-loaded", "prefix-aware")):
            config = RouterConfig(colocated=tuple(urls), policy=policy)  # type: ignore[arg-type]
            async with routing(config, session) as (_, url):
                rng = random.Random(1)
                turns = [talk for talk in range(6) for _ in range(4)]
                rng.shuffle(turns)
                talks: dict[int, list[int]] = {talk: [10 + talk + 50 * number] for talk in turns}
                computed[policy] = 0
                for talk in turns:
                    talks[talk] += rng.choices(range(10, 300), k=90)
                    ids, cached = await ask(session, url, talks[talk])
                    computed[policy] += len(talks[talk]) - cached
                    talks[talk] += ids
    fewest = 24 * 90 + 6
    assert fewest <= computed["prefix-aware"] < 1.3 * fewest
    assert computed["prefix-aware"] < 0.8 * computed["least-loaded"], computed
