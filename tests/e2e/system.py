"""Real processes for end-to-end tests: workers and a router, started by the command line that users have."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from tests.e2e.ports import free_ports

START_SECONDS = 120.0
Json = Any


@dataclass
class Process:
    """One ``twostroke`` process of a test."""

    name: str
    url: str
    popen: "subprocess.Popen[bytes]"
    log: Path

    def kill(self) -> None:
        """``kill -9``."""
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> int:
        """SIGTERM, as a supervisor would; the exit status."""
        self.popen.terminate()
        return self.popen.wait(20)


@dataclass
class System:
    """Workers behind a router."""

    router: Process
    workers: dict[str, Process] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The router's."""
        return self.router.url

    async def info(self, session: aiohttp.ClientSession, worker: str) -> Json:
        """``/internal/info`` of a worker."""
        async with session.get(f"{self.workers[worker].url}/internal/info") as reply:
            return await reply.json()

    async def idle(self, session: aiohttp.ClientSession, workers: Sequence[str] = (), seconds: float = 1.0) -> None:
        """Wait until nothing is held on these workers (all, unless named); fails after ``seconds``."""
        deadline = time.monotonic() + seconds
        for name in workers or self.workers:
            while True:
                info = await self.info(session, name)
                slots = info["slots"]
                assert slots["free"] + slots["cached"] + slots["leased"] == slots["total"]
                if not slots["leased"] and not info["running"] and not info["waiting"]:
                    break
                assert time.monotonic() < deadline, f"{name} still holds {info}"
                await asyncio.sleep(0.02)


@contextmanager
def launch(
    tmp: Path,
    roles: dict[str, str],
    *,
    engine: Sequence[str] = (),
    router: Sequence[str] = (),
    model: Path | None = None,
) -> Iterator[System]:
    """Start a worker for each name → role and a router over them; nothing of it is left at the end."""
    ports = free_ports(len(roles) + 1)
    pools = {"prefill": "--prefill", "decode": "--decode", "both": "--colocated"}
    system = System(None)  # type: ignore[arg-type]
    try:
        arguments = []
        for (name, role), port in zip(roles.items(), ports, strict=False):
            worker = ["serve", *([str(model)] if model else []), "--role", role, "--name", name, "--threads", "1"]
            if "--kv-memory" not in engine:  # or one worker would take all of a GPU's memory
                worker += ["--kv-memory", "1GiB"]
            system.workers[name] = _start(tmp, name, port, [*worker, *engine])
            arguments += [pools[role], system.workers[name].url]
        system.router = _start(tmp, "router", ports[-1], ["router", *arguments, *router])
        _wait_ready(system)
        yield system
    finally:
        processes = [system.router, *system.workers.values()] if system.router else list(system.workers.values())
        for process in processes:
            with suppress(ProcessLookupError):
                process.popen.send_signal(signal.SIGCONT)
                process.popen.terminate()
        for process in processes:
            try:
                process.popen.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                raise AssertionError(f"{process.name} did not stop:\n{process.log.read_text()[-2000:]}") from None


def _start(tmp: Path, name: str, port: int, arguments: Sequence[str]) -> Process:
    log = tmp / f"{name}-{port}.log"
    with log.open("wb") as out:
        popen = subprocess.Popen(
            [sys.executable, "-m", "twostroke", *arguments, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    return Process(name, f"http://127.0.0.1:{port}", popen, log)


def restart(tmp: Path, process: Process, arguments: Sequence[str]) -> Process:
    """A new process behind the address of one that is gone."""
    return _start(tmp, process.name, int(process.url.rsplit(":", 1)[1]), arguments)


def _wait_ready(system: System) -> None:
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        for process in (system.router, *system.workers.values()):
            assert process.popen.poll() is None, f"{process.name} ended:\n{process.log.read_text()}"
        with (
            suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(f"{system.url}/ready", timeout=2),
        ):
            return
        time.sleep(0.1)
    raise AssertionError("not ready:\n" + "\n".join(p.log.read_text() for p in system.workers.values()))


async def post(session: aiohttp.ClientSession, url: str, body: Json, **headers: str) -> tuple[int, Json]:
    """Status and JSON reply."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with session.post(url, data=json.dumps(body), headers=sent) as reply:
        return reply.status, await reply.json()


async def generate(
    session: aiohttp.ClientSession, url: str, prompt: Sequence[int], tokens: int, **sampling: float | bool
) -> list[int]:
    """Output token ids of SGLang's native endpoint; greedy unless ``sampling`` says otherwise."""
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, **sampling}
    status, reply = await post(session, f"{url}/generate", {"input_ids": list(prompt), "sampling_params": params})
    assert status == 200, reply
    ids: list[int] = reply["output_ids"]
    return ids


async def stream(session: aiohttp.ClientSession, url: str, body: Json, **headers: str) -> AsyncIterator[Json]:
    """Events of a streaming completion, to ``[DONE]``."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with session.post(f"{url}/v1/completions", json={**body, "stream": True}, headers=sent) as reply:
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])


@asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """A session without limits or timeouts of its own."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=240)
    ) as session:
        yield session


def descendants() -> list[psutil.Process]:
    """Processes that this test run has started and that still live."""
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
