"""What is sent: the same everywhere, of the right length, at the right times."""

import math
import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from twostroke.bench import workload
from twostroke.bench.workload import QUICK, REFERENCE, Chat, Grid
from twostroke.errors import StartupError

TRACE = b"""
{"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}
{"timestamp": 3500, "input_length": 700, "output_length": 2, "hash_ids": [7, 3]}
"""


def test_the_reference_is_the_reference_test() -> None:
    assert REFERENCE.input_lens == (100, 1000, 10_000, 20_000, 50_000)
    assert (REFERENCE.num_prompts, REFERENCE.request_rate, REFERENCE.output_len, REFERENCE.seed) == (160, 128, 10, 45)


def test_token_ids_never_change() -> None:
    """These ids were computed once. Where this fails, results are not comparable with those of other machines."""
    assert workload.derive(45, 1000) == 15107154559933382540
    items = workload.random_prompts(QUICK, 100, 49_152)
    assert items[0].prompt[:4] == [33836, 38667, 6991, 9205]
    assert [len(item.prompt) for item in items] == [100] * 8


def test_long_prompts_are_fewer_where_their_tokens_are_bounded() -> None:
    grid = replace(REFERENCE, prompt_tokens=5000)
    counts = [len(workload.random_prompts(grid, length, 1000)) for length in (10, 100, 1000, 50_000)]
    assert counts == [160, 50, 5, 1]


def test_lengths_have_seeds_of_their_own() -> None:
    short, long = (workload.random_prompts(QUICK, n, 49_152)[0].prompt for n in (100, 500))
    assert short != long[:100]


@given(vocab=st.integers(2, 200_000), count=st.integers(0, 50), seed=st.integers(0, 2**64 - 1))
def test_ids_are_of_the_vocabulary(vocab: int, count: int, seed: int) -> None:
    ids = workload.tokens(seed, count, vocab)
    assert len(ids) == count
    assert all(vocab // 8 <= one < vocab for one in ids)


@given(count=st.integers(1, 60), rate=st.floats(0.1, 500), burstiness=st.floats(0.05, 20))
def test_arrivals_end_at_the_exact_time(count: int, rate: float, burstiness: float) -> None:
    times = workload.arrivals(count, rate, burstiness, 1)
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] == pytest.approx(count / rate)


def test_burstiness_is_the_shape_of_the_gaps() -> None:
    """The coefficient of variation of gamma gaps is 1 / sqrt(shape)."""
    for burstiness in (0.25, 1.0, 4.0):
        times = workload.arrivals(20_000, 10, burstiness, 3)
        gaps = [b - a for a, b in pairwise(times)]
        variation = statistics.stdev(gaps) / statistics.mean(gaps)
        assert variation == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert workload.arrivals(3, math.inf, 1, 0) == [0, 0, 0]


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (1, 0), (math.nan, 1)])
def test_impossible_arrivals_are_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(StartupError, match="above 0"):
        workload.arrivals(3, rate, burstiness, 0)


def test_a_turn_starts_with_all_turns_before_it() -> None:
    chat = Chat(conversations=3, turns=3, system_len=20, user_len=5, output_len=4, pause=1.0)
    items = workload.chats(chat, replace(QUICK, request_rate=1.0), 1000)
    assert [item.at for item in items] == sorted(item.at for item in items)
    assert len({tuple(item.prompt[:20]) for item in items}) == 1
    for group in range(3):
        turns = [item.prompt for item in items if item.group == group]
        assert [len(prompt) for prompt in turns] == [25, 34, 43]
        assert turns[2][:34] == turns[1]
        assert turns[1][:25] == turns[0]


def test_equal_hash_ids_are_equal_blocks() -> None:
    lines = workload.read_trace(TRACE, "t")
    first, second = workload.trace(lines, Grid(), 1000)
    assert (len(first.prompt), len(second.prompt)) == (1100, 700)
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:700] != second.prompt[512:]
    assert (first.at, second.at, first.output_len) == (0, 2.5, 5)


def test_a_scaled_trace_shares_as_much() -> None:
    first, second = workload.trace(workload.read_trace(TRACE, "t"), Grid(), 1000, scale=0.125)
    assert len(first.prompt) == 138
    assert first.prompt[:64] == second.prompt[:64]
    assert first.prompt[64:80] != second.prompt[64:80]


def test_a_prompt_longer_than_its_hashes_ends_with_tokens_of_its_own() -> None:
    lines = workload.read_trace(b'{"timestamp":0,"input_length":600,"output_length":1,"hash_ids":[1]}\n' * 2, "t")
    first, second = workload.trace(lines, Grid(), 1000)
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:] != second.prompt[512:]
    assert len(first.prompt) == len(second.prompt) == 600


@pytest.mark.parametrize(
    ("text", "words"),
    [(b"", "no requests"), (b"{}\n", "line 1"), (b'{"timestamp":0,"input_length":0,"output_length":1}', "line 1")],
)
def test_a_broken_trace_is_named(text: bytes, words: str) -> None:
    with pytest.raises(StartupError, match=words):
        workload.read_trace(text, "trace.jsonl")


def test_words_are_as_many_as_ids() -> None:
    ids = workload.tokens(1, 200, 50_000)
    text = workload.words(ids).split()
    assert len(text) == 200
    assert len(set(text)) == len(set(ids))
