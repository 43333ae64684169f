"""The TCP link over real sockets: whatever the network or a stranger does, bytes are right or the read fails."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from tests.links.faults import Faults, Proxy, proxy
from tests.peer_process import CLAIM, content
from twostroke.errors import HandoverFailed
from twostroke.kv.memory import Bytes, PoolMemory, host_id
from twostroke.kv.pool import Lease, Pool
from twostroke.links import link, tcp
from twostroke.links.frames import FRAMING, MAX_MESSAGE, MAX_SLOTS, Challenge, Hello, Read
from twostroke.links.framing import HEADER, Kind, Proof
from twostroke.links.link import Claim, Failures, Link, Way, choose
from twostroke.links.shm import SharedMemoryLink
from twostroke.links.staging import HostStaging
from twostroke.links.tcp import TcpLink, TcpServer
from twostroke.links.wire import Wire
from twostroke.messages import PROTOCOL, CudaMemory, PoolAddress, TcpEndpoint

SLOTS, SECRET = 8, "a secret"


class Pair:
    """A server with a filled pool, every slot of which is exported to ``CLAIM``, and a link that reads it."""

    def __init__(self, block_bytes: int, secret: str, slots: int) -> None:
        self.memory = PoolMemory(slots, block_bytes, "producer")
        self.theirs = content(slots, block_bytes)
        self.memory.slots[:] = self.theirs
        listening = socket.create_server(("127.0.0.1", 0))
        self.server = TcpServer(listening, self.memory.address, self.staging(self.memory.slots), SECRET)
        self.pool = Pool(slots)
        self.lease: Lease | None = self.pool.lease()
        self.lease.grow(slots)
        self.server.start(lambda handover, attempt: self.lease if Claim(handover, attempt) == CLAIM else None)
        self.own: Bytes = np.zeros((slots, block_bytes), np.uint8)
        self.slowest = float(32 << 20)  # bytes a second
        own = PoolAddress(host_id(), os.getpid(), "consumer", slots, block_bytes, TcpEndpoint("127.0.0.1", 1))
        self.link = TcpLink(own, self.staging(self.own), secret, slowest=lambda: self.slowest)
        self.address = self.server.address
        self.all = list(range(slots))

    @staticmethod
    def staging(slots: Bytes) -> Callable[[], HostStaging]:
        return lambda: HostStaging(slots)

    @property
    def target(self) -> tuple[str, int]:
        assert isinstance(self.server.address.memory, TcpEndpoint)
        return self.server.address.memory.host, self.server.address.memory.port

    async def read(self, remote: list[int], local: list[int], *, claim: Claim = CLAIM) -> None:
        await self.link.read(self.address, remote, local, claim)

    def read_all(self) -> None:
        """Every slot into the same slot of ours, in a loop of its own."""
        asyncio.run(self.read(self.all, self.all))

    def through(self, proxy: Proxy) -> None:
        self.address = msgspec.structs.replace(self.server.address, memory=TcpEndpoint("127.0.0.1", proxy.port))

    def close(self) -> None:
        self.link.close()
        self.server.close()
        self.memory.close()


@contextmanager
def pair(block_bytes: int = 3000, secret: str = SECRET, slots: int = SLOTS) -> Iterator[Pair]:
    """Nothing is left of it."""
    files = len(os.listdir("/proc/self/fd"))
    both = Pair(block_bytes, secret, slots)
    try:
        yield both
    finally:
        both.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tcp-")]
    assert len(os.listdir("/proc/self/fd")) <= files + 1  # that of the mapping, which ``both`` holds


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is broken shows sooner."""
    monkeypatch.setattr(tcp, "PATIENCE", 0.3)


# -- what goes well --------------------------------------------------------------------------------------------------


async def test_bytes_arrive_pairwise_and_only_there() -> None:
    with pair() as both:
        await both.read([7, 0, 3, 0], [1, 5, 0, 2])
        expected = np.zeros_like(both.own)
        expected[[1, 5, 0, 2]] = both.theirs[[7, 0, 3, 0]]
        assert (both.own == expected).all()


async def test_one_connection_serves_many_reads() -> None:
    with pair() as both, proxy(both.target) as network:
        both.through(network)
        for slot in both.all:
            await both.read([slot], [slot])
        assert (both.own == both.theirs).all()
        assert network.connections == 1


async def test_many_reads_at_once() -> None:
    with pair() as both:
        await asyncio.gather(*(both.read([slot % SLOTS], [slot % SLOTS]) for slot in range(40)))
        assert (both.own == both.theirs).all()


