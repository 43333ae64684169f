"""Rows in which messages come twice, out of order, late, or from somebody else."""

import asyncio
import http.client
import re
import socket
from collections.abc import Callable

from tests.faults.fleet import ATTACH, DECODE, PREFILL, SECRET
from tests.faults.stage import Stage, happened, row
from tests.links.faults import Faults
from twostroke.links.frames import BLOCK, MAX_MESSAGE
from twostroke.links.framing import HEADER
from twostroke.messages import SECRET_HEADER, TICKET_HEADER

_REQUEST = re.compile(
    rb"POST (?P<path>\S+) HTTP/1.1\r\n"
    rb"(?P<head>(?:[^\r\n]+\r\n)*?Content-Length: (?P<size>\d+)\r\n(?:[^\r\n]+\r\n)*)\r\n",
    re.IGNORECASE,
)
Sent = tuple[str, dict[str, str], bytes]  # path, headers, body


def _recorded(stage: Stage) -> list[Sent]:
    """Every request that the prefill worker was sent since the stage began: the router's, and the consumer's."""
    said, sent = bytes(stage.fleet.control.seen), []
    for match in _REQUEST.finditer(said):
        lines = (line.split(b": ", 1) for line in match["head"].splitlines())
        headers = {name.decode().lower(): value.decode() for name, value in lines}
        sent.append((match["path"].decode(), headers, said[match.end() : match.end() + int(match["size"])]))
    return sent


