"""Two ends agree on a link, or the hand-over fails and the consumer computes: real engines and sockets."""

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path

import msgspec
import pytest
import torch

from tests.engine.rig import Rig, ids, request, running
from tests.links.faults import Faults, proxy
from tests.tiny import generate
from twostroke.api.lifecycle import Lifecycle
from twostroke.config import LinkChoice, WorkerConfig
from twostroke.engine.engine import Admitted
from twostroke.engine.runner import Launched
from twostroke.engine.scheduler import Chunk
from twostroke.errors import HandoverFailed, StartupError
from twostroke.links import nixl, tcp
from twostroke.links.frames import Read
from twostroke.links.link import Failures, Link
from twostroke.links.nixl import NixlLink, NixlServer, signed
from twostroke.links.shm import SharedMemoryLink
from twostroke.links.staging import Staging, staging
from twostroke.links.tcp import TcpLink, TcpServer
from twostroke.links.wire import Wire
from twostroke.messages import Attach, Confirm, Event, NixlMemory, Opened, Output, PoolAddress, TcpEndpoint
from twostroke.worker.consumer import Peer, Pull
from twostroke.worker.loading import load
from twostroke.worker.producer import Producer
from twostroke.worker.worker import _warm_up

PROMPT, COUNT = list(range(10, 50)), 6  # 2 blocks and a half
FARAWAY = "another machine"
NIXL = pytest.mark.skipif(not nixl.installed(), reason="NIXL is not installed")
SLOWEST = float(32 << 20)  # bytes a second


