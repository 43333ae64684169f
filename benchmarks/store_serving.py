"""What the store saves or costs a request, end to end: one worker with the built-in model, real HTTP.

- ``ttft``: time to first token of a long prompt that is in a tier, against computing it on the same worker
- ``chat``: conversations that the pool cannot hold, with each list of tiers, against none
- ``decode``: time per token while other requests' prefill is written into a tier, against none: workers side by side

In bfloat16, or float32 on a CPU that cannot multiply it: slow prefill would make loading look fast.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from benchmarks.common import Row, machine, row
from benchmarks.servers import free_port, running

DTYPE = "float32" if machine()["bf16"] == "none" else "bfloat16"
TOKEN_BYTES = 23_040 * (2 if DTYPE == "float32" else 1)  # of the built-in model's KV
PROMPT = 4000  # tokens
USERS, TURNS, AT_ONCE = 20, 8, 4
OPENING, QUESTION, ANSWER = 32, 16, 8  # tokens: what a conversation starts with, and what each turn adds
CHAT_POOL = 1200  # tokens, of up to 20 · 224
DECODES, STEPS = 2, 48  # running at once, and tokens of each
BACKGROUND, EVERY = 192, 6  # tokens of a prompt that comes meanwhile, whenever so many tokens have come
Json = Any


class Reply(NamedTuple):
    """One request as its client saw it. Seconds."""

    ttft: float
    tpot: float
    tokens: list[int]


def random_prompt(rng: random.Random, tokens: int) -> list[int]:
    """Token ids."""
    return [rng.randrange(100, 49_000) for _ in range(tokens)]


async def generate(
    http: aiohttp.ClientSession,
    url: str,
    prompt: Sequence[int],
    output: int,
    heard: Callable[[int], None] = lambda _count: None,
) -> Reply:
    """Send a prompt, and take so many tokens. ``heard`` is told after each how many there are."""
    body: Json = {"input_ids": prompt, "stream": True}
    body["sampling_params"] = {"max_new_tokens": output, "temperature": 0, "ignore_eos": True}
    start, times, last = time.perf_counter(), [], b""
    async with http.post(f"{url}/generate", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter() - start)
                last = line
                heard(len(times))
    tokens = json.loads(last[6:])["output_ids"]
    assert len(tokens) == output, last
    return Reply(times[0], (times[-1] - times[0]) / max(1, output - 1), tokens)


@contextmanager
def worker(store: str, pool: int, threads: int) -> Iterator[str]:
    """The URL of a worker with these tiers ("" for none; "service" for a service of its own) and a pool of so many
    tokens. ``threads``: 0 for all cores.
    """
    with ExitStack() as stack:
        if store.startswith("service"):
            service = free_port()
            command = ["twostroke", "store", "--port", str(service), "--memory", store.partition(":")[2]]
            stack.enter_context(running(command, service))
            store = f"service:127.0.0.1:{service}"
        port = free_port()
        memory = (pool // 16 + 1) * 16 * TOKEN_BYTES
        command = ["twostroke", "serve", "--port", str(port), "--dtype", DTYPE, "--kv-memory", str(memory)]
        command += ["--threads", str(threads)] if threads else []
        url = f"http://127.0.0.1:{port}"
        stack.enter_context(running([*command, *(["--store", store] if store else [])], f"{url}/ready"))
        yield url


@asynccontextmanager
async def client(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A session, after a request that warms the worker up."""
    async with aiohttp.ClientSession() as http:
        await generate(http, url, random_prompt(random.Random(0), 300), 2)
        yield http


