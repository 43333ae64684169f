"""The cache service: real processes and sockets, and what goes wrong with them."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from tests.engine.rig import until
from tests.links.faults import Faults, proxy
from tests.store.blocks import BYTES, FINGERPRINT, OTHER, Given, Taken, keys
from twostroke import cli
from twostroke.config import DiskTier, StoreConfig
from twostroke.errors import HandoverFailed, StartupError
from twostroke.kv import memory
from twostroke.kv.memory import Bytes
from twostroke.links.framing import HEADER
from twostroke.messages import PoolAddress
from twostroke.store import process as process_module
from twostroke.store import server as server_module
from twostroke.store import service
from twostroke.store.format import Sealed
from twostroke.store.frames import FRAMING, MAX_MESSAGE, VERSION, Borrow, Done, Lent, Mask, Returned, split
from twostroke.store.host import HostTier
from twostroke.store.process import tiers
from twostroke.store.server import Server
from twostroke.store.service import ServiceTier, Session
from twostroke.store.tier import TierFailed

MiB = 1 << 20
MANY = keys(*range(40))


@asynccontextmanager
async def serving(config: StoreConfig, secret: str = "s") -> AsyncIterator[tuple[Server, int]]:
    """A service in this process, and its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = Server(listening, tiers(config), secret, ttl=config.ttl, layouts=config.layouts)
    server.start()
    yield server, listening.getsockname()[1]
    await server.close()


@asynccontextmanager
async def client(
    port: int, fingerprint: str = FINGERPRINT, secret: str = "s", gpu: "Gpu | None" = None
) -> AsyncIterator[ServiceTier]:
    register, prepare = (gpu.register, gpu.prepare) if gpu else (None, None)
    tier = ServiceTier("127.0.0.1", port, BYTES, fingerprint, secret, register=register, prepare=prepare)
    yield tier
    await tier.close()


@contextmanager
def process(path: Path, port: int, memory: str = "64KiB", disk: str = "2MiB") -> Iterator["subprocess.Popen[bytes]"]:
    """``twostroke store`` with a disk."""
    command = [sys.executable, "-m", "twostroke", "store", "--memory", memory, "--disk", f"{path}:{disk}"]
    with subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE) as popen:
        try:
            assert popen.stderr is not None
            first = popen.stderr.readline()
            assert b"serving on" in first, first
            yield popen
        finally:
            popen.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


MEMORY = StoreConfig(memory=MiB)


async def test_what_one_worker_writes_others_read() -> None:
    async with serving(MEMORY) as (_, port), client(port) as one, client(port) as other:
        await one.open()
        assert await one.put(MANY, Given(MANY)) == len(MANY)
        target = Taken()
        assert await other.get(MANY, target) == len(MANY)
        assert target.right(MANY)
        assert other.mapped == len(MANY), "out of the service's memory"
        assert await other.put(MANY, Given(MANY)) == len(MANY)
        assert other.usage().blocks == len(MANY)


class Gpu:
    """What a GPU would be told."""

    def __init__(self) -> None:
        self.registered: list[int] = []  # sizes of what is registered now
        self.threads: set[int] = set()  # that were prepared

    def register(self, memory: Bytes) -> Callable[[], None]:
        size = memory.nbytes
        self.registered.append(size)
        return lambda: self.registered.remove(size)

    def prepare(self) -> None:
        self.threads.add(threading.get_ident())


