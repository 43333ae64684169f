"""The consumer's end of a hand-over: pulls a prompt's blocks from the producer while it computes them."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import aiohttp
import msgspec
from aiohttp.http_exceptions import HttpProcessingError  # a line that is too long

from twostroke.api.lifecycle import Lifecycle
from twostroke.engine.engine import Admitted, Engine, Job
from twostroke.errors import HandoverFailed
from twostroke.handover.machine import CONSUMER, ConsumerAction, ConsumerEvent, ConsumerState, Machine
from twostroke.kv.keys import prompt_key
from twostroke.kv.pool import Slot
from twostroke.links.link import Claim, Failures, Link, Way, choose
from twostroke.messages import (
    SECRET_HEADER,
    Alive,
    Attach,
    Confirm,
    Confirmed,
    Ended,
    Event,
    Opened,
    Output,
    Published,
    Sampled,
    Writing,
    decode,
    encode,
)

_MAX_LINE = 16 << 20  # bytes of one event: a list of slots
_MAX_CONFIRMED = 1 << 10  # bytes
_event = msgspec.json.Decoder(Event)


class Peer:
    """A producer, seen from the consumer: its HTTP endpoints, each call with a deadline."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, secret: str, silence: float) -> None:
        """``silence``: seconds without a word from it, after which it is given up."""
        self._session = session
        self._url = url
        self._headers = {SECRET_HEADER: secret} if secret else {}
        self._silence = silence

    async def attach(self, message: Attach) -> AsyncGenerator[Event, None]:
        """The hand-over's events.

        Raises:
            HandoverFailed: the producer is gone, refuses, sends nonsense, or was silent for too long.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._silence, sock_read=self._silence)
        try:
            async with self._session.post(
                f"{self._url}/internal/handover/attach",
                data=encode(message),
                headers=self._headers,
                timeout=timeout,
                read_bufsize=_MAX_LINE,
                allow_redirects=False,
            ) as reply:
                if reply.status != 200:
                    raise HandoverFailed(f"the producer refused: {await _reason(reply)}")
                async for line in reply.content:
                    yield _event.decode(line)
        except (aiohttp.ClientError, HttpProcessingError, TimeoutError, ValueError, RecursionError) as error:
            raise HandoverFailed(f"the producer's stream broke: {error or type(error).__name__}") from error

    async def confirm(self, message: Confirm) -> bool:
        """Whether the producer's lease was alive. ``HandoverFailed`` if it cannot be asked."""
        return await self._ask("confirm", message)

    async def writing(self, message: Writing) -> bool:
        """Whether the producer is still at work. ``HandoverFailed`` if it cannot be asked."""
        return await self._ask("writing", message)

    async def _ask(self, what: str, message: Confirm | Writing) -> bool:
        try:
            async with self._session.post(
                f"{self._url}/internal/handover/{what}",
                data=encode(message),
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=self._silence),
                allow_redirects=False,
            ) as reply:
                if reply.status != 200:
                    raise HandoverFailed(f"the producer refused: {await _reason(reply)}")
                if reply.content_length is None or reply.content_length > _MAX_CONFIRMED:
                    raise HandoverFailed("the producer's confirmation is too long")
                return decode(await reply.read(), Confirmed).alive
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise HandoverFailed(f"the producer cannot confirm: {error or type(error).__name__}") from error


