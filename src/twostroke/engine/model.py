"""A causal language model of transformers, run over the paged KV pool on one device."""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from importlib import import_module
from pathlib import Path

import torch
from transformers import PreTrainedModel

from twostroke.engine.fusion import fuse
from twostroke.engine.runner import Launched, Limits, Runner
from twostroke.engine.sampling import Row
from twostroke.engine.scheduler import Chunk
from twostroke.engine.weights import DUMMY, load_network, model_digest
from twostroke.errors import StartupError
from twostroke.kv.layout import Layout

log = logging.getLogger(__name__)


class Model:
    """The network, its layout, and the runner that computes its steps."""

    def __init__(
        self,
        directory: Path,
        *,
        dtype: str,
        block_tokens: int,
        device: str = "cpu",
        threads: int = 0,
        load_format: str = "auto",
    ) -> None:
        """Load the weights.

        Args:
            directory: of a Hugging Face model.
            dtype: of weights and KV; "auto" is bfloat16 unless the device computes float32 faster.
            block_tokens: tokens in a block.
            device: "cpu", "cuda" or "cuda:N".
            threads: of the matrix products on a CPU; 0 is what torch would take.
            load_format: see ``load_network``.

        Raises:
            ModelError: the directory does not hold a causal language model that can be run.
            MemoryTooSmall: the device cannot hold the weights.
            StartupError: the device, dtype or block size cannot be used.
        """
        self.device = _device(device)
        self.threads = threads or torch.get_num_threads()
        on_gpu = self.device.type == "cuda"
        if on_gpu:  # pinned memory is of the current device, and a worker shall be on no other
            torch.cuda.set_device(self.device)
        try:  # one of them alone: Triton is only where a GPU is
            kind = import_module("twostroke.engine.cuda" if on_gpu else "twostroke.engine.cpu")
        except ImportError as error:
            raise StartupError(f"--device {device}: {error}; install twostroke[{self.device.type}]") from error
        if dtype == "auto":
            dtype = kind.usual_dtype()
        if dtype not in kind.DTYPES:
            raise StartupError(f"dtype {dtype!r} does not run on {self.device}: use {' or '.join(kind.DTYPES)}")
        network = load_network(
            directory,
            dtype=getattr(torch, dtype),
            device=self.device,
            load_format=load_format,
            attention=kind.ATTENTION,
            experts=kind.EXPERTS.get(dtype),
        )
        config = network.config.get_text_config()
        heads = config.num_attention_heads
        self.layout = Layout(
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            block_tokens=block_tokens,
            dtype=dtype,
            # Made-up weights are the same only on devices of one kind.
            model=model_digest(directory, load_format) + (f" {_kind(self.device)}" if load_format == DUMMY else ""),
        )
        self.vocab_size = int(config.vocab_size)
        self.max_position = int(config.max_position_embeddings)
        self.eos = _end_tokens(network)
        log.info("loaded %s on %s, %d fused projections", directory.name, self.device, fuse(network))
        self.runner: Runner = kind.make_runner(network, self.layout, self.device, self.threads)
        self.depth = self.runner.depth

    def bind(self, slots: torch.Tensor, limits: Limits, say: Callable[[str], None] = log.info) -> None:
        """Use this pool, ``uint8 [num_slots, block_bytes]``, for steps within these limits, and be ready."""
        self.runner.bind(slots, limits, say)

    def enter_thread(self) -> None:
        """Call once in the thread that calls ``launch``."""
        self.runner.enter_thread()

    def launch(self, chunks: Seq[Chunk]) -> Launched:
        """Start computing one step.

        Raises:
            OutOfMemory: the device has not enough left; the step was not computed.
            DeviceLost: the device computes nothing any more.
        """
        rows = [
            Row(
                sampling=sequence.request.sampling,
                prompt=sequence.request.prompt,
                output=sequence.tokens[len(sequence.request.prompt) :],
                position=start + size - len(sequence.request.prompt),
                eos=self.eos,
            )
            for sequence, start, size, samples in chunks
            if samples
        ]
        return self.runner.launch(chunks, rows)

    def forward(self, chunks: Seq[Chunk]) -> torch.Tensor:
        """Compute the chunks and wait: logits ``[chunks that sample, vocabulary]``. For tests."""
        return self.runner.forward(chunks)


def _device(name: str) -> torch.device:
    if not name.startswith("cuda"):
        return torch.device(name)
    if not torch.cuda.is_available():
        raise StartupError(f"--device {name}: torch {torch.__version__} sees no GPU here")
    device = torch.device(name)
    if (device.index or 0) >= torch.cuda.device_count():
        raise StartupError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", device.index or 0)


def _kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _end_tokens(network: PreTrainedModel) -> frozenset[int]:
    """Ids that end a generation, of the generation config first, as transformers has it."""
    eos = network.generation_config.eos_token_id if network.generation_config else network.config.eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or [])