@pytest.mark.parametrize("size", [service._OUTBOX_BYTES, 3 * BYTES], ids=["one offer", "several"])
async def test_a_gpu_moves_blocks_by_memory_that_is_registered_with_it(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pool the service cannot map: blocks go through an outbox, which it can; many times round."""
    monkeypatch.setattr(service, "_OUTBOX_BYTES", size)
    gpu, pools = Gpu(), MiB // BYTES
    async with serving(MEMORY) as (_, port):
        async with client(port, gpu=gpu) as tier:
            await tier.open()
            assert gpu.registered == [pools * BYTES], "the service's memory, before anybody waits for it"
            assert len(gpu.threads) == service._THREADS
            for turn in range(5):
                some = keys(*range(40 * turn, 40 * turn + 40))
                assert await tier.put(some, Given(some)) == len(some)
                target = Taken()
                assert await tier.get(some, target) == len(some)
                assert target.right(some)
            assert tier.offered == tier.mapped == 200
            assert len(gpu.registered) == 3, "and two outboxes"
        await until(lambda: not gpu.registered)


async def test_a_gpu_and_a_service_on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "host_id", lambda: "elsewhere")
    gpu = Gpu()
    async with serving(MEMORY) as (_, port), client(port, gpu=gpu) as tier:
        await tier.open()
        assert await tier.put(MANY, Given(MANY)) == len(MANY)
        target = Taken()
        assert await tier.get(MANY, target) == len(MANY)
        assert target.right(MANY)
        assert tier.offered == tier.mapped == 0
        assert not gpu.registered, "there is no outbox that nobody would look into"


async def test_what_comes_one_after_the_other_has_one_connection() -> None:
    async with serving(MEMORY) as (server, port), client(port) as tier:
        for _ in range(8):
            await tier.put(MANY[:3], Given(MANY[:3]))
            assert await tier.get(MANY[:3], Taken()) == 3
        (wire,) = server._listener.threads
        wire.abort()
        await until(lambda: not server._listener.threads)
        assert all(await tier.contains(MANY[:3]))
        assert len(tier._sessions) == 1, "the one that was hung up on is gone"


async def test_over_the_connection_from_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "host_id", lambda: "elsewhere")
    async with serving(MEMORY) as (_, port), client(port) as tier:
        await tier.put(MANY, Given(MANY))
        for _ in range(2):
            target = Taken()
            assert await tier.get(MANY, target) == len(MANY)
            assert target.right(MANY)
        assert tier.mapped == 0


async def test_memory_that_cannot_be_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by another user's process."""

    def refuse(_: PoolAddress) -> Bytes:
        raise HandoverFailed("no")

    monkeypatch.setattr(service, "map_peer", refuse)
    async with serving(MEMORY) as (server, port), client(port) as tier:
        await tier.put(MANY, Given(MANY))
        target = Taken()
        assert await tier.get(MANY, target) == len(MANY)
        assert target.right(MANY)
        assert tier.mapped == 0
        (shop,) = [task.result() for task in server._shops.values()]
        await until(lambda: not shop._tiers[0]._shelf._pins)


async def test_a_reader_that_dawdles_has_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it read may have been evicted by then: the loan is over, and it is told."""

    class Slow(Taken):
        def place(self, index: int, block: Sealed) -> bool:
            time.sleep(0.1)
            return super().place(index, block)

    async with serving(MEMORY) as (server, port), client(port) as tier:
        await tier.put(MANY, Given(MANY))
        monkeypatch.setattr("twostroke.store.server.PATIENCE", 0.2)
        with pytest.raises(TierFailed):
            await tier.get(MANY[:7], Slow())
        (shop,) = [task.result() for task in server._shops.values()]
        await until(lambda: not shop._tiers[0]._shelf._pins)


async def test_a_flipped_bit_in_the_services_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(MEMORY) as (server, port), client(port) as tier:
        await tier.put(MANY, Given(MANY))
        (shop,) = [task.result() for task in server._shops.values()]
        first = shop._tiers[0]
        assert isinstance(first, HostTier)
        first.arena.slots[first._shelf._slot[MANY[5]], 7] ^= 1
        target = Taken()
        assert await tier.get(MANY, target) == 5
        assert target.right(MANY)
        assert tier.usage().damaged == 1
        assert not (await tier.contains(MANY))[5], "the service has looked for itself, and given it up"
        assert await tier.put(MANY, Given(MANY)) == len(MANY)
        assert await tier.get(MANY, Taken()) == len(MANY)


async def test_blocks_sink_to_the_services_disk_and_rise_again(tmp_path: Path) -> None:
    config = StoreConfig(memory=10 * BYTES, disk=DiskTier(tmp_path, MiB))
    async with serving(config) as (server, port), client(port) as tier:
        for first in range(0, 40, 8):
            some = MANY[first : first + 8]
            assert await tier.put(some, Given(some)) == 8
            (shop,) = [task.result() for task in server._shops.values()]
            await shop.store.settle()
        target = Taken()
        assert await tier.get(MANY, target) == len(MANY)
        assert target.right(MANY)
        assert shop.store.reports()[1].hits > 0


async def test_another_secret_is_refused_and_so_is_one_layout_too_many() -> None:
    async with serving(MEMORY) as (_, port):
        async with client(port, secret="wrong") as stranger:
            with pytest.raises(TierFailed, match="secret"):
                await stranger.open()
        async with client(port) as one, client(port, OTHER) as other:
            await one.open()
            with pytest.raises(TierFailed, match="1 layouts"):
                await other.open()


async def test_a_layout_that_does_not_fit_is_refused_with_the_reason() -> None:
    async with serving(StoreConfig(memory=BYTES - 1)) as (_, port), client(port) as tier:
        with pytest.raises(TierFailed, match="does not hold one block"):
            await tier.open()


async def test_the_first_client_does_not_wait_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking it lasts longer than anybody's patience if there is much: it was taken before anybody could ask."""

    def populate(_: object, advice: int) -> None:
        assert advice == memory._POPULATE_READ, "nothing is taken any more"

    async with serving(StoreConfig(memory=2 * MiB, layouts=2)) as (_, port):
        monkeypatch.setattr(memory, "_populate", populate)
        async with client(port) as one, client(port, OTHER) as other:
            for tier in (one, other):
                await tier.open()
                assert await tier.put(MANY, Given(MANY)) == len(MANY)
                assert await tier.get(MANY, Taken()) == len(MANY)


def test_nobody_can_connect_before_there_is_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()

    def look(_: StoreConfig) -> None:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
        raise StartupError("nobody listens yet")

    monkeypatch.setattr(process_module, "tiers", look)
    assert cli.run(["store", "--memory", "1MiB", "--port", str(port)]) == 2
    assert "nobody listens yet" in capsys.readouterr().err


async def test_blocks_have_a_lifetime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the monotonic clock: that somebody moves the other by a day means nothing."""
    async with serving(StoreConfig(memory=MiB, ttl=0.4)) as (server, port), client(port) as tier:
        assert await tier.put(MANY, Given(MANY)) == len(MANY)
        monkeypatch.setattr(time, "time", lambda: 1e9)
        assert all(await tier.contains(MANY))
        (shop,) = [task.result() for task in server._shops.values()]
        await until(lambda: shop.store.reports()[0].blocks == 0)
        assert not any(await tier.contains(MANY))
        assert await tier.get(MANY, Taken()) == 0
        assert await tier.put(MANY[:3], Given(MANY[:3])) == 3
        assert await tier.get(MANY, Taken()) == 3


async def test_a_lifetime_that_ends_while_a_block_is_read() -> None:
    async with serving(StoreConfig(memory=MiB, ttl=3600)) as (server, port), client(port) as tier:
        await tier.put(MANY, Given(MANY))
        (shop,) = [task.result() for task in server._shops.values()]
        target = Taken()
        reading = asyncio.create_task(tier.get(MANY, target))
        await asyncio.sleep(0.001)
        shop._ttl = 0.0
        await shop.expire()
        await reading
        assert target.right(MANY)
        assert shop.store.reports()[0].blocks == 0


def test_killed_and_started_again_it_has_what_was_on_its_disk(tmp_path: Path) -> None:
    """Killed in the middle of writing; what did get onto the disk is right."""
    port, more = free_port(), keys(*range(100, 300))

    async def write(popen: "subprocess.Popen[bytes]") -> None:
        async with client(port, secret="") as tier:
            assert await tier.put(MANY, Given(MANY)) == len(MANY)
            async with asyncio.timeout(20):
                while not tier._reports or tier._reports[-1].blocks < len(MANY):
                    await tier.open()
            asyncio.get_running_loop().call_later(0.05, popen.kill)
            with pytest.raises(TierFailed):
                await write_on(tier)

    async def write_on(tier: ServiceTier) -> None:
        for first in range(10**9):
            some = more[7 * first % 180 :][:20]
            await tier.put(some, Given(some))

    async def read(popen: "subprocess.Popen[bytes]") -> None:
        async with client(port, secret="") as tier:
            target = Taken()
            assert await tier.get(MANY, target) == len(MANY)
            assert target.right(MANY)
            here = [one for one, there in zip(more, await tier.contains(more), strict=True) if there]
            target = Taken()
            await tier.get(here, target)
            assert target.right(here)
            assert await tier.put(more[:20], Given(more[:20])) == 20
            popen.kill()
            popen.wait()
            with pytest.raises(TierFailed):
                await tier.get(MANY, Taken())

    with process(tmp_path, port) as popen:
        asyncio.run(write(popen))
    with process(tmp_path, port) as popen:
        asyncio.run(read(popen))


async def test_two_that_write_the_same_blocks_at_once() -> None:
    """They are there once, and right."""
    async with serving(MEMORY) as (_, port), client(port) as one, client(port) as other:
        await asyncio.gather(*(tier.put(MANY, Given(MANY)) for tier in (one, other) for _ in range(3)))
        target = Taken()
        assert await other.get(MANY, target) == len(MANY)
        assert target.right(MANY)
        await one.open()
        assert one.usage().blocks == len(MANY)


def test_one_that_is_stopped_is_given_up_and_works_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "PATIENCE", 0.3)
    port = free_port()

    async def use(popen: "subprocess.Popen[bytes]") -> None:
        async with client(port, secret="") as tier:
            await tier.put(MANY, Given(MANY))
            popen.send_signal(signal.SIGSTOP)
            with pytest.raises(TierFailed):
                await tier.get(MANY, Taken())
            with pytest.raises(TierFailed):
                await tier.open()
            popen.send_signal(signal.SIGCONT)
            target = Taken()
            assert await tier.get(MANY, target) == len(MANY)
            assert target.right(MANY)

    with process(tmp_path, port) as popen:
        asyncio.run(use(popen))


@pytest.mark.parametrize("faults", [Faults(cut=5000), Faults(stall=5000)], ids=["cut", "stall"])
async def test_a_network_that_fails_in_the_middle(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "PATIENCE", 0.3)
    monkeypatch.setattr(service, "host_id", lambda: "elsewhere")
    async with serving(MEMORY) as (server, port):
        async with client(port) as tier:
            await tier.put(MANY, Given(MANY))
        with proxy(("127.0.0.1", port), down=faults) as network:
            async with client(network.port) as tier:
                target = Taken()
                with pytest.raises(TierFailed):
                    await tier.get(MANY, target)
                assert target.right(MANY)
        with proxy(("127.0.0.1", port), up=faults) as network:
            async with client(network.port) as tier:
                with pytest.raises(TierFailed):
                    await tier.put(keys(*range(100, 140)), Given(keys(*range(100, 140))))
        async with client(port) as tier:
            target = Taken()
            await tier.get(MANY, target)
            assert target.right(MANY)
            assert await tier.get(keys(*range(100, 140)), Taken()) < 40
        await until(lambda: not server._listener.threads)


async def test_bits_that_flip_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives damaged is not used, and not stored; it can be had the next time."""
    monkeypatch.setattr(service, "host_id", lambda: "elsewhere")
    some = MANY[:7]
    async with serving(MEMORY) as (_, port):
        with proxy(("127.0.0.1", port), up=Faults(flip=(3000,))) as network:
            async with client(network.port) as tier:
                assert await tier.put(some, Given(some)) == 6
                assert await tier.put(some, Given(some)) == 7
        with proxy(("127.0.0.1", port), down=Faults(flip=(3000,))) as network:
            async with client(network.port) as tier:
                target = Taken()
                assert await tier.get(some, target) < 7
                assert len(target.blocks) == 6
                assert target.right(some)
                assert tier.usage().damaged == 1
                assert await tier.get(some, Taken()) == 7


async def test_more_blocks_than_are_received_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are stored while others come, of which one is damaged on the way."""
    monkeypatch.setattr(service, "host_id", lambda: "elsewhere")
    monkeypatch.setattr("twostroke.store.server.INBOX_BYTES", 3 * BYTES)
    async with serving(MEMORY) as (_, port):
        with proxy(("127.0.0.1", port), up=Faults(flip=(12_345,))) as network:
            async with client(network.port) as tier:
                assert await tier.put(MANY, Given(MANY, gone=[7])) == len(MANY) - 2
                missing = [key for key, here in zip(MANY, await tier.contains(MANY), strict=True) if not here]
                assert MANY[7] in missing
                assert await tier.put(MANY, Given(MANY)) == len(MANY)
                target = Taken()
                assert await tier.get(MANY, target) == len(MANY)
                assert target.right(MANY)


async def test_only_what_was_lent_can_come_back() -> None:
    async with serving(MEMORY) as (server, port), client(port) as tier:
        await tier.put(MANY, Given(MANY))

        def lie(session: Session) -> None:
            assert len(session.ask(Borrow(b"".join(MANY[:3]), None), Lent).slots) == 3
            for _ in range(3):
                session.payload()
            session.ask(Returned([3]), Done)

        with pytest.raises(TierFailed, match="other blocks"):
            await tier._run(lie)
        (shop,) = [task.result() for task in server._shops.values()]
        await until(lambda: not shop._tiers[0]._shelf._pins)
        assert all(await tier.contains(MANY))


async def test_a_client_that_vanishes_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with serving(MEMORY) as (server, port):
        for _ in range(5):
            tier = ServiceTier("127.0.0.1", port, BYTES, FINGERPRINT, "s")
            await tier.put(MANY, Given(MANY))
            await tier.close()
        await until(lambda: not server._listener.threads)
        assert len(os.listdir("/proc/self/fd")) <= before + 4
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_noise_is_refused() -> None:
    rng = random.Random(1)
    async with serving(MEMORY) as (server, port):

        def shout(noise: bytes) -> None:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
                try:
                    raw.sendall(noise)
                    raw.shutdown(socket.SHUT_WR)
                    while raw.recv(4096):
                        pass
                except ConnectionError:
                    pass

        for size in (1, 12, 13, 100, 5000):
            await asyncio.to_thread(shout, rng.randbytes(size))
            head = HEADER.pack(b"2sts", VERSION, 1, min(size, MAX_MESSAGE))
            await asyncio.to_thread(shout, head + rng.randbytes(size))
        await until(lambda: not server._listener.threads)
        async with client(port) as tier:
            await tier.open()


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (HEADER.pack(b"nope", VERSION, 1, 0), "does not speak"),
        (HEADER.pack(b"2sts", 9, 1, 0), "version 9"),
        (HEADER.pack(b"2sts", VERSION, 1, MAX_MESSAGE + 1), "not expected"),
        (HEADER.pack(b"2sts", VERSION, 2, 1020), "not expected"),
        (HEADER.pack(b"2sts", VERSION, 7, 0), "not expected"),
    ],
)
def test_frames_that_are_none(header: bytes, words: str) -> None:
    with pytest.raises(TierFailed, match=words):
        FRAMING.parse_header(header)


def test_messages_that_are_none() -> None:
    body = FRAMING.message(Mask(b"\1"))[HEADER.size :]
    assert FRAMING.parse_message(body, Mask) == Mask(b"\1")
    with pytest.raises(TierFailed, match="no message"):
        FRAMING.parse_message(b"\xff\xff", Mask)
    with pytest.raises(TierFailed, match="cut off"):
        split(b"x" * 17)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --memory"),
        (["--memory", "4000GiB", "--port", str(free_port())], "does not fit"),
        (["--memory", "1GiB", "--ttl", "soon"], "not a time"),
        (["--disk", "/path"], "PATH:SIZE"),
        (["--memory", "1GiB", "--layouts", "0"], "at least 1"),
        (["--memory", "1GiB", "--host", "0.0.0.0"], "TWOSTROKE_SECRET"),
    ],
)
def test_services_that_cannot_start(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TWOSTROKE_SECRET", raising=False)
    assert cli.run(["store", *arguments]) == 2
    assert words in capsys.readouterr().err
