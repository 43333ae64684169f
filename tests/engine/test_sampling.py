"""From logits to tokens, against a plain NumPy reference, and the noise that decides."""

import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twostroke.engine.sampling import Row, sample, uniform
from twostroke.messages import Sampling, Token

VOCAB = 40
NO_EOS = frozenset[int]()
KNOWN_NOISE = [0.3859926107094097, 0.5648628684101831, 0.02680982996688175]
Logits = npt.NDArray[np.float32]


def row(
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    eos: frozenset[int] = NO_EOS,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    **knobs: object,
) -> Row:
    values: dict[str, Any] = {"max_tokens": 100, "seed": seed, "temperature": temperature, **knobs}
    return Row(Sampling(**values), prompt or [1, 2], output or [], len(output or []), eos)


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32))


def pick(logits: torch.Tensor, *rows: Row) -> list[int]:
    return [token.id for token in sample(logits.clone(), rows)]


def adjusted(logits: Logits, row: Row) -> npt.NDArray[np.float64]:
    """The documented adjustments, one token at a time."""
    s, values = row.sampling, logits.astype(np.float64)
    for token in range(VOCAB):
        values[token] += s.logit_bias.get(token, 0.0)
        ends = token in s.stop_token_ids or (token in row.eos and not s.ignore_eos)
        if ends and len(row.output) < s.min_tokens:
            values[token] = -math.inf
        if token in [*row.prompt, *row.output]:
            values[token] *= s.repetition_penalty if values[token] <= 0 else 1 / s.repetition_penalty
        times = list(row.output).count(token)
        values[token] -= s.frequency_penalty * times + (s.presence_penalty if times else 0)
    return values


def allowed(values: npt.NDArray[np.float64], s: Sampling) -> dict[int, float]:
    """The distribution to draw from: token → probability, after temperature, top-k, top-p and min-p."""
    scaled = values / s.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    best = sorted(range(VOCAB), key=lambda token: -probs[token])
    kept, mass = [], 0.0
    for rank, token in enumerate(best):
        in_k = not s.top_k or rank < s.top_k
        if rank == 0 or (in_k and mass < s.top_p and probs[token] >= s.min_p * probs[best[0]]):
            kept.append(token)
        mass += probs[token]
    total = sum(probs[token] for token in kept)
    return {token: probs[token] / total for token in kept}


def drawn(values: npt.NDArray[np.float64], s: Sampling, noise: float) -> int:
    """Walk the distribution in order of ids until its mass exceeds the noise."""
    mass = 0.0
    distribution = allowed(values, s)
    for token in sorted(distribution):
        mass += distribution[token]
        if mass > noise:
            return token
    raise AssertionError("the noise is below 1")


def margin(values: npt.NDArray[np.float64], s: Sampling, noise: float) -> float:
    """How far the noise is from where the draw would be another: float32 may decide otherwise when it is tiny."""
    distribution = allowed(values, s)
    edges = np.cumsum([distribution[token] for token in sorted(distribution)])
    return float(np.abs(edges - noise).min())


# -- the noise -------------------------------------------------------------------------------------------------------


def test_noise_is_the_same_on_every_machine() -> None:
    assert [uniform(0, 0), uniform(7, 3), uniform(2**63, 10**6)] == KNOWN_NOISE


def test_noise_differs_by_seed_and_by_position_and_is_spread_evenly() -> None:
    noise = np.array([[uniform(seed, position) for position in range(100)] for seed in range(100)])
    assert len(set(noise.ravel())) == noise.size
    assert noise.min() >= 0
    assert noise.max() < 1
    counts, _ = np.histogram(noise, bins=20, range=(0, 1))
    expected = noise.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-square of 19 degrees, p = 0.001
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.05


# -- choice ----------------------------------------------------------------------------------------------------------


def test_temperature_zero_is_greedy_whatever_else_is_asked() -> None:
    logits = logits_of(1, 3)
    rows = [row(seed=s, temperature=0, top_k=5, top_p=0.1, min_p=0.5) for s in range(3)]
    assert pick(logits, *rows) == logits.argmax(-1).tolist()


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    logits = logits_of(2)
    assert {pick(logits, row(seed=s, temperature=1e-6))[0] for s in range(20)} == {int(logits.argmax())}


