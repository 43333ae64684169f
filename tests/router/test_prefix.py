"""Who probably knows the beginning of a prompt."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostroke.router.prefix import BYTES_A_TOKEN, CHUNK, HOLDERS, MAX_CHUNKS, PrefixMap, chain, tokens_of

CHUNK_TOKENS = CHUNK // BYTES_A_TOKEN


def body(prompt: str, **more: object) -> bytes:
    return json.dumps({**more, "prompt": prompt}).encode()


def test_prompts_that_begin_alike_have_hashes_that_begin_alike() -> None:
    long, longer, other = (chain(body(text)) for text in ("a" * 1000, "a" * 1000 + "b" * 1000, "b" * 2000))
    assert 0 < len(long) < len(longer)
    assert long == longer[: len(long)]
    assert not set(other) & set(longer)


def test_what_stands_before_the_prompt_does_not_count() -> None:
    assert chain(body("x" * 600, max_tokens=1)) == chain(body("x" * 600, max_tokens=100, model="another"))


def test_a_salt_parts_tenants_wherever_it_stands() -> None:
    def salted(salt: str) -> list[Sequence[int]]:
        return [
            chain(json.dumps({"prompt": "x" * 600, "cache_salt": salt, "n": 1}).encode()),
            chain(json.dumps({"cache_salt": salt, "prompt": "x" * 600, "n": 1}).encode()),
        ]

    one, other = salted("one"), salted("two")
    assert one[0][0] == one[1][0]
    assert not set(one[0]) & set(other[0])
    assert not set(one[0]) & set(chain(body("x" * 600)))
    tenants = [chain(body("x" * 600), tenant) for tenant in ("", "a", "b")]
    assert len({hashes[0] for hashes in tenants}) == 3, "a tenant of the router's counts like a salt"
    assert chain(body("x" * 600, cache_salt="s"), "a") == chain(body("x" * 600, cache_salt="s"), "b")
    assert chain(b'{"cache_salt"') == chain(b'{"cache_salt":"')


def test_a_chat_goes_on_where_it_was() -> None:
    turns = [{"role": "user", "content": "why? " * 200}]
    before = chain(json.dumps({"messages": turns, "stream": True}).encode())
    turns += [{"role": "assistant", "content": "because. " * 100}, {"role": "user", "content": "oh"}]
    after = chain(json.dumps({"messages": turns, "stream": True}).encode())
    assert before[:-1] == after[: len(before) - 1]  # the last chunk may have the end of the body


@pytest.mark.parametrize(
    ("size", "chunks"), [(0, 0), (CHUNK - 1, 0), (CHUNK, 1), (2 * CHUNK, 2), (1 << 20, MAX_CHUNKS)]
)
def test_only_full_chunks_count_and_not_too_many(size: int, chunks: int) -> None:
    assert len(chain(b"x" * size)) == chunks


def test_a_match_ends_where_the_prompts_part() -> None:
    known = PrefixMap()
    known.remember([1, 2, 3], ["a"])
    known.remember([1, 2, 30, 40], ["b"])
    assert known.match([1, 2, 30, 40, 50]) == {"a": 2 * CHUNK_TOKENS, "b": 4 * CHUNK_TOKENS}
    assert known.match([2, 3]) == {"a": 2 * CHUNK_TOKENS, "b": CHUNK_TOKENS}
    assert known.match([9]) == known.match([]) == {}


def test_the_latest_holders_are_remembered() -> None:
    known = PrefixMap()
    for number in range(HOLDERS + 2):
        known.remember([1], [f"w{number}"])
    assert set(known.match([1])) == {f"w{number}" for number in range(2, HOLDERS + 2)}


@given(st.lists(st.tuples(st.lists(st.integers(0, 30), max_size=6, unique=True), st.sampled_from("abc")), max_size=50))
def test_it_is_bounded_and_a_match_is_a_beginning(served: list[tuple[list[int], str]]) -> None:
    known = PrefixMap(10)
    for hashes, worker in served:
        known.remember(hashes, [worker])
        assert len(known) <= 10
        assert known.match(hashes)[worker] == len(hashes) * CHUNK_TOKENS if hashes else not known.match(hashes)


@given(st.binary(max_size=2000))
def test_any_body_has_a_chain(data: bytes) -> None:
    assert len(chain(data)) <= len(data) // CHUNK
    assert tokens_of(len(data)) <= len(data)
