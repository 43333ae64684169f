"""One call from its translation to its reply: its sequences run concurrently, their tokens leave as they come."""

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import aclosing

from starlette.types import Send

from twostroke.api.call import Call, Choice
from twostroke.api.http import DONE, EVENT_STREAM, reply
from twostroke.api.lifecycle import Lifecycle
from twostroke.api.service import Service
from twostroke.errors import EngineFailed
from twostroke.messages import Ticket


class Exchange:
    """Runs a call. Ends, and so aborts, every sequence before it returns or raises."""

    def __init__(self, call: Call, service: Service, lifecycle: Lifecycle, ticket: Ticket | None, send: Send) -> None:
        card = service.card()
        self._call = call
        self._choices = [Choice(job, card, service.tokenizer) for job in call.jobs]
        self._service = service
        self._lifecycle = lifecycle
        self._ticket = ticket
        self._send = send
        self._started = False
        self._sending = asyncio.Lock()  # choices take turns, so that no event overtakes the status

    async def run(self) -> None:
        """Generate and reply.

        The status of a stream is only sent with its first event, so an error before that still has its own status.

        Raises:
            TwostrokeError: a sequence failed; the others were aborted. The reply may have begun.
        """
        await _all([self._generate(choice) for choice in self._choices])
        if not self._call.stream:
            await reply(self._send, self._call.reply.whole(self._choices))
            return
        await self._emit(self._call.reply.closing(self._choices) + DONE)
        await self._send({"type": "http.response.body", "body": b""})

    async def _generate(self, choice: Choice) -> None:
        request = choice.job.request
        async with aclosing(self._service.generate(request, self._ticket)) as outputs:
            async for output in outputs:
                self._lifecycle.tokens(request.id, len(output.tokens))
                delta = choice.feed(output)
                if self._call.stream:
                    await self._emit(self._call.reply.chunk(choice, delta))
                if choice.finish:
                    return
        raise EngineFailed("the generation ended without a reason")

    async def _emit(self, events: bytes) -> None:
        if not events:
            return
        async with self._sending:
            if not self._started:
                self._started = True
                events = self._call.reply.opening(self._choices) + events
                await self._send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
            await self._send({"type": "http.response.body", "body": events, "more_body": True})


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
