"""What servers say of themselves while a run goes on: their metrics, looked at again and again."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import aiohttp
import msgspec
from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

INTERVAL = 0.5  # seconds, at first
MOST = 600  # samples of a run; with more, every other one is dropped and the interval doubled
_TIMEOUT = aiohttp.ClientTimeout(total=2)
_MAX_BYTES = 8 << 20  # of one scrape
_STATES = {  # gauges of ours, of vLLM and of SGLang
    "twostroke_num_requests_running": "running",
    "twostroke_num_requests_waiting": "waiting",
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "sglang:num_running_reqs": "running",
    "sglang:num_queue_reqs": "waiting",
}
_MOVED = {  # counters of bytes: the label that says where, and what happens there
    "twostroke_handover_bytes_total": ("link", "link {}"),
    "twostroke_store_read_bytes_total": ("tier", "tier {}, read"),
    "twostroke_store_written_bytes_total": ("tier", "tier {}, written"),
}
_WANTED = (*_STATES, *_MOVED)


class Watched(Struct):
    """Samples of a run: ``times`` are seconds after its start; ``values`` are by server and by series ("running",
    "waiting", "link shm", "tier host, read": bytes so far), None where a server did not answer.
    """

    times: list[float] = []
    values: dict[str, dict[str, list[float | None]]] = {}

    def add(self, at: float, found: dict[str, dict[str, float]]) -> None:
        """One more sample, of whichever servers answered."""
        for server, series in found.items():
            known = self.values.setdefault(server, {})
            for name in series:
                known.setdefault(name, [None] * len(self.times))
        for server, known in self.values.items():
            for name, column in known.items():
                column.append(found.get(server, {}).get(name))
        self.times.append(at)

    def thin(self) -> None:
        """Drop every other sample."""
        del self.times[1::2]
        for known in self.values.values():
            for column in known.values():
                del column[1::2]

    def drop_idle(self) -> None:
        """Drop counters that did not move: they say nothing, and fill disks."""
        for known in self.values.values():
            for name in [name for name in known if name not in ("running", "waiting")]:
                seen = [value for value in known[name] if value is not None]
                if not seen or seen[0] == seen[-1]:
                    del known[name]


def read_metrics(text: str) -> dict[str, float]:
    """The series of one scrape in Prometheus' text format; those of the same name (vLLM's engines) are added up.

    Raises:
        ValueError: it is no such text.
    """
    found: dict[str, float] = {}
    wanted = "".join(line for line in text.splitlines(keepends=True) if line.startswith(_WANTED))  # parsing is slow
    for family in text_string_to_metric_families(wanted):
        for sample in family.samples:
            if sample.name in _STATES:
                name = _STATES[sample.name]
            elif sample.name in _MOVED:
                label, series = _MOVED[sample.name]
                name = series.format(sample.labels.get(label, ""))
            else:
                continue
            found[name] = found.get(name, 0.0) + sample.value
    return found


@asynccontextmanager
async def watching(url: str) -> AsyncIterator[Watched]:
    """Look at the server's metrics until the block ends: at each worker's, if it is our router, else at its own."""
    watched = Watched()
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        servers, start = await _servers(session, url), time.monotonic()
        looking = asyncio.create_task(_look(session, servers, watched, start))
        try:
            yield watched
        finally:
            looking.cancel()
            await asyncio.wait([looking])
        await _sample(session, servers, watched, start)
        watched.drop_idle()


async def _look(session: aiohttp.ClientSession, servers: dict[str, str], watched: Watched, start: float) -> None:
    interval = INTERVAL
    while True:
        await _sample(session, servers, watched, start)
        if len(watched.times) >= MOST:
            watched.thin()
            interval *= 2
        await asyncio.sleep(interval)


async def _sample(session: aiohttp.ClientSession, servers: dict[str, str], watched: Watched, start: float) -> None:
    at = time.monotonic() - start
    answers = await asyncio.gather(*(_scrape(session, url) for url in servers.values()))
    watched.add(round(at, 3), {name: one for name, one in zip(servers, answers, strict=True) if one})


async def _servers(session: aiohttp.ClientSession, url: str) -> dict[str, str]:
    """URLs of whoever has metrics worth looking at, by name."""

    class Listed(Struct):
        id: str
        url: str

    with suppress(aiohttp.ClientError, OSError, TimeoutError, ValueError):  # a DecodeError is one, too
        async with session.get(f"{url}/workers") as reply:
            if reply.status == 200:
                workers = msgspec.json.decode(await _body(reply), type=list[Listed])
                return {worker.id: worker.url for worker in workers}
    return {"server": url}


async def _scrape(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Empty if the server has no metrics, or does not answer now."""
    with suppress(aiohttp.ClientError, OSError, TimeoutError, ValueError):
        async with session.get(f"{url}/metrics") as reply:
            if reply.status == 200:
                return read_metrics((await _body(reply)).decode())
    return {}


async def _body(reply: aiohttp.ClientResponse) -> bytes:
    """All of it, which may come in pieces.

    Raises:
        ValueError: it is too long.
    """
    body = bytearray()
    async for piece in reply.content.iter_any():
        body += piece
        if len(body) > _MAX_BYTES:
            raise ValueError("too long")
    return bytes(body)
