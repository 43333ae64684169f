"""What the hand-over costs over each link: one prefill and one decode worker, on this CPU with one thread each, or with
``--shape`` on this machine's GPUs, with random weights.

Fresh random prompts. "Exposed" is what the client waits for KV after prefill has ended. "Second token" is the gap after
the first one, against the mean gap of those that follow. Time to first token is compared, over the first link, with
one of the same workers doing both phases, asked directly, in turn.

In bfloat16, or float32 on a CPU that cannot multiply it: slow prefill would make the hand-over look fast.

    python -m benchmarks.bench_handover [--links shm,tcp,nixl] [--repeats 3] [--lengths 1000,2000]
    python -m benchmarks.bench_handover --shape Qwen2.5-7B
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import torch

from benchmarks.common import Row, machine, report, row
from benchmarks.servers import free_port, running
from benchmarks.shapes import shape

LENGTHS = "1000,2000,4000,8000"  # tokens
LONG_LENGTHS = "8192,32768,50000"  # of GPUs
COMPARED = (100, 1000, 2000, 4000)  # on a CPU, with one worker that does both phases
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


async def measure(
    router: str,
    link: str,
    lengths: Sequence[int],
    compared: Sequence[int],
    repeats: int,
    goal: str,
    settings: Mapping[str, object],
) -> None:
    """Each length, over one link. What is known is reported after each."""
    rows: list[Row] = []
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{router}/workers") as reply:
            colocated = next(worker["url"] for worker in await reply.json() if worker["id"] == "prefill-0")
        for turn, tokens in enumerate((600, max(lengths))):
            await stream(session, router, tokens, f"warm-up-{turn}")
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
                least = "≤ 1.05" if tokens >= 1000 else ""
                rows.append(row(f"TTFT, {what}", "ms", through, direct, "the prefill worker alone", least))
            if tokens in lengths:
                rows.append(row(f"exposed hand-over, {what}", "ms", waits, prefills, "its prefill", goal))
                rows.append(row(f"second token, {what}", "ms", gaps, steps, "TPOT of the others", "≤ 1.5"))
            report(f"handover_{link}", rows, **settings, output_tokens=OUTPUT, repeats=repeats)


def main() -> None:
    """Start the system over each link and measure it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", help="on GPUs: Qwen2.5-7B, Llama-3.1-8B or Qwen3-30B-A3B")
    parser.add_argument("--links")
    parser.add_argument("--lengths")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    lengths = [int(length) for length in (options.lengths or (LONG_LENGTHS if options.shape else LENGTHS)).split(",")]
    links = (options.links or ("cuda-ipc,tcp" if options.shape else "shm,tcp,nixl")).split(",")
    with tempfile.TemporaryDirectory() as folder:
        if options.shape:
            command = [str(shape(options.shape, Path(folder))), "--load-format", "dummy"]
            settings: dict[str, object] = {"shape": options.shape, "device": torch.cuda.get_device_name()}
            settings["gpus"], compared, goal = torch.cuda.device_count(), lengths, "≤ 0.01"
        else:
            dtype = "float32" if machine()["bf16"] == "none" else "bfloat16"
            command, settings = ["--threads", "1", "--dtype", dtype], {"dtype": dtype, "threads_per_worker": 1}
            compared, goal = [tokens for tokens in COMPARED if tokens <= max(lengths)], "≤ 0.05"
        for link in links:
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            with running(["twostroke", "up", *command, "--port", str(port), "--link", link], f"{url}/ready"):
                alone = compared if link == links[0] else []
                asyncio.run(measure(url, link, lengths, alone, options.repeats, goal, settings))


if __name__ == "__main__":
    main()