async def test_more_slots_than_one_request_holds() -> None:
    with pair(64, slots=MAX_SLOTS * 2 + 3) as both:
        await both.read(both.all, both.all[::-1])
        assert (both.own == both.theirs[::-1]).all()


async def test_a_large_read_has_two_connections() -> None:
    with pair(tcp._LEAST_PART // 4) as both, proxy(both.target) as network:
        both.through(network)
        for _ in range(2):
            await both.read(both.all, both.all[::-1])
            assert (both.own == both.theirs[::-1]).all()
            both.own[:] = 0
        assert network.connections == 2


async def test_a_part_that_fails_ends_the_others() -> None:
    """The other half of the slots would come, slowly."""
    with pair(tcp._LEAST_PART // 4) as both, proxy(both.target, down=Faults(rate=1e6)) as network:
        both.through(network)
        both.lease = both.pool.lease()
        both.lease.slots = both.all[:7]
        with pytest.raises(HandoverFailed, match="slot 7 is not exported"):
            await both.read([7, *both.all[:7]], both.all)
        both.own[:] = 7
        await asyncio.sleep(0.1)
        assert (both.own == 7).all()
        assert not both.link._idle


async def test_reading_nothing_asks_nobody() -> None:
    with pair() as both:
        await both.link.read(msgspec.structs.replace(both.address, memory=TcpEndpoint("127.0.0.1", 1)), [], [], CLAIM)


async def test_no_secret_at_all_is_a_secret_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__name__ + ".SECRET", "")
    with pair(secret="") as both:
        await both.read([1], [1])
        assert (both.own[1] == both.theirs[1]).all()


async def test_a_connection_that_the_server_closed_is_made_anew() -> None:
    with pair() as both:
        await both.read([0], [0])
        for wire in list(both.server._listener.threads):
            wire.abort()
        while both.server._listener.threads:  # noqa: ASYNC110 - threads
            await asyncio.sleep(0.005)
        await both.read([1], [1])
        assert (both.own[:2] == both.theirs[:2]).all()


async def test_a_connection_that_the_peer_has_closed_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nothing is read any more: the peer may never come back."""
    monkeypatch.setattr(tcp, "SWEEP_SECONDS", 0.01)
    with pair() as both:
        await both.read([1], [1])
        assert len(both.link._idle) == 1
        both.server.close()
        async with asyncio.timeout(30):
            while both.link._idle:  # noqa: ASYNC110 - the link's own
                await asyncio.sleep(0.01)


async def test_idle_connections_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    with pair() as both, proxy(both.target) as network:
        both.through(network)
        await both.read([0], [0])
        monkeypatch.setattr(tcp, "IDLE_SECONDS", 0.0)
        await both.read([1], [1])
        assert network.connections == 2
        assert len(both.link._idle) == 1


# -- who may read what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", ["", "another", SECRET + " "])
async def test_the_wrong_secret(secret: str) -> None:
    with pair(secret=secret) as both:
        with pytest.raises(HandoverFailed, match="secret"):
            await both.read([0], [0])
        assert not both.own.any()


async def test_the_secret_is_never_sent() -> None:
    with pair() as both, proxy(both.target) as network:
        both.through(network)
        await both.read([0], [0])
        assert SECRET.encode() not in network.seen


async def test_a_server_that_does_not_know_the_secret() -> None:
    """It sends back the client's own proof, which is all it has."""
    with pair() as both, socket.create_server(("127.0.0.1", 0)) as listening:
        address = both.address

        def fake() -> None:
            raw, _ = listening.accept()
            with raw:
                wire, deadline = Wire(raw, FRAMING), time.monotonic() + 5
                wire.say(Challenge(wire.hear(Hello, deadline).nonce, "producer", SLOTS, 3000), 1)
                wire.say(wire.hear(Proof, deadline), 1)

        thread = threading.Thread(target=fake)
        thread.start()
        both.address = msgspec.structs.replace(address, memory=TcpEndpoint(*listening.getsockname()[:2]))
        with pytest.raises(HandoverFailed, match="secret"):
            await both.read([0], [0])
        thread.join()


@pytest.mark.parametrize("claim", [Claim("another", 0), Claim(CLAIM.handover, 1), Claim("x", 2**31 - 1)])
async def test_slots_of_another_hand_over(claim: Claim) -> None:
    with pair() as both:
        with pytest.raises(HandoverFailed, match="refused: slot 2 is not exported to attempt"):
            await both.read([2, 1], [2, 1], claim=claim)
        assert not both.own.any()


async def test_a_slot_that_is_not_exported() -> None:
    with pair() as both:
        both.lease = both.pool.lease()
        both.lease.slots = [1, 3]
        await both.read([3, 1], [0, 1])
        with pytest.raises(HandoverFailed, match="slot 2 is not exported"):
            await both.read([1, 2, 3], [5, 6, 7])
        assert not both.own[6:].any()


async def test_a_lease_that_ends_during_a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pair() as both:
        load = HostStaging.load

        def end(self: HostStaging, slot: int) -> memoryview:
            if slot == 3 and both.lease is not None:
                both.lease.alive = False
            return load(self, slot)

        monkeypatch.setattr(HostStaging, "load", end)
        with pytest.raises(HandoverFailed, match="slot 4 is not exported"):
            await both.read(both.all, both.all)


@pytest.mark.parametrize("change", [{"instance": "stranger"}, {"num_slots": SLOTS + 1}])
async def test_a_pool_that_is_not_what_its_address_says(change: dict[str, str | int]) -> None:
    with pair() as both:
        both.address = msgspec.structs.replace(both.address, **change)
        with pytest.raises(HandoverFailed, match="another instance"):
            await both.read([0], [0])


async def test_what_the_address_rules_out() -> None:
    with pair() as both:
        with pytest.raises(HandoverFailed, match="outside"):
            await both.read([SLOTS], [0])
        both.address = msgspec.structs.replace(both.address, block_bytes=1)
        with pytest.raises(HandoverFailed, match="bytes"):
            await both.read([0], [0])


async def test_another_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = HEADER.pack(b"2stk", PROTOCOL + 1, Kind.MESSAGE, 0)
    with pair() as both:
        with socket.create_connection(both.target) as raw:
            raw.sendall(newer)
            wire = Wire(raw, FRAMING)
            with pytest.raises(HandoverFailed, match=f"refused: the other end speaks version {PROTOCOL + 1}"):
                wire.hear(Challenge, time.monotonic() + 5)
        with pytest.raises(HandoverFailed, match="version"):
            FRAMING.parse_header(newer)


async def test_nobody_listens(hasty: None) -> None:
    with pair() as both:
        for endpoint in (TcpEndpoint("127.0.0.1", 1), TcpEndpoint("::1", 1), TcpEndpoint("no number", 1)):
            both.address = msgspec.structs.replace(both.address, memory=endpoint)
            with pytest.raises(HandoverFailed, match="TCP link to the peer broke"):
                await both.read([0], [0])


# -- what strangers send ---------------------------------------------------------------------------------------------


def talk(both: Pair, data: bytes) -> bytes:
    """Send this to the server, from the start of a connection; all that it says."""
    with socket.create_connection(both.target, timeout=5) as raw:
        raw.sendall(data)
        raw.shutdown(socket.SHUT_WR)
        said = b""
        try:
            while part := raw.recv(1 << 16):
                said += part
        except ConnectionError:
            pass
        return said


def test_garbage_truncated_and_oversized_frames() -> None:
    hello = FRAMING.message(Hello(bytes(32)))
    with pair() as both:
        assert b"does not speak" in talk(both, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"not expected" in talk(both, HEADER.pack(b"2stk", PROTOCOL, Kind.MESSAGE, MAX_MESSAGE + 1))
        assert b"not expected" in talk(both, HEADER.pack(b"2stk", PROTOCOL, Kind.BLOCK, 3024))
        assert b"not expected" in talk(both, HEADER.pack(b"2stk", PROTOCOL, 9, 1))
        assert b"Proof instead of Hello" in talk(both, FRAMING.message(Proof(bytes(32))))
        assert b"Read instead of Proof" in talk(
            both, hello + FRAMING.message(Read(1, CLAIM.handover, CLAIM.attempt, [0]))
        )
        assert b"secret differs" in talk(both, hello + FRAMING.message(Proof(bytes(32))))
        for end in range(len(hello)):
            assert talk(both, hello[:end]) == b""
        both.read_all()
        assert (both.own == both.theirs).all()


def test_what_was_recorded_cannot_be_replayed() -> None:
    with pair() as both:
        with proxy(both.target) as network:
            both.through(network)
            both.read_all()
        said = talk(both, bytes(network.seen))
        assert b"secret differs" in said
        assert not any(bytes(block) in said for block in both.theirs)


def test_a_request_that_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody in between repeats a frame."""

    say = Wire.say

    def repeat(self: Wire, content: Struct, seconds: float) -> None:
        for _ in range(2 if isinstance(content, Read) else 1):
            say(self, content, seconds)

    with pair() as both:
        both.read_all()
        monkeypatch.setattr(Wire, "say", repeat)
        asyncio.run(both.read([0], [0]))
        connection = both.link._idle[0]
        with pytest.raises(HandoverFailed):  # what the server says of it is no answer to the next one
            connection.fetch([(1, 1)], CLAIM, tcp._Transfer(1))


async def test_a_silent_stranger_is_shown_out(hasty: None) -> None:
    with pair() as both, socket.create_connection(both.target, timeout=5) as raw:
        start = time.monotonic()
        assert await asyncio.to_thread(raw.recv, 1) == b""
        assert time.monotonic() - start < 1


async def test_no_more_connections_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twostroke.links.wire.MAX_CONNECTIONS", 2)
    with pair() as both:
        held = [socket.create_connection(both.target, timeout=5) for _ in range(3)]
        assert await asyncio.to_thread(held[2].recv, 1) == b""
        for raw in held:
            raw.close()
        await asyncio.sleep(0.05)
        await both.read([0], [0])


@given(data=st.binary(min_size=HEADER.size, max_size=HEADER.size), block=st.none() | st.integers(0, 2**31))
def test_any_header(data: bytes, block: int | None) -> None:
    try:
        kind, size = FRAMING.parse_header(data, block)
    except HandoverFailed:
        return
    assert size <= MAX_MESSAGE if kind is Kind.MESSAGE else block is not None and size == block + 24


@given(data=st.binary(max_size=200), wanted=st.sampled_from([Hello, Challenge, Proof, Read]))
def test_any_body(data: bytes, wanted: type[Struct]) -> None:
    with pytest.raises(HandoverFailed):
        FRAMING.parse_message(data, wanted)


def test_bodies_that_are_out_of_bounds() -> None:
    wide = {"type": 4, "serial": 1, "handover": "h", "attempt": 0, "slots": [0] * (MAX_SLOTS + 1)}
    bodies: list[object] = [
        wide,
        {**wide, "slots": []},
        {**wide, "slots": [-1]},
        {**wide, "slots": [2**31]},
        {**wide, "slots": [0], "more": 1},
        {**wide, "slots": [0], "handover": ""},
        {"type": 1, "nonce": bytes(31)},
        {"type": 9},
        {"type": 5, "reason": "no"},
        None,
    ]
    for body in bodies:
        with pytest.raises(HandoverFailed):
            FRAMING.parse_message(msgspec.msgpack.encode(body), Read)


@given(data=st.data())
def test_messages_survive_the_wire_and_damage_is_seen_or_harmless(data: st.DataObject) -> None:
    read = Read(data.draw(st.integers(0, 2**31 - 1)), "h/0", 3, data.draw(st.lists(st.integers(0, 99), min_size=1)))
    frame = bytearray(FRAMING.message(read))
    _, size = FRAMING.parse_header(frame[: HEADER.size])
    assert size == len(frame) - HEADER.size
    assert FRAMING.parse_message(frame[HEADER.size :], Read) == read
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        FRAMING.parse_header(frame[: HEADER.size])
        FRAMING.parse_message(frame[HEADER.size :], Read)
    except HandoverFailed:
        pass


def test_a_proof_is_good_for_one_side_of_one_connection() -> None:
    hello, challenge = Hello(bytes(32)), Challenge(bytes(32), "i", 2, 8)
    good = FRAMING.prove("client", "s", hello, challenge)
    FRAMING.check_proof(good, FRAMING.prove("client", "s", hello, challenge))
    other = [
        FRAMING.prove("server", "s", hello, challenge),
        FRAMING.prove("client", "t", hello, challenge),
        FRAMING.prove("client", "s", Hello(b"\1" * 32), challenge),
        FRAMING.prove("client", "s", hello, msgspec.structs.replace(challenge, nonce=b"\1" * 32)),
        FRAMING.prove("client", "s", hello, msgspec.structs.replace(challenge, num_slots=3)),
    ]
    for proof in other:
        with pytest.raises(HandoverFailed):
            FRAMING.check_proof(proof, good)


# -- what the network does -------------------------------------------------------------------------------------------


def traffic() -> tuple[int, int]:
    """Bytes that a small read takes, up and down."""
    with pair(16, slots=3) as both, proxy(both.target) as network:
        both.through(network)
        both.read_all()
        return network.passed[0], network.passed[1]


@pytest.mark.parametrize("direction", ["up", "down"])
def test_cut_at_every_byte(direction: str) -> None:
    count = traffic()[direction == "down"]
    for cut in range(count):
        with pair(16, slots=3) as both, proxy(both.target, **{direction: Faults(cut=cut)}) as network:
            both.through(network)
            start = time.monotonic()
            with pytest.raises(HandoverFailed):
                both.read_all()
            assert time.monotonic() - start < 1, f"cut after {cut} of {count} bytes"


@pytest.mark.parametrize(("direction", "bit"), [("up", 0), ("down", 7)])
def test_a_flipped_bit_at_every_byte(direction: str, bit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either the bytes are right all the same, because the block was fetched again, or the read fails."""
    monkeypatch.setattr(tcp, "PATIENCE", 0.25)
    count, right = traffic()[direction == "down"], 0
    for position in range(count):
        faults = Faults(flip=(position,), bit=bit)
        with pair(16, slots=3) as both, proxy(both.target, **{direction: faults}) as network:
            both.through(network)
            try:
                both.read_all()
            except HandoverFailed:
                continue
            assert (both.own == both.theirs).all(), f"byte {position}"
            right += 1
    assert right == (3 * (16 + 16) if direction == "down" else 0)  # the blocks and their checksums


async def test_a_flipped_bit_is_fetched_again_and_only_that_block(caplog: pytest.LogCaptureFixture) -> None:
    with pair(100_000) as both, proxy(both.target, down=Faults(flip=(350_000,))) as network:
        both.through(network)
        await both.read(both.all, both.all)
        assert (both.own == both.theirs).all()
        assert 900_000 < network.passed[1] < 1_000_000
    assert "1 of 8 blocks arrived damaged" in caplog.text


async def test_a_block_that_is_damaged_twice() -> None:
    with pair(100_000) as both:
        with proxy(both.target, down=Faults(flip=(350_000, 850_000))) as network:
            both.through(network)
            with pytest.raises(HandoverFailed, match="slot 3 arrived damaged twice"):
                await both.read(both.all, both.all)
        both.address = both.server.address
        await both.read(both.all, both.all)
        assert (both.own == both.theirs).all()


@pytest.mark.parametrize("rate", [50_000, 2_000_000])  # bytes a second; a whole and a small part of a block
async def test_a_slow_link_is_seen_within_three_seconds(rate: float) -> None:
    with pair(368_640, slots=64) as both, proxy(both.target, down=Faults(rate=rate)) as network:
        both.through(network)
        start = time.monotonic()
        with pytest.raises(HandoverFailed, match="slow"):
            await both.read(both.all, both.all)
        assert 1 < time.monotonic() - start < 3


async def test_a_slow_network_is_worth_it_where_computing_is_slower(hasty: None) -> None:
    """Each block takes longer than a link may be silent."""
    with pair(60_000, slots=2) as both, proxy(both.target, down=Faults(rate=100_000)) as network:
        both.through(network)
        both.slowest = 80_000.0
        await both.read(both.all, both.all)
        assert (both.own == both.theirs).all()


async def test_a_link_that_is_slow_in_many_small_reads() -> None:
    """None of them takes long by itself."""
    with pair(368_640, slots=64) as both, proxy(both.target, down=Faults(rate=5e6)) as network:
        both.through(network)
        start = time.monotonic()

        async def read_each() -> None:
            for slot in both.all:
                await both.read([slot], [slot])

        with pytest.raises(HandoverFailed, match="slow"):
            await read_each()
        assert time.monotonic() - start < 5


@pytest.mark.parametrize(("after", "slowest"), [(0, 32e6), (150, 32e6), (500_000, 32e6), (500_000, 1e3)])
async def test_a_link_that_goes_silent(after: int, slowest: float) -> None:
    """However slow computing is, and so the link may be: nothing at all is too little."""
    with pair(368_640) as both, proxy(both.target, down=Faults(stall=after)) as network:
        both.slowest = slowest
        both.through(network)
        start = time.monotonic()
        with pytest.raises(HandoverFailed, match="the TCP link to the peer broke"):
            await both.read(both.all, both.all)
        assert time.monotonic() - start < 3


async def test_waiting_for_an_answer_is_not_slowness(hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small reads of a peer that answers late, but fast."""
    load = HostStaging.load

    def late(self: HostStaging, slot: int) -> memoryview:
        time.sleep(0.05)
        return load(self, slot)

    monkeypatch.setattr(HostStaging, "load", late)
    with pair(16) as both:
        for slot in both.all * 2:
            await both.read([slot], [slot])


# -- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cancels", [1, 3])
async def test_after_cancellation_nothing_writes(cancels: int) -> None:
    """The slots may go to another request at once."""
    with pair(368_640) as both, proxy(both.target, down=Faults(rate=20e6)) as network:
        both.through(network)
        read = asyncio.create_task(both.read(both.all, both.all))
        while not both.own.any():  # noqa: ASYNC110 - a thread writes
            await asyncio.sleep(0.005)
        start = time.monotonic()
        for _ in range(cancels):
            read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        both.own[:] = 7
        assert time.monotonic() - start < 0.5
        await asyncio.sleep(0.1)
        assert (both.own == 7).all()


async def test_cancelled_before_it_began() -> None:
    with pair() as both:
        read = asyncio.create_task(both.read([0], [0]))
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        await asyncio.sleep(0)
        queued = [asyncio.create_task(both.read([0], [0])) for _ in range(20)]
        await asyncio.sleep(0)
        for read in queued:
            read.cancel()
        await asyncio.wait(queued)
        both.own[:] = 7
        await asyncio.sleep(0.05)
        assert (both.own == 7).all()
        await both.read([0], [0])


async def test_cancelled_while_it_connects() -> None:
    """To a peer that takes connections and never says a word."""
    with pair() as both, socket.create_server(("127.0.0.1", 0)) as listening:
        both.address = msgspec.structs.replace(both.address, memory=TcpEndpoint(*listening.getsockname()[:2]))
        read = asyncio.create_task(both.read([0], [0]))
        await asyncio.sleep(0.1)
        start = time.monotonic()
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        assert time.monotonic() - start < 0.5


async def test_a_server_that_closes_in_the_middle() -> None:
    with pair(368_640, slots=64) as both, proxy(both.target, down=Faults(rate=20e6)) as network:
        both.through(network)
        read = asyncio.create_task(both.read(both.all, both.all))
        while not both.own.any():  # noqa: ASYNC110 - a thread writes
            await asyncio.sleep(0.005)
        await asyncio.to_thread(both.server.close)
        with pytest.raises(HandoverFailed):
            await read


# -- the choice of a link --------------------------------------------------------------------------------------------


async def test_the_best_link_that_both_have() -> None:
    with pair() as both:
        mapped, served = both.memory.address, both.address
        shm = SharedMemoryLink(both.own)
        links: list[Link] = [shm, both.link]
        fresh = Failures()
        assert choose(links, [served, mapped], fresh) == [Way(shm, mapped), Way(both.link, served)]
        assert choose(links, [served], fresh) == [Way(both.link, served)]
        assert choose([both.link], [mapped, served], fresh) == [Way(both.link, served)]
        away = msgspec.structs.replace(mapped, host="elsewhere")
        assert choose(links, [away, served], fresh) == [Way(both.link, served)]
        gpu = msgspec.structs.replace(mapped, memory=CudaMemory(device="g", handle="00", offset=0))
        assert choose(links, [gpu, served], fresh) == [Way(both.link, served)]
        with pytest.raises(
            HandoverFailed, match=r"no link in common.*this machine, offers cuda-ipc; .* reads over shm, tcp"
        ):
            choose(links, [gpu], fresh)
        with pytest.raises(HandoverFailed, match=r"another machine, offers shm; .* reads over shm$"):
            choose([shm], [away], fresh)
        shm.close()


async def test_a_way_that_failed_lately_is_the_last_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    with pair() as both:
        mapped, served = both.memory.address, both.address
        shm = SharedMemoryLink(both.own)
        failures = Failures()
        ways = choose([shm, both.link], [mapped, served], failures)
        failures.add(ways[0])
        assert choose([shm, both.link], [mapped, served], failures) == ways[::-1]
        other = [msgspec.structs.replace(pool, instance="other") for pool in (mapped, served)]
        assert [way.link for way in choose([shm, both.link], other, failures)] == [shm, both.link]
        failures.add(ways[1])
        assert choose([shm, both.link], [mapped, served], failures) == ways
        monkeypatch.setattr(link, "FAILED_SECONDS", 0.0)
        failures.add(ways[0])
        failures.add(ways[1])
        assert not failures.recent(ways[0])
        shm.close()
