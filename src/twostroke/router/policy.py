"""Which workers serve a request. Pure: a view of the workers in, a route out; no clock, no randomness, no I/O.

Loads are tokens. A worker that computes a prompt first computes what is queued there, less what it knows already.
Tokens whose KV is resident make every step of a decoding worker read more memory: far less than computing them, but
for as long as they stay.
"""

from collections.abc import Mapping, Sequence
from typing import Generic, Literal, Protocol, TypeVar

from msgspec import Struct

from twostroke.config import Policy
from twostroke.errors import Unavailable

Pool = Literal["prefill", "decode", "colocated"]

# A resident token costs each of, say, 256 steps its KV bytes of bandwidth: on an H200 (57 KB, 4 TB/s) 3.7 µs, against
# 24 µs for computing a token. See README.md for what was measured.
RESIDENT = 8  # resident tokens weigh as much as one to compute
ANSWER_TOKENS = 256  # room that an answer is expected to need; nobody knows


class Candidate(Protocol):
    """What a policy may know of a worker."""

    @property
    def key(self) -> str:
        """Names the process."""
        ...

    @property
    def pool(self) -> Pool:
        """What the router uses the worker for."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it takes requests now."""
        ...

    @property
    def queued(self) -> int:
        """Prompt tokens, estimated, that it still has to compute."""
        ...

    @property
    def resident(self) -> int:
        """Tokens, estimated, whose KV its requests hold or will hold."""
        ...


W = TypeVar("W", bound=Candidate)


class Prompt(Struct, frozen=True):
    """What a policy may know of a request."""

    tokens: int = 0  # estimated
    known: Mapping[str, int] = {}  # of these, by worker ``key``: how many are probably in its cache

    def missing(self, worker: Candidate) -> int:
        """Tokens that the worker would have to compute."""
        return max(0, self.tokens - self.known.get(worker.key, 0))


class Rules(Struct, frozen=True):
    """How to choose."""

    policy: Policy = "least-loaded"
    short: int = 0  # tokens to compute, below which a decode worker does it by itself


class Disaggregated(Struct, Generic[W], frozen=True):
    """Prefill on one worker, decode on another; the KV cache is handed over."""

    prefill: W
    decode: W


class Colocated(Struct, Generic[W], frozen=True):
    """One worker does both."""

    worker: W


Route = Disaggregated[W] | Colocated[W]
ANY = Prompt()


def choose(workers: Sequence[W], rules: Rules, turn: int, prompt: Prompt = ANY) -> Route[W]:
    """Pick the route with least to compute before the first token, and least that slows all others down.

    Pairs and colocated workers compete. A decode worker computes what is ``short`` by itself; it computes everything,
    and so does a prefill worker, while nobody else is there. ``turn`` is the number of choices made before:
    round-robin follows it, and ties are broken by it.

    Raises:
        Unavailable: no worker is ready.
    """
    prefill, answering = _pools(workers, turn)
    if not answering:
        raise Unavailable(_missing(workers))

    def computing(worker: W) -> int:
        return worker.queued + prompt.missing(worker)

    first = prefill[0] if rules.policy == "round-robin" and prefill else min(prefill, key=computing, default=None)

    def alone(worker: W) -> bool:
        return worker.pool != "decode" or first is None or prompt.missing(worker) < rules.short

    def cost(worker: W) -> tuple[int, bool]:
        """At equal cost, a pair disturbs nobody's decode."""
        by_itself = alone(worker)
        computes = worker if by_itself or first is None else first
        return computing(computes) + worker.resident // RESIDENT, by_itself

    answers = answering[0] if rules.policy == "round-robin" else min(answering, key=cost)
    if first is None or alone(answers):
        return Colocated(answers)
    return Disaggregated(first, answers)


def successor(workers: Sequence[W], rules: Rules, turn: int, prompt: Prompt = ANY) -> W:
    """Pick the worker that continues an answer by itself: one that answers, or a prefill worker if there is no other.

    Raises:
        Unavailable: none is ready.
    """
    _, able = _pools(workers, turn)
    if not able:
        raise Unavailable("no other worker is ready")

    def cost(worker: W) -> int:
        return worker.queued + prompt.missing(worker) + worker.resident // RESIDENT

    return able[0] if rules.policy == "round-robin" else min(able, key=cost)


def _pools(workers: Sequence[W], turn: int) -> tuple[list[W], list[W]]:
    """Ready workers: those that prefill, and those that answer, which the former do only if there is nobody else."""
    decode, colocated, prefill = (
        [worker for worker in workers if worker.pool == pool and worker.ready]
        for pool in ("decode", "colocated", "prefill")
    )
    return _in_turn(prefill, turn), _in_turn([*decode, *colocated] or prefill, turn)


def _in_turn(workers: list[W], turn: int) -> list[W]:
    """``min`` takes the first of equals, so each is the first in its turn."""
    start = turn % len(workers) if workers else 0
    return workers[start:] + workers[:start]


def _missing(workers: Sequence[Candidate]) -> str:
    """Names the pools that were configured (all, if none was): no worker of them is ready."""
    pools = ("prefill", "decode", "colocated")
    configured = {worker.pool for worker in workers}
    named = [pool for pool in pools if pool in configured or not configured]
    return f"no route to a model: no {' and no '.join(named)} worker is ready"
