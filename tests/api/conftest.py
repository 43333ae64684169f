"""A scripted twin of a worker, a tiny real tokenizer, and a real server over a real socket."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aiohttp
import pytest
from hypothesis import settings
from openai import AsyncOpenAI

from tests.tiny_tokenizer import build_tokenizer
from twostroke.api.call import Setting
from twostroke.api.lifecycle import Lifecycle
from twostroke.api.server import build_app
from twostroke.api.service import Load
from twostroke.api.serving import bind, serve
from twostroke.errors import TwostrokeError, Unavailable
from twostroke.messages import ForeignTicket, KvTransfer, ModelCard, Output, Request, Ticket, Token
from twostroke.tokenizer import Tokenizer

settings.register_profile("no deadline", deadline=None)  # other processes may hold the cores
settings.load_profile("no deadline")

MAX_LEN = 256
MAX_BODY = 1 << 20


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def card(tokenizer: Tokenizer) -> ModelCard:
    (eos,) = tokenizer.special_ids
    vocab_size = max(tokenizer.encode("".join(map(chr, range(256))))) + 64
    return ModelCard("tiny", vocab_size, MAX_LEN, frozenset({eos}), created=1_700_000_000)


@pytest.fixture(scope="session")
def setting(card: ModelCard, tokenizer: Tokenizer) -> Setting:
    return Setting(card, tokenizer, "req-1", now=1_700_000_001)


class ScriptedService:
    """Answers every request with the same tokens, one an output, and notes what happens to its generators."""

    def __init__(self, card: ModelCard, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.state = "ready"
        self.script: list[int] = tokenizer.encode("hello world")
        self.hang_after: int | None = None  # outputs, after which the generator waits forever
        self.fail_after: int | None = None  # outputs, after which it raises ``error``
        self.error: Exception = TwostrokeError("scripted")
        self.requests: list[Request] = []
        self.tickets: list[Ticket | None] = []
        self.words: list[tuple[ForeignTicket, bool]] = []
        self.produces = True  # what other routers' words ask for
        self.open = 0
        self.opened: asyncio.Queue[str] = asyncio.Queue()  # request ids, as their generators start
        self.closed = asyncio.Event()  # set when no generator is open any more
        self._aborts: dict[int, asyncio.Event] = {}  # by the very request
        self._card = card

    def card(self) -> ModelCard:
        if self.state != "ready":
            raise Unavailable(f"the worker is {self.state}")
        return self._card

    def health(self) -> tuple[str, str]:
        return self.state, "loading weights" if self.state == "starting" else ""

    async def generate(self, request: Request, ticket: Ticket | None) -> AsyncGenerator[Output, None]:
        self.requests.append(request)
        self.tickets.append(ticket)
        self.open += 1
        self.opened.put_nowait(request.id)
        self.closed.clear()
        try:
            for count, output in enumerate(self._outputs(request)):
                await self._step(count, request)
                yield Output([], "abort") if self._aborted(request) else output
        finally:
            self.open -= 1
            if not self.open:
                self.closed.set()

    def load(self) -> Load:
        return Load(running=2, waiting=1, tokens=50)

    def ticket(self, word: ForeignTicket, *, insider: bool) -> Ticket:
        self.words.append((word, insider))
        return Ticket("foreign", "produce" if self.produces else "consume")

    def transfer(self, ticket: Ticket, host: str, port: int) -> KvTransfer:
        return KvTransfer(do_remote_prefill=True, remote_host=host, remote_port=port)

    async def produce(self, requests: Sequence[Request], ticket: Ticket) -> list[Output]:
        self.requests.extend(requests)
        self.tickets.append(ticket)
        return [Output([self._token(self.script[0], request.sampling.logprobs)], "length") for request in requests]

    def abort(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._aborts.setdefault(id(request), asyncio.Event()).set()

    def _aborted(self, request: Request) -> bool:
        return id(request) in self._aborts and self._aborts[id(request)].is_set()

    async def _step(self, count: int, request: Request) -> None:
        await asyncio.sleep(0)
        if count == self.fail_after:
            raise self.error
        if count == self.hang_after:
            await self._aborts.setdefault(id(request), asyncio.Event()).wait()

    def _outputs(self, request: Request) -> list[Output]:
        sampling = request.sampling
        ids = self.script[: sampling.max_tokens]
        stopped = bool(ids) and ids[-1] in self._card.eos_token_ids | sampling.stop_token_ids
        finish = "stop" if stopped else "length"
        tokens = [self._token(token, sampling.logprobs) for token in ids]
        cached = 0 if request.output else 1
        outputs = [Output([token], None, cached) for token in tokens[:-1]]
        outputs.append(Output(tokens[-1:], finish, cached))  # type: ignore[arg-type]
        assert request.output == ids[: len(request.output)]
        return outputs[len(request.output) :]

    def _token(self, token: int, logprobs: int | None) -> Token:
        if logprobs is None:
            return Token(token)
        return Token(token, -0.5, [((token + i) % 256, -0.5 - i) for i in range(logprobs)])


class Running:
    """A server in this event loop, and ways to call it."""

    def __init__(self, url: str, service: ScriptedService, lifecycle: Lifecycle, http: aiohttp.ClientSession) -> None:
        self.url = url
        self.service = service
        self.lifecycle = lifecycle
        self.http = http
        self.openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@asynccontextmanager
async def running(
    service: ScriptedService, shutdown_seconds: int = 5, api_keys: tuple[str, ...] = ()
) -> AsyncIterator[Running]:
    lifecycle, stop, sock = Lifecycle("worker-0"), asyncio.Event(), bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    app = build_app(service, lifecycle, max_body=MAX_BODY, api_keys=api_keys)
    serving = asyncio.create_task(serve(app, sock, shutdown_seconds=shutdown_seconds, stop=stop))
    try:
        async with aiohttp.ClientSession() as http:
            server = Running(url, service, lifecycle, http)
            yield server
            await server.openai.close()
    finally:
        stop.set()
        await serving


@pytest.fixture
def service(card: ModelCard, tokenizer: Tokenizer) -> ScriptedService:
    return ScriptedService(card, tokenizer)


@pytest.fixture
async def server(service: ScriptedService) -> AsyncIterator[Running]:
    async with running(service) as server:
        yield server