class Direct(Peer):
    """A producer in this process: no HTTP in between."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer

    async def attach(self, message: Attach) -> AsyncIterator[Event]:  # type: ignore[override]
        async with aclosing(self._producer.attach(message, "127.0.0.1")) as events:
            async for event in events:
                yield event

    async def confirm(self, message: Confirm) -> bool:
        return self._producer.confirm(message).alive


class Ends:
    """A producer and a consumer, each with the links that it was given."""

    def __init__(self, p: Rig, d: Rig, pools: tuple[PoolAddress, ...], links: Sequence[Link]) -> None:
        self.p, self.d, self.links = p, d, links
        self.producer = Producer(
            p.engine, pools, lease_seconds=60, attach_timeout=60, queue_timeout=60, heartbeat=60, progress_timeout=60
        )
        self.lifecycle = Lifecycle("d")
        self.failures = Failures()

    async def tokens(self, prompt: list[int] = PROMPT) -> list[int]:
        """What a client gets whose prompt is handed over."""
        one = request(prompt, COUNT)
        self.id, handover = one.http_id, f"{one.http_id}/0"

        async def produce() -> None:
            first = msgspec.structs.replace(one.sampling, max_tokens=1)  # as a worker does
            prefill = msgspec.structs.replace(one, sampling=first)
            async with aclosing(self.producer.produce(prefill, handover, 0)) as updates:
                async for _ in updates:
                    pass

        job = self.d.engine.submit(one, loads=True)
        producing = asyncio.create_task(produce())
        updates = job.updates()
        admitted = await anext(updates)
        assert isinstance(admitted, Admitted)
        pull = Pull(
            job,
            admitted,
            handover,
            0,
            engine=self.d.engine,
            links=self.links,
            peer=Direct(self.producer),
            patience=60,
            lifecycle=self.lifecycle,
            failures=self.failures,
        )
        pulling = asyncio.create_task(pull.run())
        async with asyncio.timeout(20):
            outputs = [update async for update in updates if isinstance(update, Output)]
            await pulling
        self.d.engine.abort(job)
        await asyncio.gather(producing, return_exceptions=True)
        self.producer.close()
        return ids(outputs)

    def detail(self, event: str) -> dict[str, str | int | float]:
        """Of a stamp; empty if there is none."""
        return next((one.detail for one in self.lifecycle.timeline(self.id) if one.event == event), {})


@contextmanager
def ends(p: Rig, d: Rig, offers: str, reads: str, *, host: str | None = None, secret: str = "s") -> Iterator[Ends]:
    """``offers`` and ``reads``: names of links. ``host``: where the producer is, if not here."""
    mapped = p.memory.address
    slots = torch.from_numpy(p.memory.slots)
    server = TcpServer(socket.create_server(("127.0.0.1", 0)), mapped, staging(slots), "s")
    registered = NixlServer(slots, mapped, "s") if "nixl" in offers else None
    pools = {"shm": mapped, "tcp": server.address, "nixl": registered.address if registered else mapped}
    own = torch.from_numpy(d.memory.slots)
    links: dict[str, Link] = {
        "shm": SharedMemoryLink(d.memory.slots),
        "tcp": TcpLink(d.memory.address, staging(own), secret, slowest=lambda: SLOWEST),
    }
    if "nixl" in reads:
        links["nixl"] = NixlLink(own, secret, slowest=lambda: 0.0)
    offered = [msgspec.structs.replace(pools[name], host=host or mapped.host) for name in offers.split()]
    offered = [signed(pool, "s") if isinstance(pool.memory, NixlMemory) else pool for pool in offered]
    both = Ends(p, d, tuple(offered), [links[name] for name in reads.split()])
    server.start(both.producer.exported)
    yield both
    for link in links.values():
        link.close()
    server.close()
    if registered:
        registered.close()


@pytest.fixture
async def rigs(tiny_model: Callable[[str], Path]) -> AsyncIterator[tuple[Path, Rig, Rig]]:
    directory = tiny_model("Qwen3ForCausalLM")
    async with running(directory) as p, running(directory) as d:
        yield directory, p, d


Rigs = tuple[Path, Rig, Rig]


@pytest.mark.parametrize(
    ("offers", "reads", "host", "link"),
    [
        ("shm tcp", "shm tcp", None, "shm"),
        ("shm tcp", "shm tcp", FARAWAY, "tcp"),
        ("tcp", "shm tcp", None, "tcp"),
        ("shm tcp", "tcp", None, "tcp"),
        ("tcp", "tcp", FARAWAY, "tcp"),
        pytest.param("shm nixl tcp", "shm nixl tcp", None, "shm", marks=NIXL),
        pytest.param("shm nixl tcp", "shm nixl tcp", FARAWAY, "nixl", marks=NIXL),  # as NIXL sees it, it is not far
        pytest.param("nixl", "nixl", None, "nixl", marks=NIXL),
        pytest.param("nixl tcp", "tcp", None, "tcp", marks=NIXL),
    ],
)
async def test_the_best_link_that_both_have(rigs: Rigs, offers: str, reads: str, host: str | None, link: str) -> None:
    directory, p, d = rigs
    with ends(p, d, offers, reads, host=host) as both:
        assert await both.tokens() == generate(directory, PROMPT, COUNT)
        assert both.detail("attached") == {"link": link}
        assert both.detail("kv_complete")["blocks"] == 3
        assert not both.detail("fallback")


@pytest.mark.parametrize(("offers", "reads", "host"), [("shm", "tcp", None), ("tcp", "shm", None), ("shm", "shm", "x")])
async def test_nothing_in_common(rigs: Rigs, offers: str, reads: str, host: str | None) -> None:
    directory, p, d = rigs
    with ends(p, d, offers, reads, host=host) as both:
        assert await both.tokens() == generate(directory, PROMPT, COUNT)
        reason = str(both.detail("fallback")["reason"])
        assert f"offers {offers}; the consumer reads over {reads}" in reason
        assert ("on another machine" in reason) == bool(host)


async def test_another_secret(rigs: Rigs) -> None:
    directory, p, d = rigs
    with ends(p, d, "tcp", "tcp", secret="x") as both:
        assert await both.tokens() == generate(directory, PROMPT, COUNT)
        assert "secret" in str(both.detail("fallback")["reason"])


@pytest.mark.parametrize(
    "down", [Faults(cut=9000), Faults(stall=9000), Faults(rate=4000)], ids=["cut", "stall", "slow"]
)
async def test_a_link_that_fails_in_the_middle(rigs: Rigs, down: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    """The consumer computes what it did not get, and nothing stays held."""
    directory, p, d = rigs
    monkeypatch.setattr(tcp, "PATIENCE", 0.3)
    with ends(p, d, "tcp", "tcp") as both:
        endpoint = both.producer._pools[0].memory
        assert isinstance(endpoint, TcpEndpoint)
        with proxy((endpoint.host, endpoint.port), down=down) as network:
            pool = msgspec.structs.replace(both.producer._pools[0], memory=TcpEndpoint("127.0.0.1", network.port))
            both.producer._pools = (pool,)
            assert await both.tokens() == generate(directory, PROMPT, COUNT)
            assert both.detail("fallback")


async def test_the_next_link_when_memory_cannot_be_mapped(rigs: Rigs) -> None:
    """As in a container whose processes are not ours to see: what the address names is there, and is not the pool."""
    directory, p, d = rigs
    with ends(p, d, "shm tcp", "shm tcp") as both:
        nothing = os.open("/dev/null", os.O_RDONLY)
        os.dup2(nothing, p.memory._fd)
        os.close(nothing)
        assert await both.tokens() == generate(directory, PROMPT, COUNT)
        assert both.detail("attached") == {"link": "shm"}
        failed = both.detail("link_failed")
        assert (failed["link"], failed["following"]) == ("shm", "tcp")
        assert "cannot be mapped" in str(failed["reason"])
        assert (both.detail("kv_complete")["blocks"], both.detail("kv_complete")["link"]) == (3, "tcp")
        assert not both.detail("fallback")

        assert await both.tokens(PROMPT[::-1]) == generate(directory, PROMPT[::-1], COUNT)
        assert both.detail("attached") == {"link": "tcp"}, "what failed lately is not tried first"
        assert not both.detail("link_failed")


@NIXL
async def test_the_next_link_where_nixl_cannot_read(rigs: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between machines without RDMA, say."""
    directory, p, d = rigs
    monkeypatch.setenv("UCX_TLS", "tcp")
    with ends(p, d, "nixl tcp", "nixl tcp", host=FARAWAY) as both:
        assert await both.tokens() == generate(directory, PROMPT, COUNT)
        assert both.detail("link_failed")["link"] == "nixl"
        assert both.detail("kv_complete")["link"] == "tcp"


