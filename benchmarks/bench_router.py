"""What the router adds to a request and to a token, against calling the worker directly.

The worker is a real HTTP server without a model (``benchmarks/upstream.py``), so that nothing but the router is seen.

    python -m benchmarks.bench_router [repeats]
"""

import asyncio
import sys
import time
from contextlib import ExitStack

import aiohttp

from benchmarks.common import Row, report, row
from benchmarks.servers import free_port, running

REQUESTS = 200  # one after the other
TOKENS = 2000  # of one stream


async def per_request(session: aiohttp.ClientSession, url: str) -> float:
    """Mean seconds of a request of one token."""
    start = time.perf_counter()
    for _ in range(REQUESTS):
        async with session.post(f"{url}/v1/completions", data=b"1") as reply:
            await reply.read()
    return (time.perf_counter() - start) / REQUESTS


async def per_token(session: aiohttp.ClientSession, url: str) -> float:
    """Mean seconds of a token of a long stream."""
    start = time.perf_counter()
    async with session.post(f"{url}/v1/completions", data=str(TOKENS).encode()) as reply:
        async for _ in reply.content.iter_any():
            pass
    return (time.perf_counter() - start) / TOKENS


async def measure(routes: dict[str, str], direct: str, repeats: int) -> list[Row]:
    """All ways in turn."""
    times: dict[tuple[str, str], list[float]] = {}
    async with aiohttp.ClientSession() as session:
        for _ in range(repeats + 1):
            for name, url in {"direct": direct, **routes}.items():
                times.setdefault((name, "request"), []).append(1e6 * await per_request(session, url))
                times.setdefault((name, "token"), []).append(1e6 * await per_token(session, url))
    rows = []
    for name in routes:
        for what, goal in (("request", "+300 µs"), ("token", "+40 µs")):
            ours, theirs = times[name, what][1:], times["direct", what][1:]  # the first ones warm up
            added = [one - other for one, other in zip(ours, theirs, strict=True)]
            rows.append(row(f"{what}, {name}", "µs", ours, theirs, "the worker itself", goal))
            rows.append(row(f"added to a {what}, {name}", "µs", added, theirs, "the worker itself", goal))
    return rows


def main() -> None:
    """Start two workers and two routers, and measure."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    p, d, colocated, pair = (free_port() for _ in range(4))
    url = "http://127.0.0.1:{}".format
    with ExitStack() as stack:
        for port in (p, d):
            stack.enter_context(running(["benchmarks.upstream", str(port)], url(port)))
        for port, workers in ((colocated, ["--colocated", url(d)]), (pair, ["--prefill", url(p), "--decode", url(d)])):
            stack.enter_context(running(["twostroke", "router", "--port", str(port), *workers], f"{url(port)}/ready"))
        routes = {"colocated": url(colocated), "prefill + decode": url(pair)}
        rows = asyncio.run(measure(routes, url(d), repeats))
    report("router", rows, requests=REQUESTS, tokens=TOKENS, repeats=repeats)


if __name__ == "__main__":
    main()
