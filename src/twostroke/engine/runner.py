"""What differs between devices: how one runs a step of the network. One implementation for each kind of device."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch

from twostroke.engine.sampling import Row
from twostroke.engine.scheduler import Chunk
from twostroke.messages import Token


@dataclass(frozen=True)
class Limits:
    """The largest step that a runner has to be ready for."""

    max_batch: int  # sequences in one step
    token_budget: int  # tokens in one step
    context: int  # tokens of one sequence


class Launched(Protocol):
    """A step under way."""

    def tokens(self) -> list[Token]:
        """Wait until it is computed; one token for each chunk that samples, in order.

        Raises:
            DeviceLost: it never will be.
        """
        ...


class Runner(Protocol):
    """Runs steps on one device, always from one thread. Steps compute in the order of their launch."""

    depth: int  # steps that may be under way at once; 1 if launching computes

    def measure(self, limits: Limits) -> int:
        """Bytes of the device's memory that this process needs besides the pool."""
        ...

    def bind(self, slots: torch.Tensor, limits: Limits, say: Callable[[str], None]) -> None:
        """Use this pool, ``uint8 [num_slots, block_bytes]``, for steps within these limits, and be ready."""
        ...

    def enter_thread(self) -> None:
        """Call once in the thread that launches: some settings are a thread's own."""
        ...

    def launch(self, chunks: Seq[Chunk], rows: Seq[Row]) -> Launched:
        """Start computing the chunks, single tokens first. ``rows``: one for each chunk that samples.

        Raises:
            OutOfMemory: the device has not enough left; the step was not computed.
            DeviceLost: the device computes nothing any more.
        """
        ...

    def forward(self, chunks: Seq[Chunk]) -> torch.Tensor:
        """Compute the chunks and wait: logits ``[chunks that sample, vocabulary]``. For tests."""
        ...
