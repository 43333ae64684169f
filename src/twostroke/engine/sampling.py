"""From logits to tokens, on the device that has them, without waiting for it. The noise is a function of
(seed, position) alone, so that a request which is resumed, preempted or handed over draws the same tokens.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import torch

from twostroke.messages import Sampling, Token


@dataclass(frozen=True)
class Row:
    """What decides one sequence's next token, besides its logits."""

    sampling: Sampling
    prompt: Seq[int]
    output: Seq[int]  # tokens generated so far; may lack those in flight, unless ``sampling.needs_history``
    position: int  # how many tokens come before it in the output
    eos: frozenset[int]


class _Report(NamedTuple):
    """The log-probabilities that one row reports."""

    chosen: torch.Tensor  # float32 [1]
    top: torch.Tensor  # float32 [alternatives], best first
    ids: torch.Tensor  # int64 [alternatives]


@dataclass(frozen=True)
class Drawn:
    """One token for each row."""

    ids: torch.Tensor  # int64 [rows]
    reports: dict[int, _Report]  # of rows that report log-probabilities

    def to_host(self) -> "Drawn":
        """The same in the host's memory; from a GPU, not before its stream has come that far."""
        reports = {row: _Report(*(x.to("cpu", non_blocking=True) for x in one)) for row, one in self.reports.items()}
        return Drawn(self.ids.to("cpu", non_blocking=True), reports)

    def tokens(self) -> list[Token]:
        """As messages; they must be in the host's memory."""
        return [self._token(row, id_) for row, id_ in enumerate(self.ids.tolist())]

    def _token(self, row: int, id_: int) -> Token:
        report = self.reports.get(row)
        if report is None:
            return Token(id_)
        top = [(int(i), float(value)) for i, value in zip(report.ids.tolist(), report.top.tolist(), strict=True)]
        return Token(id_, logprob=float(report.chosen[0]), top=top)


def uniform(seed: int, position: int) -> float:
    """The noise of one draw: in [0, 1), the same on every machine."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def sample(logits: torch.Tensor, rows: Seq[Row]) -> list[Token]:
    """Pick one token for each row, and wait for it. See ``draw``."""
    drawn = draw(logits, rows).to_host()
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    return drawn.tokens()


@torch.inference_mode()  # as the model's: its logits may not be changed in place outside
def draw(logits: torch.Tensor, rows: Seq[Row]) -> Drawn:
    """Pick one token for each row.

    Args:
        logits: ``[rows, vocabulary]``, any floating dtype, on any device. May be overwritten.
        rows: one for each row of ``logits``.
    """
    logits = logits.float()
    reported = {i: logits[i].log_softmax(-1) for i, row in enumerate(rows) if row.sampling.logprobs is not None}
    for index, row in enumerate(rows):
        _adjust(logits[index], row)
    chosen = logits.argmax(-1)
    drawn = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        at = on_device(drawn, torch.int64, logits.device)
        chosen[at] = _draw(logits[at], [rows[index] for index in drawn])
    # As vLLM has it, what is reported is before any adjustment.
    reports = {i: _report(logprobs, chosen[i], rows[i].sampling.logprobs or 0) for i, logprobs in reported.items()}
    return Drawn(chosen, reports)


def is_plain(rows: Seq[Row]) -> bool:
    """Whether the most probable token is all that any row wants."""
    return not any(
        _is_adjusted(row) or row.sampling.temperature > 0 or row.sampling.logprobs is not None for row in rows
    )


def on_device(values: Seq[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of ``values``; to a GPU it is copied without waiting for it."""
    on_gpu = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=on_gpu).to(device, non_blocking=on_gpu)


def _report(logprobs: torch.Tensor, chosen: torch.Tensor, count: int) -> _Report:
    top, ids = logprobs.topk(count)
    return _Report(logprobs.gather(0, chosen[None]), top, ids)


def _is_adjusted(row: Row) -> bool:
    sampling = row.sampling
    return bool(sampling.logit_bias) or row.position < sampling.min_tokens or sampling.needs_history


def _adjust(logits: torch.Tensor, row: Row) -> None:
    """Biases and penalties on one row ``[vocabulary]``, in place."""
    if not _is_adjusted(row):
        return
    sampling, device = row.sampling, logits.device
    if sampling.logit_bias:
        ids = on_device(list(sampling.logit_bias), torch.int64, device)
        logits[ids] += on_device(list(sampling.logit_bias.values()), torch.float32, device)
    if row.position < sampling.min_tokens:
        ends = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else row.eos)
        logits.index_fill_(0, on_device(list(ends), torch.int64, device), -torch.inf)
    if sampling.repetition_penalty != 1.0:
        seen = on_device(list({*row.prompt, *row.output}), torch.int64, device)
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty
        )
    if (sampling.presence_penalty or sampling.frequency_penalty) and row.output:
        counts = Counter(row.output)
        ids = on_device(list(counts), torch.int64, device)
        times = on_device(list(counts.values()), torch.float32, device)
        logits[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times


def _draw(logits: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
    """Invert each row's cumulative distribution at its noise; ``int64 [rows]``.

    Only rows that cut the tail (top-k, top-p, min-p) are sorted.
    """

    settings = [row.sampling for row in rows]
    temperature = on_device([max(s.temperature, 1e-5) for s in settings], torch.float32, logits.device)
    probs = (logits / temperature[:, None]).softmax(-1)
    cut = [i for i, s in enumerate(settings) if s.top_k or s.top_p < 1 or s.min_p]
    if cut:
        at = on_device(cut, torch.int64, logits.device)
        probs[at] = _cut_tail(probs[at], [settings[i] for i in cut])
    draws = [uniform(row.sampling.seed, row.position) for row in rows]
    noise = on_device(draws, torch.float32, logits.device)[:, None]
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
