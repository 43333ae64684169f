"""A whole system of real processes on a tiny model, its prefill worker behind proxies that can fail."""

import asyncio
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil
from transformers import AutoTokenizer

from tests.e2e.system import Process, System, launch
from tests.links.faults import Faults, Proxy, proxy
from tests.tiny import VOCAB, generate, make_model

Json = Any
PREFILL, DECODE = "prefill-0", ("decode-0", "decode-1")
ROLES = {PREFILL: "prefill", **dict.fromkeys(DECODE, "decode")}
PAIR = {PREFILL: "prefill", DECODE[0]: "decode"}
ENGINE = ("--dtype", "float32", "--chunk-size", "64", "--lease-seconds", "4")
BLOCK = 4096  # bytes of a block of 16 tokens of the model below, in float32
SMALL = 24  # blocks: room for one request at a time
SECRET = "s3cret"  # of the fleet over TCP
ATTACH = b"/internal/handover/attach"
SETTLE = 10.0  # seconds in which everything that a fault has left must be gone
_PORT = re.compile(rb'"port":(\d{5})\b')


class Model:
    """The tiny model, and the fault-free answers: what transformers itself generates, greedily and in float32."""

    def __init__(self, directory: Path) -> None:
        self.directory = make_model("LlamaForCausalLM", directory, max_position_embeddings=4096)
        self._tokenizer = AutoTokenizer.from_pretrained(directory)

    def prompt(self, number: int, tokens: int) -> list[int]:
        """One of the prompts. Few, since transformers is slow; a salt keeps their blocks from being found again."""
        pick = random.Random(number)
        return [pick.randrange(2, VOCAB) for _ in range(tokens)]

    def text(self, prompt: Sequence[int], tokens: int) -> str:
        """What a client must get."""
        answer = generate(self.directory, prompt, tokens, ends=False)
        return str(self._tokenizer.decode(answer, skip_special_tokens=True))


class Account(NamedTuple):
    """What a process holds when it is idle."""

    files: int  # open, but for sockets
    sockets: int
    tasks: int  # of its event loop


class Leftover(AssertionError):
    """Something is held that nobody needs."""


