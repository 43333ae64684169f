"""The choice of workers, as a pure function."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from twostroke.config import Policy
from twostroke.errors import Unavailable
from twostroke.router.policy import Colocated, Disaggregated, Pool, choose


class Fake(Struct, frozen=True):
    name: str
    pool: Pool
    ready: bool = True
    requests: int = 0
    tokens: int = 0


P0, P1 = Fake("p0", "prefill"), Fake("p1", "prefill")
D0, D1 = Fake("d0", "decode"), Fake("d1", "decode")
C0, C1 = Fake("c0", "colocated"), Fake("c1", "colocated")

workers = st.lists(
    st.builds(
        Fake,
        name=st.uuids().map(str),
        pool=st.sampled_from(["prefill", "decode", "colocated"]),
        ready=st.booleans(),
        requests=st.integers(0, 5),
        tokens=st.integers(0, 5),
    ),
    max_size=8,
)
policies = st.sampled_from(["least-loaded", "round-robin"])


def test_a_pair_serves() -> None:
    assert choose([P0, D0], "least-loaded", 0) == Disaggregated(P0, D0)


@pytest.mark.parametrize("pair", [[P0], [D0], []])
def test_a_colocated_worker_stands_in_for_half_a_pair(pair: list[Fake]) -> None:
    assert choose([*pair, C0], "least-loaded", 0) == Colocated(C0)


def test_a_pair_wins_a_tie_and_a_colocated_worker_takes_what_would_be_a_queue() -> None:
    assert isinstance(choose([C0, P0, D0], "least-loaded", 0), Disaggregated)
    busy = Fake("d", "decode", requests=1)
    assert choose([P0, busy, C0], "least-loaded", 0) == Colocated(C0)


def test_prefill_goes_where_fewest_tokens_wait_and_decode_where_fewest_requests_run() -> None:
    long, many = Fake("long", "prefill", requests=1, tokens=900), Fake("many", "prefill", requests=3, tokens=30)
    full, roomy = Fake("full", "decode", requests=8, tokens=1), Fake("roomy", "decode", requests=2, tokens=99)
    assert choose([long, many, full, roomy], "least-loaded", 0) == Disaggregated(many, roomy)


@pytest.mark.parametrize("policy", ["least-loaded", "round-robin"])
def test_equal_workers_take_turns(policy: Policy) -> None:
    chosen = [choose([C0, C1], policy, turn) for turn in range(4)]
    assert chosen == [Colocated(C0), Colocated(C1), Colocated(C0), Colocated(C1)]


def test_round_robin_ignores_load() -> None:
    busy = Fake("busy", "colocated", requests=99)
    assert Colocated(busy) in [choose([busy, C0], "round-robin", turn) for turn in range(2)]


@pytest.mark.parametrize(
    ("given_workers", "words", "silent"),
    [
        ([], ["prefill", "decode", "colocated"], []),
        ([P0], ["no decode"], ["prefill", "colocated"]),
        ([D0], ["no prefill"], ["decode", "colocated"]),
        ([Fake("p", "prefill", ready=False), D0], ["no prefill"], ["decode", "colocated"]),
        ([P0, Fake("d", "decode", ready=False), Fake("c", "colocated", ready=False)], ["decode", "coloc"], []),
    ],
)
def test_the_error_names_what_is_missing(given_workers: list[Fake], words: list[str], silent: list[str]) -> None:
    with pytest.raises(Unavailable) as caught:
        choose(given_workers, "least-loaded", 0)
    assert caught.value.status == 503
    assert all(word in caught.value.message for word in words)
    assert not any(word in caught.value.message for word in silent)


@given(workers, policies, st.integers(0, 1000))
def test_whoever_is_chosen_is_ready_and_for_its_part(view: list[Fake], policy: Policy, turn: int) -> None:
    ready = Counter(worker.pool for worker in view if worker.ready)
    servable = ready["colocated"] or (ready["prefill"] and ready["decode"])
    try:
        route = choose(view, policy, turn)
    except Unavailable:
        assert not servable
        return
    assert servable
    if isinstance(route, Colocated):
        assert route.worker.ready
        assert route.worker.pool == "colocated"
    else:
        assert route.prefill.ready
        assert route.decode.ready
        assert (route.prefill.pool, route.decode.pool) == ("prefill", "decode")


@given(workers, st.integers(0, 1000))
def test_least_loaded_never_leaves_a_less_loaded_one_idle(view: list[Fake], turn: int) -> None:
    try:
        route = choose(view, "least-loaded", turn)
    except Unavailable:
        return
    answering = route.worker if isinstance(route, Colocated) else route.decode
    pools = {"colocated", "decode"} if any(w.ready and w.pool == "prefill" for w in view) else {"colocated"}
    assert answering.requests == min(w.requests for w in view if w.ready and w.pool in pools)
    if isinstance(route, Disaggregated):
        assert route.prefill.tokens == min(w.tokens for w in view if w.ready and w.pool == "prefill")


@given(workers, policies, st.integers(0, 1000))
def test_the_same_view_gives_the_same_route(view: list[Fake], policy: Policy, turn: int) -> None:
    def outcome() -> object:
        try:
            return choose(view, policy, turn)
        except Unavailable as error:
            return error.message

    assert outcome() == outcome()
