"""Which workers serve a request. Pure: a view of the workers in, a route out; no clock, no randomness, no I/O."""

from collections.abc import Callable, Sequence
from typing import Generic, Literal, Protocol, TypeVar

from msgspec import Struct

from twostroke.config import Policy
from twostroke.errors import Unavailable

Pool = Literal["prefill", "decode", "colocated"]


class Candidate(Protocol):
    """What a policy may know of a worker."""

    @property
    def pool(self) -> Pool:
        """What the router uses the worker for."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it takes requests now."""
        ...

    @property
    def requests(self) -> int:
        """Requests that it serves or queues."""
        ...

    @property
    def tokens(self) -> int:
        """Prompt tokens, estimated, that it still has to compute."""
        ...


W = TypeVar("W", bound=Candidate)


class Disaggregated(Struct, Generic[W], frozen=True):
    """Prefill on one worker, decode on another; the KV cache is handed over."""

    prefill: W
    decode: W


class Colocated(Struct, Generic[W], frozen=True):
    """One worker does both."""

    worker: W


Route = Disaggregated[W] | Colocated[W]


def choose(workers: Sequence[W], policy: Policy, turn: int) -> Route[W]:
    """Pick the worker that answers, and one to prefill for it if it is a decode worker.

    Decode workers (when a prefill worker is ready to feed them) and colocated workers compete for the request; a
    decode worker wins a tie. ``turn`` is the number of choices made before: round-robin follows it, least-loaded
    breaks ties by it.

    Raises:
        Unavailable: no pair and no colocated worker is ready; the message names what is missing.
    """
    prefill, decode, colocated = (_ready(workers, pool) for pool in ("prefill", "decode", "colocated"))
    answering = [*(decode if prefill else ()), *colocated]
    if not answering:
        raise Unavailable(_missing(workers, bool(prefill), bool(decode)))
    answers = _pick(answering, policy, turn, _by_requests)
    if answers.pool == "colocated":
        return Colocated(answers)
    return Disaggregated(_pick(prefill, policy, turn, _by_tokens), answers)


def successor(workers: Sequence[W], policy: Policy, turn: int) -> W:
    """Pick the worker that continues an answer by itself: one that answers, or a prefill worker if there is no other.

    Raises:
        Unavailable: none is ready.
    """
    decode, colocated, prefill = (_ready(workers, pool) for pool in ("decode", "colocated", "prefill"))
    able = [*decode, *colocated] or prefill
    if not able:
        raise Unavailable("no other worker is ready")
    return _pick(able, policy, turn, _by_requests)


def _by_requests(worker: Candidate) -> tuple[int, ...]:
    """Decode: the batch size sets the time of a step. At equal load, a pair disturbs nobody's decode."""
    return worker.requests, worker.pool == "colocated", worker.tokens


def _by_tokens(worker: Candidate) -> tuple[int, ...]:
    """Prefill: a new prompt waits for all tokens before it."""
    return worker.tokens, worker.requests


def _pick(workers: Sequence[W], policy: Policy, turn: int, load: Callable[[Candidate], tuple[int, ...]]) -> W:
    start = turn % len(workers)
    return workers[start] if policy == "round-robin" else min((*workers[start:], *workers[:start]), key=load)


def _ready(workers: Sequence[W], pool: Pool) -> list[W]:
    return [worker for worker in workers if worker.pool == pool and worker.ready]


def _missing(workers: Sequence[Candidate], prefill: bool, decode: bool) -> str:
    """Names the pools without a ready worker, those only that were configured (all, if none was)."""
    lacking = [pool for pool, ready in (("prefill", prefill), ("decode", decode)) if not ready]
    configured = {worker.pool for worker in workers}
    named = [pool for pool in (*lacking, "colocated") if pool in configured or not configured]
    return f"no route to a model: no {' and no '.join(named or lacking)} worker is ready"
