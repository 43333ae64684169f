"""What clients see: every endpoint as an ASGI app.

``Boundary`` is the one place where errors become replies. Endpoints are raw ASGI, so that a token costs little.
"""

import asyncio
import hmac
import logging
import re
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from secrets import token_hex
from typing import TypeVar

import msgspec
from msgspec import Struct
from msgspec.json import encode
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twostroke import config
from twostroke.api import openai, sglang
from twostroke.api.alive import Alive
from twostroke.api.call import Call, Choice, Setting
from twostroke.api.exchange import Exchange, at_once
from twostroke.api.handover import add_transfer
from twostroke.api.http import (
    DONE,
    ClientGone,
    error_object,
    header,
    read_body,
    reply,
    reply_error,
    unless_gone,
)
from twostroke.api.keys import Guard
from twostroke.api.lifecycle import Lifecycle
from twostroke.api.service import Service
from twostroke.errors import (
    BadRequest,
    Conflict,
    MethodNotAllowed,
    NotFound,
    RequestError,
    TwostrokeError,
    Unauthorized,
    Unavailable,
)
from twostroke.messages import (
    ATTEMPT_HEADER,
    JOURNAL_HEADER,
    REQUEST_ID_HEADER,
    SECRET_HEADER,
    TICKET_HEADER,
    ForeignTicket,
    Journal,
    KvTransfer,
    Request,
    Sampling,
    Sent,
    Ticket,
    TimelineEvent,
)

log = logging.getLogger(__name__)

Translate = Callable[[bytes, Setting], Call]
Endpoint = Callable[[Scope, Receive, Send], Awaitable[None]]
Word = TypeVar("Word", Ticket, Journal, int)

_REQUEST_ID = re.compile(r"[\x21-\x2e\x30-\x7e]{1,600}")  # without blank and "/"; vLLM's router puts two hosts into it
_BIG_BODY = 32 << 10  # bytes, above which translation (tokenisation) leaves the event loop
_PROBE_SECONDS = 20.0
_LINES = msgspec.json.Decoder(list[Sent])


def build_app(
    service: Service,
    lifecycle: Lifecycle,
    *,
    max_body: int,
    routes: Sequence[BaseRoute] = (),
    api_keys: Sequence[str] = (),
) -> ASGIApp:
    """All public endpoints over ``service``, and the worker's own ``routes``. ``max_body`` is in bytes. ``api_keys``:
    who may ask for tokens; none is anybody.
    """
    api = _Api(service, lifecycle, max_body)
    pages = Router([*routes, *api.routes()], redirect_slashes=False)
    return Alive(Boundary(Guard(pages, api_keys, config.cluster_secret())))


# -- the boundary ------------------------------------------------------------------------------------------------


class Boundary:
    """Names every request, and turns whatever is raised below it into exactly one reply."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = header(scope, REQUEST_ID_HEADER)
        good = given is not None and _REQUEST_ID.fullmatch(given)
        http_id = given if given is not None and good else token_hex(16)
        scope["app"] = self  # makes Starlette's router raise 404 and 405 instead of answering in plain text
        scope["twostroke.http_id"] = http_id
        named = _NamedSend(send, http_id)
        try:
            if given is not None and not good:
                text = f"{REQUEST_ID_HEADER} must be 1 to 600 printable ASCII characters without blank and /"
                raise BadRequest(text, param=REQUEST_ID_HEADER)
            await self._app(scope, receive, named)
        except ClientGone:
            return
        except asyncio.CancelledError:
            await named.fail(Unavailable("the server is shutting down"))
            raise
        except HTTPException as error:
            await named.fail(_routing_error(error, scope))
        except TwostrokeError as error:
            await named.fail(error)
        except Exception as error:  # noqa: BLE001 - the one boundary: logged, and answered with 500
            _log_unexpected(http_id, error)
            await named.fail(RequestError(f"internal error; the server's log has it under {http_id}"))


class _NamedSend:
    """Adds the request's id to the reply, and knows how far the reply is."""

    def __init__(self, send: Send, http_id: str) -> None:
        self._send = send
        self._header = (REQUEST_ID_HEADER.encode(), http_id.encode())
        self._started = False
        self._ended = False

    async def __call__(self, message: Message) -> None:
        if not self._started:
            self._started = True
            message = {**message, "headers": [*message.get("headers", ()), self._header]}
        elif not message.get("more_body", False):
            self._ended = True
        await self._send(message)

    async def fail(self, error: TwostrokeError) -> None:
        """An error reply, or an error event when the stream has begun. Only streams can fail once begun."""
        if not self._started:
            await reply_error(self, error)
        elif not self._ended:
            await self({"type": "http.response.body", "body": b"data: " + error_object(error) + b"\n\n" + DONE})