class Fleet:
    """A router over a prefill worker and decode workers.

    Whoever asks the prefill worker over HTTP comes through ``control``, and over TCP for its blocks through ``link``.
    The router comes to the first decode worker through ``answers``.
    """

    def __init__(self, system: System, control: Proxy, link: Proxy, answers: Proxy) -> None:
        self.system = system
        self.control = control
        self.link = link
        self.answers = answers
        self.usual = 0.0  # seconds that an answer takes without a fault
        self._accounts: dict[int, Account] = {}  # by pid

    @property
    def url(self) -> str:
        return self.system.url

    @property
    def workers(self) -> dict[str, Process]:
        return self.system.workers

    @property
    def processes(self) -> list[Process]:
        return [self.system.router, *self.workers.values()]

    def heal(self) -> None:
        """The network is in order again."""
        for network in (self.control, self.link, self.answers):
            network.up, network.down = Faults(), Faults()

    async def replace(self, session: aiohttp.ClientSession, name: str) -> None:
        """Start a new process in the place of one that was killed, and wait for it."""
        self.workers[name].kill()
        self.workers[name] = self.workers[name].again()
        await self.whole(session)

    async def whole(self, session: aiohttp.ClientSession) -> None:
        """Wait until the router sees every worker ready."""
        pids = {process.pid for process in self.workers.values()}
        async with asyncio.timeout(60):
            while True:
                with suppress(aiohttp.ClientError):  # the router may be new, too
                    async with session.get(f"{self.url}/workers") as reply:
                        if {worker["pid"] for worker in await reply.json() if worker["state"] == "ready"} == pids:
                            return
                await asyncio.sleep(0.02)

    async def freed(self, session: aiohttp.ClientSession, workers: Sequence[str] = ()) -> float:
        """Seconds until nothing is held on these workers (all, unless named). ``Leftover`` if that takes too long."""
        start = time.monotonic()
        for name in workers or self.workers:
            while (left := await self._held(session, name)) is not None:
                if time.monotonic() > start + SETTLE:
                    raise Leftover(f"{name} still holds {left}")
                await asyncio.sleep(0.02)
        return time.monotonic() - start

    async def clean(self, session: aiohttp.ClientSession) -> None:
        """Nothing is left: no slot, lease or hand-over, no file, socket, task or process."""
        await self.freed(session)
        for process in self.processes:
            deadline = time.monotonic() + SETTLE
            before = self._accounts.setdefault(process.pid, await self._account(session, process))
            while excess := self._excess(process, before, await self._account(session, process)):
                if time.monotonic() > deadline:
                    raise Leftover(f"{process.name}: {excess}")
                await asyncio.sleep(0.1)

    async def _held(self, session: aiohttp.ClientSession, name: str) -> Json:
        info = await self.system.info(session, name)
        slots = info["slots"]
        assert slots["free"] + slots["cached"] + slots["leased"] == slots["total"], slots
        gauges = await self._gauges(session, self.workers[name])
        info["handovers"] = gauges["twostroke_handovers_open"]
        return info if slots["leased"] or info["running"] or info["waiting"] or info["handovers"] else None

    async def _gauges(self, session: aiohttp.ClientSession, process: Process) -> dict[str, float]:
        async with session.get(f"{process.url}/metrics") as reply:
            lines = [line.rpartition(" ") for line in (await reply.text()).splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    async def metric(self, session: aiohttp.ClientSession, worker: str, name: str) -> float:
        """A metric of a worker, 0 if it has not been counted yet."""
        return (await self._gauges(session, self.workers[worker])).get(name, 0.0)

    async def _account(self, session: aiohttp.ClientSession, process: Process) -> Account:
        tasks = (await self._gauges(session, process))["twostroke_tasks"]
        kinds = []
        for entry in os.scandir(f"/proc/{process.pid}/fd"):
            try:
                kinds.append(os.readlink(entry.path).startswith("socket:"))
            except FileNotFoundError:
                continue
        return Account(kinds.count(False), kinds.count(True), int(tasks))

    def _excess(self, process: Process, before: Account, now: Account) -> str:
        """What is held beyond what was at first.

        Connections are kept for the next request, and for a minute if the other end is gone without a word.
        """
        own = psutil.Process(process.pid)
        if children := own.children():
            return f"child processes {children}"
        forgotten = [c for c in own.net_connections("tcp") if c.status == psutil.CONN_CLOSE_WAIT]
        if forgotten:
            return f"connections that the other end has closed: {forgotten}"
        # Two tasks watch the links' peers, and one file is the prefill worker's pool, once it has been read.
        if now.files > before.files + 1 or now.tasks > before.tasks + 2 or now.sockets > before.sockets + 40:
            return f"at first {before}, now {now}"
        return ""


def _behind(control: Proxy, link: Proxy) -> Callable[[bytearray], bytearray]:
    """Have whoever attaches look for the prefill worker's TCP link at ``link``. Both ports have five digits."""

    def replaced(match: "re.Match[bytes]") -> bytes:
        link.target = ("127.0.0.1", int(match[1]))
        return b'"port":%d' % link.port

    def rewrite(data: bytearray) -> bytearray:
        return bytearray(_PORT.sub(replaced, bytes(data))) if b'"opened"' in data else data

    return rewrite


@contextmanager
def fleet(
    tmp: Path,
    model: Model,
    roles: dict[str, str],
    *,
    kv: Sequence[int] = (1024,),
    engine: Sequence[str] = (),
    own: Mapping[str, Sequence[str]] | None = None,
    router: Sequence[str] = (),
    secret: str = "",
    direct: bool = False,
) -> Iterator[Fleet]:
    """Start one; nothing of it is left at the end.

    Args:
        kv: blocks of the pools of the first worker, the second, and so on; the last holds for all others too.
        own: more options, of one worker each.
        direct: without proxies.
    """
    nowhere = ("127.0.0.1", 9)
    with proxy(nowhere) as control, proxy(nowhere) as link, proxy(nowhere) as answers:
        control.rewrite = _behind(control, link)

        def front(process: Process) -> str:
            before = {PREFILL: control, DECODE[0]: answers}.get(process.name)
            if before is None or direct:
                return process.url
            before.target = ("127.0.0.1", process.port)
            return f"http://127.0.0.1:{before.port}"

        sizes = dict(zip(roles, [*kv, *[kv[-1]] * len(roles)], strict=False))
        options = {name: ["--kv-memory", str(sizes[name] * BLOCK), *(own or {}).get(name, ())] for name in roles}
        with launch(
            tmp,
            roles,
            engine=[*ENGINE, *engine],
            own=options,
            router=router,
            model=model.directory,
            environment={"TWOSTROKE_SECRET": secret},
            front=front,
        ) as system:
            yield Fleet(system, control, link, answers)


class Fleets:
    """Fleets by kind, each started when it is first needed and used until a row fails on it."""

    def __init__(self, tmp: Path) -> None:
        self._tmp = tmp
        self._running: dict[str, tuple[Fleet, ExitStack]] = {}
        self.model = Model(tmp / "model")

    def get(self, kind: str) -> Fleet:
        """A running fleet of one of ``KINDS``."""
        if kind not in self._running:
            stack = ExitStack()
            self._running[kind] = stack.enter_context(KINDS[kind](self._tmp, self.model)), stack
        return self._running[kind][0]

    def drop(self, kind: str) -> None:
        """Stop one."""
        if kind in self._running:
            self._running.pop(kind)[1].close()

    def close(self) -> None:
        """Stop all."""
        for kind in list(self._running):
            self.drop(kind)


KINDS: dict[str, Callable[[Path, Model], AbstractContextManager[Fleet]]] = {
    "shm": lambda tmp, model: fleet(tmp, model, ROLES),
    "tcp": lambda tmp, model: fleet(tmp, model, ROLES, engine=["--link", "tcp"], secret=SECRET),
    "crowd": lambda tmp, model: fleet(tmp, model, PAIR, kv=[2048], direct=True),
    "small D": lambda tmp, model: fleet(tmp, model, PAIR, kv=[1024, SMALL]),
    "small P": lambda tmp, model: fleet(tmp, model, PAIR, kv=[SMALL, 1024]),
    "small": lambda tmp, model: fleet(tmp, model, PAIR, kv=[SMALL], engine=["--max-queue", "6"]),
}


async def events(session: aiohttp.ClientSession, url: str, body: Json, id_: str) -> AsyncIterator[Json]:
    """Events of a streaming completion, to ``[DONE]``; an error event is one of them."""
    headers = {"x-request-id": id_}
    async with session.post(f"{url}/v1/completions", json={**body, "stream": True}, headers=headers) as reply:
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])
