"""Open-loop load: every request is sent when it is due, however slow the server is.

The generator watches itself, too: how late it sent, and what it cost.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import aiohttp
import numpy as np
from msgspec import Struct

from twostroke.bench.dialect import PATHS, Asking, BadStream, Reading
from twostroke.bench.workload import Item

_LATE = 0.005  # seconds; later than this and later than a twentieth of the TTFT, and the generator was the limit
_BUSY = 0.8  # share of one core
_MAX_ERROR = 300  # characters


class Record(Struct):
    """What became of one request. ``planned`` and ``start`` are seconds after the run's start, ``chunks`` seconds after
    the request's own start. A failed one has an ``error`` and counts in no average.
    """

    id: str
    planned: float
    start: float
    input_len: int
    asked_len: int  # output tokens asked for
    output_len: int = 0
    chunks: list[float] = []
    cached: int | None = None  # prompt tokens that the server says it had
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.chunks[0]

    @property
    def e2el(self) -> float:
        """Seconds to the last token."""
        return self.chunks[-1]

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None of a single one."""
        return (self.e2el - self.ttft) / (self.output_len - 1) if self.output_len > 1 else None

    @property
    def itl(self) -> list[float]:
        """Seconds between chunks."""
        return [later - earlier for earlier, later in zip(self.chunks, self.chunks[1:], strict=False)]


class Generator(Struct, frozen=True):
    """The load generator about itself. ``limited`` says that it, not the server, may have been the limit."""

    late_ms_p50: float
    late_ms_p99: float
    late_ms_max: float
    cpu_seconds: float
    cpu_us_per_request: float
    cpu_us_per_token: float
    busy: float  # share of one core
    limited: bool


class Load(Struct):
    """A run's records in the order of sending, and how long it took."""

    records: list[Record]
    duration: float  # seconds from the start to the end of the last request
    started: float  # unix seconds
    generator: Generator


class Client:
    """Sends to one server."""

    def __init__(self, url: str, asking: Asking, *, timeout: float = 600.0, key: str | None = None) -> None:
        self._url = url.rstrip("/") + PATHS[asking.dialect]
        self._asking = asking
        self._timeout = timeout
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    async def load(self, items: Sequence[Item], name: str, done: Callable[[Item], None] = lambda _: None) -> Load:
        """Send everything when it is due, and wait for the last answer. Requests are called ``<name>-<number>``;
        ``done`` hears of each that has ended.
        """
        bodies = [self._asking.body(item) for item in items]  # not while the clock runs
        sending: list[asyncio.Task[Record]] = []
        connector = aiohttp.TCPConnector(limit=0)
        no_limit = aiohttp.ClientTimeout(total=None)  # each request has its own deadline
        async with aiohttp.ClientSession(connector=connector, timeout=no_limit, auto_decompress=False) as session:
            cpu, wall, start = time.process_time(), time.time(), time.perf_counter()
            try:
                for number, (item, body) in enumerate(zip(items, bodies, strict=True)):
                    if (wait := start + item.at - time.perf_counter()) > 0:
                        await asyncio.sleep(wait)
                    one = self._send(session, body, item, f"{name}-{number}", start)
                    sending.append(asyncio.create_task(self._tell(one, item, done)))
                records = await asyncio.gather(*sending)
            finally:
                for task in sending:
                    task.cancel()
            duration, cpu = time.perf_counter() - start, time.process_time() - cpu
        return Load(records, duration, wall, judge(records, cpu, duration))

    async def _tell(self, sending: Awaitable[Record], item: Item, done: Callable[[Item], None]) -> Record:
        record = await sending
        done(item)
        return record

    async def _send(self, session: aiohttp.ClientSession, body: bytes, item: Item, id_: str, start: float) -> Record:
        sent = time.perf_counter()
        record = Record(id_, item.at, sent - start, len(item.prompt), item.output_len)
        reading = Reading()
        try:
            async with asyncio.timeout(self._timeout):
                headers = {**self._headers, "x-request-id": id_}
                async with session.post(self._url, data=body, headers=headers) as reply:
                    if reply.status != 200:
                        text = (await reply.content.read(4096)).decode(errors="replace")
                        raise BadStream(f"status {reply.status}: {text}")
                    async for data in reply.content.iter_any():
                        reading.feed(data, time.perf_counter() - sent)
            if not (reading.complete and reading.chunks):
                raise BadStream("the stream ended early")
        except TimeoutError:
            record.error = f"no complete answer within {self._timeout:g} s"
        except (BadStream, aiohttp.ClientError, OSError) as error:
            record.error = f"{type(error).__name__}: {error}"[:_MAX_ERROR]
        record.chunks, record.output_len, record.cached = reading.chunks, reading.output_len, reading.cached
        record.input_len = reading.input_len or record.input_len
        return record


def judge(records: Sequence[Record], cpu: float, duration: float) -> Generator:
    """Was the generator itself the limit? ``cpu`` is what this process used, ``duration`` how long, in seconds."""
    late = [max(0.0, record.start - record.planned) for record in records] or [0.0]
    p50, p99 = np.percentile(late, [50, 99])
    ttfts = [record.ttft for record in records if not record.error]
    slow = p99 > _LATE and bool(ttfts) and p99 > np.median(ttfts) / 20
    busy = cpu / duration if duration else 0.0
    return Generator(
        late_ms_p50=1e3 * float(p50),
        late_ms_p99=1e3 * float(p99),
        late_ms_max=1e3 * max(late),
        cpu_seconds=cpu,
        cpu_us_per_request=1e6 * cpu / max(1, len(records)),
        cpu_us_per_token=1e6 * cpu / max(1, sum(record.output_len for record in records)),
        busy=busy,
        limited=bool(slow or busy > _BUSY),
    )
