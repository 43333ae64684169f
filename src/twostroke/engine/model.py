"""A causal language model of transformers, run over the paged KV pool."""

import logging
from collections.abc import Sequence as Seq
from pathlib import Path

import numba
import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from twostroke.engine import attention
from twostroke.engine.attention import Batch, Prefill
from twostroke.engine.scheduler import Chunk
from twostroke.errors import ModelError, StartupError
from twostroke.kv.layout import Layout

log = logging.getLogger(__name__)
_SAMPLES = 64  # places of each weight file that its digest reads
_SAMPLE_BYTES = 1 << 16


def model_digest(directory: Path) -> str:
    """Names the weights: a hash over the configuration, and over size, header and evenly spaced samples of each
    weight file. Reading a few MiB of each file keeps the start fast; two fine-tunes differ nearly everywhere.
    """
    digest = xxhash.xxh3_128((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for index in range(_SAMPLES):
                file.seek(size * index // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return str(digest.hexdigest())


class Model:
    """The network. ``forward`` computes one step's chunks and returns logits where tokens are to be sampled."""

    def __init__(self, directory: Path, *, dtype: str, block_tokens: int, threads: int = 0) -> None:
        """Load the weights. ``threads``: of the matrix products; 0 is what torch would take.

        Raises:
            ModelError: the directory does not hold a causal language model that can be run.
            StartupError: the dtype or block size cannot be used.
        """
        if dtype not in ("float32", "bfloat16"):
            raise StartupError(f"dtype {dtype!r} does not run on a CPU: use bfloat16 or float32")
        self._network = _load(directory, getattr(torch, dtype))
        config = self._network.config.get_text_config()
        heads = config.num_attention_heads
        self.layout = Layout(
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            block_tokens=block_tokens,
            dtype=dtype,
            model=model_digest(directory),
        )
        self.vocab_size = int(config.vocab_size)
        self.max_position = int(config.max_position_embeddings)
        self.eos = _end_tokens(self._network)
        fused = fuse(self._network)
        log.info("loaded %s, %d fused projections", directory.name, fused)
        self.threads = threads or torch.get_num_threads()
        self._kv = torch.empty(0)

    def bind(self, slots: torch.Tensor) -> None:
        """Use this pool: ``uint8 [num_slots, block_bytes]``."""
        dtype = getattr(torch, self.layout.dtype)
        self._kv = slots.view(dtype).view(-1, *self.layout.shape)

    def enter_thread(self) -> None:
        """Call once in the thread that calls ``forward``: thread counts are a thread's own."""
        torch.set_num_threads(self.threads)
        numba.set_num_threads(min(self.threads, numba.config.NUMBA_NUM_THREADS))

    @torch.inference_mode()
    def forward(self, chunks: Seq[Chunk]) -> torch.Tensor:
        """Compute the chunks, single tokens first; logits ``[chunks that sample, vocabulary]``."""
        tokens: list[int] = []
        positions: list[int] = []
        for sequence, start, size in chunks:
            tokens += sequence.tokens[start : start + size]
            positions += range(start, start + size)
        batch = self._batch(chunks, positions)
        hidden = self._network.base_model(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            **{attention.NAME: batch},
        ).last_hidden_state[0]
        last = np.cumsum([chunk.size for chunk in chunks]) - 1
        rows = [int(row) for row, chunk in zip(last, chunks, strict=True) if chunk.samples]
        logits: torch.Tensor = self._network.get_output_embeddings()(hidden[rows])
        return logits

    def _batch(self, chunks: Seq[Chunk], positions: Seq[int]) -> Batch:
        size = self.layout.block_tokens
        position = torch.tensor(positions)
        slots, prefills, row = [], [], 0
        singles = [chunk for chunk in chunks if chunk.size == 1]
        longest = max((chunk.start // size + 1 for chunk in singles), default=0)
        tables = np.zeros((len(singles), longest), np.int32)
        for index, (sequence, start, count) in enumerate(chunks):
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


def _load(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    disable_progress_bar()
    try:
        network = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation=attention.NAME, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{directory} cannot be loaded as a causal language model: {error}") from error
    if not getattr(network, "_supports_attention_backend", False):
        raise ModelError(f"{type(network).__name__} does not call transformers' attention interface")
    if getattr(network.config, "attn_logit_softcapping", None) or any(hasattr(m, "sinks") for m in network.modules()):
        raise ModelError(f"{type(network).__name__} needs attention soft-capping or sinks, which are not supported")
    if any(getattr(module, "is_causal", True) is False for module in network.modules()):
        raise ModelError(f"{directory} is not a causal language model: its tokens see those after them")
    return network.eval().requires_grad_(False)


def _end_tokens(network: PreTrainedModel) -> frozenset[int]:
    """Ids that end a generation, of the generation config first, as transformers has it."""
    eos = network.generation_config.eos_token_id if network.generation_config else network.config.eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or [])


class _Fused(nn.Module):
    """Several linear maps of one input as one product. It returns the first map's result and keeps the others'."""

    def __init__(self, parts: Seq[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([part.weight.data for part in parts]), requires_grad=False)
        biases = [part.bias.data for part in parts if part.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self.sizes = [part.out_features for part in parts]
        self.results: tuple[torch.Tensor, ...] = ()
        self.input: torch.Tensor | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.input = input
        first, *rest = torch.split(nn.functional.linear(input, self.weight, self.bias), self.sizes, dim=-1)
        self.results = tuple(rest)
        return first


class _Part(nn.Module):
    """Hands out what a ``_Fused`` has computed already, for the same input and no other."""

    def __init__(self, fused: _Fused, index: int) -> None:
        super().__init__()
        self.source = (fused,)  # a tuple, so that it does not become a submodule twice
        self.index = index

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        fused = self.source[0]
        assert input is fused.input, "fused projections must be called in order, on one input"
        return fused.results[self.index]


_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse(network: nn.Module) -> int:
    """Let projections that read the same input be one matrix product each; returns how many there are.

    transformers' model code stays as it is: it still calls each projection by its name.
    """
    count = 0
    for module in list(network.modules()):
        for names in _TOGETHER:
            parts = [getattr(module, name, None) for name in names]
            linears = [part for part in parts if type(part) is nn.Linear]
            if len(linears) != len(names) or len({part.bias is None for part in linears}) != 1:
                continue
            fused = _Fused(linears)
            setattr(module, names[0], fused)
            for index, name in enumerate(names[1:]):
                setattr(module, name, _Part(fused, index))
            count += 1
    return count
