"""Steps on the CPU."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numba
import numpy as np
import torch
from transformers import PreTrainedModel

from twostroke.engine import cpu_attention
from twostroke.engine.cpu_attention import Batch, Prefill
from twostroke.engine.runner import Launched, Limits
from twostroke.engine.sampling import Row, sample
from twostroke.engine.scheduler import Chunk
from twostroke.kv.layout import Layout
from twostroke.messages import Token

ATTENTION = cpu_attention.NAME  # of what the network is loaded with
DTYPES = ("bfloat16", "float32")
EXPERTS: dict[str, str] = {}  # by dtype; transformers' own choice


def usual_dtype() -> str:
    """What computes fastest here: without instructions for it, bfloat16 takes ten times as long as float32."""
    return "bfloat16" if torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "SVE")) else "float32"


class _Done(NamedTuple):
    """A step that is computed already."""

    sampled: list[Token]

    def tokens(self) -> list[Token]:
        return self.sampled


class CpuRunner:
    """Computes when it launches."""

    depth = 1

    def __init__(self, network: PreTrainedModel, layout: Layout, threads: int) -> None:
        self._network = network
        self._layout = layout
        self._threads = threads
        self._kv = torch.empty(0)

    def measure(self, limits: Limits) -> int:
        """See ``Runner``. Nobody divides a machine's memory by this."""
        del limits
        return 0

    def bind(self, slots: torch.Tensor, limits: Limits, say: Callable[[str], None]) -> None:
        """See ``Runner``."""
        del limits, say
        self._kv = slots.view(getattr(torch, self._layout.dtype)).view(-1, *self._layout.shape)

    def enter_thread(self) -> None:
        """See ``Runner``."""
        torch.set_num_threads(self._threads)
        numba.set_num_threads(min(self._threads, numba.config.NUMBA_NUM_THREADS))

    def launch(self, chunks: Seq[Chunk], rows: Seq[Row]) -> Launched:
        """See ``Runner``."""
        return _Done(sample(self.forward(chunks), rows))

    @torch.inference_mode()
    def forward(self, chunks: Seq[Chunk]) -> torch.Tensor:
        """See ``Runner``."""
        tokens: list[int] = []
        positions: list[int] = []
        for sequence, start, size, _ in chunks:
            tokens += sequence.tokens[start : start + size]
            positions += range(start, start + size)
        batch = self._batch(chunks, positions)
        hidden = self._network.base_model(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            twostroke=batch,
        ).last_hidden_state[0]
        last = np.cumsum([chunk.size for chunk in chunks]) - 1
        rows = [int(row) for row, chunk in zip(last, chunks, strict=True) if chunk.samples]
        logits: torch.Tensor = self._network.get_output_embeddings()(hidden[rows])
        return logits

    def _batch(self, chunks: Seq[Chunk], positions: Seq[int]) -> Batch:
        size = self._layout.block_tokens
        position = torch.tensor(positions)
        slots, prefills, row = [], [], 0
        singles = [chunk for chunk in chunks if chunk.size == 1]
        longest = max((chunk.start // size + 1 for chunk in singles), default=0)
        tables = np.zeros((len(singles), longest), np.int32)
        for index, (sequence, start, count, _) in enumerate(chunks):
            table = sequence.slots()[: (start + count - 1) // size + 1]
            slots += [table[at // size] for at in range(start, start + count)]
            if count == 1:
                tables[index, : len(table)] = table
            else:
                prefills.append(Prefill(row, start, count, torch.tensor(table)))
            row += count
        return Batch(
            kv=self._kv,
            slots=torch.tensor(slots),
            offsets=position % size,
            tables=tables,
            lengths=np.array([chunk.start + 1 for chunk in singles], np.int32),
            prefills=prefills,
        )


def make_runner(network: PreTrainedModel, layout: Layout, device: torch.device, threads: int) -> CpuRunner:
    """A runner of this kind of device."""
    del device
    return CpuRunner(network, layout, threads)