def _send(stage: Stage, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
    """Say something to the prefill worker; its answer, of a stream only the status."""
    connection = http.client.HTTPConnection("127.0.0.1", stage.fleet.workers[PREFILL].port, timeout=10)
    try:
        connection.request("POST", path, body, headers)
        reply = connection.getresponse()
        streams = reply.getheader("content-type") == "application/x-ndjson"
        return reply.status, b"" if streams else reply.read()
    finally:
        connection.close()


def _refused(answer: tuple[int, bytes]) -> None:
    status, body = answer
    assert status in (400, 401, 409, 413, 422) or b'"alive":false' in body, answer


async def _commits(stage: Stage) -> tuple[float, float]:
    """Hand-overs that came to a good end, and that did not."""
    counts = {"complete": 0.0, "fallback": 0.0}
    for name in DECODE:
        for how in counts:
            metric = f'twostroke_handovers_total{{outcome="{how}"}}'
            counts[how] += await stage.fleet.metric(stage.session, name, metric)
    return counts["complete"], counts["fallback"]


async def _amid(stage: Stage, lie: Callable[[], None]) -> None:
    """Lie when the consumer has heard some of the events. The true hand-over goes on: there is exactly one commit."""
    errors: list[Exception] = []
    done = False

    def strike() -> None:
        nonlocal done
        try:
            lie()
        except Exception as error:  # noqa: BLE001 - in the proxy's thread; raised again below
            errors.append(error)
        done = True

    complete = fallback = 0.0
    while not done:  # where a fast prefill is told in few words, the byte may not be reached
        complete, fallback = await _commits(stage)
        stage.fleet.control.seen.clear()
        stage.fleet.control.down = Faults(where=ATTACH, strike=(stage.random.randrange(200, 800), strike))
        await stage.exactly()
    if errors:
        raise errors[0]
    stage.fleet.heal()
    # A consumer that hears nothing while all this is said may give up; it never takes the same blocks twice.
    assert sum(await _commits(stage)) == complete + fallback + 1


@row("duplicate and replayed messages to P", "exactly one commit, or refusal", "tcp")
async def replayed(stage: Stage) -> None:
    """While the hand-over is under way, and again after it, in any order."""

    def again() -> None:
        for path, headers, body in _recorded(stage):
            if path.endswith("attach") or TICKET_HEADER in headers:
                _refused(_send(stage, path, headers, body))

    await _amid(stage, again)
    old = [sent for sent in _recorded(stage) if "internal" in sent[0] or TICKET_HEADER in sent[1]]
    happened(len(old) >= 3, "nothing was recorded")
    stage.random.shuffle(old)
    for path, headers, body in old:
        _refused(await asyncio.to_thread(_send, stage, path, headers, body))
    await stage.freed()


@row("forged messages to P", "exactly one commit, or refusal", "tcp")
async def forged(stage: Stage) -> None:
    """By somebody who does not know the secret; who knows it but not the instance; of another attempt or hand-over."""

    def lie() -> None:
        (path, headers, body), *_ = [sent for sent in _recorded(stage) if sent[0].endswith("attach")]
        for secret in ("", SECRET[:-1], SECRET + "x"):
            assert _send(stage, path, {**headers, SECRET_HEADER: secret}, body)[0] == 401
        known = {SECRET_HEADER: SECRET}
        handover = re.search(rb'"handover":"([^"]+)"', body)
        assert handover
        for name, attempt, instance, blocks in (
            (handover[1], 0, b"0" * 32, 1),
            (handover[1], 1, b"0" * 32, 1),
            (b"another/0", 0, b"0" * 32, 1),
            (handover[1], 0, b"0" * 32, 2**31 - 1),
        ):
            confirm = b'{"handover":"%b","attempt":%d,"instance":"%b","blocks":%d,"release":true}'
            _refused(_send(stage, "/internal/handover/confirm", known, confirm % (name, attempt, instance, blocks)))
        # A ticket of the running hand-over with another request in it.
        ticket = b'{"id":"%b","side":"produce","attempt":0}' % handover[1].split(b"/")[0]
        ticketed = {**known, TICKET_HEADER: ticket.decode()}
        _refused(_send(stage, "/v1/completions", ticketed, b'{"prompt":[5,6,7],"max_tokens":3}'))

    await _amid(stage, lie)
    await stage.freed()


@row("truncated and oversized messages to P", "exactly one commit, or refusal", "tcp")
async def mangled(stage: Stage) -> None:
    def lie() -> None:
        sent = [one for one in _recorded(stage) if "internal" in one[0]]
        for path, headers, body in sent:
            plain = {SECRET_HEADER: headers[SECRET_HEADER]}
            for size in (0, 1, len(body) // 2, len(body) - 1):
                assert _send(stage, path, plain, body[:size])[0] == 400
            assert _send(stage, path, plain, body + b" " * 100_000)[0] == 413
            assert _send(stage, path, plain, b"[" * 60_000)[0] == 400
            _hang_up(stage, path, headers, body)

    await _amid(stage, lie)
    await stage.freed()


def _hang_up(stage: Stage, path: str, headers: dict[str, str], body: bytes) -> None:
    """Half a request, and then nothing more."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection(("127.0.0.1", stage.fleet.workers[PREFILL].port)) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body[: len(body) // 2])


@row("forged, replayed and oversized frames to the TCP link", "refusal", "tcp")
async def link_lied_to(stage: Stage) -> None:
    """Whatever a stranger says, and whatever was once said by somebody who knows the secret."""
    stage.fleet.link.seen.clear()
    await asyncio.to_thread(stage.fleet.link.hang_up)
    await stage.exactly()
    said = bytes(stage.fleet.link.seen)
    happened(len(said) > 200, "nothing was recorded")
    magic = said[: HEADER.size]
    for lie in (said, said[:50], said[stage.random.randrange(len(said)) :], stage.random.randbytes(300), magic, b""):
        heard = await asyncio.to_thread(_tell_link, stage, lie)
        assert len(heard) < BLOCK.size + 1024, "no block is sent"
    huge = HEADER.pack(*HEADER.unpack(magic)[:-1], MAX_MESSAGE + 1) + b"x" * 1000
    assert len(await asyncio.to_thread(_tell_link, stage, huge)) < 1024
    await stage.freed()


def _tell_link(stage: Stage, said: bytes) -> bytes:
    """All that the link's server says to that."""
    heard = b""
    with socket.create_connection(stage.fleet.link.target, timeout=10) as connection:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        try:
            while piece := connection.recv(1 << 16):
                heard += piece
        except ConnectionError:  # it hangs up on what it does not read
            pass
    return heard


@row("reordered and forged events to D", "exactly one commit, or refusal", "tcp")
async def events_reordered(stage: Stage) -> None:
    """A consumer that is told of blocks out of order, of others' slots, or nonsense, computes for itself."""
    honest = stage.fleet.control.rewrite
    lies: list[Callable[[bytes], bytes]] = [
        lambda said: re.sub(rb'"first":0,', b'"first":4,', said),
        lambda said: re.sub(rb'"slots":\[\d{3},', b'"slots":[001,', said),
        lambda said: re.sub(rb'"slots":\[\d(\d\d),', rb'"slots":[9\1,', said),
        lambda said: said.replace(b'"published"', b'"publishes"'),
        lambda said: said.replace(b'"sampled"', b'"opened" '),
    ]
    lie = stage.random.choice(lies)
    stage.fleet.control.rewrite = lambda data: bytearray(lie(bytes(honest(data))))
    try:
        id_ = await stage.exactly()
    finally:
        stage.fleet.control.rewrite = honest
    happened(await stage.reasons(id_, "fallback"), "the lie was not told")
    await stage.freed()
