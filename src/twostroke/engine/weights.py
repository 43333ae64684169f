"""From a model directory to a network of transformers on a device, and the digest that names its weights."""

from pathlib import Path

import torch
import xxhash
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from twostroke.errors import MemoryTooSmall, ModelError

DUMMY = "dummy"  # the load format of weights that are made up
_SEED = 0  # of dummy weights
_SAMPLES = 64  # places of each weight file that its digest reads
_SAMPLE_BYTES = 1 << 16
_UNUSABLE = (  # what transformers raises, depending on what is wrong with the files
    *(OSError, ValueError, KeyError, TypeError, ArithmeticError, RuntimeError),
    *(SafetensorError, StrictDataclassError),
)


def load_network(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str,
    attention: str,
    experts: str | None = None,
) -> PreTrainedModel:
    """The causal language model in ``directory``, on ``device``, ready to compute.

    ``load_format``: "auto" reads the weights; "dummy" makes random ones from ``config.json`` alone, the same each time
    on devices of one kind. ``attention`` and, in a mixture of experts, ``experts`` name transformers' implementations.

    Raises:
        ModelError: the directory does not hold a causal language model that can be run.
        MemoryTooSmall: the device cannot hold the weights.
    """
    disable_progress_bar()
    make = _dummy if load_format == DUMMY else _read
    try:
        network = make(directory, dtype, device, attention)
        if experts and network._can_set_experts_implementation():
            network.set_experts_implementation(experts)
    except torch.OutOfMemoryError as error:
        raise MemoryTooSmall(f"the weights of {directory} do not fit into the memory of {device}") from error
    except _UNUSABLE as error:
        raise ModelError(f"{directory} cannot be loaded as a causal language model: {error}") from error
    if not getattr(network, "_supports_attention_backend", False):
        raise ModelError(f"{type(network).__name__} does not call transformers' attention interface")
    if getattr(network.config, "attn_logit_softcapping", None) or any(hasattr(m, "sinks") for m in network.modules()):
        raise ModelError(f"{type(network).__name__} needs attention soft-capping or sinks, which are not supported")
    if any(getattr(module, "is_causal", True) is False for module in network.modules()):
        raise ModelError(f"{directory} is not a causal language model: its tokens see those after them")
    return network.eval().requires_grad_(False)


def model_digest(directory: Path, load_format: str = "auto") -> str:
    """Names the weights: a hash over the configuration, and over size, header and evenly spaced samples of each
    weight file. Reading a few MiB of each file keeps the start fast; two fine-tunes differ nearly everywhere.
    """
    digest = xxhash.xxh3_128((directory / "config.json").read_bytes())
    if load_format == DUMMY:
        digest.update(f"{DUMMY} {_SEED}".encode())
        return str(digest.hexdigest())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for index in range(_SAMPLES):
                file.seek(size * index // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return str(digest.hexdigest())


def _read(directory: Path, dtype: torch.dtype, device: torch.device, attention: str) -> PreTrainedModel:
    """The weights in the files. On a GPU, each tensor goes there straight from the mapped file."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, device_map={"": device}, attn_implementation=attention, local_files_only=True
    )


def _dummy(directory: Path, dtype: torch.dtype, device: torch.device, attention: str) -> PreTrainedModel:
    """Random weights, as transformers itself would start a training. They are drawn on ``device``: on a GPU in no time,
    and with other values than on a CPU.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(forked, device_type="cuda"), torch.device(device):
        torch.manual_seed(_SEED)
        network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if (directory / "generation_config.json").is_file():
        network.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return network
