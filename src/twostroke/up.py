"""The whole system on one machine: start it, show what it does until it is ready, watch it, stop it."""

import asyncio
import os
import secrets
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle, islice

import aiohttp
import msgspec
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from twostroke import config as configs
from twostroke.api.serving import bind
from twostroke.children import Child
from twostroke.config import UpConfig
from twostroke.lent import lend
from twostroke.messages import SECRET_HEADER, Role, WorkerInfo
from twostroke.models import default_name, resolve
from twostroke.router.worker import WorkerReport

LOOPBACK = "127.0.0.1"
ROUTER = "router"
GRACE_SECONDS = 15.0  # between SIGTERM and SIGKILL; longer than the router waits for its requests
_LOOK_SECONDS = 0.2
_ASK = aiohttp.ClientTimeout(total=2.0)


class Plan(Struct, frozen=True):
    """One worker to start."""

    name: str
    role: Role
    port: int
    threads: int
    device: str
    utilization: float  # of a GPU's memory

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"


def plan_workers(config: UpConfig, cores: int, gpus: int, ports: Sequence[int]) -> list[Plan]:
    """Names, ports, threads and devices. Workers on one device share its memory. Cores left over by an even split go
    to the first workers, which prefill.
    """
    roles: list[tuple[str, Role]] = [
        *((f"prefill-{i}", "prefill") for i in range(config.prefill)),
        *((f"decode-{i}", "decode") for i in range(config.decode)),
        *((f"colocated-{i}", "both") for i in range(config.colocated)),
    ]
    share, spare = divmod(cores, len(roles))
    devices = list(islice(cycle(_devices(config, gpus)), len(roles)))
    return [
        Plan(
            name,
            role,
            ports[i],
            threads=config.engine.threads or max(1, share + (i < spare)),
            device=devices[i],
            utilization=config.engine.gpu_memory_utilization / devices.count(devices[i]),
        )
        for i, (name, role) in enumerate(roles)
    ]


def _devices(config: UpConfig, gpus: int) -> Sequence[str]:
    """What workers are placed on in turn: what was asked for, or every GPU."""
    device = config.engine.device
    if config.devices:
        return ["cuda:0" if device == "cuda" else device for device in config.devices]
    if device in ("auto", "cuda"):
        return [f"cuda:{i}" for i in range(gpus)] or ["cpu" if device == "auto" else "cuda:0"]
    return [device]


def serve_arguments(plan: Plan, config: UpConfig) -> list[str]:
    """The command line of one worker."""
    engine = config.engine
    optional = {
        "--max-model-len": engine.max_model_len,
        "--kv-memory": engine.kv_memory,
        "--chunk-size": engine.token_budget,
        "--store": ",".join(map(str, config.store)) or None,
        "--tenant-quota": config.tenant_quota,
        "--eviction": config.eviction,
        "--link-device": ",".join(config.link_devices) or None,
    }
    return [
        *("serve", *([config.model] if config.model else [])),
        *("--role", plan.role, "--name", plan.name, "--host", LOOPBACK, "--port", str(plan.port)),
        *("--device", plan.device, "--gpu-memory-utilization", str(plan.utilization), "--threads", str(plan.threads)),
        *("--dtype", engine.dtype, "--load-format", engine.load_format),
        *("--block-size", str(engine.block_tokens), "--max-batch", str(engine.max_batch)),
        *("--link", config.link, "--gds", engine.gds),
        *(part for name, value in optional.items() if value is not None for part in (name, str(value))),
    ]


def router_arguments(plans: Sequence[Plan], config: UpConfig) -> list[str]:
    """The command line of the router."""
    pools = {"prefill": "--prefill", "decode": "--decode", "both": "--colocated"}
    workers = [part for plan in plans for part in (pools[plan.role], plan.url)]
    insecure = ["--insecure"] if config.insecure else []
    return [
        *("router", *workers, "--host", config.host, "--port", str(config.port)),
        *("--schedule", config.schedule, "--policy", config.policy, "--on-loss", config.on_loss, *insecure),
    ]


def run(config: UpConfig) -> int:
    """Start everything and stay until Ctrl-C (exit code 0) or until a process dies (1).

    Raises:
        StartupError: the counts, the address, the port or the model make a start pointless.
    """
    configs.check_pools(config.prefill, config.decode, config.colocated)
    configs.check_bind(config.host, configs.cluster_secret(), config.insecure)
    configs.check_service(config.store, configs.cluster_secret())
    bind(config.host, config.port).close()  # a port in use is better told now than after a minute of loading
    console = Console(highlight=False)
    resolve(config.model, lambda line: console.print(escape(line)), config.engine.load_format)
    return asyncio.run(System(config, console).run())


