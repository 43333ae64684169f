"""What the hand-over over shared memory costs, on this CPU: one prefill and one decode worker of one thread each.

The reference is one of the same workers doing both phases, asked directly. Fresh random prompts, in turn.

    python -m benchmarks.bench_handover [repeats]
"""

import asyncio
import random
import sys
import time
from typing import Any

import aiohttp

from benchmarks.common import Row, report, row
from benchmarks.servers import free_port, running

LENGTHS = (100, 1000, 2000, 4000)  # tokens
OUTPUT = 8  # tokens
_ids = random.Random(45)
Json = Any


async def ttft(
    session: aiohttp.ClientSession, url: str, tokens: int, request_id: str, prompt: list[int] | None = None
) -> float:
    """Seconds from sending a prompt, a fresh one unless it is given, until the first event of its stream."""
    prompt = prompt or [_ids.randrange(100, 49_000) for _ in range(tokens)]
    body = {"prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True, "stream": True}
    start = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body, headers={"x-request-id": request_id}) as reply:
        reply.raise_for_status()
        await reply.content.readline()
        first = time.perf_counter() - start
        await reply.read()
    return first


async def exposed(session: aiohttp.ClientSession, url: str, request_id: str) -> tuple[float, float]:
    """From a request's timeline: seconds that KV was waited for after prefill, and seconds of prefill."""
    async with session.get(f"{url}/debug/requests/{request_id}") as reply:
        events: list[Json] = (await reply.json())["events"]
    times = {(event["worker"], event["event"]): event["time"] for event in events}
    detail = next(event["detail"] for event in events if event["event"] == "kv_complete")
    return detail["exposed_ms"] / 1e3, times["prefill-0", "prefill_ended"] - times["prefill-0", "prefill_started"]


async def measure(router: str, repeats: int) -> list[Row]:
    """Both ways in turn, for each length."""
    rows = []
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{router}/workers") as reply:
            colocated = next(worker["url"] for worker in await reply.json() if worker["id"] == "prefill-0")
        for tokens in LENGTHS:
            through, direct, waits, prefills = [], [], [], []
            for turn in range(repeats + 1):
                name = f"bench-{tokens}-{turn}"
                one = await ttft(session, router, tokens, name)
                other = await ttft(session, colocated, tokens, f"{name}-direct")
                if turn:  # the first one warms up
                    wait, prefill = await exposed(session, router, name)
                    through.append(1e3 * one)
                    direct.append(1e3 * other)
                    waits.append(1e3 * wait)
                    prefills.append(1e3 * prefill)
            goal = "≤ 1.05" if tokens >= 1000 else ""
            rows.append(row(f"TTFT, {tokens} tokens", "ms", through, direct, "colocated, same threads", goal))
            goal = "≤ 0.05" if tokens >= 1000 else ""
            rows.append(row(f"exposed hand-over, {tokens} tokens", "ms", waits, prefills, "its prefill", goal))
    return rows


def main() -> None:
    """Start the system and measure it."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with running(["twostroke", "up", "--port", str(port), "--threads", "1"], f"{url}/ready"):
        rows = asyncio.run(measure(url, repeats))
    report("handover", rows, link="shm", threads_per_worker=1, output_tokens=OUTPUT, repeats=repeats)


if __name__ == "__main__":
    main()