def _routing_error(error: HTTPException, scope: Scope) -> TwostrokeError:
    if error.status_code == 405:
        return MethodNotAllowed(f"{scope['method']} is not allowed on {scope['path']}")
    if error.status_code == 404:
        return NotFound(f"there is no {scope['path']}")
    return BadRequest(str(error.detail))


def _log_unexpected(http_id: str, error: Exception) -> None:
    """Log where, not what: the text of a foreign exception may quote the prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("request %s failed with %s\n%s", http_id, type(error).__name__, frames)


# -- endpoints ---------------------------------------------------------------------------------------------------


class Health(Struct, frozen=True):
    """Reply of ``/health`` and ``/ready``."""

    state: str
    detail: str


class Timeline(Struct, frozen=True):
    """Reply of ``/debug/requests/{id}``."""

    id: str
    events: list[TimelineEvent]
    missing: dict[str, str] = {}  # workers that could not be asked, and why; only a router asks


class _Api:
    """The endpoints."""

    def __init__(self, service: Service, lifecycle: Lifecycle, max_body: int) -> None:
        self._service = service
        self._lifecycle = lifecycle
        self._max_body = max_body
        self._secret = config.cluster_secret()
        # By x-request-id, side of a hand-over, and attempt: a new attempt may come before the old one has ended.
        self._live: dict[tuple[str, str, int], Call] = {}

    def routes(self) -> list[Route]:
        gets: dict[str, Endpoint] = {
            "/v1/models": self._models,
            "/health": self._ready,  # other routers send requests as soon as this is good
            "/ready": self._ready,
            "/metrics": self._metrics,
            "/debug/requests/{id:path}": self._timeline,
            "/health_generate": self._health_generate,
            "/get_model_info": self._model_info,
            "/model_info": self._model_info,
            "/get_server_info": self._server_info,
            "/server_info": self._server_info,
            "/get_load": self._load,
        }
        posts: dict[str, Endpoint] = {
            "/v1/completions": self._generating(openai.completions),
            "/v1/chat/completions": self._generating(openai.chat),
            "/generate": self._generating(sglang.generate),
            "/abort_request": self._abort,
        }
        return [route(path, endpoint, "GET") for path, endpoint in gets.items()] + [
            route(path, endpoint, "POST") for path, endpoint in posts.items()
        ]

    # generating

    def _generating(self, translate: Translate) -> Endpoint:
        async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
            ticket, journal = self._word(scope, TICKET_HEADER, Ticket), self._word(scope, JOURNAL_HEADER, Journal)
            if ticket is not None and journal is not None and journal.size:
                raise BadRequest("an answer that has begun cannot be handed over", param=TICKET_HEADER)
            size = journal.size if journal else 0
            body = await read_body(scope, receive, self._max_body + size)
            setting = self._setting(scope, journal.created if journal else int(time.time()))
            call = await self._translate(translate, body[size:], setting)
            sent = await _read_journal(body[:size]) if journal else None
            if call.handover is not None and not size:
                ticket = self._foreign(scope, call.handover, ticket, answers=journal is not None)
            with self._registered(setting.http_id, call, ticket, journal):
                if ticket is not None and ticket.side == "produce":
                    await unless_gone(self._produce(call, ticket, scope, send), receive)
                else:
                    exchange = Exchange(call, self._service, self._lifecycle, ticket, send, sent)
                    await unless_gone(exchange.run(), receive)

        return endpoint

    def _word(self, scope: Scope, name: str, type_: type[Word]) -> Word | None:
        """What the router says in the header ``name``, if it does; only from one who may say so."""
        text = header(scope, name)
        if text is None:
            return None
        if self._secret and not self._insider(scope):
            raise Unauthorized(f"{name} needs the cluster secret in {SECRET_HEADER}")
        try:
            return msgspec.json.decode(text, type=type_)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadRequest(f"{name}: {error}", param=name) from None

    def _insider(self, scope: Scope) -> bool:
        """Whether the request carries the cluster secret."""
        given = header(scope, SECRET_HEADER) or ""
        return bool(self._secret) and hmac.compare_digest(given.encode(), self._secret.encode())

    def _foreign(self, scope: Scope, word: ForeignTicket, ticket: Ticket | None, *, answers: bool) -> Ticket:
        """The ticket that another router wrote into the body. ``answers``: our own passes our reply on."""
        if ticket is not None:
            raise BadRequest(f"one hand-over by {TICKET_HEADER} and another one in the body: one router too many")
        ticket = self._service.ticket(word, insider=self._insider(scope))
        if answers and ticket.side == "produce":
            raise BadRequest("a prefill for another router is no answer for this one: one router too many")
        return ticket

    def _setting(self, scope: Scope, now: int) -> Setting:
        card = self._service.card()
        return Setting(card, self._service.tokenizer, scope["twostroke.http_id"], now, scope["twostroke.tenant"])

    async def _translate(self, translate: Translate, body: bytes, setting: Setting) -> Call:
        if len(body) <= _BIG_BODY:
            return translate(body, setting)
        return await asyncio.to_thread(translate, body, setting)

    @contextmanager
    def _registered(self, http_id: str, call: Call, ticket: Ticket | None, journal: Journal | None) -> Iterator[None]:
        word = journal or ticket  # the router's own, where another one's ticket stands in the body
        key = (http_id, ticket.side if ticket else "", word.attempt if word else 0)
        if key in self._live:
            raise Conflict(f"a request with the {REQUEST_ID_HEADER} {http_id} is running")
        self._live[key] = call
        try:
            yield
        finally:
            del self._live[key]

    async def _produce(self, call: Call, ticket: Ticket, scope: Scope, send: Send) -> None:
        """The producer's reply: a first token for each prompt, and what vLLM's router shall tell the consumer."""
        card, tokenizer = self._service.card(), self._service.tokenizer
        choices = [Choice(job, card, tokenizer) for job in call.jobs if job.request.choice == 0]
        outputs = await self._service.produce([choice.job.request for choice in choices], ticket)
        passed_on = isinstance(call.handover, KvTransfer)  # in a reply that is not streamed, whatever was asked for
        answer, headers = at_once(call.reply, choices, outputs, stream=call.stream and not passed_on)
        if passed_on:
            answer = add_transfer(answer, self._service.transfer(ticket, *scope["server"][:2]))
        await reply(send, answer, headers=headers)

    async def _abort(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Abort by ``rid``, or by x-request-id where a call has no rid. Unknown ones are no error: it may be over. Our
        router means one attempt: the next may be here already.
        """
        rid = sglang.abort(await read_body(scope, receive, self._max_body))
        only = self._word(scope, ATTEMPT_HEADER, int)
        for (http_id, _, attempt), call in self._live.items():
            if rid in (call.rid, http_id) and only in (None, attempt):
                self._service.abort([job.request for job in call.jobs])
        await reply(send, b"")

    # looking

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, encode(openai.models(self._service.card())))

    async def _ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        health = Health(*self._service.health())
        await reply(send, encode(health), 200 if health.state == "ready" else 503)

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, self._lifecycle.metrics(), headers=[(b"content-type", CONTENT_TYPE_LATEST.encode())])

    async def _timeline(self, scope: Scope, receive: Receive, send: Send) -> None:
        http_id = scope["path_params"]["id"]
        events = self._lifecycle.timeline(http_id)
        if not events:
            raise NotFound(f"no request {http_id!r} is remembered here")
        await reply(send, encode(Timeline(http_id, events)))

    async def _health_generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """SGLang's deep health check: does a token come out?"""
        card = self._service.card()
        token = min(card.eos_token_ids, default=0)
        request = Request(f"health-{token_hex(8)}/0/0", [token], Sampling(max_tokens=1, seed=0, temperature=0.0))
        try:
            async with asyncio.timeout(_PROBE_SECONDS), aclosing(self._service.generate(request, None)) as outputs:
                async for output in outputs:
                    if output.tokens or output.finish:
                        break
        except TimeoutError:
            raise Unavailable(f"no token within {_PROBE_SECONDS:.0f} s") from None
        await reply(send, encode(Health(*self._service.health())))

    async def _model_info(self, scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, encode(sglang.model_info(self._service.card())))

    async def _load(self, scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, encode(sglang.load_info(self._service.load())))

    async def _server_info(self, scope: Scope, receive: Receive, send: Send) -> None:
        await reply(send, encode(sglang.server_info(self._service.card(), self._service.health()[0])))


async def _read_journal(text: bytes) -> list[Sent]:
    try:
        long = len(text) > _BIG_BODY
        lines = await asyncio.to_thread(_LINES.decode_lines, text) if long else _LINES.decode_lines(text)
        return [sent for line in lines for sent in line]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the journal in front of the body: {error}", param=JOURNAL_HEADER) from None


class _Raw:
    """Lets a bound method be a raw ASGI endpoint: Starlette takes plain functions and methods for its own kind."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._endpoint(scope, receive, send)


def route(path: str, endpoint: Endpoint, method: str) -> Route:
    """A route to a raw ASGI endpoint."""
    return Route(path, _Raw(endpoint), methods=[method])
