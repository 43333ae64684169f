"""Real processes for end-to-end tests: workers and a router, started by the command line that users have."""

import asyncio
import json
import multiprocessing
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import torch

from tests.e2e.ports import free_ports

START_SECONDS = 120.0
Json = Any


# Processes are forked from one that has imported everything already. Nothing has run in it: no thread, no OpenMP.
NURSERY = multiprocessing.get_context("forkserver")
NURSERY.set_forkserver_preload(
    [
        "twostroke.worker.worker",
        "twostroke.router.router",
        "twostroke.kv.lines",
        "transformers.models.llama.modeling_llama",
    ]
)


def _main(arguments: Sequence[str], log: Path, environment: dict[str, str]) -> None:
    """The command line, in a process of its own."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.close(out)
    os.environ.clear()  # it is that of the first test
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # or tqdm's lock would leave a file in /dev/shm
    from twostroke.cli import main

    main(arguments)


class Process:
    """One ``twostroke`` process of a test, on a port of loopback."""

    def __init__(self, name: str, port: int, arguments: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.arguments = arguments
        self._environment = environment
        self._process = NURSERY.Process(
            target=_main,
            args=([*arguments, "--port", str(port)], log, {**os.environ, "HF_HUB_OFFLINE": "1", **environment}),
            daemon=True,
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, "it was started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    @property
    def status(self) -> int | None:
        """How it has ended."""
        return self._process.exitcode

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process is still there. From any thread."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """``kill -9``."""
        self.signal(signal.SIGKILL)
        self.ended(5)

    def ended(self, seconds: float) -> bool:
        """Whether it has ended, by then."""
        self._process.join(seconds)
        return not self._process.is_alive()

    def stop(self, seconds: float = 20) -> None:
        """SIGTERM, as a supervisor would; also if it was stopped by SIGSTOP. It fails if that is not enough."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        if not self.ended(seconds):
            self.kill()
            raise AssertionError(f"{self.name} did not stop:\n{self.log.read_text()[-2000:]}")

    def again(self, options: Mapping[str, str] | None = None, **environment: str) -> "Process":
        """A new process behind the address of this one, which is gone; with other options, as far as they are given."""
        arguments = list(self.arguments)
        for option, value in (options or {}).items():
            if option in arguments:
                arguments[arguments.index(option) + 1] = value
            else:
                arguments += [option, value]
        return Process(self.name, self.port, arguments, self.log, {**self._environment, **environment})


@dataclass
class System:
    """Workers behind a router."""

    router: Process
    workers: dict[str, Process] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The router's."""
        return self.router.url

    def wait_ready(self) -> None:
        """Until the router sees every worker ready."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for process in (self.router, *self.workers.values()):
                assert process.running, f"{process.name} ended:\n{process.log.read_text()}"
            with (
                suppress(urllib.error.URLError, ConnectionError, TimeoutError),
                urllib.request.urlopen(f"{self.url}/ready", timeout=2),
            ):
                return
            time.sleep(0.02)
        raise AssertionError("not ready:\n" + "\n".join(p.log.read_text() for p in self.workers.values()))

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
    environment: dict[str, str] | None = None,
    own: Mapping[str, Sequence[str]] | None = None,
    front: Callable[[Process], str] = lambda process: process.url,
) -> Iterator[System]:
    """Start a worker for each name → role and a router over them; nothing of it is left at the end. As with ``up``,
    each GPU of this machine is used in turn, unless a device is named.

    Args:
        own: more options, of one worker each.
        front: where the router finds a worker, if not at its own address.
    """
    ports = free_ports(len(roles) + 1)
    pools = {"prefill": "--prefill", "decode": "--decode", "both": "--colocated"}
    system = System(None)  # type: ignore[arg-type]

    def start(name: str, port: int, arguments: Sequence[str]) -> Process:
        return Process(name, port, arguments, tmp / f"{name}-{port}.log", environment or {})

    try:
        arguments = []
        gpus = torch.cuda.device_count()
        for nth, ((name, role), port) in enumerate(zip(roles.items(), ports, strict=False)):
            worker = ["serve", *([str(model)] if model else []), "--role", role, "--name", name, "--threads", "1"]
            worker += [*engine, *(own or {}).get(name, ())]
            if gpus and "--device" not in worker:
                worker += ["--device", f"cuda:{nth % gpus}"]
            if "--kv-memory" not in worker:  # or one would take all of a GPU's memory; and pages take time to make
                worker += ["--kv-memory", "64MiB" if model else "1GiB"]
            system.workers[name] = start(name, port, worker)
            arguments += [pools[role], front(system.workers[name])]
        system.router = start("router", ports[-1], ["router", *arguments, *router])
        system.wait_ready()
        yield system
    finally:
        processes = [system.router, *system.workers.values()] if system.router else list(system.workers.values())
        for process in processes:
            process.signal(signal.SIGCONT)
            process.signal(signal.SIGTERM)
        for process in processes:
            process.stop()


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
async def client(headers: dict[str, str] | None = None) -> AsyncIterator[aiohttp.ClientSession]:
    """A session without limits or timeouts of its own; ``headers`` go with each request. It keeps no connection: a test
    that computes for longer than a server keeps one would not see it closed in time.
    """
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=240),
        headers=headers,
    ) as session:
        yield session


def descendants() -> list[psutil.Process]:
    """Processes that this test run has started and that still live; but for ``multiprocessing``'s own."""
    children = psutil.Process().children(recursive=True)
    own = [child.pid for child in psutil.Process().children() if any("multiprocessing" in a for a in child.cmdline())]
    return [child for child in children if child.pid not in own and child.status() != psutil.STATUS_ZOMBIE]


def shared_files() -> set[str]:
    """Files in shared memory."""
    return set(os.listdir("/dev/shm"))


def left_shared(before: Collection[str]) -> set[str]:
    """Files in shared memory that were not there before, and stay: tests beside this one have some for a moment."""
    deadline = time.monotonic() + 5
    while (left := shared_files().difference(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
