"""Which tokens of which sequences the next step computes. Pure: no clock, no threads, no tensors.

A sequence waits, then holds slots for all its tokens and runs, until it is finished::

    WAITING ──admit──▶ RUNNING ──finish──▶ FINISHED
     ▲    │              │   ▲
     │    └─▶ LOADING ───│───┘  resume: its blocks came from elsewhere (a hand-over; later a store)
     └──────preempt──────┘        its blocks can be loaded again then

A step computes, for each running sequence, some of the tokens whose KV is not there yet. Prefill, a chunk of prefill,
decode, recomputing after a preemption, and computing what was generated elsewhere are all that one thing.

A step can be planned while earlier ones are in flight: planned, but not committed. A sequence's next token is then
computed before its id is known to us, since the device knows it. If it turns out to end the sequence, that was in vain.
"""

import bisect
from collections import deque
from collections.abc import Collection
from collections.abc import Sequence as Seq
from enum import Enum
from typing import NamedTuple

from twostroke.kv.keys import BlockKey, block_keys
from twostroke.kv.pool import Lease, Pool
from twostroke.messages import FinishReason, Request, Token


class State(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    LOADING = "loading"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One request as the engine sees it: its tokens so far, the slots that hold their KV, how many are computed.

    Tokens ``0 .. computed - 1`` have their KV in ``lease.slots``. Blocks below ``computed`` are never written again.
    Steps in flight compute tokens ``computed .. scheduled - 1``.
    """

    __slots__ = (
        "cached", "computed", "exports", "finish", "keys", "lease", "loads", "order", "published", "reloads", "request",
        "root", "scheduled", "state", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        root: BlockKey,
        *,
        loads: bool = False,
        reloads: bool = False,
        exports: Lease | None = None,
        keys: Seq[BlockKey] = (),
    ) -> None:
        self.request = request
        self.root = root  # parent key of the first block
        self.loads = loads  # stop at LOADING once admitted, for somebody else to bring blocks
        self.reloads = reloads  # the same whenever it is admitted again after it was preempted
        self.exports = exports  # also holds every prompt block as soon as it is computed; outlives the sequence
        self.tokens = [*request.prompt, *request.output]
        self.keys = list(keys)  # of full blocks of ``tokens``, as far as they were needed
        self.lease: Lease | None = None
        self.computed = 0  # tokens
        self.scheduled = 0  # tokens that are computed, or will be by the steps in flight
        self.cached = 0  # prompt tokens that were already there when it was first admitted
        self.published = 0  # full blocks that can be found by key
        self.order = 0  # arrival
        self.state = State.WAITING
        self.finish: FinishReason | None = None

    @property
    def outputs(self) -> int:
        """How many tokens were generated, here or elsewhere."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def flying(self) -> bool:
        """Whether a step in flight computes it: its slots are being written."""
        return self.scheduled > self.computed

    @property
    def length(self) -> int:
        """How many tokens it has once the steps in flight are committed, if none of them ends it; while it is RUNNING.

        Who runs lacks at least one token's KV: if all known ones are scheduled, another one is being sampled.
        """
        return max(len(self.tokens), self.scheduled + 1)

    @property
    def unknown(self) -> int:
        """How many of these are not in ``tokens`` yet: the steps in flight sample them."""
        return self.length - len(self.tokens)

    @property
    def ready(self) -> bool:
        """Whether one more step can compute it. Its last token may still be unknown then, but not if sampling looks at
        it, nor if it is the last by length.
        """
        if self.state is not State.RUNNING or self.finish is not None:
            return False
        unknown, sampling = self.unknown, self.request.sampling
        if unknown == 0:
            return True
        return unknown == 1 and not sampling.needs_history and self.outputs + 1 < sampling.max_tokens

    def slots(self) -> list[int]:
        """Slots of its blocks, in order."""
        return self.lease.slots if self.lease else []

    def extend_keys(self, block_tokens: int) -> None:
        """Bring ``keys`` up to date with ``tokens``."""
        parent = self.keys[-1] if self.keys else self.root
        self.keys += block_keys(parent, self.tokens[len(self.keys) * block_tokens :], block_tokens)


class Chunk(NamedTuple):
    """Compute tokens ``start .. start + size - 1`` of a sequence.

    If ``start == len(sequence.tokens)`` when it is planned, its one token is what the step in flight before it samples.
    """

    sequence: Sequence
    start: int
    size: int
    samples: bool  # it reaches the sequence's last token, so that its logits give the next one


class Result(NamedTuple):
    """A chunk was computed; ``token`` is what it sampled, if anything."""

    sequence: Sequence
    token: Token | None


class Scheduler:
    """Admits by (priority, arrival), decodes before it prefills, preempts the latest arrival when slots run out."""

    def __init__(
        self, pool: Pool, *, block_tokens: int, max_batch: int, token_budget: int, eos: Collection[int]
    ) -> None:
        self.pool = pool
        self.block_tokens = block_tokens
        self.max_batch = max_batch
        self.token_budget = token_budget
        self.eos = frozenset(eos)
        self.waiting: list[Sequence] = []  # sorted by (priority, order)
        self.running: list[Sequence] = []  # LOADING or RUNNING, in order of admission
        self._arrivals = 0
        self.fresh: list[BlockKey] = []  # blocks that became findable; whoever wants to know takes them out
        self.flight: deque[list[Chunk]] = deque()  # steps that are planned but not committed, oldest first

    # -- what others ask for -------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Its prompt plus output must fit into an empty pool, or it would wait for ever."""
        self._arrivals += 1
        sequence.order = self._arrivals
        self._enqueue(sequence)

    def admit(self) -> list[Sequence]:
        """Give waiting sequences their slots, strictly in order; returns those that were admitted."""
        admitted = []
        while self.waiting and len(self.running) < self.max_batch and self._reserve(self.waiting[0]):
            sequence = self.waiting.pop(0)
            sequence.state = State.LOADING if sequence.loads else State.RUNNING
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def loaded(self, sequence: Sequence, tokens: int, *, stored: bool = False) -> None:
        """The KV of the first ``tokens`` tokens of a LOADING sequence is in its slots, verified.

        ``stored``: it was computed for an earlier request.
        """
        assert sequence.state is State.LOADING, f"{sequence.state} sequence cannot load"
        sequence.computed = sequence.scheduled = max(sequence.computed, tokens)
        if stored and not sequence.outputs:
            sequence.cached = sequence.computed
        self._publish(sequence)

    def resume(self, sequence: Sequence, first: Token | None = None) -> None:
        """Nothing more is loaded: compute what is missing. ``first`` is an output token that is already known;
        the sequence is finished at once if it was to have no other.

        If every block came but not the first token, the last prompt token has to be computed again, for its logits.
        Its block can be found by now and must not be written: the sequence is admitted anew, sharing those before it.
        """
        assert sequence.state is State.LOADING, f"{sequence.state} sequence cannot resume"
        sequence.loads = False
        sequence.state = State.RUNNING
        if first is not None:
            self._append(sequence, first.id)
            self._settle(sequence)
        elif sequence.computed == len(sequence.tokens):
            self._preempt(sequence)

    def ending(self, sequence: Sequence, token: int) -> FinishReason | None:
        """Whether ``token``, as the next output token, ends the sequence."""
        sampling, outputs = sequence.request.sampling, sequence.outputs + 1
        ends = token in sampling.stop_token_ids or (token in self.eos and not sampling.ignore_eos)
        if ends and outputs > sampling.min_tokens:
            return "stop"
        return "length" if outputs >= sampling.max_tokens else None

    def abort(self, sequence: Sequence) -> None:
        """End a sequence. While steps in flight compute it, its slots stay held."""
        if sequence.finish is None:
            sequence.finish = "abort"
            self._settle(sequence)

    # -- the step ------------------------------------------------------------------------------------------------

    def plan(self) -> list[Chunk]:
        """Choose the next step's tokens: one of each decoding sequence, then prefill chunks, within the budget.

        Chunks of a single token come first: attention treats them alike. The step is in flight from now on, unless it
        is empty: then nothing can be computed before something else happens, if only the commit of an earlier step.
        """
        budget = self.token_budget
        chunks: list[Chunk] = []
        taken: set[Sequence] = set()  # to make room for others, also after they were planned here
        ready = [sequence for sequence in self.running if sequence.ready]
        for sequence in sorted(ready, key=lambda sequence: sequence.length - sequence.scheduled > 1):
            # A prefill has had room since its admission, but for a first token that came with an incomplete hand-over.
            if budget and sequence not in taken and self._make_room(sequence, taken):
                missing = sequence.length - sequence.scheduled
                size = min(budget, missing)
                chunks.append(Chunk(sequence, sequence.scheduled, size, samples=size == missing))
                budget -= size
        step = sorted((chunk for chunk in chunks if chunk.sequence not in taken), key=lambda chunk: chunk.size > 1)
        for chunk in step:
            chunk.sequence.scheduled += chunk.size
        if step:
            self.flight.append(step)
        return step

    def commit(self, tokens: list[Token]) -> list[Result]:
        """The oldest step in flight is computed and gave one token for each chunk that samples, in order.

        A sequence that has ended since the step was planned has no result.
        """
        sampled = iter(tokens)
        results = []
        for sequence, _, size, samples in self.flight.popleft():
            token = next(sampled) if samples else None
            sequence.computed += size
            self._publish(sequence)
            if sequence.finish is None:
                if token is not None:
                    self._append(sequence, token.id)
                results.append(Result(sequence, token))
            self._settle(sequence)
        return results

    def fail(self, blamed: Collection[Sequence] | None = None) -> list[Sequence]:
        """The newest step in flight could not be computed: it is taken back, and the sequences of it that are blamed
        (``None``: all) are finished. Returns those; the others are planned again.
        """
        failed = []
        for sequence, start, _, _ in self.flight.pop():
            sequence.scheduled = start
            if sequence.finish is None and (blamed is None or sequence in blamed):
                sequence.finish = "abort"
                failed.append(sequence)
            self._settle(sequence)
        return failed

    # -- inside --------------------------------------------------------------------------------------------------

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        bisect.insort(self.waiting, sequence, key=lambda other: (other.request.priority, other.order))

    def _reserve(self, sequence: Sequence) -> bool:
        """Lease slots for all tokens of ``sequence``, sharing the prefix blocks that are in the pool already."""
        sequence.extend_keys(self.block_tokens)
        # The last token is always computed, since its logits are needed; so its block is never a shared one.
        reusable = sequence.keys[: (len(sequence.tokens) - 1) // self.block_tokens]
        lease = self.pool.lease()
        lease.share(self.pool.match(reusable))
        hits = len(lease.slots)
        if not lease.grow(-(-len(sequence.tokens) // self.block_tokens) - hits):
            lease.release()
            return False
        sequence.lease = lease
        sequence.published = hits
        sequence.computed = sequence.scheduled = hits * self.block_tokens
        if not sequence.outputs:
            sequence.cached = sequence.computed
        self._publish(sequence)
        return True

    def _make_room(self, sequence: Sequence, taken: set[Sequence]) -> bool:
        """A slot for the last token of ``sequence``, preempting later arrivals, at worst itself; they are ``taken``.

        Who is in flight cannot be preempted yet. It is not planned any further, so that it can be at the next step.
        Who exports is spared: its exported blocks would stay held, so that it could stand in the way of everybody, and
        it has all its slots and ends with its prefill.
        """
        assert sequence.lease is not None, "a running sequence holds slots"
        needed = -(-sequence.length // self.block_tokens) - len(sequence.lease.slots)
        while not sequence.lease.grow(needed):
            victims = [o for o in self.running if o.state is State.RUNNING and (o.exports is None or o is sequence)]
            victim = max(victims, key=lambda other: (other.request.priority, other.order))
            taken.add(victim)
            if victim.flying:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.loads = sequence.reloads
        self.running.remove(sequence)
        self._enqueue(sequence)

    def _append(self, sequence: Sequence, token: int) -> None:
        sequence.finish = self.ending(sequence, token)
        sequence.tokens.append(token)

    def _publish(self, sequence: Sequence) -> None:
        """Make the blocks that became full and computed findable by key, and hold them for a hand-over."""
        # A sequence that has ended never gets to know what else was sampled and computed for it.
        full = min(sequence.computed, len(sequence.tokens)) // self.block_tokens
        prompt = len(sequence.request.prompt)
        if full > len(sequence.keys):
            sequence.extend_keys(self.block_tokens)
        for index in range(sequence.published, full):
            self.pool.publish(sequence.slots()[index], sequence.keys[index])
        self.fresh += sequence.keys[sequence.published : full]
        sequence.published = max(sequence.published, full)
        exports = sequence.exports
        if exports is not None and exports.alive:
            # The prompt's partial last block goes out once it is complete; no later token is written into it,
            # because a sequence that exports ends with its first token.
            complete = full if sequence.computed < prompt else -(-prompt // self.block_tokens)
            exports.share(sequence.slots()[len(exports.slots) : complete])

    def _release(self, sequence: Sequence) -> None:
        if sequence.lease is not None:
            sequence.lease.release()
            sequence.lease = None
        sequence.computed = sequence.scheduled = sequence.published = 0

    def _settle(self, sequence: Sequence) -> None:
        """Retire a sequence that has ended, unless its slots are still being written."""
        if sequence.finish is None or sequence.flying:
            return
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        self._release(sequence)
        sequence.state = State.FINISHED
