"""Real workers join, drain, change roles and leave while requests run; routers die and are replaced."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.ports import free_ports
from tests.tiny import generate, make_model
from twostroke import cli

START_SECONDS = 90.0
PROMPT = [(7 * i) % 300 + 10 for i in range(60)]
LONG = 400  # tokens: a second or more of decoding


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("LlamaForCausalLM", tmp_path_factory.mktemp("tiny"))


class Nodes:
    """Processes of one test, all gone at its end."""

    def __init__(self, tmp: Path, model: Path) -> None:
        self.ports = free_ports(8)
        self.router_url = f"http://127.0.0.1:{self.ports[0]}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._tmp = tmp
        self._model = model

    def start(self, name: str, arguments: Sequence[str]) -> None:
        with (self._tmp / f"{name}.log").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "twostroke", *arguments],
                stdout=out,
                stderr=out,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )

    def router(self) -> None:
        self.start("router", ["router", "--port", str(self.ports[0])])

    def worker(self, name: str, role: str, place: int, *more: str) -> None:
        flags = ["--role", role, "--name", name, "--port", str(self.ports[place]), "--router", self.router_url]
        engine = ["--threads", "1", "--dtype", "float32", "--kv-memory", "2MiB", "--chunk-size", "16"]
        self.start(name, ["serve", str(self._model), *flags, *engine, *more])

    async def operate(self, *arguments: str) -> int:
        """``twostroke workers``."""
        return await asyncio.to_thread(cli.run, ["workers", *arguments, "--url", self.router_url])

    def log(self, name: str) -> str:
        return (self._tmp / f"{name}.log").read_text()

    async def workers(self, session: aiohttp.ClientSession) -> dict[str, dict[str, str]]:
        try:
            async with session.get(f"{self.router_url}/workers") as reply:
                return {worker["id"]: worker for worker in await reply.json()}
        except aiohttp.ClientError:
            return {}

    async def ready(self, session: aiohttp.ClientSession, *names: str) -> None:
        """Until these workers, and no others, are ready."""

        async def there() -> bool:
            known = await self.workers(session)
            return set(known) == set(names) and all(worker["state"] == "ready" for worker in known.values())

        await until(there, START_SECONDS)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


@contextmanager
def nodes(tmp: Path, model: Path) -> Iterator[Nodes]:
    running = Nodes(tmp, model)
    try:
        yield running
    finally:
        for process in running.processes.values():
            process.kill()
            process.wait()


async def ask(session: aiohttp.ClientSession, url: str, tokens: int) -> list[int]:
    """Greedy token ids."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    async with session.post(f"{url}/generate", json={"input_ids": PROMPT, "sampling_params": sampling}) as reply:
        assert reply.status == 200, await reply.text()
        ids: list[int] = (await reply.json())["output_ids"]
        return ids


async def stream(session: aiohttp.ClientSession, url: str, begun: asyncio.Event) -> list[int]:
    """The same, streamed; ``begun`` once there is something."""
    sampling = {"temperature": 0, "max_new_tokens": LONG, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "stream": True}
    ids: list[int] = []
    async with session.post(f"{url}/generate", json=body) as reply:
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                ids = event["output_ids"]
                begun.set()
    return ids


async def busy(session: aiohttp.ClientSession, running: Nodes, names: Sequence[str]) -> str:
    """Which of these workers decodes now."""
    for name in names:
        url = (await running.workers(session))[name]["url"]
        async with session.get(f"{url}/internal/info") as reply:
            if (await reply.json())["running"]:
                return name
    raise AssertionError("nobody decodes")


async def test_workers_come_and_go_under_traffic(tmp_path: Path, model: Path) -> None:
    """One system, in order: all join; one is drained by a call, one by SIGTERM; roles change; the router is killed."""
    with nodes(tmp_path, model) as running:
        running.router()
        for place, (name, role) in enumerate({"p0": "prefill", "d0": "decode", "d1": "decode"}.items(), 1):
            running.worker(name, role, place)
        async with aiohttp.ClientSession() as session:
            await running.ready(session, "p0", "d0", "d1")
            running.worker("odd", "decode", 4, "--block-size", "8")  # only now: the first to join is right
            whole = await ask(session, running.router_url, LONG)
            assert whole[:100] == generate(model, PROMPT, 100)

            # Who does not fit is told why, and never listed.
            async def refused() -> bool:
                return "has block size 8, worker" in running.log("odd")

            await until(refused, START_SECONDS)
            running.processes["odd"].terminate()
            assert running.processes["odd"].wait(20) == 0
            assert set(await running.workers(session)) == {"p0", "d0", "d1"}

            # Roles change under a running answer; the engine is as good at either.
            begun = asyncio.Event()
            answer = asyncio.create_task(stream(session, running.router_url, begun))
            await begun.wait()
            held = await busy(session, running, ["d0", "d1"])
            assert await running.operate("role", held, "prefill") == 0
            assert await answer == whole
            assert (await running.workers(session))[held]["role"] == "prefill"
            assert await ask(session, running.router_url, 50) == whole[:50]
            assert await running.operate("role", held, "decode") == 0

            # Drained by a call: it finishes its stream, takes nothing new, leaves, and its process ends well.
            begun.clear()
            answer = asyncio.create_task(stream(session, running.router_url, begun))
            await begun.wait()
            held = await busy(session, running, ["d0", "d1"])
            assert await running.operate("drain", held) == 0
            assert (await running.workers(session))[held]["state"] == "draining"
            assert await ask(session, running.router_url, 20) == whole[:20]
            assert await answer == whole
            assert await asyncio.to_thread(running.processes[held].wait, 20) == 0
            rest = "d0" if held == "d1" else "d1"
            await running.ready(session, "p0", rest)

            # SIGTERM does the same.
            begun.clear()
            answer = asyncio.create_task(stream(session, running.router_url, begun))
            await begun.wait()
            running.processes[rest].terminate()
            assert await answer == whole
            assert await asyncio.to_thread(running.processes[rest].wait, 20) == 0
            await running.ready(session, "p0")
            assert await ask(session, running.router_url, 20) == whole[:20]  # whoever is left serves

            # The router is killed: its worker drops what it did, and a new router knows it again, in the role it has.
            assert await running.operate("role", "p0", "both") == 0
            begun.clear()
            answer = asyncio.create_task(stream(session, running.router_url, begun))
            await begun.wait()
            url = (await running.workers(session))["p0"]["url"]
            running.processes["router"].kill()
            with pytest.raises(aiohttp.ClientError):
                await answer

            async def idle() -> bool:
                async with session.get(f"{url}/internal/info") as reply:
                    info = await reply.json()
                return not info["running"] and not info["slots"]["leased"]

            await until(idle)
            running.router()
            await running.ready(session, "p0")
            assert (await running.workers(session))["p0"]["role"] == "colocated"
            assert await ask(session, running.router_url, 20) == whole[:20]