@pytest.mark.parametrize("knobs", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_most_probable_token_always_stays(knobs: dict[str, Any]) -> None:
    logits = logits_of(3)
    assert {pick(logits, row(seed=s, temperature=2.0, **knobs))[0] for s in range(20)} == {int(logits.argmax())}


def test_top_p_keeps_no_more_than_it_needs() -> None:
    """Of four equal tokens, two have half of the mass."""
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, [3, 5, 7, 9]] = 0.0
    assert len({pick(logits, row(seed=seed, top_p=0.5))[0] for seed in range(60)}) == 2
    assert len({pick(logits, row(seed=seed, top_p=0.51))[0] for seed in range(60)}) == 3


@settings(deadline=None, max_examples=150)
@given(
    data=st.integers(0, 10**6),
    seed=st.integers(0, 2**63 - 1),
    temperature=st.floats(0.1, 3),
    top_k=st.sampled_from([0, 1, 2, 5, VOCAB, 10 * VOCAB]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    penalties=st.tuples(st.floats(-2, 2), st.floats(-2, 2), st.floats(0.5, 2)),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=4),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=8),
    min_tokens=st.integers(0, 10),
)
def test_draws_are_those_of_the_reference(
    data: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalties: tuple[float, float, float],
    bias: dict[int, float],
    output: list[int],
    min_tokens: int,
) -> None:
    logits = logits_of(data)
    one = row(
        [3, 4, 5], output, frozenset([6]), seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        presence_penalty=penalties[0], frequency_penalty=penalties[1], repetition_penalty=penalties[2],
        logit_bias=bias, min_tokens=min_tokens, stop_token_ids=frozenset([7]),
    )  # fmt: skip
    values = adjusted(logits[0].numpy(), one)
    noise = uniform(seed, len(output))
    chosen = pick(logits, one)[0]
    if margin(values, one.sampling, noise) > 1e-4:
        assert chosen == drawn(values, one.sampling, noise)
    else:
        assert np.isfinite(values[chosen])


def test_draws_follow_the_distribution() -> None:
    logits = logits_of(5)
    one = row(temperature=0.8, top_k=6)
    probabilities = allowed(logits[0].numpy().astype(np.float64), one.sampling)
    draws = 4000
    rows = [row(temperature=0.8, top_k=6, seed=seed) for seed in range(draws)]
    counts = Counter(pick(logits.expand(draws, -1), *rows))
    assert set(counts) <= set(probabilities)
    chi = sum((counts[token] - draws * p) ** 2 / (draws * p) for token, p in probabilities.items())
    assert chi < 20.5  # 5 degrees of freedom, p = 0.001; the seeds are fixed


def test_draws_of_one_sequence_follow_the_distribution() -> None:
    """One seed, many positions."""
    logits = logits_of(6)
    one = row(top_p=0.7)
    probabilities = allowed(logits[0].numpy().astype(np.float64), one.sampling)
    draws = 3000
    rows = [row(output=[0] * position, top_p=0.7, seed=11) for position in range(draws)]
    counts = Counter(pick(logits.expand(draws, -1), *rows))
    assert set(counts) <= set(probabilities)
    chi = sum((counts[token] - draws * p) ** 2 / (draws * p) for token, p in probabilities.items())
    assert chi < 3 * len(probabilities) + 15


def test_impossible_tokens_are_never_drawn() -> None:
    """Also where rounding lets the cumulative mass end below the noise, or begin with zeros."""
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 17] = 0.0
    assert {pick(logits, row(seed=seed))[0] for seed in range(50)} == {17}


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(6)), st.integers(1, 5))
def test_company_order_and_split_do_not_change_a_draw(order: list[int], cut: int) -> None:
    logits = logits_of(7, 6)
    rows = [
        row(seed=3, temperature=0),
        row(seed=3),
        row(seed=4, top_k=3),
        row(seed=4, output=[5, 5], top_p=0.6),
        row(seed=5, min_p=0.1, frequency_penalty=1.0, output=[1, 2, 2]),
        row(seed=5, logit_bias={3: 4.0}, temperature=2.0),
    ]
    alone = [pick(logits[i : i + 1], rows[i])[0] for i in range(6)]
    for part in (order, order[:cut], order[cut:]):
        assert pick(logits[part], *(rows[i] for i in part)) == [alone[i] for i in part]


def test_seed_and_position_decide() -> None:
    logits = torch.zeros(1, VOCAB)
    draws = [[pick(logits, row(seed=seed, output=[0] * at))[0] for at in range(20)] for seed in range(20)]
    assert [pick(logits, row(seed=3, output=[9] * at))[0] for at in range(20)] == draws[3]  # what was said does not
    assert len({tuple(draw) for draw in draws}) == 20
    assert min(len(set(draw)) for draw in draws) > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened_first(dtype: torch.dtype) -> None:
    logits = logits_of(8, 4).to(dtype)
    rows = [row(seed=seed, top_k=5) for seed in range(4)]
    assert pick(logits, *rows) == pick(logits.float(), *rows)