async def test_the_next_link_in_the_middle(rigs: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was verified before counts, and only the rest is read again."""
    directory, p, d = rigs
    with ends(p, d, "shm tcp", "shm tcp") as both:
        prompt = list(range(100, 260))  # 10 blocks, published in chunks
        read, reads = SharedMemoryLink.read, 0
        begun, launch = threading.Event(), p.engine.model.launch

        def paced(chunks: Sequence[Chunk]) -> Launched:
            if any(chunk.start for chunk in chunks):  # or P may be done before anything is read
                begun.wait(10)
            return launch(chunks)

        async def once(self: SharedMemoryLink, *arguments: object) -> None:
            nonlocal reads
            reads += 1
            begun.set()
            if reads > 1:
                raise HandoverFailed("out of reach")
            await read(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(p.engine.model, "launch", paced)
        monkeypatch.setattr(SharedMemoryLink, "read", once)
        asked: list[int] = []
        answer = TcpServer._answer

        def note(self: TcpServer, wire: Wire, staging: Staging, request: Read) -> None:
            asked.extend(request.slots)
            answer(self, wire, staging, request)

        monkeypatch.setattr(TcpServer, "_answer", note)
        assert await both.tokens(prompt) == generate(directory, prompt, COUNT)
        assert both.detail("link_failed")["following"] == "tcp"
        assert 0 < len(asked) == len(set(asked)) < 10
        assert both.detail("kv_complete")["blocks"] == 10


async def test_when_no_link_works_the_consumer_computes(rigs: Rigs) -> None:
    directory, p, d = rigs
    with ends(p, d, "shm tcp", "shm tcp", secret="x") as both:
        nothing = os.open("/dev/null", os.O_RDONLY)
        os.dup2(nothing, p.memory._fd)
        os.close(nothing)
        assert await both.tokens() == generate(directory, PROMPT, COUNT)
        assert both.detail("link_failed")["link"] == "shm"
        assert "secret" in str(both.detail("fallback")["reason"])


async def test_whoever_listens_everywhere_is_found_where_it_was_reached(rigs: Rigs) -> None:
    _, p, _ = rigs
    everywhere = msgspec.structs.replace(p.memory.address, memory=TcpEndpoint("0.0.0.0", 7))
    pools = (p.memory.address, everywhere)
    producer = Producer(
        p.engine, pools, lease_seconds=60, attach_timeout=60, queue_timeout=60, heartbeat=60, progress_timeout=60
    )
    events = producer.attach(Attach("h/0", 0, p.model.layout.fingerprint, 0, "a prompt"), "10.1.2.3")
    opened = await anext(events)
    assert isinstance(opened, Opened)
    assert [pool.memory for pool in opened.pools] == [p.memory.address.memory, TcpEndpoint("10.1.2.3", 7)]
    await events.aclose()


async def test_only_what_a_hand_over_exports_now(rigs: Rigs) -> None:
    _, p, _ = rigs
    pools = (p.memory.address,)
    producer = Producer(
        p.engine, pools, lease_seconds=60, attach_timeout=60, queue_timeout=60, heartbeat=60, progress_timeout=60
    )
    async with aclosing(producer.produce(request(PROMPT, 1), "h/0", 2)) as updates:
        async for _ in updates:
            lease = producer.exported("h/0", 2)
            assert lease is not None
            assert lease.alive
            assert producer.exported("h/0", 1) is None
            assert producer.exported("h/1", 2) is None
    assert lease is not None
    assert len(lease.slots) == 3
    producer.close()
    assert producer.exported("h/0", 2) is None
    assert not lease.alive


@pytest.mark.parametrize(
    ("link", "rdma", "offers"),
    [
        ("auto", False, ["shm", "tcp"]),
        pytest.param("auto", True, ["shm", "nixl", "tcp"], marks=NIXL),
        ("shm", False, ["shm"]),
        pytest.param("nixl", False, ["nixl"], marks=NIXL),
        ("tcp", True, ["tcp"]),
        ("cuda-ipc", False, None),
    ],
)
def test_what_a_worker_offers(
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    link: LinkChoice,
    rdma: bool,
    offers: list[str] | None,
) -> None:
    monkeypatch.setattr(nixl, "has_rdma", lambda: rdma)
    config = WorkerConfig(model=str(tiny_model("LlamaForCausalLM")), link=link)
    engine = msgspec.structs.replace(config.engine, device="cpu", kv_memory=1 << 20, threads=1)
    config = msgspec.structs.replace(config, engine=engine)
    if offers is None:
        with pytest.raises(StartupError, match="--link cuda-ipc does not go with device cpu"):
            load(config, "i", "s", lambda _: None)
        return
    loaded = load(config, "i", "s", lambda _: None)
    assert [pool.memory.link for pool in loaded.offers] == [one.name for one in loaded.links] == offers
    loaded.close()


async def test_a_link_must_be_faster_than_computing(tiny_model: Callable[[str], Path]) -> None:
    """Once a worker has warmed up, it knows how fast that is."""
    config = WorkerConfig(model=str(tiny_model("LlamaForCausalLM")), link="tcp")
    engine = msgspec.structs.replace(config.engine, device="cpu", kv_memory=1 << 20, threads=1)
    loaded = load(msgspec.structs.replace(config, engine=engine), "i", "s", lambda _: None)
    (link,) = loaded.links
    assert isinstance(link, TcpLink)
    assert link._slowest() == 1 << 20
    died = asyncio.Event()
    loaded.engine.start(asyncio.get_running_loop(), died.set)
    await _warm_up(loaded)
    await asyncio.to_thread(loaded.engine.stop)
    assert loaded.engine.speed > 0
    assert link._slowest() == max(1 << 20, loaded.engine.speed)
    loaded.engine._speed = 1e6  # tokens a second
    assert link._slowest() == 1e6 * loaded.engine.model.layout.token_bytes
    loaded.close()


@NIXL
def test_network_devices_that_nixl_does_not_have(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who names one wants it. Where nobody asked, a worker goes without NIXL."""
    config = WorkerConfig(model=str(tiny_model("LlamaForCausalLM")), link_devices=("mlx5_99",))
    engine = msgspec.structs.replace(config.engine, device="cpu", kv_memory=1 << 20, threads=1)
    config = msgspec.structs.replace(config, engine=engine)
    with pytest.raises(StartupError, match="mlx5_99"):
        load(config, "i", "s", lambda _: None)
    monkeypatch.setattr(nixl, "has_rdma", lambda: True)
    monkeypatch.setenv("UCX_NET_DEVICES", "mlx5_99")
    loaded = load(msgspec.structs.replace(config, link_devices=()), "i", "s", lambda _: None)
    assert [pool.memory.link for pool in loaded.offers] == ["shm", "tcp"]
    assert "going without NIXL" in caplog.text
    loaded.close()
