"""Disaggregated = colocated = transformers, greedy, in float32, for real prompts."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.e2e.conftest import FLOAT32, HAND_OVER, ROLES, Reference, Tiny
from tests.e2e.system import System, client, generate, launch, post
from twostroke.links import nixl

TOKENS = 12
CPU = (*FLOAT32, "--device", "cpu")  # for the tiny model


async def check(system: System, url: str, reference: Reference | Tiny, prompts: Sequence[tuple[int, ...]]) -> None:
    """All prompts at once give what transformers gives each alone."""
    async with client() as session:
        answers = await asyncio.gather(*(generate(session, url, prompt, TOKENS) for prompt in prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer == reference.generate(prompt, TOKENS), f"prompt of {len(prompt)} tokens"
        await system.idle(session)


async def handed_over(system: System) -> int:
    """Blocks that the decode worker has read from its peer."""
    async with client() as session, session.get(f"{system.workers['decode-0'].url}/metrics") as reply:
        lines = (await reply.text()).splitlines()
        return sum(int(float(line.split()[1])) for line in lines if line.startswith("twostroke_handover_blocks_total"))


async def test_disaggregated(system: System, reference: Reference) -> None:
    prompts = reference.prompts()
    await check(system, system.url, reference, prompts)
    assert await handed_over(system) >= sum(map(len, prompts)) // 16 * 0.9, "the blocks came from the prefill worker"


async def test_disaggregated_again_with_prefix_hits(system: System, reference: Reference) -> None:
    prompt = reference.prompts()[-2]
    async with client() as session:
        _, reply = await post(
            session, f"{system.url}/generate", {"input_ids": prompt, "max_new_tokens": TOKENS, "temperature": 0}
        )
    assert reply["meta_info"]["cached_tokens"] >= len(prompt) - 16
    await check(system, system.url, reference, reference.prompts())


async def test_colocated(system: System, reference: Reference) -> None:
    """The same worker, asked without a ticket, does both phases: the engine knows no roles."""
    await check(system, system.workers["prefill-0"].url, reference, reference.prompts())


async def test_seeded_sampling_is_the_same_disaggregated_and_colocated(system: System, reference: Reference) -> None:
    prompts = reference.prompts()[:8]
    async with client() as session:
        for url in (system.url, system.workers["prefill-0"].url):
            answers = await asyncio.gather(
                *(
                    generate(session, url, prompt, 20, temperature=0.9, top_p=0.95, top_k=50, seed=7 + index)
                    for index, prompt in enumerate(prompts)
                )
            )
            if url == system.url:
                first = answers
        assert answers == first
        assert any(answer != reference.generate(prompt, 20) for prompt, answer in zip(prompts, answers, strict=True))


@pytest.mark.parametrize(
    ("engine", "router"),
    [
        (("--block-size", "7", "--chunk-size", "8192"), ("--schedule", "serial")),
        (("--block-size", "32", "--chunk-size", "64"), ("--schedule", "concurrent", "--policy", "round-robin")),
    ],
    ids=["serial, odd blocks, chunk > prompt", "concurrent, block 32, chunk 64"],
)
async def test_other_settings(tmp_path: Path, tiny: Tiny, engine: tuple[str, ...], router: tuple[str, ...]) -> None:
    with launch(tmp_path, ROLES, engine=[*CPU, *engine], router=[*router, *HAND_OVER], model=tiny.directory) as system:
        await check(system, system.url, tiny, tiny.prompts())
        assert await handed_over(system) > 0


NIXL = pytest.param("nixl", marks=pytest.mark.skipif(not nixl.installed(), reason="NIXL is not installed"))


@pytest.mark.parametrize("link", ["tcp", NIXL])
async def test_over_one_link(tmp_path: Path, tiny: Tiny, link: str) -> None:
    """Forced; the other links are neither offered nor used."""
    prompts, engine = tiny.prompts(), [*CPU, "--chunk-size", "192", "--link", link]
    with launch(tmp_path, ROLES, engine=engine, model=tiny.directory, router=HAND_OVER) as system:
        await check(system, system.url, tiny, prompts)
        assert await handed_over(system) >= sum(map(len, prompts)) // 16 * 0.9
        async with client() as session:
            assert {(await system.info(session, name))["link"] for name in ROLES} == {link}
            body = {"prompt": list(tiny.prompts()[-1][100:200]), "max_tokens": 2}
            await post(session, f"{system.url}/v1/completions", body, x_request_id="one")
            async with session.get(f"{system.url}/debug/requests/one") as reply:
                events = {event["event"]: event["detail"] for event in (await reply.json())["events"]}
            assert events["attached"] == {"link": link}
            assert events["kv_complete"]["link"] == link


async def test_preemption(tmp_path: Path, tiny: Tiny) -> None:
    """A pool that holds a fraction of the load: decodes are preempted and recomputed, and nobody is stuck."""
    prompts = [(*prompt[:100], number) for number, prompt in enumerate(tiny.prompts() + tiny.prompts()[-2:])]
    tokens, block = 100, 3 * 2 * 2 * 16 * 16 * 4  # bytes: layers, K and V, heads, head_dim, tokens, float32
    # What P holds for a request that waits at D, behind one that waits for P, is only let go when its lease expires.
    engine = [*CPU, "--kv-memory", str(40 * block), "--lease-seconds", "2"]
    with launch(tmp_path, ROLES, engine=engine, model=tiny.directory) as system:
        async with client() as session:
            answers = await asyncio.gather(*(generate(session, system.url, prompt, tokens) for prompt in prompts))
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer == tiny.generate(prompt, tokens)
            await system.idle(session)
            async with session.get(f"{system.workers['decode-0'].url}/metrics") as reply:
                metrics = await reply.text()
    preemptions = [line for line in metrics.splitlines() if line.startswith("twostroke_preemptions_total")]
    assert preemptions
    assert float(preemptions[0].split()[1]) > 0
