"""From logits to tokens. The noise is a function of (seed, position) alone, so that a request which is resumed,
preempted or handed over draws the same tokens.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from twostroke.messages import Sampling, Token


@dataclass(frozen=True)
class Row:
    """What decides one sequence's next token, besides its logits."""

    sampling: Sampling
    prompt: Seq[int]
    output: Seq[int]  # tokens generated so far
    eos: frozenset[int]


def uniform(seed: int, position: int) -> float:
    """The noise of one draw: in [0, 1), the same on every machine."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


@torch.inference_mode()  # as the model's: its logits may not be changed in place outside
def sample(logits: torch.Tensor, rows: Seq[Row]) -> list[Token]:
    """Pick one token for each row.

    Args:
        logits: ``[rows, vocabulary]``, any floating dtype, on any device. May be overwritten.
        rows: one for each row of ``logits``.
    """
    logits = logits.float()
    reported = _reported(logits, rows)
    for index, row in enumerate(rows):
        _adjust(logits[index], row)
    chosen = logits.argmax(-1)
    drawn = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        chosen[drawn] = _draw(logits[drawn], [rows[index] for index in drawn])
    ids: list[int] = chosen.tolist()
    return [_token(id_, reported.get(index), rows[index].sampling.logprobs) for index, id_ in enumerate(ids)]


def _reported(logits: torch.Tensor, rows: Seq[Row]) -> dict[int, torch.Tensor]:
    """Log-probabilities ``[vocabulary]`` of the rows that report them, before any adjustment (as vLLM reports)."""
    wanted = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
    return {index: logits[index].log_softmax(-1) for index in wanted}


def _token(id_: int, logprobs: torch.Tensor | None, count: int | None) -> Token:
    if logprobs is None or count is None:
        return Token(id_)
    values, ids = logprobs.topk(count) if count else (logprobs[:0], logprobs[:0])
    top = [(int(alternative), float(value)) for alternative, value in zip(ids.tolist(), values.tolist(), strict=True)]
    return Token(id_, logprob=float(logprobs[id_]), top=top)


def _adjust(logits: torch.Tensor, row: Row) -> None:
    """Biases and penalties on one row ``[vocabulary]``, in place."""
    sampling = row.sampling
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
    if len(row.output) < sampling.min_tokens:
        ends = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else row.eos)
        logits[list(ends)] = -torch.inf
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(list({*row.prompt, *row.output}), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty
        )
    if (sampling.presence_penalty or sampling.frequency_penalty) and row.output:
        counts = Counter(row.output)
        ids = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), device=logits.device)
        logits[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times


def _draw(logits: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
    """Invert each row's cumulative distribution at its noise; ``int64 [rows]``.

    Only rows that cut the tail (top-k, top-p, min-p) are sorted.
    """

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    settings = [row.sampling for row in rows]
    probs = (logits / column([max(s.temperature, 1e-5) for s in settings])).softmax(-1)
    cut = [i for i, s in enumerate(settings) if s.top_k or s.top_p < 1 or s.min_p]
    if cut:
        probs[cut] = _cut_tail(probs[cut], [settings[i] for i in cut])
    noise = column([uniform(row.sampling.seed, len(row.output)) for row in rows])
    cumulative = probs.double().cumsum(-1)
    index = torch.searchsorted(cumulative, noise.double() * cumulative[:, -1:], right=True)[:, 0]
    # Rounding can point past the last possible token; the most probable one then takes its place.
    index = index.clamp(max=probs.shape[-1] - 1)
    possible = probs.gather(1, index[:, None])[:, 0] > 0
    return torch.where(possible, index, probs.argmax(-1))


def _cut_tail(probs: torch.Tensor, settings: Seq[Sampling]) -> torch.Tensor:
    """Zero what top-k, top-p and min-p exclude; the most probable token always stays. ``[rows, vocabulary]``."""
    ordered, ids = probs.sort(-1, descending=True)
    rank = torch.arange(ordered.shape[-1], device=probs.device)
    before = ordered.cumsum(-1) - ordered  # the mass of everything more probable
    for index, sampling in enumerate(settings):
        keep = before[index] < sampling.top_p
        if sampling.top_k:
            keep &= rank < sampling.top_k
        if sampling.min_p:
            keep &= ordered[index] >= sampling.min_p * ordered[index, 0]
        keep[0] = True
        ordered[index] *= keep
    return torch.zeros_like(probs).scatter_(-1, ids, ordered)