def test_logits_of_a_model_in_inference_mode_can_be_adjusted() -> None:
    with torch.inference_mode():
        logits = logits_of(9) * 1
    biased = row(temperature=0, logit_bias={5: 100.0}, repetition_penalty=1.1, presence_penalty=0.5, output=[1])
    assert [token.id for token in sample(logits, [biased])] == [5]


# -- adjustments -----------------------------------------------------------------------------------------------------


def greedy(values: dict[int, float], **knobs: object) -> int:
    logits = torch.full((1, VOCAB), -10.0)
    for token, value in values.items():
        logits[0, token] = value
    return pick(logits, row(temperature=0, **knobs))[0]  # type: ignore[arg-type]


def test_logit_bias() -> None:
    assert greedy({1: 2.0, 2: 1.0}) == 1
    assert greedy({1: 2.0, 2: 1.0}, logit_bias={2: 1.5}) == 2
    assert greedy({1: 2.0, 2: 1.0}, logit_bias={1: -100.0}) == 2


def test_presence_penalty_counts_once_and_only_outputs() -> None:
    assert greedy({1: 2.0, 2: 1.0}, prompt=[1], presence_penalty=1.5) == 1
    assert greedy({1: 2.0, 2: 1.0}, output=[1], presence_penalty=1.5) == 2
    assert greedy({1: 2.0, 2: 1.0}, output=[1, 1, 1], presence_penalty=0.9) == 1


def test_frequency_penalty_counts_each_time() -> None:
    assert greedy({1: 2.0, 2: 1.0}, output=[1], frequency_penalty=0.6) == 1
    assert greedy({1: 2.0, 2: 1.0}, output=[1, 1], frequency_penalty=0.6) == 2


def test_repetition_penalty_shrinks_towards_less_probable_on_both_sides_of_zero() -> None:
    assert greedy({1: 2.0, 2: 1.5}, prompt=[1], repetition_penalty=1.5) == 2
    assert greedy({1: 2.0, 2: 1.5}, output=[1], prompt=[9], repetition_penalty=1.5) == 2
    assert greedy({1: -1.0, 2: -1.2}, prompt=[1], repetition_penalty=1.5) == 2


def test_min_tokens_masks_what_ends() -> None:
    eos = frozenset([1])
    assert greedy({1: 3.0, 2: 2.0, 3: 1.0}, eos=eos) == 1
    assert greedy({1: 3.0, 2: 2.0, 3: 1.0}, eos=eos, min_tokens=1) == 2
    assert greedy({1: 3.0, 2: 2.0, 3: 1.0}, eos=eos, min_tokens=1, stop_token_ids=frozenset([2])) == 3
    assert greedy({1: 3.0, 2: 2.0, 3: 1.0}, eos=eos, min_tokens=1, output=[9]) == 1


def test_min_tokens_leaves_an_ignored_eos_alone() -> None:
    assert greedy({1: 3.0, 2: 2.0}, eos=frozenset([1]), min_tokens=5, ignore_eos=True) == 1


# -- logprobs --------------------------------------------------------------------------------------------------------


def test_no_logprobs_unless_asked() -> None:
    assert sample(logits_of(1), [row(temperature=0)]) == [Token(int(logits_of(1).argmax()))]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_are_the_models_own(count: int) -> None:
    """Of the distribution before temperature, bias and penalties; the best alternatives first."""
    logits = logits_of(4)
    expected = logits[0].double().log_softmax(-1)
    (token,) = sample(logits.clone(), [row(temperature=0.3, logit_bias={8: 50.0}, logprobs=count)])
    assert token.id == 8
    assert token.logprob == pytest.approx(float(expected[8]), abs=1e-5)
    assert token.top is not None
    best = expected.argsort(descending=True)[:count].tolist()
    assert [id_ for id_, _ in token.top] == best
    assert [value for _, value in token.top] == pytest.approx(expected[best].tolist(), abs=1e-5)


def test_each_row_reports_what_it_asked_for() -> None:
    tokens = sample(logits_of(4, 3), [row(), row(logprobs=2), row(temperature=0, logprobs=0)])
    assert [token.top and len(token.top) for token in tokens] == [None, 2, []]
    assert tokens[0].logprob is None


def test_no_rows() -> None:
    """A step of prefill chunks that do not end."""
    assert sample(torch.empty(0, VOCAB), []) == []
