"""Disaggregated = colocated = transformers, greedy, in float32, for real prompts."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.e2e.conftest import DEVICE, FLOAT32, ROLES, Reference
from tests.e2e.system import System, client, generate, launch, post
from twostroke.links import nixl

TOKENS = 12
ODD_BLOCK = "7" if DEVICE == "cpu" else "48"


async def check(system: System, url: str, reference: Reference, prompts: Sequence[tuple[int, ...]]) -> None:
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
    prompts = reference.prompts()[:12]
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
        (("--block-size", ODD_BLOCK, "--chunk-size", "8192"), ("--schedule", "serial")),
        (("--block-size", "32", "--chunk-size", "64"), ("--schedule", "concurrent", "--policy", "round-robin")),
    ],
    ids=["serial, odd blocks, chunk > prompt", "concurrent, block 32, chunk 64"],
)
async def test_other_settings(
    tmp_path: Path, reference: Reference, engine: tuple[str, ...], router: tuple[str, ...]
) -> None:
    prompts = reference.prompts()[::3]
    with launch(tmp_path, ROLES, engine=[*FLOAT32, *engine], router=router) as system:
        await check(system, system.url, reference, prompts)
        assert await handed_over(system) > 0


NIXL = pytest.param("nixl", marks=pytest.mark.skipif(not nixl.installed(), reason="NIXL is not installed"))


@pytest.mark.parametrize("link", ["tcp", NIXL])
async def test_over_one_link(tmp_path: Path, reference: Reference, link: str) -> None:
    """Forced; the other links are neither offered nor used."""
    prompts = reference.prompts()[13:20:3]
    with launch(tmp_path, ROLES, engine=[*FLOAT32, "--chunk-size", "192", "--link", link]) as system:
        await check(system, system.url, reference, prompts)
        assert await handed_over(system) >= sum(map(len, prompts)) // 16 * 0.9
        async with client() as session:
            assert {(await system.info(session, name))["link"] for name in ROLES} == {link}
            body = {"prompt": list(reference.prompts()[-1][:100]), "max_tokens": 2}
            await post(session, f"{system.url}/v1/completions", body, x_request_id="one")
            async with session.get(f"{system.url}/debug/requests/one") as reply:
                events = {event["event"]: event["detail"] for event in (await reply.json())["events"]}
            assert events["attached"] == {"link": link}
            assert events["kv_complete"]["link"] == link


async def test_preemption(tmp_path: Path, reference: Reference) -> None:
    """A pool that holds a fraction of the load: decodes are preempted and recomputed, and nobody is stuck."""
    prompts = [prompt for prompt in reference.prompts() if len(prompt) < 400]
    tokens = 48
    pool = 46_080 * 16 * 72  # bytes: 72 blocks of 16 tokens in float32
    with launch(tmp_path, ROLES, engine=[*FLOAT32, "--kv-memory", str(pool)]) as system:
        async with client() as session:
            answers = await asyncio.gather(*(generate(session, system.url, prompt, tokens) for prompt in prompts))
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer == reference.generate(prompt, tokens)
            await system.idle(session)
            async with session.get(f"{system.workers['decode-0'].url}/metrics") as reply:
                metrics = await reply.text()
    preemptions = [line for line in metrics.splitlines() if line.startswith("twostroke_preemptions_total")]
    assert preemptions
    assert float(preemptions[0].split()[1]) > 0
