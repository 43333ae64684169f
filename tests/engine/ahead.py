"""The CPU, playing a device that is two steps deep."""

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedModel

from twostroke.engine.cpu import CpuRunner
from twostroke.engine.runner import Launched
from twostroke.engine.sampling import Row, sample
from twostroke.engine.scheduler import Chunk, Sequence
from twostroke.kv.layout import Layout
from twostroke.messages import Token


class _Frozen:
    """What a runner reads of a sequence, as it was at the launch."""

    def __init__(self, sequence: Sequence) -> None:
        self.tokens = list(sequence.tokens)
        self._slots = list(sequence.slots())

    def slots(self) -> list[int]:
        return self._slots


@dataclass(frozen=True, eq=False)
class _Ahead:
    """A step that is not computed before it is waited for."""

    runner: "AheadRunner"
    chunks: list[Chunk]
    frozen: list[_Frozen]  # the chunks' sequences
    rows: list[Row]

    def tokens(self) -> list[Token]:
        return self.runner.compute(self)


class AheadRunner(CpuRunner):
    """Computes as such a device does: in order, what it was told at the launch, here at the latest moment. It knows the
    token that it sampled last for a sequence, whether or not we do.
    """

    depth = 2

    def __init__(self, network: PreTrainedModel, layout: Layout, threads: int) -> None:
        super().__init__(network, layout, threads)
        self.log: list[str] = []  # "launch" and "tokens", as they were called
        self.unknown = 0  # chunks whose token was not known at their launch
        self._pending: deque[_Ahead] = deque()
        self._last: dict[Sequence, int] = {}  # what the step before sampled

    def launch(self, chunks: Seq[Chunk], rows: Seq[Row]) -> Launched:
        """See ``Runner``."""
        self.log.append("launch")
        self.unknown += sum(chunk.start == len(chunk.sequence.tokens) for chunk in chunks)
        step = _Ahead(self, list(chunks), [_Frozen(chunk.sequence) for chunk in chunks], list(rows))
        self._pending.append(step)
        assert len(self._pending) <= self.depth, "too many steps under way"
        return step

    def compute(self, step: _Ahead) -> list[Token]:
        """Compute a step, the oldest."""
        self.log.append("tokens")
        assert self._pending.popleft() is step, "steps are waited for in order"
        for chunk, frozen in zip(step.chunks, step.frozen, strict=True):
            if chunk.start == len(frozen.tokens):
                assert chunk.size == 1, "only one token can be unknown"
                frozen.tokens.append(self._last[chunk.sequence])
        known = [
            Chunk(cast(Sequence, frozen), chunk.start, chunk.size, chunk.samples)
            for chunk, frozen in zip(step.chunks, step.frozen, strict=True)
        ]
        tokens = sample(self.forward(known), step.rows)
        sampled = [chunk.sequence for chunk in step.chunks if chunk.samples]
        self._last = {sequence: token.id for sequence, token in zip(sampled, tokens, strict=True)}
        return tokens
