"""What the API needs from whatever generates: a worker's engine, or a scripted twin in tests."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from msgspec import Struct

from twostroke.messages import ForeignTicket, KvTransfer, ModelCard, Output, Request, Ticket
from twostroke.tokenizer import Tokenizer


class Load(Struct, frozen=True):
    """How much a worker has to do."""

    running: int  # sequences
    waiting: int
    tokens: int  # that hold KV, or are still to be computed


class Service(Protocol):
    """Generates tokens. All methods are called on the event loop."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the served model. Only asked for after ``card`` has answered."""
        ...

    def card(self) -> ModelCard:
        """What is served.

        Raises:
            Unavailable: the worker is starting or draining.
        """
        ...

    def health(self) -> tuple[str, str]:
        """The state ("starting", "ready" or "draining"), and in words what the worker is doing."""
        ...

    def load(self) -> Load:
        """How much there is to do now. Raises ``Unavailable`` like ``card``."""
        ...

    def ticket(self, word: ForeignTicket, *, insider: bool) -> Ticket:
        """What another router's word asks of us. ``insider``: the request came with the cluster secret.

        Raises:
            BadRequest, Unauthorized: it is not for us, or not to be believed.
        """
        ...

    def transfer(self, ticket: Ticket, host: str, port: int) -> KvTransfer:
        """The word for the consumer of what this ticket let us produce. The address is ours."""
        ...

    def generate(self, request: Request, ticket: Ticket | None) -> AsyncGenerator[Output, None]:
        """Outputs of one sequence, the last one with ``finish`` set.

        ``aclose`` aborts, and so does cancelling the reader. Raises ``RequestError``s.
        """
        ...

    async def produce(self, requests: Sequence[Request], ticket: Ticket) -> list[Output]:
        """Be the prefill end of a hand-over of these prompts. Returns their first tokens."""
        ...

    def abort(self, requests: Sequence[Request]) -> None:
        """End the sequences of these very requests, which it was given, with finish reason "abort"."""
        ...
