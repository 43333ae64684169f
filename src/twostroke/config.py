"""Frozen configurations, one a process, and the only reader of the environment."""

import os
import re
from pathlib import Path

from msgspec import Struct

from twostroke.errors import StartupError
from twostroke.messages import Role

GiB = 1 << 30
_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


class EngineConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """What the engine needs to know, apart from the model itself."""

    dtype: str = "bfloat16"
    block_tokens: int = 16
    kv_memory: int = GiB  # bytes of the KV pool
    max_model_len: int | None = None  # tokens; None is what the model and the pool allow
    max_batch: int = 256  # sequences in one step
    token_budget: int = 512  # tokens in one step: decodes first, then prefill chunks
    threads: int = 0  # of the matrix products; 0 is all cores


class WorkerConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """One worker process."""

    model: str | None = None  # a Hugging Face directory, a GGUF file, or a hub id; None is the embedded model
    served_name: str | None = None
    role: Role = "both"
    name: str = "worker-0"
    host: str = "127.0.0.1"
    port: int = 8100
    engine: EngineConfig = EngineConfig()
    lease_seconds: float = 30.0  # a lease that nobody renews ends after this
    handover_timeout: float = 60.0  # silence from the producer after which the consumer computes for itself
    attach_timeout: float = 5.0  # how long either end waits for the other to appear
    max_queue: int = 1024  # waiting requests, above which new ones get 429
    max_body: int = 16 << 20  # bytes


class RouterConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The router process. The URLs are of workers by the role that the router gives them."""

    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    colocated: tuple[str, ...] = ()
    schedule: str = "concurrent"  # or "serial"
    policy: str = "least-loaded"  # or "round-robin"
    host: str = "127.0.0.1"
    port: int = 8000
    heartbeat: float = 1.0  # seconds between looks at each worker
    max_body: int = 16 << 20  # bytes


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "1.5 GB" or "1048576". Units are binary either way.

    Raises:
        StartupError: the text is no size, or not positive.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size <= 0:
        raise StartupError(f"{text!r} is not a size in bytes; write for example 512MiB or 4GiB")
    return size


def cluster_secret() -> str:
    """The secret that internal channels require (``TWOSTROKE_SECRET``); empty when none is set."""
    return os.environ.get("TWOSTROKE_SECRET", "")


def cache_dir() -> Path:
    """Where converted models are kept: ``TWOSTROKE_CACHE``, else the user's cache directory."""
    if own := os.environ.get("TWOSTROKE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twostroke"


def check_bind(host: str, secret: str, insecure: bool = False) -> None:
    """Refuse to listen beyond loopback without a cluster secret.

    Raises:
        StartupError: ``host`` is not a loopback address, no secret is set, and ``insecure`` was not asked for.
    """
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    if not loopback and not secret and not insecure:
        raise StartupError(
            f"refusing to listen on {host} without a cluster secret: set TWOSTROKE_SECRET to the same value on every "
            "worker and router, or pass --insecure"
        )