class System:
    """The router, the workers, and what is shown of them."""

    def __init__(self, config: UpConfig, console: Console) -> None:
        self._config = config
        self._board = Board(console)
        self._console = console
        self._secret = configs.cluster_secret() or secrets.token_hex(32)
        cores = len(os.sched_getaffinity(0))
        ports = free_ports(config.prefill + config.decode + config.colocated)
        self._plans = plan_workers(config, cores, configs.gpus(), ports)
        self._workers: list[Child] = []
        self._router: list[Child] = []
        self._stop = asyncio.Event()
        if any(plan.device != "cpu" for plan in self._plans):
            self._console.print(f"devices: {', '.join(f'{p.name} {p.device}' for p in self._plans)}")
        else:
            self._console.print(f"{cores} CPU cores: {', '.join(f'{p.name} {p.threads}' for p in self._plans)} threads")

    async def run(self) -> int:
        """From start to stop; the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        with ExitStack() as lent:
            if not configs.cluster_secret():  # whoever has set one has it
                lent.enter_context(lend(self._config.port, self._secret))
            return await self._serve()

    async def _serve(self) -> int:
        try:
            with self._board:
                await self._start()
                died = asyncio.create_task(self._first_death())
                stopped = asyncio.create_task(self._stop.wait())
                ready = asyncio.create_task(self._until_ready())
                await asyncio.wait((ready, died, stopped), return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                self._announce(ready.result())
                await asyncio.wait((died, stopped), return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            return await self._verdict(died)
        finally:
            await self._end()

    async def _verdict(self, died: "asyncio.Task[Child]") -> int:
        if not died.done():
            self._console.print("stopping (Ctrl-C again to kill)")
            return 0
        self._console.print(f"{died.result().epitaph()}\nstopping everything else", style="red", markup=False)
        return 1

    async def _start(self) -> None:
        environment = configs.child_environment(self._secret, self._config.api_keys)
        for plan in self._plans:
            self._board.show(plan.name, "starting")
            arguments = serve_arguments(plan, self._config)
            self._workers.append(await Child.start(plan.name, arguments, environment, self._board.line))
        arguments = router_arguments(self._plans, self._config)
        self._board.show(ROUTER, "starting")
        self._router.append(await Child.start(ROUTER, arguments, environment, self._board.line))

    async def _first_death(self) -> Child:
        """The first process that ends, unless it is a worker that was drained and is not the last one."""
        children = {child.ended: child for child in (*self._workers, *self._router)}
        while True:
            done, _ = await asyncio.wait(children, return_when=asyncio.FIRST_COMPLETED)
            child = children.pop(done.pop())
            if not child.left or len(children) <= len(self._router) or child in self._router:
                return child
            self._console.print(f"{child.name} was drained, and has left")

    async def _until_ready(self) -> list[WorkerReport]:
        """Show what each process is doing until the router says that all are ready; then, the workers."""
        url = self._url()
        async with aiohttp.ClientSession(headers={SECRET_HEADER: self._secret}, timeout=_ASK) as session:
            while True:
                for plan in self._plans:
                    if body := await _get(session, f"{plan.url}/internal/info"):
                        info = msgspec.json.decode(body, type=WorkerInfo)
                        self._board.show(plan.name, info.state if info.state == "ready" else info.detail)
                if await _get(session, f"{url}/ready") is not None:
                    self._board.show(ROUTER, "ready")
                    return msgspec.json.decode(await _get(session, f"{url}/workers") or b"[]", type=list[WorkerReport])
                await asyncio.sleep(_LOOK_SECONDS)

    def _announce(self, workers: Sequence[WorkerReport]) -> None:
        url, model = self._url(), workers[0].model if workers else default_name(self._config.model)
        table = Table("worker", "role", "URL", "pid", "device", "threads", box=None, pad_edge=False)
        for worker in workers:
            table.add_row(worker.id, worker.role, worker.url, str(worker.pid), worker.device, str(worker.threads))
        self._console.print(table)
        links = sorted({worker.link for worker in workers if worker.role != "colocated"})
        self._console.print(f"link: {', '.join(links) or 'none, workers are colocated'}")
        asked = '[{"role": "user", "content": "What is the capital of France?"}]'
        body = f'{{"model": "{model}", "messages": {asked}, "temperature": 0}}'
        self._console.print(f"ready: {url}\n\ntry:")
        key = " -H 'authorization: Bearer KEY'" if self._config.api_keys else ""
        command = f"curl {url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{body}'"
        self._console.print(command, soft_wrap=True, markup=False)
        self._console.print()

    def _url(self) -> str:
        host = LOOPBACK if self._config.host in ("0.0.0.0", "::") else self._config.host  # noqa: S104 - not a bind
        return f"http://[{host}]:{self._config.port}" if ":" in host else f"http://{host}:{self._config.port}"

    def _on_signal(self) -> None:
        """The first asks everything to stop, the second kills."""
        if self._stop.is_set():
            for child in (*self._router, *self._workers):
                child.signal(signal.SIGKILL)
        self._stop.set()

    async def _end(self) -> None:
        """Stop the router, which lets its requests finish, then the workers; kill what does not stop in time."""
        self._stop.set()
        for group in (self._router, self._workers):
            for child in group:
                child.signal(signal.SIGTERM)
            if group:
                await asyncio.wait([child.ended for child in group], timeout=GRACE_SECONDS)
            for child in group:
                child.signal(signal.SIGKILL)
                await child.ended


class Board:
    """What each process is doing: spinners on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._details: dict[str, str] = {}
        self._tasks: dict[str, TaskID] = {}
        columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console) if console.is_terminal else None

    def __enter__(self) -> "Board":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def show(self, name: str, detail: str) -> None:
        """``name`` is now doing ``detail``."""
        if self._details.get(name) == detail:
            return
        self._details[name] = detail
        text = escape(f"{name}: {detail}")
        if not self._progress:
            self._console.print(text)
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(text, total=1)
        self._progress.update(self._tasks[name], description=text, completed=int(detail == "ready"))

    def line(self, name: str, text: str) -> None:
        """Pass on a line that a process wrote."""
        self._console.print(f"[{name}] {text}", markup=False, style="dim", soft_wrap=True)


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody uses now; all are held until the last is found, so they differ."""
    with ExitStack() as held:
        return [held.enter_context(_free_port()) for _ in range(count)]


@contextmanager
def _free_port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        yield probe.getsockname()[1]


async def _get(session: aiohttp.ClientSession, url: str) -> bytes | None:
    """The body of a 200 reply; None for any other, or none."""
    with suppress(aiohttp.ClientError, OSError):
        async with session.get(url) as reply:
            body = await reply.read()
            return body if reply.status == 200 else None
    return None
