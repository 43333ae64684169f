"""One call from its translation to its reply: its sequences run concurrently, their tokens leave as they come."""

import asyncio
from collections import defaultdict
from collections.abc import Coroutine, Sequence
from contextlib import aclosing

from msgspec.json import encode
from msgspec.structs import replace
from starlette.types import Send

from twostroke.api.call import Call, Choice, Reply, check_tokens, finite
from twostroke.api.http import DONE, EVENT_STREAM, Headers, reply
from twostroke.api.lifecycle import Lifecycle
from twostroke.api.service import Service
from twostroke.errors import BadRequest, EngineFailed
from twostroke.messages import JOURNAL_HEADER, Output, Sent, Ticket, Token

_JOURNALED = [*EVENT_STREAM, (JOURNAL_HEADER.encode(), b"1")]


class Exchange:
    """Runs a call. Ends, and so aborts, every sequence before it returns or raises."""

    def __init__(
        self,
        call: Call,
        service: Service,
        lifecycle: Lifecycle,
        ticket: Ticket | None,
        send: Send,
        journal: Sequence[Sent] | None = None,
    ) -> None:
        """``journal``: what the client has seen already; unless it is None, a stream's journal is kept."""
        card = service.card()
        self._call = call
        self._choices = [Choice(job, card, service.tokenizer) for job in call.jobs]
        self._service = service
        self._lifecycle = lifecycle
        self._ticket = ticket
        self._send = send
        self._journal = journal if call.stream else None
        self._vocab_size = card.vocab_size
        self._opened = bool(self._journal)  # the client has seen the opening
        self._started = False
        self._sending = asyncio.Lock()  # choices take turns, so that no event overtakes the status

    async def run(self) -> None:
        """Generate and reply.

        The status of a stream is only sent with its first event, so an error before that still has its own status.

        Raises:
            BadRequest: the journal is not one of this call.
            TwostrokeError: a sequence failed; the others were aborted. The reply may have begun.
        """
        if self._journal:
            await asyncio.to_thread(self._replay, self._journal)
        await _all([self._generate(choice) for choice in self._choices if not choice.finish])
        if not self._call.stream:
            await reply(self._send, self._call.reply.whole(self._choices))
            return
        await self._emit(self._call.reply.closing(self._choices) + DONE)
        await self._send({"type": "http.response.body", "body": b""})

    async def _generate(self, choice: Choice) -> None:
        request, unsent = choice.job.request, list[Output]()
        async with aclosing(self._service.generate(request, self._ticket)) as outputs:
            async for output in outputs:
                self._lifecycle.tokens(request.id, len(output.tokens))
                delta = choice.feed(output)
                if self._call.stream:
                    unsent.append(output)
                    if events := self._call.reply.chunk(choice, delta):
                        await self._emit(events, choice.index, unsent)
                        unsent.clear()
                if choice.finish:
                    return
        raise EngineFailed("the generation ended without a reason")

    def _replay(self, journal: Sequence[Sent]) -> None:
        """Bring every choice, and the dialect's state, to where the client saw it last."""
        by_choice: defaultdict[int, list[Sent]] = defaultdict(list)
        for sent in journal:
            by_choice[sent.choice].append(sent)
        for choice in self._choices:
            own = by_choice.get(choice.index)
            if own is None:
                continue
            tokens = [token if isinstance(token, Token) else Token(token) for sent in own for token in sent.tokens]
            ids, finish = [token.id for token in tokens], own[-1].finish
            check_tokens(ids, self._vocab_size, JOURNAL_HEADER)
            delta = choice.feed(Output(tokens, finish, max(sent.cached_tokens for sent in own)))
            self._call.reply.chunk(choice, delta)
            if not choice.finish and len(ids) >= choice.job.request.sampling.max_tokens:
                raise BadRequest("the journal has more tokens than were asked for", param=JOURNAL_HEADER)
            choice.job = replace(choice.job, request=replace(choice.job.request, output=ids))

    async def _emit(self, events: bytes, index: int = 0, sent: Sequence[Output] = ()) -> None:
        """Send events: all that there is to see of these outputs of choice ``index``."""
        async with self._sending:
            if not self._opened:
                self._opened = True
                events = self._call.reply.opening(self._choices) + events
            if self._journal is not None:
                line = encode([_entry(index, output) for output in sent]) if sent else b""
                events = b":%d %b\n%b" % (len(events), line, events)
            if not self._started:
                self._started = True
                headers = EVENT_STREAM if self._journal is None else _JOURNALED
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send({"type": "http.response.body", "body": events, "more_body": True})


def at_once(
    write: Reply, choices: Sequence[Choice], outputs: Sequence[Output], *, stream: bool
) -> tuple[bytes, Headers | None]:
    """Body and headers of a reply with one output for each choice, all of which are there already."""
    deltas = [choice.feed(output) for choice, output in zip(choices, outputs, strict=True)]
    if not stream:
        return write.whole(choices), None
    chunks = [write.chunk(choice, delta) for choice, delta in zip(choices, deltas, strict=True)]
    return b"".join([write.opening(choices), *chunks, write.closing(choices), DONE]), EVENT_STREAM


def _entry(index: int, output: Output) -> Sent:
    """JSON knows no infinity: log-probabilities are as clients read them."""
    tokens = [
        token.id
        if token.logprob is None
        else Token(token.id, finite(token.logprob), [(i, finite(logprob)) for i, logprob in token.top or ()])
        for token in output.tokens
    ]
    return Sent(index, tokens, output.finish, output.cached_tokens)


async def _all(work: Sequence[Coroutine[None, None, None]]) -> None:
    """Run all; at the first error, or when cancelled, end the others before passing it on."""
    if len(work) == 1:  # the common case needs no task of its own
        await work[0]
        return
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
