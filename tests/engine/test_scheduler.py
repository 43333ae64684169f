"""The scheduler: each promise by example, and any sequence of events against a model that reads its whole context."""

import hashlib
from collections import deque
from collections.abc import Collection
from collections.abc import Sequence as Seq

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from twostroke.engine.scheduler import Chunk, Result, Scheduler, Sequence, State
from twostroke.kv.keys import root_key
from twostroke.kv.pool import Lease, Pool
from twostroke.messages import FinishReason, Request, Sampling, Slots, Token

ROOT = root_key("layout", "")
EOS = 0


def pure_token(id_: str, position: int) -> int:
    """What the fake model answers: decided by the request and the position alone. One in eight is EOS."""
    return hashlib.blake2b(f"{id_}:{position}".encode()).digest()[0] % 8


def expected(request: Request) -> tuple[list[int], FinishReason]:
    """The output of a request that nothing disturbs."""
    sampling, tokens = request.sampling, list[int]()
    while True:
        token = pure_token(request.id, len(request.prompt) + len(tokens))
        tokens.append(token)
        stops = token in sampling.stop_token_ids or (token == EOS and not sampling.ignore_eos)
        if stops and len(tokens) > sampling.min_tokens:
            return tokens, "stop"
        if len(tokens) == sampling.max_tokens:
            return tokens, "length"