async def ttft(path: Path, repeats: int, threads: int) -> list[Row]:
    """In turn: new prompts are computed; old ones, which the pool has lost since, are loaded."""
    rows = []
    for store, goal in (("host:2GiB", 0.10), ("service:2GiB", 0.15), (f"disk:{path}/ttft:2GiB", 0.20)):
        rng = random.Random(store)
        prompts = [random_prompt(rng, PROMPT) for _ in range(2)]
        fresh, loaded = [], []
        with worker(store, PROMPT + PROMPT // 8, threads) as url:  # room for one of them
            async with client(url) as http:
                for prompt in prompts:
                    fresh.append(1e3 * (await generate(http, url, prompt, 1)).ttft)
                    await asyncio.sleep(1.0)  # it is written
                for turn in range(2 * repeats):
                    loaded.append(1e3 * (await generate(http, url, prompts[turn % 2], 1)).ttft)
        name = store.partition(":")[0]
        rows.append(row(f"TTFT, {PROMPT:,} tokens in {name}", "ms", loaded, fresh, "computed", f"<= {goal:.2f}"))
    return rows


class Conversations(NamedTuple):
    """All turns of all users, with one list of tiers."""

    ttfts: list[float]  # ms, of all turns but each user's first
    rate: float  # output tokens a second


async def converse(store: str, threads: int) -> Conversations:
    """Every user's first turn, then every user's second one, and so on, some of them at once."""
    histories = [random_prompt(random.Random(user), OPENING) for user in range(USERS)]
    ttfts: list[float] = []
    with worker(store, CHAT_POOL, threads) as url:
        async with client(url) as http:
            left = iter([(user, turn) for turn in range(TURNS) for user in range(USERS)])

            async def users() -> None:
                for user, turn in left:
                    histories[user] += random_prompt(random.Random(f"{user} {turn}"), QUESTION)
                    reply = await generate(http, url, histories[user], ANSWER)
                    histories[user] += reply.tokens
                    if turn:
                        ttfts.append(1e3 * reply.ttft)

            start = time.perf_counter()
            await asyncio.gather(*(users() for _ in range(AT_ONCE)))
            return Conversations(ttfts, USERS * TURNS * ANSWER / (time.perf_counter() - start))


async def chat(path: Path, threads: int) -> list[Row]:
    """Each list once, in turn; none first and last, since the machine may have changed meanwhile."""
    disk = f"disk:{path}/chat"
    stores = ["", "host:1GiB", f"{disk}:1GiB", f"host:128MiB,{disk}-below:1GiB", "service:1GiB", ""]
    found = [(store, await converse(store, threads)) for store in stores]
    without = [one for store, one in found if not store]
    rows = []
    for store, one in found[1:-1]:
        name = ",".join(tier.partition(":")[0] for tier in store.split(","))
        rows.append(
            row(
                f"chat, TTFT, {name}",
                "ms",
                one.ttfts,
                [value for other in without for value in other.ttfts],
                "no store",
                "<= 1",
            )
        )
        rates = [other.rate for other in without]
        rows.append(row(f"chat, output tokens, {name}", "1/s", [one.rate], rates, "no store", ">= 1"))
    return rows


async def load(http: aiohttp.ClientSession, url: str, rng: random.Random) -> float:
    """Milliseconds a token of some requests that decode, while others' prompts come: always as many. Were these to come
    at fixed times, whatever slows the machine down for a moment would have more of them come, and they slow it further.
    """
    background: list[asyncio.Task[Reply]] = []

    def heard(count: int) -> None:
        if count % EVERY == 0 and count < STEPS:
            background.append(asyncio.create_task(generate(http, url, random_prompt(rng, BACKGROUND), 1)))

    first, *others = [random_prompt(rng, 64) for _ in range(DECODES)]
    replies = await asyncio.gather(
        generate(http, url, first, STEPS, heard), *(generate(http, url, one, STEPS) for one in others)
    )
    await asyncio.gather(*background)
    return 1e3 * statistics.mean([reply.tpot for reply in replies])


async def decode(path: Path, repeats: int, threads: int) -> list[Row]:
    """All workers are there at once, and take turns."""
    stores = {"none": "", "host": "host:1GiB", "disk": f"disk:{path}/decode:1GiB", "service": "service:1GiB"}
    found: dict[str, list[float]] = {name: [] for name in stores}
    with ExitStack() as stack:
        urls = {name: stack.enter_context(worker(store, 2000, threads)) for name, store in stores.items()}
        for url in urls.values():
            async with client(url):
                pass
        async with aiohttp.ClientSession() as http:
            for turn in range(repeats):
                order = list(urls.items())
                for name, url in order if turn % 2 else reversed(order):
                    found[name].append(await load(http, url, random.Random(f"{turn} {name}")))
    return [
        row(f"TPOT while prefill is written, {name}", "ms", found[name], found["none"], "no store", "<= 1.05")
        for name in list(stores)[1:]
    ]
