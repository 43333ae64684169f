"""What the hand-over costs over each link, on this CPU: one prefill and one decode worker of one thread each.

Fresh random prompts. "Exposed" is what the client waits for KV after prefill has ended. "Second token" is the gap after
the first one, against the mean gap of those that follow. Time to first token is compared, over shared memory, with one
of the same workers doing both phases, asked directly, in turn.

In bfloat16, or float32 on a CPU that cannot multiply it: slow prefill would make the hand-over look fast.

    python -m benchmarks.bench_handover [links] [repeats] [lengths]       for example: shm,tcp,nixl 3 1000,2000
"""

import asyncio
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import aiohttp

from benchmarks.common import Row, machine, report, row
from benchmarks.servers import free_port, running

LENGTHS = (1000, 2000, 4000, 8000)  # tokens
COMPARED = (100, 1000, 2000, 4000)  # with one worker that does both phases; over shared memory
OUTPUT = 24  # tokens
_ids = random.Random(45)
Json = Any


async def stream(
    session: aiohttp.ClientSession, url: str, tokens: int, request_id: str, prompt: list[int] | None = None
) -> list[float]:
    """Seconds from sending a prompt, a fresh one unless it is given, until each token of its answer."""
    prompt = prompt or [_ids.randrange(100, 49_000) for _ in range(tokens)]
    body = {"prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True, "stream": True}
    start, times = time.perf_counter(), []
    async with session.post(f"{url}/v1/completions", json=body, headers={"x-request-id": request_id}) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter() - start)
    return times


async def exposed(session: aiohttp.ClientSession, url: str, request_id: str, link: str) -> tuple[float, float]:
    """From a request's timeline: seconds that KV was waited for after prefill, and seconds of prefill."""
    async with session.get(f"{url}/debug/requests/{request_id}") as reply:
        events: list[Json] = (await reply.json())["events"]
    times = {(event["worker"], event["event"]): event["time"] for event in events}
    detail = next(event["detail"] for event in events if event["event"] == "kv_complete")
    assert detail["link"] == link, detail
    return detail["exposed_ms"] / 1e3, times["prefill-0", "prefill_ended"] - times["prefill-0", "prefill_started"]


async def measure(router: str, link: str, dtype: str, lengths: Sequence[int], repeats: int) -> None:
    """Each length, over one link. What is known is reported after each."""
    rows: list[Row] = []
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{router}/workers") as reply:
            colocated = next(worker["url"] for worker in await reply.json() if worker["id"] == "prefill-0")
        compared = [tokens for tokens in COMPARED if tokens <= max(lengths)] if link == "shm" else []
        await stream(session, router, 600, "warm-up")
        for tokens in sorted({*lengths, *compared}):
            through, direct, waits, prefills, gaps, steps = [], [], [], [], [], []
            for turn in range(repeats):
                name = f"bench-{tokens}-{turn}"
                times = await stream(session, router, tokens, name)
                wait, prefill = await exposed(session, router, name, link)
                through.append(1e3 * times[0])
                waits.append(1e3 * wait)
                prefills.append(1e3 * prefill)
                gaps.append(1e3 * (times[1] - times[0]))
                steps.append(1e3 * (times[-1] - times[1]) / (len(times) - 2))
                if tokens in compared:
                    direct.append(1e3 * (await stream(session, colocated, tokens, f"{name}-direct"))[0])
            what = f"{link}, {tokens} tokens"
            if tokens in compared:
                goal = "≤ 1.05" if tokens >= 1000 else ""
                rows.append(row(f"TTFT, {what}", "ms", through, direct, "colocated, same threads", goal))
            if tokens in lengths:
                rows.append(row(f"exposed hand-over, {what}", "ms", waits, prefills, "its prefill", "≤ 0.05"))
                rows.append(row(f"second token, {what}", "ms", gaps, steps, "TPOT of the others", "≤ 1.5"))
            settings: dict[str, object] = {"dtype": dtype, "threads_per_worker": 1, "output_tokens": OUTPUT}
            report(f"handover_{link}", rows, **settings, repeats=repeats)


def main() -> None:
    """Start the system over each link and measure it."""
    links = sys.argv[1].split(",") if len(sys.argv) > 1 else ["shm", "tcp", "nixl"]
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    lengths = [int(length) for length in sys.argv[3].split(",")] if len(sys.argv) > 3 else LENGTHS
    dtype = "float32" if machine()["bf16"] == "none" else "bfloat16"
    for link in links:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        arguments = ["up", "--port", str(port), "--threads", "1", "--link", link, "--dtype", dtype]
        with running(["twostroke", *arguments], f"{url}/ready"):
            asyncio.run(measure(url, link, dtype, lengths, repeats))


if __name__ == "__main__":
    main()
