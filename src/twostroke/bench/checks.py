"""What cannot work is said before anything starts. Pure, but for reading the model's files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from twostroke.bench.schemes import Scheme, Understand
from twostroke.config import CPU_KV_MEMORY, EngineConfig, GiB
from twostroke.errors import StartupError

_WORKER_BYTES = 600 << 20  # of a worker beyond weights and pool: libraries, activations


class ModelFacts(Struct, frozen=True):
    """What the model's files say. 0 is unknown."""

    name: str
    context: int  # tokens
    vocab: int
    weight_bytes: int
    kv_values: int  # numbers that one token leaves in the KV cache

    def kv_bytes(self, dtype: str) -> int:
        """Bytes of one token's KV, at most: "auto" may turn out as float32."""
        return self.kv_values * (2 if dtype in ("bfloat16", "float16") else 4)


class Machine(Struct, frozen=True):
    """What this machine has."""

    gpus: int
    free_memory: int  # bytes of host memory


class Room(Struct, frozen=True):
    """What a scheme makes of model and machine. ``tokens`` is the longest prompt with its answer, ``pool`` what a pool
    holds; 0 is unknown, and then nothing is refused for it.
    """

    workers: int
    tokens: int
    pool: int


def read_model(directory: Path, name: str) -> ModelFacts:
    """Facts of a checked Hugging Face directory."""
    config: dict[str, Any] = msgspec.json.decode((directory / "config.json").read_bytes())
    config = config.get("text_config") or config
    heads = config.get("num_attention_heads") or 0
    head_dim = config.get("head_dim") or (config.get("hidden_size", 0) // heads if heads else 0)
    kv_heads = config.get("num_key_value_heads") or heads
    return ModelFacts(
        name=name,
        context=config.get("max_position_embeddings") or 0,
        vocab=config.get("vocab_size") or 0,
        weight_bytes=sum(file.stat().st_size for file in directory.glob("*.safetensors")),
        kv_values=2 * (config.get("num_hidden_layers") or 0) * kv_heads * head_dim,
    )


def check_scheme(
    scheme: Scheme, arguments: Sequence[str], model: ModelFacts, machine: Machine, understand: Understand
) -> Room:
    """Can the scheme run here? ``arguments`` is the whole command line of ``up``.

    Raises:
        StartupError: it cannot; the message is the reason.
    """
    for line in (*scheme.companions("/scratch", 1), arguments):
        meaning = understand([*line, "--parent-pid", "1"])
    workers = _workers(meaning)
    engine = meaning["engine"]
    assert isinstance(engine, EngineConfig)
    if scheme.gpus > machine.gpus:
        raise StartupError(f"it needs {scheme.gpus} GPUs, there are {machine.gpus}")
    on_cpu = engine.device == "cpu" or (engine.device == "auto" and not machine.gpus and not meaning.get("devices"))
    if not on_cpu:
        if not machine.gpus:
            raise StartupError("it needs a GPU, there is none")
        return Room(workers, engine.max_model_len or model.context, 0)
    kv_memory = engine.kv_memory or CPU_KV_MEMORY
    needed = workers * (model.weight_bytes + kv_memory + _WORKER_BYTES)
    if needed > machine.free_memory:
        raise StartupError(
            f"{workers} workers need about {needed / GiB:.1f} GiB of memory, {machine.free_memory / GiB:.1f} are free"
        )
    per_token = model.kv_bytes(engine.dtype)
    pool = kv_memory // per_token if per_token else 0
    limits = [limit for limit in (engine.max_model_len, model.context, pool) if limit]
    return Room(workers, min(limits, default=0), pool)


def check_length(room: Room, prompt: int, output: int) -> None:
    """Do prompts of this length fit?

    Raises:
        StartupError: they do not.
    """
    if room.tokens and prompt + output > room.tokens:
        raise StartupError(f"{prompt:,} + {output:,} tokens do not fit into the context of {room.tokens:,}")


def check_in_place(room: Room, tokens: int) -> None:
    """Does the KV of a whole workload of ``tokens`` stay in a pool, so that decoding alone can be timed?

    Raises:
        StartupError: it does not.
    """
    if room.pool and tokens > room.pool:
        raise StartupError(f"the KV of {tokens:,} tokens would have to be in place, a pool holds {room.pool:,}")


def _workers(meaning: Mapping[str, object]) -> int:
    counts = [meaning.get(role) for role in ("prefill", "decode", "colocated")]
    return sum(count for count in counts if isinstance(count, int)) or 2
