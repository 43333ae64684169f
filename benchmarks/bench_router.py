"""What the router adds to a request and to a token, against the worker itself and against sglang-router.

The workers are HTTP servers without a model (``benchmarks/upstream.py``), so that nothing but routers is seen.

    python -m benchmarks.bench_router [--repeats 5] [--sglang-router PATH]

``PATH``: the executable of ``pip install sglang-router==0.3.2`` in an environment of its own; without one, its rows are
missing. Both routers stand before the same pair of workers, and are measured in turn.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import aiohttp
import psutil
import uvloop
from msgspec import Struct

from benchmarks.common import Row, report, row
from benchmarks.load import close, connect, throughput
from benchmarks.servers import answers, free_port, running

PATH = "/v1/completions"
PROMPT = b'"model":"none","prompt":"%b"' % (b"hello world " * 20)
WHOLE = b'{%b,"max_tokens":1}' % PROMPT
REQUESTS = 200  # one after the other
TOKENS = 2000  # of one stream
CONNECTIONS = 32
SECONDS = 3.0  # of load
IDLE, ACTIVE, GAP = 1000, 200, 0.1  # streams, and seconds between tokens of an active one
PROBES = 300


class Server(Struct, frozen=True):
    """A router, or the worker itself."""

    name: str
    url: str
    process: psutil.Process | None = None

    def cpu(self) -> float:
        """Seconds of CPU that it took so far."""
        times = self.process.cpu_times() if self.process else None
        return times.user + times.system if times else 0.0


def streamed(tokens: int, gap: float = 0.0) -> bytes:
    """The body of a request for a stream, whose first token comes at once."""
    return b'{%b,"stream":true,"max_tokens":%d,"gap":%g,"first":0}' % (PROMPT, tokens, gap)


async def per_request(session: aiohttp.ClientSession, url: str) -> float:
    """Mean µs of a request of one token, one after the other."""
    start = time.perf_counter()
    for _ in range(REQUESTS):
        async with session.post(url + PATH, data=WHOLE) as reply:
            await reply.read()
    return 1e6 * (time.perf_counter() - start) / REQUESTS


async def per_token(session: aiohttp.ClientSession, url: str) -> float:
    """Mean µs of a token of a long stream."""
    start = time.perf_counter()
    async with session.post(url + PATH, data=streamed(TOKENS)) as reply:
        async for _ in reply.content.iter_any():
            pass
    return 1e6 * (time.perf_counter() - start) / TOKENS


async def alone(servers: Sequence[Server], direct: Server, repeats: int) -> list[Row]:
    """One client, one request at a time: what each router adds."""
    times: dict[tuple[str, str], list[float]] = {}
    async with aiohttp.ClientSession() as session:
        for _ in range(repeats + 1):
            for server in (direct, *servers):
                times.setdefault((server.name, "request"), []).append(await per_request(session, server.url))
                times.setdefault((server.name, "token"), []).append(await per_token(session, server.url))
    rows = []
    for server in servers:
        for what, goal in (("request", "+300 µs"), ("token", "+40 µs")):
            ours, theirs = times[server.name, what][1:], times[direct.name, what][1:]  # the first ones warm up
            added = [one - other for one, other in zip(ours, theirs, strict=True)]
            rows.append(row(f"added to a {what}, {server.name}", "µs", added, theirs, "the worker itself", goal))
    return rows


async def loaded(ours: Server, theirs: Server | None, repeats: int) -> list[Row]:
    """Many clients: requests a second, and the router's CPU for each."""
    rates: dict[str, list[float]] = {}
    costs: dict[str, list[float]] = {}
    servers = [ours, *([theirs] if theirs else [])]
    for _ in range(repeats):
        for server in servers:
            before = server.cpu()
            rate = await throughput(server.url, PATH, WHOLE, connections=CONNECTIONS, seconds=SECONDS)
            rates.setdefault(server.name, []).append(rate)
            costs.setdefault(server.name, []).append(1e6 * (server.cpu() - before) / (rate * 1.25 * SECONDS))
    against = theirs or ours
    return [
        row("requests a second, " + ours.name, "1/s", rates[ours.name], rates[against.name], against.name, ">= 1"),
        row("CPU of the router for one", "µs", costs[ours.name], costs[against.name], against.name, "<= 1"),
    ]