class Launch:
    """A step in flight, as the device has it: block tables and tokens are those of when it was planned."""

    def __init__(self, chunks: Seq[Chunk], block_tokens: int) -> None:
        self.chunks = chunks
        self.block_tokens = block_tokens
        self.tables = [c.sequence.slots()[: -(-(c.start + c.size) // block_tokens)] for c in chunks]
        self.known = [c.sequence.tokens[: c.start + c.size] for c in chunks]
        self.sampled: list[Token] | None = None  # once it is computed

    def __contains__(self, sequence: Sequence) -> bool:
        return any(chunk.sequence is sequence for chunk in self.chunks)

    def written(self) -> list[int]:
        """The slots that it writes."""
        pairs = zip(self.chunks, self.tables, strict=True)
        return [slot for chunk, table in pairs for slot in table[chunk.start // self.block_tokens :]]


class FakeModel:
    """Stands for the network: what it keeps for a token depends on all tokens before, as real KV does, and it checks
    that it finds the whole context where the scheduler says it is.
    """

    def __init__(self, total: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.kv: list[list[int | None]] = [[None] * block_tokens for _ in range(total)]
        self.last: dict[Sequence, int] = {}  # the token that was last sampled

    def write(self, slots: Seq[int], tokens: Seq[int], start: int, end: int) -> None:
        for at in range(start, end):
            self.kv[slots[at // self.block_tokens]][at % self.block_tokens] = hash(tuple(tokens[: at + 1]))

    def check(self, slots: Seq[int], tokens: Seq[int], end: int) -> None:
        for at in range(end):
            found = self.kv[slots[at // self.block_tokens]][at % self.block_tokens]
            assert found == hash(tuple(tokens[: at + 1])), f"token {at} has another token's KV"

    def forward(self, step: Launch) -> None:
        contexts = []
        for chunk, known in zip(step.chunks, step.known, strict=True):
            end = chunk.start + chunk.size
            contexts.append(known if len(known) == end else [*known, self.last[chunk.sequence]])
            assert len(contexts[-1]) == end, "only a chunk's one token can be unknown"
        for chunk, table, tokens in zip(step.chunks, step.tables, contexts, strict=True):
            self.write(table, tokens, chunk.start, len(tokens))
        for table, tokens in zip(step.tables, contexts, strict=True):
            self.check(table, tokens, len(tokens))
        step.sampled = []
        for chunk, tokens in zip(step.chunks, contexts, strict=True):
            if chunk.samples:
                self.last[chunk.sequence] = pure_token(chunk.sequence.request.id, len(tokens))
                step.sampled.append(Token(self.last[chunk.sequence]))

    def spoil(self, step: Launch) -> None:
        """What a step leaves behind that breaks off."""
        for chunk, table in zip(step.chunks, step.tables, strict=True):
            for at in range(chunk.start, chunk.start + chunk.size):
                self.kv[table[at // self.block_tokens]][at % self.block_tokens] = None


class Bench:
    """A scheduler and a fake model to step it with."""

    def __init__(self, slots: int = 16, block_tokens: int = 4, max_batch: int = 8, token_budget: int = 16) -> None:
        self.pool = Pool(slots)
        self.model = FakeModel(slots, block_tokens)
        self.scheduler = Scheduler(
            self.pool, block_tokens=block_tokens, max_batch=max_batch, token_budget=token_budget, eos=[EOS]
        )
        self.flight: deque[Launch] = deque()
        self._next = 0

    def add(
        self,
        prompt: Seq[int] = (1, 2, 3),
        *,
        max_tokens: int = 4,
        priority: int = 0,
        loads: bool = False,
        exports: Lease | None = None,
        id_: str = "",
        ignore_eos: bool = True,
        min_tokens: int = 0,
        stop: frozenset[int] = frozenset(),
        penalty: float = 0,
    ) -> Sequence:
        self._next += 1
        sampling = Sampling(
            max_tokens, 0, ignore_eos=ignore_eos, min_tokens=min_tokens, stop_token_ids=stop, frequency_penalty=penalty
        )
        request = Request(id_ or f"r{self._next}/0/0", list(prompt), sampling, priority=priority)
        sequence = Sequence(request, ROOT, loads=loads, exports=exports)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Result]:
        self.planned()
        return self.commit()

    def finish(self, depth: int = 1, limit: int = 200) -> None:
        """Step until nothing is left to do, with up to ``depth`` steps in flight."""
        for _ in range(limit):
            while len(self.flight) < depth and self.planned():
                pass
            self.commit()
            if not self.scheduler.running and not self.scheduler.waiting:
                return
        raise AssertionError("sequences starve")

    def planned(self) -> list[tuple[Sequence, int, int]]:
        """Begin a step; ``commit`` ends the oldest."""
        self.scheduler.admit()
        chunks = self.scheduler.plan()
        if chunks:
            self.flight.append(Launch(chunks, self.model.block_tokens))
        return [(chunk.sequence, chunk.start, chunk.size) for chunk in chunks]

    def compute(self) -> None:
        """Compute the oldest step in flight that is not computed yet."""
        self.model.forward(next(step for step in self.flight if step.sampled is None))

    def commit(self) -> list[Result]:
        if not self.flight:
            return []
        if self.flight[0].sampled is None:
            self.compute()
        sampled = self.flight.popleft().sampled
        assert sampled is not None
        return self.scheduler.commit(sampled)

    def fail(self, blamed: Collection[Sequence] | None = None) -> list[Sequence]:
        """The newest step breaks off."""
        self.model.spoil(self.flight.pop())
        return self.scheduler.fail(blamed)

    @property
    def counts(self) -> Slots:
        return self.pool.counts()


def output(sequence: Sequence) -> list[int]:
    return sequence.tokens[len(sequence.request.prompt) :]


# -- one promise at a time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_gets_its_tokens_and_leaves_nothing_held(depth: int) -> None:
    bench = Bench()
    sequence = bench.add(range(1, 11), max_tokens=9)
    bench.finish(depth)
    assert (output(sequence), sequence.finish) == expected(sequence.request)
    assert sequence.state is State.FINISHED
    assert bench.counts.leased == 0


def test_admission_is_by_priority_then_arrival() -> None:
    bench = Bench(max_batch=1)
    late, first, second, urgent = (bench.add(priority=priority) for priority in (1, 0, 0, -1))
    order = []
    for _ in range(4):
        order += bench.scheduler.admit()
        while bench.scheduler.running:
            bench.step()
    assert order == [urgent, first, second, late]


def test_admission_does_not_skip_who_is_first() -> None:
    """A large request is not overtaken for ever by small ones that still fit."""
    bench = Bench(slots=4, block_tokens=4)
    bench.add(range(1, 9))
    large, small = bench.add(range(1, 17)), bench.add([1])
    assert len(bench.scheduler.admit()) == 1
    assert bench.scheduler.waiting == [large, small]


def test_max_batch_bounds_what_runs() -> None:
    bench = Bench(max_batch=2)
    for _ in range(5):
        bench.add()
    assert len(bench.scheduler.admit()) == 2
    assert len(bench.scheduler.plan()) == 2


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    bench = Bench(token_budget=5)
    sequence = bench.add(range(1, 13))
    chunks, tokens = [], []
    for _ in range(3):
        chunks += bench.planned()
        tokens.append([result.token for result in bench.commit()])
    assert chunks == [(sequence, 0, 5), (sequence, 5, 5), (sequence, 10, 2)]
    assert tokens[:2] == [[None], [None]]
    assert tokens[2] == [Token(pure_token(sequence.request.id, 12))]


def test_decodes_come_before_prefills_and_singles_first() -> None:
    bench = Bench(token_budget=6)
    decoding = bench.add([1, 2, 3])
    bench.step()
    long, single = bench.add(range(10, 14)), bench.add([7])
    assert bench.planned() == [(decoding, 3, 1), (single, 0, 1), (long, 0, 4)]


def test_prefills_share_what_decodes_leave_of_the_budget() -> None:
    bench = Bench(token_budget=6)
    decoding = bench.add([1, 2, 3])
    bench.step()
    long, longer = bench.add(range(10, 14)), bench.add(range(20, 30))
    assert bench.planned() == [(decoding, 3, 1), (longer, 0, 1), (long, 0, 4)]


def test_a_known_prefix_is_shared_not_computed() -> None:
    bench = Bench(block_tokens=4)
    one = bench.add(range(1, 11))
    bench.step()
    two = bench.add([*range(1, 9), 50, 51])
    bench.scheduler.admit()
    assert (two.computed, two.cached) == (8, 8)
    assert two.slots()[:2] == one.slots()[:2]
    assert not set(two.slots()[2:]) & set(one.slots())
    bench.finish()
    assert output(two) == expected(two.request)[0]


def test_a_prefix_is_found_after_its_request_ended() -> None:
    bench = Bench(block_tokens=4)
    bench.add(range(1, 11))
    bench.finish()
    again = bench.add(range(1, 11))
    bench.scheduler.admit()
    assert again.cached == 8


def test_the_last_token_is_computed_even_if_its_block_is_known() -> None:
    """Its logits are needed, and a shared block must not be written: so the whole last block is computed again."""
    bench = Bench(block_tokens=4)
    bench.add(range(1, 9))
    bench.finish()
    again = bench.add(range(1, 9))
    bench.scheduler.admit()
    assert again.computed == 4
    bench.finish()
    assert output(again) == expected(again.request)[0]


def test_outputs_are_cached_too() -> None:
    """The next turn of a conversation starts with this turn's answer."""
    bench = Bench(block_tokens=4)
    one = bench.add([1, 2, 3], max_tokens=10)
    bench.finish()
    two = bench.add([*one.tokens, 9, 9])
    bench.scheduler.admit()
    assert two.cached == 12  # of 13 tokens the last was never computed


def test_salted_prefixes_are_not_shared() -> None:
    bench = Bench()
    bench.add(range(1, 11))
    bench.finish()
    other = Sequence(Request("x/0/0", list(range(1, 11)), Sampling(1, 0)), root_key("layout", "tenant"))
    bench.scheduler.add(other)
    bench.scheduler.admit()
    assert other.cached == 0


def first_eos(limit: int = 1000) -> tuple[str, int]:
    """A request id whose first EOS comes after at least three other tokens, and how many tokens come before it."""
    for number in range(limit):
        tokens = [pure_token(f"e{number}/0/0", 3 + position) for position in range(12)]
        if EOS in tokens and tokens.index(EOS) >= 3 and EOS in tokens[tokens.index(EOS) + 1 :]:
            return f"e{number}/0/0", tokens.index(EOS)
    raise AssertionError("no such id")


def test_eos_ends_a_sequence_and_is_its_last_token() -> None:
    bench = Bench()
    id_, before = first_eos()
    sequence = bench.add(id_=id_, max_tokens=12, ignore_eos=False)
    bench.finish()
    assert (len(output(sequence)), output(sequence)[-1], sequence.finish) == (before + 1, EOS, "stop")


def test_ignore_eos_goes_on() -> None:
    bench = Bench()
    sequence = bench.add(id_=first_eos()[0], max_tokens=12)
    bench.finish()
    assert (len(output(sequence)), sequence.finish) == (12, "length")


def test_stop_tokens_end_a_sequence_also_with_ignore_eos() -> None:
    bench = Bench()
    id_, before = first_eos()
    sequence = bench.add(id_=id_, max_tokens=12, stop=frozenset([EOS]))
    bench.finish()
    assert (len(output(sequence)), sequence.finish) == (before + 1, "stop")


def test_nothing_ends_a_sequence_before_min_tokens() -> None:
    bench = Bench()
    id_, before = first_eos()
    sequence = bench.add(id_=id_, max_tokens=12, ignore_eos=False, min_tokens=before + 1)
    bench.finish()
    assert len(output(sequence)) > before + 1
    assert sequence.finish == "stop"


def test_preemption_takes_the_least_urgent_then_the_latest() -> None:
    bench = Bench(slots=3, block_tokens=4)
    urgent = bench.add([1, 2, 3, 4], max_tokens=8, priority=-1)
    first = bench.add([5, 6, 7, 8], max_tokens=8)
    bench.step()  # each has 4 tokens in its block and one more to store; there is one slot for it
    assert bench.planned() == [(urgent, 4, 1)]
    assert first.state is State.WAITING
    assert first.slots() == []
    bench.commit()


def test_a_preempted_sequence_goes_on_as_if_nothing_had_been() -> None:
    bench = Bench(slots=4, block_tokens=2, token_budget=6)
    sequences = [bench.add([number, 1, 1], max_tokens=5) for number in range(3)]
    preempted = False
    for _ in range(100):
        bench.step()
        preempted |= any(s.state is State.WAITING and s.outputs for s in sequences)
    assert preempted
    assert [output(s) for s in sequences] == [expected(s.request)[0] for s in sequences]
    assert bench.counts.leased == 0


def test_room_for_an_urgent_sequence_can_come_from_one_that_is_planned_already() -> None:
    bench = Bench(slots=3, block_tokens=4)
    first = bench.add([1, 2, 3], max_tokens=8)
    bench.step()
    bench.step()  # it has filled its block
    urgent = bench.add([5, 6, 7, 8], max_tokens=8, priority=-1)
    bench.step()
    assert bench.counts.free == 0
    assert bench.planned() == [(urgent, 4, 1)]
    assert first.state is State.WAITING
    bench.commit()
    bench.finish()
    assert output(first) == expected(first.request)[0]


def test_a_preempted_sequence_keeps_its_place_in_the_queue() -> None:
    bench = Bench(slots=2, block_tokens=4)
    bench.add([1, 2, 3, 4], max_tokens=4)
    second, third = bench.add([5, 6, 7, 8], max_tokens=4), bench.add([9])
    bench.step()
    bench.planned()
    assert bench.scheduler.waiting == [second, third]


def test_cached_counts_what_was_there_at_first() -> None:
    """A prompt that is found again after a preemption was computed for this very request."""
    bench = Bench(slots=2, block_tokens=4)
    bench.add([1, 2, 3, 4], max_tokens=4)
    second = bench.add([5, 6, 7, 8], max_tokens=4)
    bench.finish()
    assert second.cached == 0


def test_abort_of_a_waiting_sequence() -> None:
    bench = Bench(max_batch=1)
    bench.add()
    waiting = bench.add()
    bench.scheduler.admit()
    bench.scheduler.abort(waiting)
    assert (waiting.state, waiting.finish, bench.scheduler.waiting) == (State.FINISHED, "abort", [])


def test_abort_of_a_preempted_sequence() -> None:
    bench = Bench(slots=3, block_tokens=4)
    bench.add([1, 2, 3, 4], max_tokens=8)
    preempted = bench.add([5, 6, 7, 8], max_tokens=8)
    bench.step()
    bench.step()
    assert (preempted.state, preempted.outputs, preempted.flying) == (State.WAITING, 1, False)
    bench.scheduler.abort(preempted)
    assert (preempted.state, bench.scheduler.waiting) == (State.FINISHED, [])


def test_abort_between_steps_frees_at_once() -> None:
    bench = Bench()
    sequence = bench.add()
    bench.step()
    bench.scheduler.abort(sequence)
    assert (sequence.state, sequence.finish) == (State.FINISHED, "abort")
    assert bench.counts.leased == 0


def test_abort_during_a_step_holds_the_slots_until_it_is_committed() -> None:
    """The engine still writes them."""
    bench = Bench()
    sequence, other = bench.add([1] * 5), bench.add([2] * 5)
    bench.planned()
    bench.scheduler.abort(sequence)
    assert bench.counts.leased == 4
    results = bench.commit()
    assert [result.sequence for result in results] == [other]
    assert (sequence.state, output(sequence)) == (State.FINISHED, [])
    assert bench.counts.leased == 2


def test_aborting_twice_is_harmless() -> None:
    bench = Bench()
    sequence = bench.add()
    bench.finish()
    bench.scheduler.abort(sequence)
    assert sequence.finish == "length"


def test_a_failed_step_ends_what_it_computed_and_nothing_else() -> None:
    bench = Bench(max_batch=2)
    planned = [bench.add(), bench.add()]
    waiting = bench.add()
    bench.planned()
    assert bench.fail() == planned
    assert [sequence.finish for sequence in planned] == ["abort", "abort"]
    assert bench.counts.leased == 0
    bench.finish()
    assert output(waiting) == expected(waiting.request)[0]


def test_a_loading_sequence_holds_slots_and_is_not_planned() -> None:
    bench = Bench()
    sequence = bench.add(range(1, 11), loads=True)
    assert bench.scheduler.admit() == [sequence]
    assert (sequence.state, len(sequence.slots())) == (State.LOADING, 3)
    assert bench.scheduler.plan() == []


def test_a_loaded_prompt_is_not_computed() -> None:
    bench = Bench()
    sequence = bench.add(range(1, 11), loads=True)
    bench.scheduler.admit()
    bench.model.write(sequence.slots(), sequence.tokens, 0, 10)
    bench.scheduler.loaded(sequence, 10)
    bench.scheduler.resume(sequence, Token(pure_token(sequence.request.id, 10)))
    assert bench.planned() == [(sequence, 10, 1)]
    bench.commit()
    bench.finish()
    assert output(sequence) == expected(sequence.request)[0]


@pytest.mark.parametrize("tokens", [0, 4, 8])
def test_what_was_not_loaded_is_computed(tokens: int) -> None:
    bench = Bench()
    sequence = bench.add(range(1, 11), loads=True)
    bench.scheduler.admit()
    bench.model.write(sequence.slots(), sequence.tokens, 0, tokens)
    bench.scheduler.loaded(sequence, tokens)
    bench.scheduler.resume(sequence)
    assert bench.planned() == [(sequence, tokens, 10 - tokens)]
    bench.commit()
    bench.finish()
    assert output(sequence) == expected(sequence.request)[0]


@pytest.mark.parametrize("prompt", [8, 10])
def test_a_wholly_loaded_prompt_whose_first_token_is_not_known(prompt: int) -> None:
    """The producer was lost between its last block and its token: somebody has to compute the last token again."""
    bench = Bench()
    sequence = bench.add(range(1, prompt + 1), loads=True)
    bench.scheduler.admit()
    bench.model.write(sequence.slots(), sequence.tokens, 0, prompt)
    bench.scheduler.loaded(sequence, prompt)
    bench.scheduler.resume(sequence)
    bench.finish()
    assert output(sequence) == expected(sequence.request)[0]
    assert bench.counts.leased == 0


@pytest.mark.parametrize("prompt", [8, 10])
@pytest.mark.parametrize("tokens", [0, 4])
def test_a_known_first_token_whose_prompt_is_not_wholly_loaded(prompt: int, tokens: int) -> None:
    """The producer was lost after its token and before its last blocks; that token may need a block of its own."""
    bench = Bench()
    sequence = bench.add(range(1, prompt + 1), loads=True)
    bench.scheduler.admit()
    bench.model.write(sequence.slots(), sequence.tokens, 0, tokens)
    bench.scheduler.loaded(sequence, tokens)
    bench.scheduler.resume(sequence, Token(pure_token(sequence.request.id, prompt)))
    assert bench.planned() == [(sequence, tokens, prompt + 1 - tokens)]
    bench.commit()
    bench.finish()
    assert output(sequence) == expected(sequence.request)[0]
    assert bench.counts.leased == 0


def test_a_first_token_can_be_the_only_one() -> None:
    bench = Bench()
    sequence = bench.add(range(1, 11), loads=True, max_tokens=1)
    bench.scheduler.admit()
    bench.scheduler.resume(sequence, Token(5))
    assert (sequence.state, sequence.finish, output(sequence)) == (State.FINISHED, "length", [5])
    assert bench.counts.leased == 0


def test_loading_sequences_are_not_preempted() -> None:
    """Somebody writes into their slots."""
    bench = Bench(slots=2, block_tokens=4)
    decoding = bench.add([1, 2, 3, 4], max_tokens=4)
    loading = bench.add([5, 6, 7], loads=True)
    bench.step()
    assert bench.planned() == []
    assert (decoding.state, loading.state) == (State.WAITING, State.LOADING)


def test_only_loading_sequences_load_and_resume() -> None:
    bench = Bench()
    sequence = bench.add()
    bench.scheduler.admit()
    with pytest.raises(AssertionError, match="cannot load"):
        bench.scheduler.loaded(sequence, 1)
    with pytest.raises(AssertionError, match="cannot resume"):
        bench.scheduler.resume(sequence)


def test_exports_grow_with_the_prefill_and_outlive_it() -> None:
    bench = Bench(block_tokens=4, token_budget=5)
    lease = bench.pool.lease()
    sequence = bench.add(range(1, 11), max_tokens=1, exports=lease)
    held = []
    while sequence.state is not State.FINISHED:
        bench.step()
        held.append(len(lease.slots))
    assert held == [1, 3]  # after 5 and after 10 tokens
    assert bench.counts.leased == 3
    bench.model.check(lease.slots, sequence.request.prompt, 10)
    lease.release()
    assert bench.counts == Slots(total=16, free=14, cached=2, leased=0)


def test_exports_hold_a_known_prefix_before_anything_is_computed() -> None:
    bench = Bench(block_tokens=4)
    bench.add(range(1, 11))
    bench.finish()
    lease = bench.pool.lease()
    sequence = bench.add(range(1, 11), max_tokens=1, exports=lease)
    bench.scheduler.admit()
    assert lease.slots == sequence.slots()[:2]


def test_exports_end_with_the_prompt() -> None:
    """The block in which the first token would be stored goes out as the prompt leaves it."""
    bench = Bench(block_tokens=4)
    lease = bench.pool.lease()
    bench.add(range(1, 7), max_tokens=1, exports=lease)
    bench.finish()
    assert len(lease.slots) == 2


def test_an_ended_export_does_not_stop_the_prefill() -> None:
    bench = Bench(token_budget=4)
    lease = bench.pool.lease()
    sequence = bench.add(range(1, 11), max_tokens=1, exports=lease)
    bench.step()
    lease.release()
    bench.finish()
    assert output(sequence) == expected(sequence.request)[0]
    assert bench.counts.leased == 0


def test_who_exports_is_not_preempted() -> None:
    """Its exported blocks would stay held: so it could wait for ever for the slots that it holds itself."""
    bench = Bench(slots=4, block_tokens=4, token_budget=5)
    decoding = bench.add([1, 2, 3], max_tokens=6)
    bench.step()
    lease = bench.pool.lease()
    exported = bench.add(range(10, 20), max_tokens=1, exports=lease)
    bench.step()
    bench.step()
    assert (decoding.state, exported.state) == (State.WAITING, State.RUNNING)
    bench.step()
    assert exported.finish == "length"
    assert len(lease.slots) == 3
    lease.release()
    bench.finish()
    assert output(decoding) == expected(decoding.request)[0]


# -- steps in flight -------------------------------------------------------------------------------------------------


def tokens_of(results: Seq[Result]) -> list[tuple[Sequence, int | None]]:
    return [(sequence, token.id if token else None) for sequence, token in results]


def test_a_decoding_sequence_is_in_every_step() -> None:
    bench = Bench()
    one, two = bench.add([1, 2, 3], max_tokens=20), bench.add([4, 5], max_tokens=20)
    bench.planned()
    for step in range(10):
        assert (one.unknown, one.length, len(one.tokens)) == (1, 4 + step, 3 + step)
        assert bench.planned() == [(one, 3 + step, 1), (two, 2 + step, 1)]
        assert tokens_of(bench.commit()) == [
            (one, pure_token(one.request.id, 3 + step)),
            (two, pure_token(two.request.id, 2 + step)),
        ]


def test_a_prompt_goes_on_while_its_first_chunk_is_in_flight() -> None:
    bench = Bench(token_budget=5)
    sequence = bench.add(range(1, 13))
    steps = [bench.planned(), bench.planned()]
    assert tokens_of(bench.commit()) == [(sequence, None)]
    steps.append(bench.planned())
    assert (sequence.computed, sequence.scheduled, sequence.unknown) == (5, 12, 1)
    bench.commit()
    steps.append(bench.planned())
    assert steps == [[(sequence, 0, 5)], [(sequence, 5, 5)], [(sequence, 10, 2)], [(sequence, 12, 1)]]
    bench.finish(2)
    assert output(sequence) == expected(sequence.request)[0]


def test_what_samples_is_decided_when_it_is_planned() -> None:
    bench = Bench(token_budget=3)
    sequence = bench.add([1, 2, 3, 4])
    bench.scheduler.admit()
    steps = [bench.scheduler.plan() for _ in range(3)]
    assert steps == [
        [Chunk(sequence, 0, 3, samples=False)],
        [Chunk(sequence, 3, 1, samples=True)],
        [Chunk(sequence, 4, 1, samples=True)],
    ]


def test_two_tokens_are_never_unknown_to_a_chunk() -> None:
    """The device knows what the step before sampled, no more."""
    bench = Bench()
    sequence = bench.add()
    assert bench.planned() == [(sequence, 0, 3)]
    assert bench.planned() == [(sequence, 3, 1)]
    assert bench.planned() == []
    assert len(bench.scheduler.flight) == 2
    bench.commit()
    assert bench.planned() == [(sequence, 4, 1)]


def test_nothing_is_planned_after_the_token_that_ends_a_sequence_by_its_length() -> None:
    bench = Bench()
    sequence = bench.add(max_tokens=2)
    lease = bench.pool.lease()
    exported = bench.add([7, 7], max_tokens=1, exports=lease)
    assert bench.planned() == [(sequence, 0, 3), (exported, 0, 2)]
    assert bench.planned() == [(sequence, 3, 1)]
    bench.commit()
    assert bench.planned() == []
    bench.commit()
    assert (sequence.finish, exported.finish) == ("length", "length")


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(4, 0, ignore_eos=True, repetition_penalty=1.1),
        Sampling(4, 0, ignore_eos=True, presence_penalty=-0.5),
        Sampling(4, 0, ignore_eos=True, frequency_penalty=0.5),
    ],
)
def test_penalties_wait_for_the_token(sampling: Sampling) -> None:
    """Sampling depends on which tokens came before; the chunks of a prompt sample nothing, so they need not wait."""
    bench = Bench(token_budget=2)
    sequence = Sequence(Request("p/0/0", [1, 2, 3], sampling), ROOT)
    bench.scheduler.add(sequence)
    assert [bench.planned(), bench.planned()] == [[(sequence, 0, 2)], [(sequence, 2, 1)]]
    bench.commit()
    assert bench.planned() == []
    bench.commit()
    assert bench.planned() == [(sequence, 3, 1)]
    bench.finish(2)
    assert output(sequence) == expected(sequence.request)[0]


def test_a_stop_token_wastes_the_steps_in_flight_and_nothing_else() -> None:
    bench = Bench(block_tokens=4)
    id_, before = first_eos()
    sequence, other = bench.add(id_=id_, max_tokens=12, ignore_eos=False), bench.add(max_tokens=12)
    for _ in range(before):
        bench.step()
    bench.planned()
    assert bench.planned() == [(sequence, 3 + before, 1), (other, 3 + before, 1)]
    assert [result.sequence for result in bench.commit()] == [sequence, other]
    assert (sequence.finish, output(sequence)[-1]) == ("stop", EOS)
    assert bench.counts.leased == len(sequence.slots()) + len(other.slots()) > len(other.slots())
    assert bench.planned() == [(other, 4 + before, 1)]
    assert [result.sequence for result in bench.commit()] == [other]
    assert (sequence.state, len(output(sequence))) == (State.FINISHED, before + 1)
    assert bench.counts.leased == len(other.slots())
    bench.finish(2)
    assert output(other) == expected(other.request)[0]


def test_who_has_ended_cannot_be_aborted() -> None:
    bench = Bench()
    id_, before = first_eos()
    sequence = bench.add(id_=id_, max_tokens=12, ignore_eos=False)
    for _ in range(before):
        bench.step()
    bench.planned(), bench.planned()
    bench.commit()
    bench.scheduler.abort(sequence)
    assert sequence.finish == "stop"
    assert bench.commit() == []
    assert (sequence.state, bench.counts.leased) == (State.FINISHED, 0)


def test_an_aborted_sequence_holds_its_slots_until_the_last_step_in_flight() -> None:
    """Nobody knows the token that its last block ends with, so that block cannot be found."""
    bench = Bench(block_tokens=4)
    sequence = bench.add([1, 2, 3])
    bench.planned(), bench.planned()
    bench.scheduler.abort(sequence)
    assert bench.commit() == []
    assert (sequence.state, bench.counts.leased) == (State.RUNNING, 1)
    assert bench.commit() == []
    assert (sequence.state, output(sequence)) == (State.FINISHED, [])
    assert bench.counts == Slots(total=16, free=16, cached=0, leased=0)


def test_who_is_in_flight_is_preempted_a_step_later() -> None:
    """Its slots are being written. It is held back, or it would be in flight for ever."""
    bench = Bench(slots=4, block_tokens=4)
    first = bench.add([1, 2, 3, 4], max_tokens=9)
    second = bench.add([5, 6, 7], max_tokens=9)
    assert bench.planned() == [(first, 0, 4), (second, 0, 3)]
    assert bench.planned() == [(first, 4, 1), (second, 3, 1)]  # first has two slots now
    bench.commit()
    assert bench.planned() == [(first, 5, 1), (second, 4, 1)]  # so has second
    for at in (6, 7):
        bench.commit()
        assert bench.planned() == [(first, at, 1), (second, at - 1, 1)]
    bench.commit()
    assert bench.planned() == []  # first has to wait; second would have been planned
    assert (second.state, second.flying) == (State.RUNNING, True)
    bench.commit()
    assert bench.planned() == [(first, 8, 1)]
    assert second.state is State.WAITING
    bench.finish(2)
    assert [output(s) for s in (first, second)] == [expected(s.request)[0] for s in (first, second)]


def test_who_is_in_flight_does_not_preempt_itself() -> None:
    bench = Bench(slots=2, block_tokens=4)
    sequence = bench.add([1, 2, 3, 4])
    loading = bench.add([5, 6], loads=True)
    assert bench.planned() == [(sequence, 0, 4)]
    assert bench.planned() == []
    assert sequence.state is State.RUNNING
    bench.commit()
    assert bench.planned() == []
    assert (sequence.state, loading.state) == (State.WAITING, State.LOADING)
    bench.scheduler.abort(loading)
    bench.finish(2)
    assert output(sequence) == expected(sequence.request)[0]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_preempted_sequences_go_on_as_if_nothing_had_been(depth: int) -> None:
    bench = Bench(slots=4, block_tokens=2, token_budget=6)
    sequences = [bench.add([number, 1, 1], max_tokens=5) for number in range(3)]
    bench.finish(depth)
    assert [output(s) for s in sequences] == [expected(s.request)[0] for s in sequences]
    assert bench.counts.leased == 0


def test_a_failed_step_does_not_touch_the_one_before() -> None:
    """Who was in both holds its slots until that one is committed, and has no result any more."""
    bench = Bench(max_batch=3)
    both, last = bench.add(), bench.add(max_tokens=1)
    bench.planned()
    late = bench.add([7, 8])
    bench.planned()
    assert bench.fail() == [both, late]
    assert (both.state, late.state) == (State.RUNNING, State.FINISHED)
    assert [result.sequence for result in bench.commit()] == [last]
    assert (both.state, both.finish, last.finish) == (State.FINISHED, "abort", "length")
    assert bench.counts.leased == 0


def test_only_who_is_blamed_for_a_failure_ends() -> None:
    bench = Bench(token_budget=8)
    decoding, short = bench.add([1, 2, 3]), bench.add([4, 5])
    bench.planned()
    long = bench.add(range(10, 30))
    step = bench.planned()
    assert step == [(decoding, 3, 1), (short, 2, 1), (long, 0, 6)]
    assert bench.fail([long]) == [long]
    assert (long.finish, long.state) == ("abort", State.FINISHED)
    assert bench.planned() == step[:2]
    bench.finish(2)
    assert [output(s) for s in (decoding, short)] == [expected(s.request)[0] for s in (decoding, short)]
    assert bench.counts.leased == 0


def test_who_ended_before_a_step_failed_is_not_blamed() -> None:
    bench = Bench()
    aborted, other = bench.add(), bench.add()
    bench.planned()
    bench.scheduler.abort(aborted)
    assert bench.fail() == [other]
    assert (aborted.state, other.state) == (State.FINISHED, State.FINISHED)


def test_nobody_is_blamed_and_nothing_is_lost() -> None:
    bench = Bench(token_budget=4)
    sequence = bench.add(range(1, 8))
    bench.planned()
    step = bench.planned()
    assert bench.fail([]) == []
    assert bench.planned() == step
    bench.finish(2)
    assert output(sequence) == expected(sequence.request)[0]


# -- any sequence of events ------------------------------------------------------------------------------------------


PROMPTS = st.lists(st.integers(1, 2), min_size=1, max_size=14)  # of two tokens, so that prefixes are often shared


class SchedulerMachine(RuleBasedStateMachine):
    """A step is several rules, so that everything else also happens in the middle of one."""

    @initialize(
        depth=st.integers(1, 3),
        slots=st.integers(3, 9),
        block_tokens=st.integers(1, 4),
        max_batch=st.integers(1, 5),
        spare=st.integers(0, 12),
    )
    def start(self, depth: int, slots: int, block_tokens: int, max_batch: int, spare: int) -> None:
        self.depth = depth  # steps in flight, at most
        self.bench = Bench(slots, block_tokens, max_batch, token_budget=max_batch + spare)
        self.scheduler = self.bench.scheduler
        self.alive: list[Sequence] = []
        self.done: list[Sequence] = []
        self.got: dict[Sequence, list[int]] = {}  # tokens that were reported
        self.exports: dict[Sequence, Lease] = {}
        self.loaded: dict[Sequence, int] = {}  # tokens brought into a LOADING sequence
        self.flight = self.bench.flight

    def fits(self, tokens: int) -> bool:
        return -(-tokens // self.bench.model.block_tokens) <= self.bench.pool.total

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 8),
        priority=st.integers(-1, 1),
        kind=st.sampled_from(["plain", "plain", "loads", "exports"]),
        ignore_eos=st.booleans(),
        min_tokens=st.integers(0, 3),
        stop=st.frozensets(st.integers(1, 7), max_size=1),
        penalty=st.sampled_from([0.0, 0.0, 0.5]),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        priority: int,
        kind: str,
        ignore_eos: bool,
        min_tokens: int,
        stop: frozenset[int],
        penalty: float,
    ) -> None:
        max_tokens = 1 if kind == "exports" else max_tokens
        if not self.fits(len(prompt) + max_tokens):
            return
        lease = self.bench.pool.lease() if kind == "exports" else None
        sequence = self.bench.add(
            prompt, max_tokens=max_tokens, priority=priority, loads=kind == "loads", exports=lease,
            ignore_eos=ignore_eos, min_tokens=min_tokens, stop=stop, penalty=penalty,
        )  # fmt: skip
        self.alive.append(sequence)
        self.got[sequence] = []
        if lease:
            self.exports[sequence] = lease

    @rule()
    def admit(self) -> None:
        """The engine admits whenever something has changed, also during a step."""
        self.scheduler.admit()

    @precondition(lambda self: len(self.flight) < self.depth)
    @rule()
    def plan(self) -> None:
        self.scheduler.admit()
        decoding, waiting = self.decoding(), list(self.scheduler.waiting)
        before = self.flight[-1] if self.flight else None
        step = self.bench.planned()
        note(str([(sequence.request.id, start, size) for sequence, start, size in step]))
        assert len(self.flight) == len(self.scheduler.flight)
        if self.bench.pool.available and self.scheduler.waiting == waiting:
            assert decoding <= {sequence for sequence, _, _ in step}, "there was room for one that was left out"
        if not step:
            return
        sizes = [size for _, _, size in step]
        assert sum(sizes) <= self.scheduler.token_budget
        assert min(sizes) >= 1
        assert [size > 1 for size in sizes] == sorted(size > 1 for size in sizes), "singles come first"
        assert len({sequence for sequence, _, _ in step}) == len(step)
        for sequence, start, size, samples in self.flight[-1].chunks:
            assert (sequence.state, sequence.finish) == (State.RUNNING, None)
            assert sequence.scheduled == start + size
            if start + size <= len(sequence.tokens):
                assert samples == (start + size == len(sequence.tokens))
                continue
            assert (start, size, samples) == (len(sequence.tokens), 1, True), "more than one token is not known"
            assert not sequence.request.sampling.needs_history
            assert start + 1 - len(sequence.request.prompt) < sequence.request.sampling.max_tokens
            assert self.depth > 2 or (before and sequence in before), "its token is not the step's before"

    def decoding(self) -> set[Sequence]:
        """Who is in the next step if there is room: one token is missing, and that one is known or of use."""

        def decodes(sequence: Sequence) -> bool:
            ahead = [chunk for step in self.flight for chunk in step.chunks if chunk.sequence is sequence]
            unknown = sum(chunk.samples for chunk in ahead)
            if len(sequence.tokens) + unknown - sequence.computed - sum(chunk.size for chunk in ahead) != 1:
                return False
            sampling = sequence.request.sampling
            ends = sequence.outputs + unknown == sampling.max_tokens
            return unknown == 0 or (unknown == 1 and not ends and not sampling.needs_history)

        going = [s for s in self.scheduler.running if s.state is State.RUNNING and s.finish is None]
        return {sequence for sequence in going if decodes(sequence)}

    def holders(self, slot: int) -> int:
        leases = [sequence.lease for sequence in self.alive if sequence.lease] + list(self.exports.values())
        return sum(slot in lease.slots for lease in leases)

    @precondition(lambda self: any(step.sampled is None for step in self.flight))
    @rule()
    def compute(self) -> None:
        """The device is done with one more step, which is committed some time later."""
        self.bench.compute()

    @precondition(lambda self: self.flight)
    @rule()
    def commit(self) -> None:
        step = self.flight[0]
        going = [chunk for chunk in step.chunks if not chunk.sequence.finish]
        results = self.bench.commit()
        assert [result.sequence for result in results] == [chunk.sequence for chunk in going]
        assert [result.token is not None for result in results] == [chunk.samples for chunk in going]
        for sequence, token in results:
            if token:
                self.got[sequence].append(token.id)
        self.bury()

    @precondition(lambda self: self.flight and self.flight[-1].sampled is None)
    @rule(data=st.data(), everybody=st.booleans())
    def fail(self, data: st.DataObject, everybody: bool) -> None:
        sequences = [chunk.sequence for chunk in self.flight[-1].chunks]
        blamed = sequences if everybody else data.draw(st.lists(st.sampled_from(sequences), unique=True))
        going = [sequence for sequence in sequences if not sequence.finish]
        failed = self.bench.fail(None if everybody else blamed)
        assert failed == [sequence for sequence in going if sequence in blamed]
        assert all(sequence.finish == "abort" for sequence in failed)
        assert all(sequence.finish is None for sequence in going if sequence not in failed)
        self.bury()

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.alive))
        finish = sequence.finish
        self.scheduler.abort(sequence)
        assert sequence.finish == (finish or "abort")
        assert (sequence.state is State.FINISHED) != any(sequence in step for step in self.flight)
        self.bury()

    def loading(self) -> list[Sequence]:
        return [sequence for sequence in self.alive if sequence.state is State.LOADING]

    @precondition(lambda self: self.loading())
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        """Blocks arrive: full ones, or the prompt's partial last one."""
        sequence = data.draw(st.sampled_from(self.loading()))
        prompt, block_tokens = len(sequence.request.prompt), self.bench.model.block_tokens
        have = max(self.loaded.get(sequence, 0), sequence.computed)
        tokens = min(prompt, (have // block_tokens + data.draw(st.integers(0, 3))) * block_tokens)
        for slot in sequence.slots()[have // block_tokens : -(-tokens // block_tokens)]:
            assert self.holders(slot) == 1, "a slot that a peer's block goes to is in two hands"
        self.bench.model.write(sequence.slots(), sequence.tokens, have, tokens)
        self.scheduler.loaded(sequence, tokens)
        self.loaded[sequence] = tokens

    @precondition(lambda self: self.loading())
    @rule(data=st.data(), known=st.booleans())
    def resume(self, data: st.DataObject, known: bool) -> None:
        self._resume(data.draw(st.sampled_from(self.loading())), known)

    def _resume(self, sequence: Sequence, known: bool) -> None:
        first = Token(pure_token(sequence.request.id, len(sequence.tokens))) if known else None
        if first:
            self.got[sequence].append(first.id)
        self.scheduler.resume(sequence, first)
        self.bury()

    @precondition(lambda self: self.exports)
    @rule(data=st.data())
    def end_export(self, data: st.DataObject) -> None:
        """Released or expired, also before the prefill is done."""
        sequence = data.draw(st.sampled_from(list(self.exports)))
        self.exports.pop(sequence).release()

    def bury(self) -> None:
        """Check what every ended sequence leaves behind."""
        for sequence in [sequence for sequence in self.alive if sequence.state is State.FINISHED]:
            self.alive.remove(sequence)
            self.done.append(sequence)
            tokens, finish = expected(sequence.request)
            if sequence.finish == "abort":
                assert self.got[sequence] == tokens[: len(self.got[sequence])]
            else:
                assert (self.got[sequence], sequence.finish) == (tokens, finish)
                if lease := self.exports.get(sequence):
                    assert len(lease.slots) == -(-len(sequence.request.prompt) // self.bench.model.block_tokens)

    @invariant()
    def the_account_balances(self) -> None:
        counts = self.bench.counts
        assert counts.free + counts.cached + counts.leased == counts.total
        leases = [sequence.lease for sequence in self.alive if sequence.lease] + list(self.exports.values())
        assert counts.leased == len({slot for lease in leases for slot in lease.slots})

    @invariant()
    def what_is_in_flight_is_in_nobody_elses_hands(self) -> None:
        for step in self.flight:
            for chunk, table in zip(step.chunks, step.tables, strict=True):
                assert chunk.sequence.slots()[: len(table)] == table, "slots are gone that a step in flight uses"
            assert len(set(step.written())) == len(step.written()), "a slot is written twice in one step"
            for slot in step.written():
                assert self.holders(slot) == 1, "a slot that is written is in two hands"

    @invariant()
    def what_is_scheduled_is_computed_or_in_flight(self) -> None:
        for sequence in self.alive:
            chunks = [chunk for step in self.flight for chunk in step.chunks if chunk.sequence is sequence]
            assert sequence.scheduled == sequence.computed + sum(chunk.size for chunk in chunks)
            assert sequence.flying == bool(chunks)
            if sequence.state is State.RUNNING and sequence.finish is None:
                assert sequence.unknown == sum(chunk.samples for chunk in chunks)

    @invariant()
    def everybody_is_in_one_place(self) -> None:
        assert len(self.scheduler.running) <= self.scheduler.max_batch
        waiting, running = self.scheduler.waiting, self.scheduler.running
        assert sorted([*waiting, *running], key=id) == sorted(self.alive, key=id)
        assert all(sequence.state is State.WAITING and not sequence.lease for sequence in waiting)
        assert [(s.request.priority, s.order) for s in waiting] == sorted(
            (s.request.priority, s.order) for s in waiting
        )

    @invariant()
    def cached_tokens_are_whole_blocks_of_the_prompt(self) -> None:
        for sequence in self.alive:
            assert sequence.cached % self.bench.model.block_tokens == 0
            assert sequence.cached < len(sequence.request.prompt)

    @invariant()
    def exported_blocks_hold_the_prompt(self) -> None:
        for sequence, lease in self.exports.items():
            prompt = sequence.request.prompt
            end = min(len(prompt), len(lease.slots) * self.bench.model.block_tokens)
            self.bench.model.check(lease.slots, prompt, end)

    def teardown(self) -> None:
        """From anywhere, everything ends: first while those who compute exports still hold them."""
        if not hasattr(self, "bench"):
            return
        while self.flight:
            self.commit()
        for sequence in self.done:
            if lease := self.exports.pop(sequence, None):
                lease.release()
        for _ in range(400):
            self.scheduler.admit()
            while loading := self.loading():  # who resumes can have to wait, for one that loads
                self._resume(loading[0], known=False)
                self.scheduler.admit()
            for _ in range(self.depth - len(self.flight)):
                self.plan()
            assert self.flight or not self.alive, "nothing is computed and somebody waits"
            if self.flight:
                self.commit()
            self.the_account_balances()
            for sequence in self.done:
                if lease := self.exports.pop(sequence, None):
                    lease.release()
            if not self.alive:
                break
        assert not self.alive, "a sequence starves"
        assert self.bench.counts.leased == 0


SchedulerMachine.TestCase.settings = settings(deadline=None, max_examples=200, stateful_step_count=50)
TestScheduler = SchedulerMachine.TestCase
