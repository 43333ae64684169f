"""A whole worker on a tiny model: what it does when it is told to leave, and when it has no room."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest

from tests.engine.rig import until
from tests.tiny import generate, make_model
from twostroke.config import EngineConfig, WorkerConfig
from twostroke.errors import NoRoom, Unavailable
from twostroke.kv.keys import prompt_key
from twostroke.messages import Attach, Request, Sampling, Ticket
from twostroke.worker.worker import Worker

PROMPT = list(range(10, 50))  # 2 blocks and a half
BLOCK_BYTES = 16 * 2 * 2 * 2 * 8 * 4  # tokens · layers · K and V · heads · head_dim · float32
SLOTS = 6
NOBODY = "http://127.0.0.1:1"


def request(number: int, count: int = 8, *, prompt_index: int = 0) -> Request:
    sampling = Sampling(count, 0, temperature=0, ignore_eos=True)
    return Request(f"r{number}/{prompt_index}/0", PROMPT, sampling, prompt_index=prompt_index)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("LlamaForCausalLM", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
async def worker(model: Path) -> AsyncIterator[Worker]:
    engine = EngineConfig(device="cpu", dtype="float32", kv_memory=SLOTS * BLOCK_BYTES, threads=1)
    worker = Worker(WorkerConfig(str(model), engine=engine, attach_timeout=0.3), NOBODY, "")
    await worker.start(asyncio.Event())
    yield worker
    await until(lambda: worker.info().slots.leased == 0)
    assert not worker.info().running
    await worker.stop()


async def tokens(worker: Worker, request: Request, ticket: Ticket | None = None) -> list[int]:
    async with aclosing(worker.generate(request, ticket)) as outputs:
        return [token.id async for output in outputs for token in output.tokens]


async def test_it_says_what_its_blocks_are_made_of(worker: Worker) -> None:
    info = worker.info()
    assert (info.dtype, info.block_tokens, info.slots.total) == ("float32", 16, SLOTS)


async def test_a_draining_worker_finishes_and_takes_nothing_new(worker: Worker, model: Path) -> None:
    async with aclosing(worker.generate(request(0, 40), None)) as outputs:
        first = await anext(outputs)
        worker.drain(60)
        leaving = asyncio.create_task(worker.drained())
        assert worker.info().state == "draining"
        with pytest.raises(Unavailable, match="draining"):
            await tokens(worker, request(1))
        with pytest.raises(Unavailable):
            worker.card()
        with pytest.raises(Unavailable):
            await worker.produce([request(2)], Ticket("h", "produce"))
        rest = [token.id async for output in outputs for token in output.tokens]
        assert [first.tokens[0].id, *rest] == generate(model, PROMPT, 40)
    async with asyncio.timeout(10):
        await leaving


async def test_whoever_consumes_its_blocks_gets_them_before_it_leaves(worker: Worker) -> None:
    assert worker.producer
    await worker.produce([request(0)], Ticket("h", "produce"))
    assert worker.producer.open == 1
    worker.drain(60)
    leaving = asyncio.create_task(worker.drained())
    fingerprint = worker.info().fingerprint
    attach = Attach("h/0", 0, fingerprint, 0, prompt_key(fingerprint, "", PROMPT))
    async with aclosing(worker.producer.attach(attach, "127.0.0.1")) as events:
        kinds = [type(await anext(events)).__name__ for _ in range(3)]
        assert kinds == ["Opened", "Sampled", "Published"]
        assert not leaving.done()
    # It has everything, and hangs up.
    async with asyncio.timeout(10):
        await leaving


async def test_it_leaves_in_time_whatever_goes_on(worker: Worker) -> None:
    async with aclosing(worker.generate(request(0, 40), None)) as outputs:
        await anext(outputs)
        worker.drain(0)
        async with asyncio.timeout(10):
            await worker.drained()
        worker.drain(0)  # once more


async def test_without_room_a_consumer_is_refused_at_once_if_it_need_not_wait(worker: Worker, model: Path) -> None:
    impatient = Ticket("h", "consume", peer=NOBODY, waits=False)
    async with aclosing(worker.generate(request(0, 40), None)) as outputs:
        await anext(outputs)  # it holds 3 of 6 slots
        async with aclosing(worker.generate(request(1, 40), None)) as others:
            await anext(others)  # shares two of them
            salted = msgspec.structs.replace(request(2), salt="another tenant")
            with pytest.raises(NoRoom) as refused:
                await tokens(worker, salted, impatient)
            assert (refused.value.status, refused.value.code) == (429, "no_room")
            later = msgspec.structs.replace(request(3, prompt_index=1), salt="another tenant")
            patient = msgspec.structs.replace(impatient, waits=True)
            waiting = [
                asyncio.create_task(tokens(worker, later, impatient)),  # of a batch: its first prompt decides
                asyncio.create_task(tokens(worker, msgspec.structs.replace(salted, id="r4/0/0"), patient)),
            ]
            await until(lambda: worker.info().waiting == 2)
    for task in waiting:
        assert await task == generate(model, PROMPT, 8)
    assert await tokens(worker, request(5), impatient) == generate(model, PROMPT, 8)  # there is room again