class Pull:
    """One hand-over that this worker consumes, from the moment its job holds slots."""

    def __init__(
        self,
        job: Job,
        admitted: Admitted,
        handover: str,
        attempt: int,
        *,
        engine: Engine,
        links: Sequence[Link],
        peer: Peer,
        patience: float,
        takes_first: bool = True,
        lifecycle: Lifecycle,
        failures: Failures | None = None,
    ) -> None:
        """A pull that has not begun.

        Args:
            links: what this worker reads with, best first.
            failures: of those links, in all pulls.
            patience: seconds in which a producer that is alive must publish something new.
            takes_first: the producer's first token is ours; else the engine samples it once every block is here.
        """
        self._job = job
        self._handover = handover
        self._attempt = attempt
        self._engine = engine
        self._links = links
        self._failures = failures or Failures()
        self._peer = peer
        self._patience = patience
        self._takes_first = takes_first
        self._lifecycle = lifecycle
        self._machine = Machine(CONSUMER, ConsumerState.ATTACHING)
        layout = engine.model.layout
        self._block_tokens = layout.block_tokens
        self._fingerprint = layout.fingerprint
        self._slots: Sequence[Slot] = admitted.slots
        self._prompt = len(job.sequence.request.prompt)
        self._needed = layout.blocks(self._prompt)
        self._have = self._verified = admitted.computed // layout.block_tokens  # blocks
        self._ways: list[Way] = []  # to the pool, the present one first; known once the producer has answered
        self._claim = Claim(handover, attempt)
        self._fresh: Published | None = None  # published and not yet read
        self._first: Output | None = None
        self._sampled_at = time.monotonic()
        self._released = False

    async def run(self) -> None:
        """Bring the blocks in; the job goes on with whatever was verified, however this ends.

        On cancellation nothing writes into the job's slots any more once this is done.
        """
        try:
            await self._pull()
        except HandoverFailed as error:
            self._stamp("fallback", reason=error.message, verified_blocks=self._verified)
            await self._on(ConsumerEvent.LOST)
        except asyncio.CancelledError:
            if self._machine.accepts(ConsumerEvent.ABORT):
                await self._on(ConsumerEvent.ABORT)
            else:  # the request ended first, and perhaps before the producer was told
                await self._release()
            raise

    async def _pull(self) -> None:
        request = self._job.sequence.request
        prompt = prompt_key(self._fingerprint, request.salt, request.prompt)
        message = Attach(self._handover, self._attempt, self._fingerprint, self._have, prompt)
        async with contextlib.aclosing(self._peer.attach(message)) as events:
            await self._follow(events)
        self._check(self._done, "it ended too early")
        if self._machine.accepts(ConsumerEvent.COMPLETE):
            await self._on(ConsumerEvent.COMPLETE)

    async def _follow(self, events: AsyncIterator[Event]) -> None:
        """Take events until every block is verified and the first token is out, or the request is over."""
        deadline = time.monotonic() + self._patience
        async for event in events:
            if not isinstance(event, Alive):
                deadline = time.monotonic() + self._patience
            match event:
                case Opened(pools, posted):
                    self._check(not self._ways, "opened twice")
                    self._claim = self._claim._replace(posted=posted)
                    self._ways = choose(self._links, pools, self._failures)
                    self._stamp("attached", link=self._ways[0].link.name)
                    await self._on(ConsumerEvent.OPENED)
                case Published():
                    self._check(bool(self._ways), "blocks before it opened")
                    self._check(event.first == self._verified, "blocks out of order")
                    self._check(event.first + len(event.slots) <= self._needed, "more blocks than the prompt has")
                    self._fresh = event
                    await self._on(ConsumerEvent.PUBLISHED)
                    await self._on(ConsumerEvent.VERIFIED)
                case Sampled(output):
                    self._check(bool(self._ways), "a token before it opened")
                    self._check(self._first is None and len(output.tokens) == 1, "not one first token")
                    self._check(0 <= output.tokens[0].id < self._engine.model.vocab_size, "no token of the model")
                    self._check(0 <= output.cached_tokens <= self._prompt, "more cached tokens than the prompt has")
                    if self._takes_first:
                        await self._sampled(output)
                case Ended(error):
                    self._check(error is None, error or "")
                    break
                case Alive():
                    self._check(time.monotonic() < deadline, f"nothing new for {self._patience:.0f} s")
            if self._done:
                break

    @property
    def _done(self) -> bool:
        """Whether nothing more is expected of the producer."""
        ended = self._first is not None and self._first.finish is not None
        return ended or (self._verified == self._needed and not self._lacks_token)

    @property
    def _lacks_token(self) -> bool:
        """Whether the first token is still to come."""
        return self._takes_first and self._first is None

    async def _sampled(self, output: Output) -> None:
        self._sampled_at = time.monotonic()
        finish = self._engine.ending(self._job, output.tokens[0])
        self._first = msgspec.structs.replace(output, finish=finish)
        await self._on(ConsumerEvent.SAMPLED_LAST if finish else ConsumerEvent.SAMPLED)

    def _check(self, holds: bool, what: str) -> None:
        if not holds:
            raise HandoverFailed(f"the producer broke off or broke the protocol: {what}")

    async def _on(self, event: ConsumerEvent) -> None:
        for action in self._machine.on(event):
            await self._do(action)

    async def _do(self, action: ConsumerAction) -> None:
        match action:
            case ConsumerAction.READ:
                await self._read()
            case ConsumerAction.KEEP:
                self._engine.loaded(self._job, min(self._verified * self._block_tokens, self._prompt))
            case ConsumerAction.EMIT:
                assert self._first is not None, "only a known token is emitted"
                self._job.given = True
                self._job.push(self._first)
            case ConsumerAction.RESUME:
                self._engine.resume(self._job, self._first.tokens[0] if self._first else None)
                self._complete()
            case ConsumerAction.RELEASE:
                await self._release()
            case ConsumerAction.ABORT:
                self._engine.abort(self._job)

    async def _read(self) -> None:
        """Copy what is published. It counts only because the lease is alive afterwards, as is seen or as the producer
        confirms.
        """
        assert self._fresh, "only published blocks are read"
        first, remote = self._fresh.first, self._fresh.slots
        end = first + len(remote)
        last = end == self._needed and not self._lacks_token
        alive = await self._copy(remote, self._slots[first:end]) if remote else None
        if alive is None:
            alive = await self._peer.confirm(Confirm(self._handover, self._attempt, self._instance, end, last))
        self._released = last and alive  # in so many words, or we are about to hang up
        self._check(alive, "its lease had ended before the blocks were read")
        size = len(remote) * self._engine.model.layout.block_bytes
        self._lifecycle.received(self._ways[0].link.name, len(remote), size)
        self._verified = end

    async def _copy(self, remote: Sequence[Slot], local: Sequence[Slot]) -> bool | None:
        """Read slots in the best way that works; one that does not is not tried again in this hand-over. See
        ``Link.read``.
        """
        while True:
            way = self._ways[0]
            try:
                return await way.link.read(way.pool, remote, local, self._claim)
            except HandoverFailed as error:
                self._failures.add(way)
                if len(self._ways) == 1:
                    raise
                del self._ways[0]
                following = self._ways[0].link.name
                self._stamp("link_failed", link=way.link.name, reason=error.message, following=following)

    @property
    def _instance(self) -> str:
        """The producer's, as it said."""
        return self._ways[0].pool.instance

    async def _release(self) -> None:
        """Tell the producer that nothing more is needed. If that fails, its lease expires by itself."""
        if self._released or not self._ways:
            return
        message = Confirm(self._handover, self._attempt, self._instance, self._verified, release=True)
        try:
            await self._peer.confirm(message)
        except HandoverFailed as error:
            self._stamp("release_failed", reason=error.message)
        self._released = True

    def _complete(self) -> None:
        if self._verified < self._needed:
            return
        blocks = self._needed - self._have
        self._stamp(
            "kv_complete",
            link=self._ways[0].link.name,
            blocks=blocks,
            bytes=blocks * self._engine.model.layout.block_bytes,
            exposed_ms=round((time.monotonic() - self._sampled_at) * 1e3, 3),
        )

    def _stamp(self, event: str, **detail: str | int | float) -> None:
        self._lifecycle.stamp(self._job.sequence.request.id, event, **detail)


async def _reason(reply: aiohttp.ClientResponse) -> str:
    """Why the peer replied with an error, from its error object."""
    body = await reply.content.read(64 << 10)
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"HTTP {reply.status}"
