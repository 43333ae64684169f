"""The choice of workers, as a pure function."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from twostroke.config import Policy
from twostroke.errors import Unavailable
from twostroke.router.policy import RESIDENT, Colocated, Disaggregated, Pool, Prompt, Route, Rules, choose, successor


class Fake(Struct, frozen=True):
    key: str
    pool: Pool
    ready: bool = True
    queued: int = 0
    resident: int = 0


P0, P1 = Fake("p0", "prefill"), Fake("p1", "prefill")
D0, D1 = Fake("d0", "decode"), Fake("d1", "decode")
C0, C1 = Fake("c0", "colocated"), Fake("c1", "colocated")
LEAST = Rules("least-loaded")
ROBIN = Rules("round-robin")

views = st.lists(
    st.builds(
        Fake,
        key=st.uuids().map(str),
        pool=st.sampled_from(["prefill", "decode", "colocated"]),
        ready=st.booleans(),
        queued=st.integers(0, 50),
        resident=st.integers(0, 400),
    ),
    max_size=8,
)
rules = st.builds(Rules, st.sampled_from(["least-loaded", "round-robin", "prefix-aware"]), st.integers(0, 60))
turns = st.integers(0, 1000)


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[Fake], Prompt]:
    view = draw(views)
    known = {worker.key: draw(st.integers(0, 100)) for worker in view if draw(st.booleans())}
    return view, Prompt(draw(st.integers(0, 100)), known)


def test_a_pair_serves() -> None:
    assert choose([P0, D0], LEAST, 0) == Disaggregated(P0, D0)


@pytest.mark.parametrize("pair", [[P0], [D0], []])
def test_a_colocated_worker_serves_alone(pair: list[Fake]) -> None:
    assert choose([*pair, C0], LEAST, 0, Prompt(10)) in (Colocated(C0), *(Colocated(half) for half in pair))


def test_a_pair_wins_a_tie_and_a_colocated_worker_takes_what_would_be_a_queue() -> None:
    assert isinstance(choose([C0, P0, D0], LEAST, 0), Disaggregated)
    busy = Fake("d", "decode", resident=300)
    assert choose([P0, busy, C0], LEAST, 0) == Colocated(C0)
    queue = Fake("p", "prefill", queued=1)
    assert choose([queue, D0, C0], LEAST, 0) == Colocated(C0)


def test_prefill_goes_where_fewest_tokens_wait_and_decode_where_fewest_are_held() -> None:
    long, short = Fake("long", "prefill", queued=900), Fake("short", "prefill", queued=30, resident=9999)
    full, roomy = Fake("full", "decode", resident=5000), Fake("roomy", "decode", resident=4000)
    assert choose([long, short, full, roomy], LEAST, 0) == Disaggregated(short, roomy)


def test_a_known_beginning_is_worth_the_tokens_that_it_saves() -> None:
    def chosen(queue: int) -> Route[Fake]:
        knows = Fake("knows", "prefill", queued=queue)
        return choose([knows, P0, D0], Rules("prefix-aware"), 1, Prompt(1000, {"knows": 600}))

    assert chosen(599) == Disaggregated(Fake("knows", "prefill", queued=599), D0)
    assert chosen(601) == Disaggregated(P0, D0)


def test_who_computes_by_itself_is_also_chosen_by_what_it_knows() -> None:
    assert choose([C0, C1], LEAST, 0, Prompt(1000, {"c1": 100})) == Colocated(C1)
    assert choose([C0, P0, D0], LEAST, 0, Prompt(1000, {"c0": 100})) == Colocated(C0)


def test_a_decode_worker_computes_what_is_short_for_it() -> None:
    few = Rules("least-loaded", short=64)
    assert choose([P0, D0], few, 0, Prompt(63)) == Colocated(D0)
    assert choose([P0, D0], few, 0, Prompt(64)) == Disaggregated(P0, D0)
    assert choose([P0, D0], few, 0, Prompt(1000, {"d0": 950})) == Colocated(D0)
    assert choose([P0, D0], Rules("round-robin", short=64), 0, Prompt(63)) == Colocated(D0)


def test_whoever_is_left_serves() -> None:
    assert choose([D0, Fake("p", "prefill", ready=False)], LEAST, 0, Prompt(9999)) == Colocated(D0)
    assert choose([P0, Fake("d", "decode", ready=False)], LEAST, 0, Prompt(9999)) == Colocated(P0)


@pytest.mark.parametrize("rule", [LEAST, ROBIN])
def test_equal_workers_take_turns(rule: Rules) -> None:
    chosen = [choose([C0, C1], rule, turn) for turn in range(4)]
    assert chosen == [Colocated(C0), Colocated(C1), Colocated(C0), Colocated(C1)]


def test_round_robin_ignores_load() -> None:
    busy = Fake("busy", "colocated", queued=99)
    assert Colocated(busy) in [choose([busy, C0], ROBIN, turn) for turn in range(2)]


@pytest.mark.parametrize(
    ("given_workers", "words", "silent"),
    [
        ([], ["prefill", "decode", "colocated"], []),
        ([Fake("p", "prefill", ready=False)], ["no prefill"], ["decode", "colocated"]),
        (
            [Fake("p", "prefill", ready=False), Fake("d", "decode", ready=False)],
            ["no prefill", "no decode"],
            ["colocated"],
        ),
    ],
)
def test_the_error_names_what_is_missing(given_workers: list[Fake], words: list[str], silent: list[str]) -> None:
    with pytest.raises(Unavailable) as caught:
        choose(given_workers, LEAST, 0)
    assert caught.value.status == 503
    assert all(word in caught.value.message for word in words)
    assert not any(word in caught.value.message for word in silent)


def test_the_successor_is_a_prefill_worker_only_if_there_is_no_other() -> None:
    busy = Fake("d", "decode", queued=1000)
    assert successor([P0, busy], LEAST, 0) == busy
    assert successor([P0, busy, C0], LEAST, 0) == C0
    assert successor([P0], LEAST, 0) == P0
    with pytest.raises(Unavailable):
        successor([Fake("d", "decode", ready=False)], LEAST, 0)


@given(requests(), rules, turns)
def test_whoever_is_chosen_is_ready_and_for_its_part(
    request: tuple[list[Fake], Prompt], rule: Rules, turn: int
) -> None:
    view, prompt = request
    ready = Counter(worker.pool for worker in view if worker.ready)
    try:
        route = choose(view, rule, turn, prompt)
    except Unavailable:
        assert not ready
        return
    if isinstance(route, Colocated):
        assert route.worker.ready
        if route.worker.pool == "decode":
            assert not ready["prefill"] or prompt.missing(route.worker) < rule.short
        if route.worker.pool == "prefill":
            assert not ready["decode"]
            assert not ready["colocated"]
    else:
        assert route.prefill.ready
        assert route.decode.ready
        assert (route.prefill.pool, route.decode.pool) == ("prefill", "decode")
        assert prompt.missing(route.decode) >= rule.short


@given(requests(), turns)
def test_no_route_would_have_cost_less(request: tuple[list[Fake], Prompt], turn: int) -> None:
    view, prompt = request
    try:
        route = choose(view, LEAST, turn, prompt)
    except Unavailable:
        return

    def cost(computes: Fake, answers: Fake) -> int:
        return computes.queued + prompt.missing(computes) + answers.resident // RESIDENT

    ready = [worker for worker in view if worker.ready]
    prefill, decode, colocated = (
        [worker for worker in ready if worker.pool == pool] for pool in ("prefill", "decode", "colocated")
    )
    pairs = [cost(p, d) for p in prefill for d in decode]
    alone = [cost(w, w) for w in colocated or (decode if not prefill else []) or (prefill if not decode else [])]
    alone += [cost(w, w) for w in decode if not prefill]
    mine = cost(route.worker, route.worker) if isinstance(route, Colocated) else cost(route.prefill, route.decode)
    assert mine == min(pairs + alone)


@given(requests(), rules, turns)
def test_the_same_view_gives_the_same_route(request: tuple[list[Fake], Prompt], rule: Rules, turn: int) -> None:
    def outcome() -> object:
        try:
            return choose(request[0], rule, turn, request[1])
        except Unavailable as error:
            return error.message

    assert outcome() == outcome()


def test_policies_are_known() -> None:
    policies: list[Policy] = ["least-loaded", "prefix-aware", "round-robin"]
    assert [choose([C0], Rules(policy), 0) for policy in policies] == [Colocated(C0)] * 3
