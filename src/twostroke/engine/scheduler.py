"""Which tokens of which sequences the next step computes. Pure: no clock, no threads, no tensors.

A sequence waits, then holds slots for all its tokens and runs, until it is finished::

    WAITING ──admit──▶ RUNNING ──finish──▶ FINISHED
     ▲    │              │   ▲
     │    └─▶ LOADING ───│───┘  resume: its blocks came from elsewhere (a hand-over; later a store)
     └──────preempt──────┘

A step computes, for each running sequence, some of the tokens whose KV is not there yet. Prefill, a chunk of prefill,
decode, and recomputing after a preemption are all that one thing.
"""

import bisect
from collections.abc import Collection
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
    """

    __slots__ = (
        "cached", "computed", "exports", "finish", "keys", "lease", "loads", "order", "published", "request", "root",
        "state", "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, root: BlockKey, *, loads: bool = False, exports: Lease | None = None) -> None:
        self.request = request
        self.root = root  # parent key of the first block
        self.loads = loads  # stop at LOADING once admitted, for somebody else to bring blocks
        self.exports = exports  # also holds every prompt block as soon as it is computed; outlives the sequence
        self.tokens = list(request.prompt)
        self.keys: list[BlockKey] = []  # of full blocks of ``tokens``, as far as they were needed
        self.lease: Lease | None = None
        self.computed = 0  # tokens
        self.cached = 0  # prompt tokens that were already there when it was first admitted
        self.published = 0  # full blocks that can be found by key
        self.order = 0  # arrival
        self.state = State.WAITING
        self.finish: FinishReason | None = None

    @property
    def outputs(self) -> int:
        """How many tokens were generated."""
        return len(self.tokens) - len(self.request.prompt)

    def slots(self) -> list[int]:
        """Slots of its blocks, in order."""
        return self.lease.slots if self.lease else []

    def extend_keys(self, block_tokens: int) -> None:
        """Bring ``keys`` up to date with ``tokens``."""
        parent = self.keys[-1] if self.keys else self.root
        self.keys += block_keys(parent, self.tokens[len(self.keys) * block_tokens :], block_tokens)


class Chunk(NamedTuple):
    """Compute tokens ``start .. start + size - 1`` of a sequence."""

    sequence: Sequence
    start: int
    size: int

    @property
    def samples(self) -> bool:
        """Whether it reaches the sequence's last token, so that its logits give the next one."""
        return self.start + self.size == len(self.sequence.tokens)


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
        self._planned: list[Chunk] = []  # what the engine computes right now

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

    def loaded(self, sequence: Sequence, tokens: int) -> None:
        """The KV of the first ``tokens`` tokens of a LOADING sequence is in its slots, verified."""
        assert sequence.state is State.LOADING, f"{sequence.state} sequence cannot load"
        sequence.computed = max(sequence.computed, tokens)
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
            if sequence.finish is not None:
                self._retire(sequence)
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
        """End a sequence. If the present step computes it, its slots stay held until that step is committed."""
        if sequence.state is State.FINISHED:
            return
        sequence.finish = "abort"
        if not any(chunk.sequence is sequence for chunk in self._planned):
            self._retire(sequence)

    # -- the step ------------------------------------------------------------------------------------------------

    def plan(self) -> list[Chunk]:
        """Choose the next step's tokens: one of each decoding sequence, then prefill chunks, within the budget.

        Chunks of a single token come first: attention treats them alike.
        """
        budget = self.token_budget
        chunks: list[Chunk] = []
        runnable = [sequence for sequence in self.running if sequence.state is State.RUNNING]
        decoding = [sequence for sequence in runnable if len(sequence.tokens) - sequence.computed == 1]
        prefilling = [sequence for sequence in runnable if len(sequence.tokens) - sequence.computed > 1]
        for sequence in decoding:
            if budget and sequence.state is State.RUNNING and self._make_room(sequence):
                chunks.append(Chunk(sequence, sequence.computed, 1))
                budget -= 1
        for sequence in prefilling:
            # Room is there since admission, but for a first token that came with an incomplete hand-over.
            if budget and sequence.state is State.RUNNING and self._make_room(sequence):
                size = min(budget, len(sequence.tokens) - sequence.computed)
                chunks.append(Chunk(sequence, sequence.computed, size))
                budget -= size
        # Making room for one sequence can have preempted another that was planned before it.
        chunks = [chunk for chunk in chunks if chunk.sequence.state is State.RUNNING]
        self._planned = sorted(chunks, key=lambda chunk: chunk.size > 1)
        return self._planned

    def commit(self, tokens: list[Token]) -> list[Result]:
        """The planned step is computed and gave one token for each chunk that samples, in order."""
        sampled = iter(tokens)
        results = []
        planned, self._planned = self._planned, []
        for chunk in planned:
            sequence = chunk.sequence
            token = next(sampled) if chunk.samples else None
            sequence.computed += chunk.size
            self._publish(sequence)
            if sequence.finish is None:  # else it was aborted during the step
                if token is not None:
                    self._append(sequence, token.id)
                results.append(Result(sequence, token))
            if sequence.finish is not None:
                self._retire(sequence)
        return results

    def fail(self) -> list[Sequence]:
        """The planned step could not be computed: its sequences are finished. Returns them."""
        planned, self._planned = self._planned, []
        for chunk in planned:
            chunk.sequence.finish = "abort"
            self._retire(chunk.sequence)
        return [chunk.sequence for chunk in planned]

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
        sequence.computed = hits * self.block_tokens
        if not sequence.outputs:
            sequence.cached = sequence.computed
        self._publish(sequence)
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """A slot for the last token of ``sequence``, preempting later arrivals, at worst itself.

        Who exports is spared: its exported blocks would stay held, so that it could stand in the way of everybody, and
        it has all its slots and ends with its prefill.
        """
        assert sequence.lease is not None, "a running sequence holds slots"
        needed = -(-len(sequence.tokens) // self.block_tokens) - len(sequence.lease.slots)
        while not sequence.lease.grow(needed):
            victims = [o for o in self.running if o.state is State.RUNNING and (o.exports is None or o is sequence)]
            victim = max(victims, key=lambda other: (other.request.priority, other.order))
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self.running.remove(sequence)
        self._enqueue(sequence)

    def _append(self, sequence: Sequence, token: int) -> None:
        sequence.finish = self.ending(sequence, token)
        sequence.tokens.append(token)

    def _publish(self, sequence: Sequence) -> None:
        """Make the blocks that became full and computed findable by key, and hold them for a hand-over."""
        full = sequence.computed // self.block_tokens
        prompt = len(sequence.request.prompt)
        if full > len(sequence.keys):
            sequence.extend_keys(self.block_tokens)
        for index in range(sequence.published, full):
            self.pool.publish(sequence.slots()[index], sequence.keys[index])
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
        sequence.computed = sequence.published = 0

    def _retire(self, sequence: Sequence) -> None:
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        self._release(sequence)
        sequence.state = State.FINISHED
