"""The store's tiers beside LMCache, Mooncake Store and Valkey: the same blocks, in one run, each where it is installed.

- memory of the process: host tier; LMCache's local CPU back end; Mooncake with memory of its own. Limit: memcpy
- files in the page cache: LMCache's ``fs`` and ``fs_native``, as ``lmcache bench l2`` measures them; we keep in memory
  what is to be there, so the host tier stands beside them. Limit: memcpy
- files past the page cache (direct I/O): disk and directory tier; ``fs`` and ``fs_native``. Limit: raw direct I/O
- over TCP: cache service, as from another machine; Mooncake, with the memory in another process; Valkey. Limit: raw
  loopback socket
- in another process of this machine: cache service; Mooncake and Valkey, over TCP as before. Limit: memcpy

Our tiers also seal each block when they put it and verify it when they get it (xxh3-128); none of the others does. In
each repeat all take turns. ``goal`` is 1.5 times a peer that is below half of the limit, else as fast.

    python -m benchmarks.bench_store_peers [--cache FOLDER]

takes some five minutes, and on the first run makes the environments under FOLDER (``benchmarks/peers.py``).
"""

import argparse
import asyncio
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import peers
from benchmarks.common import RESULTS, machine, seconds
from benchmarks.servers import free_port
from benchmarks.store_pool import FINGERPRINT, SIZES, Pool, key
from twostroke.kv.direct import aligned, open_direct, pages, read_at, write_at
from twostroke.kv.memory import PoolMemory
from twostroke.store.directory import DirectoryTier
from twostroke.store.disk import DISK_THREADS, disk_tier
from twostroke.store.host import HostTier
from twostroke.store.segment import Segment
from twostroke.store.service import ServiceTier
from twostroke.store.tier import Tier

CHILD = Path(__file__).with_name("peer_child.py")
SECRET = "benchmark"
ANSWER_SECONDS = 120.0


@dataclass
class Place:
    """Systems that keep blocks in the same kind of place."""

    name: str
    limits: tuple[str, str]  # what the machine could do, for put and get: the better of these names that begin so
    ours: tuple[str, ...]
    theirs: tuple[str, ...]


PLACES = (
    Place("memory", ("memcpy", "memcpy"), ("host tier",), ("LMCache local CPU", "Mooncake, own memory")),
    Place("page cache", ("memcpy", "memcpy"), ("host tier",), ("LMCache fs", "LMCache fs_native")),
    Place(
        "direct I/O",
        ("raw direct write", "raw direct read"),
        ("disk tier", "directory tier"),
        ("LMCache fs, O_DIRECT", "LMCache fs_native, O_DIRECT"),
    ),
    Place("TCP", ("raw loopback socket",) * 2, ("service, TCP",), ("Mooncake, TCP", "Valkey")),
    Place("another process", ("memcpy", "memcpy"), ("service, same host",), ("Mooncake, TCP", "Valkey")),
)


@dataclass
class Rates:
    """Of one system at one block size: bytes a second, by repeat."""

    put: list[float] = field(default_factory=list)
    get: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    place: str
    block: str
    operation: str
    system: str
    rate: float  # GB/s, median
    spread: str
    of_limit: float
    ours: float | None = None  # our best in this place / this peer
    goal: float | None = None  # that this is to be


System = Callable[[int], Awaitable[tuple[float | None, float | None]]]  # seconds of a turn's put and get


class Child:
    """A peer in its own environment."""

    def __init__(self, environment: peers.Environment, arguments: Sequence[str]) -> None:
        read, write = os.pipe()
        command = [str(environment.python), str(CHILD), *arguments, "--answers", str(write)]
        quiet = {"LMCACHE_LOG_LEVEL": "ERROR", "LMCACHE_DISABLE_BANNER": "1", "MC_LOG_LEVEL": "ERROR"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the child
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            pass_fds=(write,),
            env=environment.variables() | quiet,
        )
        os.close(write)
        self._answers = os.fdopen(read)

    def answer(self) -> dict[str, float]:
        """What it says next. ``RuntimeError`` if it has ended, or says nothing."""
        ready, _, _ = select.select([self._answers], [], [], ANSWER_SECONDS)
        line = self._answers.readline() if ready else ""
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"{self.process.args!r} failed: {self._errors.read()[-1500:]}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def ask(self, **command: object) -> dict[str, float]:
        """Have it do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()
        return self.answer()

    async def turn(self, turn: int) -> tuple[float, float]:
        """Seconds of putting and getting all blocks."""
        put = await asyncio.to_thread(lambda: self.ask(do="put", turn=turn)["seconds"])
        return put, await asyncio.to_thread(lambda: self.ask(do="get", turn=turn)["seconds"])

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._answers.close()
        self._errors.close()


@contextmanager
def program(command: Sequence[str], port: int, env: dict[str, str] | None = None) -> Iterator[None]:
    """A server, from when it listens. Its whole process group ends with the block."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} does not listen")
            time.sleep(0.05)
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def works(command: Sequence[str]) -> bool:
    """Whether a command that does nothing succeeds."""
    return not subprocess.run(command, capture_output=True, check=False).returncode


