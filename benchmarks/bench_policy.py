"""What a choice of workers by known beginnings gains: conversations over two colocated workers, least-loaded against
prefix-aware, with the built-in model.

    python -m benchmarks.bench_policy [repeats]
"""

import asyncio
import json
import random
import statistics
import sys
import time
from contextlib import ExitStack

import aiohttp

from benchmarks.common import Row, report, row
from benchmarks.servers import free_port, running

CONVERSATIONS, TURNS = 6, 4
WORDS = 150  # of a turn, about 200 tokens
CLIENTS = 2
POLICIES = ("least-loaded", "prefix-aware")
_WORDS = ("time", "year", "people", "way", "day", "thing", "life", "child", "world", "school", "state", "group")


async def first_token(session: aiohttp.ClientSession, url: str, messages: list[dict[str, str]]) -> tuple[float, str]:
    """Milliseconds to the first event of an answer, and the answer."""
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, "stream": True}
    start, first, text = time.perf_counter(), 0.0, ""
    async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - start
                choices = json.loads(line[6:])["choices"]
                text += (choices[0]["delta"].get("content") or "") if choices else ""
    return 1e3 * first, text


async def converse(url: str, seed: int) -> list[float]:
    """Times to first token of all turns but the first ones: conversations go on in random order."""
    rng = random.Random(seed)
    talks: list[list[dict[str, str]]] = [[] for _ in range(CONVERSATIONS)]
    order = [talk for talk in talks for _ in range(TURNS)]
    rng.shuffle(order)
    times: list[float] = []
    busy = [asyncio.Lock() for _ in talks]
    queue = iter(order)

    async def client(session: aiohttp.ClientSession) -> None:
        for talk in queue:
            async with busy[next(i for i, other in enumerate(talks) if other is talk)]:
                talk.append({"role": "user", "content": " ".join(rng.choices(_WORDS, k=WORDS))})
                took, text = await first_token(session, url, talk)
                if len(talk) > 1:
                    times.append(took)
                talk.append({"role": "assistant", "content": text})

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
    return times


def main() -> None:
    """Two workers, a router for each policy, in turn."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    times: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    with ExitStack() as stack:
        for url in urls:
            port = url.rsplit(":", 1)[1]
            stack.enter_context(running(["twostroke", "serve", "--port", port, "--threads", "1"], f"{url}/ready"))
        routers = {policy: f"http://127.0.0.1:{free_port()}" for policy in POLICIES}
        for policy, url in routers.items():
            flags = ["--colocated", *urls, "--policy", policy, "--port", url.rsplit(":", 1)[1]]
            stack.enter_context(running(["twostroke", "router", *flags], f"{url}/ready"))
        for repeat in range(repeats):
            for number, policy in enumerate(POLICIES):
                times[policy].append(statistics.mean(asyncio.run(converse(routers[policy], 2 * repeat + number))))
    aware, least = times["prefix-aware"], times["least-loaded"]
    rows: list[Row] = [row("TTFT of later turns, prefix-aware", "ms", aware, least, "least-loaded", "< 1")]
    report("policy", rows, conversations=CONVERSATIONS, turns=TURNS, clients=CLIENTS, repeats=repeats)


if __name__ == "__main__":
    main()