async def crowded(ours: Server, direct: Server) -> list[Row]:
    """Time to first token beside many streams, and the router's CPU for each of their tokens."""
    firsts: dict[str, list[float]] = {}
    per_token = 0.0
    for server in (direct, ours):
        idle = await connect(server.url, PATH, streamed(2, 1e4), IDLE)
        active = await connect(server.url, PATH, streamed(10**6, GAP), ACTIVE)
        for some in (idle, active):
            for i in range(0, len(some), 50):
                await asyncio.gather(*(caller.first_event() for caller in some[i : i + 50]))
        cpu, start = server.cpu(), time.perf_counter()
        await asyncio.sleep(SECONDS)
        per_token = 1e6 * (server.cpu() - cpu) / ((time.perf_counter() - start) * ACTIVE / GAP)
        firsts[server.name] = [1e3 * await probe(server) for _ in range(PROBES)]
        await close([*idle, *active])
    p99 = {name: statistics.quantiles(times, n=100)[98] for name, times in firsts.items()}
    beside = f"{IDLE} idle + {ACTIVE} active streams"
    added = [p99[ours.name] - p99[direct.name]]
    return [
        row(f"added to p99 TTFT beside {beside}", "ms", added, [p99[direct.name]], "the worker itself", "< 5 ms"),
        row("CPU of the router for a streamed token", "µs", [per_token], [40.0], "the goal", "<= 40 µs"),
    ]


async def probe(server: Server) -> float:
    """Seconds to the first event of one new stream."""
    (caller,) = await connect(server.url, PATH, streamed(1), 1)
    first = await caller.first_event()
    await close([caller])
    return first


@contextmanager
def started(name: str, command: Sequence[str], url: str, ready: str) -> Iterator[Server]:
    """A router, until the block ends."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not answers(ready):
            assert process.poll() is None, f"{name} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{name} is not ready"
            time.sleep(0.1)
        yield Server(name, url, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait()


def sglang(executable: str, p: str, d: str) -> tuple[list[str], str]:
    """Its command line in PD mode, and its URL."""
    port = free_port()
    command = [
        *(executable, "launch", "--pd-disaggregation", "--prefill", p, "8998", "--decode", d, "--port", str(port)),
        *("--policy", "round_robin", "--prometheus-port", str(free_port()), "--log-level", "error"),
    ]
    return command, f"http://127.0.0.1:{port}"


def main() -> None:
    """Start two workers and the routers, and measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sglang-router", metavar="PATH")
    options = parser.parse_args()
    p, d = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    with ExitStack() as stack:
        for url in (p, d):
            stack.enter_context(running(["benchmarks.upstream", url.rsplit(":", 1)[1]], url))
        ours = []
        for name, workers in (
            ("colocated", ["--colocated", d]),
            ("prefill + decode", ["--prefill", p, "--decode", d, "--short-prompt", "0"]),
        ):
            port = free_port()
            command = [sys.executable, "-m", "twostroke", "router", "--port", str(port), *workers]
            url = f"http://127.0.0.1:{port}"
            ours.append(stack.enter_context(started(name, command, url, f"{url}/ready")))
        theirs = None
        if options.sglang_router:
            command, url = sglang(options.sglang_router, p, d)
            theirs = stack.enter_context(started("sglang-router 0.3.2, PD", command, url, f"{url}/health"))
        direct = Server("the worker itself", d)
        rows = asyncio.run(alone([*ours, *([theirs] if theirs else [])], direct, options.repeats))
        rows += uvloop.run(loaded(ours[1], theirs, options.repeats))
        rows += uvloop.run(crowded(ours[1], direct))
    report("router", rows, requests=REQUESTS, tokens=TOKENS, connections=CONNECTIONS, repeats=options.repeats)


if __name__ == "__main__":
    main()