class Run:
    """One block size: what is measured, in this order in every repeat."""

    def __init__(self, path: Path, size: int, total: int, cache: Path | None, missing: dict[str, str]) -> None:
        self.size = size
        self.blocks = total // size
        self.bytes = self.blocks * size
        self.systems: dict[str, System] = {}
        self.rates: dict[str, Rates] = {}
        self.missing = missing
        self._path = path
        self._cache = cache
        self._pool = Pool(self.blocks, size)
        self._tiers: list[Tier] = []

    async def measure(self, repeats: int) -> None:
        """All repeats."""
        with ExitStack() as stack:
            stack.callback(self._pool.memory.close)
            self._memcpy(stack)
            self._raw_disk(stack)
            self._loopback(stack)
            await self._our_tiers(stack, repeats + 2)
            for start in (self._lmcache, self._mooncake, self._valkey):
                try:
                    start(stack)
                except peers.Unavailable as error:
                    self.missing[start.__name__.strip("_")] = str(error)
            self.rates = {name: Rates() for name in self.systems}
            for turn in range(repeats + 2):
                for name, system in self.systems.items():
                    put, get = await system(turn)
                    if turn >= 2:  # before that, memory and disk are used for the first time, and connections made
                        self._note(name, put, get)
            for tier in self._tiers:
                await tier.close()

    def _note(self, name: str, put: float | None, get: float | None) -> None:
        rates = self.rates.setdefault(name, Rates())
        if put is not None:
            rates.put.append(self.bytes / put / 1e9)
        if get is not None:
            rates.get.append(self.bytes / get / 1e9)

    # -- what the machine can do ---------------------------------------------------------------------------------

    def _memcpy(self, stack: ExitStack) -> None:
        other = PoolMemory(self.blocks, self.size, "other")
        stack.callback(other.close)
        slots, order = self._pool.memory.slots, self._pool.order

        def copy(first: int, step: int) -> None:
            for index in range(first, self.blocks, step):
                np.copyto(other.slots[index], slots[order[index]])

        for count in (1, 2):
            threads = stack.enter_context(ThreadPoolExecutor(count))

            async def system(_: int, threads: ThreadPoolExecutor = threads, n: int = count) -> tuple[float, float]:
                took = seconds(lambda: list(threads.map(copy, range(n), [n] * n)))
                return took, took

            self.systems[f"memcpy, {count} thread{'s' * (count > 1)}"] = system

    def _raw_disk(self, stack: ExitStack) -> None:
        stride = pages(self.size)
        fd = open_direct(str(self._path / "raw"), os.O_RDWR | os.O_CREAT)
        stack.callback((self._path / "raw").unlink)
        stack.callback(os.close, fd)
        os.posix_fallocate(fd, 0, self.blocks * stride)
        buffers = [aligned(self.size) for _ in range(DISK_THREADS)]
        for buffer in buffers:
            buffer[: self.size] = self._pool.memory.slots[0].data
        threads = stack.enter_context(ThreadPoolExecutor(DISK_THREADS))

        def raw(work: Callable[[int, memoryview, int], None]) -> float:
            def some(thread: int) -> None:
                for index in range(thread, self.blocks, DISK_THREADS):
                    work(fd, buffers[thread], index * stride)

            return seconds(lambda: list(threads.map(some, range(DISK_THREADS))))

        async def write(_: int) -> tuple[float, None]:
            return raw(write_at), None

        async def read(_: int) -> tuple[None, float]:
            return None, raw(read_at)

        self.systems["raw direct write"] = write
        self.systems["raw direct read"] = read

    def _loopback(self, stack: ExitStack) -> None:
        """Another process receives all blocks and acknowledges them."""
        code = (
            "import socket, sys\n"
            "size, blocks, port = map(int, sys.argv[1:])\n"
            "one = socket.create_connection(('127.0.0.1', port))\n"
            "buffer = bytearray(size)\n"
            "while True:\n"
            "    for _ in range(blocks):\n"
            "        if not one.recv_into(buffer, size, socket.MSG_WAITALL): sys.exit()\n"
            "    one.sendall(b'x')\n"
        )
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = listening.getsockname()[1]
        process = subprocess.Popen([sys.executable, "-c", code, str(self.size), str(self.blocks), str(port)])
        stack.callback(process.wait)
        raw, _ = listening.accept()
        stack.callback(raw.close)
        slots, order = self._pool.memory.slots, self._pool.order

        def send() -> None:
            for slot in order:
                raw.sendall(slots[slot].data)
            raw.recv(1)

        async def system(_: int) -> tuple[float, float]:
            took = seconds(send)
            return took, took

        self.systems["raw loopback socket"] = system

    # -- ours ----------------------------------------------------------------------------------------------------

    async def _our_tiers(self, stack: ExitStack, turns: int) -> None:
        disk = int(2.2 * Segment.file_bytes(self.blocks, self.size)) + (1 << 20)
        await self._ours("host tier", HostTier(self.size, 2 * self.bytes))
        await self._ours("disk tier", disk_tier(self._path / "disk", self.size, FINGERPRINT, disk, "bench"))
        # Like LMCache's, it writes a new file for each block: there is room for all turns.
        await self._ours("directory tier", DirectoryTier(self._path / "dir", self.size, FINGERPRINT, None))
        await self._ours("service, same host", self._service(stack, turns, []))
        apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
        if not works([*apart, "true"]):
            self.missing["service, TCP"] = "unshare cannot make a process that looks as if it were on another machine"
        else:
            await self._ours("service, TCP", self._service(stack, turns, apart))

    def _service(self, stack: ExitStack, turns: int, apart: Sequence[str]) -> ServiceTier:
        """A cache service, in a pid namespace of its own if it is to be as on another machine. It has room for all
        turns: it is given each in parts, and S3-FIFO lets no part stay at the cost of what it keeps.
        """
        port = free_port()
        command = [*apart, sys.executable, "-m", "twostroke", "store", "--port", str(port)]
        command += ["--memory", str(turns * self.bytes)]
        stack.enter_context(program(command, port, {**os.environ, "TWOSTROKE_SECRET": SECRET}))
        return ServiceTier("127.0.0.1", port, self.size, FINGERPRINT, SECRET)

    async def _ours(self, name: str, tier: Tier) -> None:
        await tier.open()
        self._tiers.append(tier)

        async def system(turn: int) -> tuple[float, float]:
            keys = [key(name, turn, index) for index in range(self.blocks)]
            start = time.perf_counter()
            assert await tier.put(keys, self._pool.end()) == self.blocks
            put = time.perf_counter() - start
            start = time.perf_counter()
            assert (got := await tier.get(keys, self._pool.end())) == self.blocks, f"{name}: {got} of {self.blocks}"
            return put, time.perf_counter() - start

        self.systems[name] = system

    # -- theirs --------------------------------------------------------------------------------------------------

    def _child(self, stack: ExitStack, name: str, environment: peers.Environment, *arguments: str) -> None:
        child = Child(environment, arguments)
        stack.callback(child.close)
        child.ask(do="open", size=self.size, blocks=self.blocks)
        self.systems[name] = child.turn

    def _lmcache(self, stack: ExitStack) -> None:
        environment = peers.prepare("lmcache", self._cache)
        self._child(stack, "LMCache local CPU", environment, "lmcache", "--capacity", str(2 * self.bytes))
        for adapter in ("fs", "fs_native"):
            for direct in ([], ["--direct"]):
                name = f"LMCache {adapter}{', O_DIRECT' * bool(direct)}"
                folder = ["--path", str(self._path / name), "--threads", str(DISK_THREADS), *direct]
                self._child(stack, name, environment, adapter, *folder)

    def _mooncake(self, stack: ExitStack) -> None:
        environment = peers.prepare("mooncake", self._cache)
        binary = environment.packages / "mooncake" / "mooncake_master"
        for name, owned in (("Mooncake, own memory", True), ("Mooncake, TCP", False)):
            port, metrics = free_port(), free_port()
            command = [str(binary), f"--rpc_port={port}", "--rpc_address=127.0.0.1", f"--metrics_port={metrics}"]
            stack.enter_context(program([*command, "--metrics_host=127.0.0.1"], port, environment.variables()))
            memory, master = str(2 * self.bytes + (64 << 20)), ["--master", f"127.0.0.1:{port}"]
            if not owned:
                owner = Child(environment, ["owner", *master, "--capacity", memory])
                stack.callback(owner.close)
                owner.answer()
            capacity = memory if owned else "0"
            self._child(stack, name, environment, "mooncake", *master, "--capacity", capacity)

    def _valkey(self, stack: ExitStack) -> None:
        environment = peers.prepare("valkey", self._cache)
        port = free_port()
        command = [str(peers.server(self._cache)), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--dir", str(self._path), "--maxmemory", str(3 * self.bytes), "--appendonly", "no"]
        stack.enter_context(program(command, port))
        self._child(stack, "Valkey", environment, "valkey", "--port", str(port))


def lines(block: str, rates: dict[str, Rates]) -> Iterator[Line]:
    """What the table says of one block size."""
    for place in PLACES:
        for operation, limit_name in zip(("put", "get"), place.limits, strict=True):

            def of(name: str, operation: str = operation) -> list[float]:
                found: list[float] = getattr(rates.get(name, Rates()), operation)
                return found

            limits = {name: statistics.median(of(name)) for name in rates if name.startswith(limit_name) and of(name)}
            limit = max(limits.values())
            best = max((statistics.median(of(name)) for name in place.ours if of(name)), default=None)
            for name in (*limits, *place.ours, *place.theirs):
                if not (measured := of(name)):
                    continue
                rate = statistics.median(measured)
                spread = f"{min(measured):.2f} – {max(measured):.2f}"
                ratio = best / rate if name in place.theirs and best is not None else None
                goal = None if ratio is None else 1.5 if rate < limit / 2 else 1.0
                yield Line(place.name, block, operation, name, rate, spread, rate / limit, ratio, goal)


def show(table: Sequence[Line]) -> None:
    """Print it."""
    out = Table("place", "block", "", "system", "GB/s", "spread", "of limit", "ours / it", "goal", title="store_peers")
    last: tuple[str, str, str] | None = None
    for one in table:
        ratio = "" if one.ours is None else f"{one.ours:.2f}"
        goal = (
            "" if one.goal is None or one.ours is None else f">= {one.goal} {'won' if one.ours >= one.goal else 'LOST'}"
        )
        if last is not None and last != (one.place, one.block, one.operation):
            out.add_section()
        last = one.place, one.block, one.operation
        figures = f"{one.rate:.2f}", one.spread, f"{one.of_limit:.2f}", ratio, goal
        out.add_row(one.place, one.block, one.operation, one.system, *figures)
    Console(width=150).print(out)


def versions(cache: Path | None) -> dict[str, str]:
    """Of peers, as they are installed."""
    found = {"xxhash": version("xxhash")}
    for name in peers.PACKAGES:
        if environment := peers.find(name, cache):
            for one in environment.packages.glob("*.dist-info"):
                package, _, number = one.name.removesuffix(".dist-info").partition("-")
                if package in ("lmcache", "torch", "mooncake_transfer_engine_non_cuda", "redis", "hiredis"):
                    found[f"{name}: {package}"] = number
    try:
        command = [str(peers.server(cache)), "--version"]
        found["server"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except peers.Unavailable:
        pass
    return found


def main() -> None:
    """Make what is missing, measure, print and write ``results/store_peers.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mebibytes", type=int, default=128, help="of blocks in each repeat")
    parser.add_argument("--path", type=Path, default=Path(tempfile.gettempdir()), help="the disk that is measured")
    parser.add_argument("--cache", type=Path, help="where environments are made; by default our cache directory")
    parser.add_argument("--block", choices=list(SIZES), action="append", help="only this size; may be repeated")
    options = parser.parse_args()
    os.environ["TWOSTROKE_SECRET"] = SECRET
    missing: dict[str, str] = {}
    for name in peers.PACKAGES:
        try:
            peers.prepare(name, options.cache)
        except peers.Unavailable as error:
            missing[name] = str(error)
    table: list[Line] = []
    start = time.monotonic()
    for block in options.block or SIZES:
        with tempfile.TemporaryDirectory(dir=options.path) as path:
            run = Run(Path(path), SIZES[block], options.mebibytes << 20, options.cache, missing)
            asyncio.run(run.measure(options.repeats))
        table += lines(block, run.rates)
        print(f"{block}: {time.monotonic() - start:.0f} s", flush=True)
    show(table)
    for what, why in missing.items():
        print(f"not measured: {what}: {why}")
    settings = {"repeats": options.repeats, "bytes": options.mebibytes << 20, "disk_threads": DISK_THREADS}
    result = {
        "benchmark": "store_peers",
        "machine": machine() | versions(options.cache),
        "settings": settings | {"seconds": round(time.monotonic() - start)},
        "missing": missing,
        "rows": [asdict(line) for line in table],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "store_peers.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
