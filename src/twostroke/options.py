"""Options that several verbs of the command line have in common."""

from dataclasses import dataclass
from typing import Literal

from cyclopts import Parameter

from twostroke import config
from twostroke.config import EngineConfig, EvictionPolicy, GdsChoice, LoadFormat, parse_size
from twostroke.errors import StartupError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of the engine, the same for one worker and for all workers of ``up``."""

    device: str = "auto"
    "cpu, cuda or cuda:1; auto prefers a GPU."
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    "Numbers that weights and KV cache are made of."
    load_format: LoadFormat = "auto"
    "dummy makes random weights from config.json alone."
    max_model_len: int | None = None
    "Longest prompt + answer, in tokens. [default: as much as fits]"
    gpu_memory_utilization: float = 0.9
    "Share of a GPU's memory that workers may take."
    kv_memory: str | None = None
    "Size of a worker's KV cache. [default: 1GiB; on a GPU the rest]"
    block_size: int = 16
    "Tokens in one KV block."
    chunk_size: int | None = None
    "Most tokens in one engine step. [default: 512; on a GPU 8192]"
    max_batch: int = 256
    "Most sequences in one engine step."
    threads: int | None = None
    "CPU threads of each worker. [default: all; up divides them]"
    store: str | None = None
    "Tiers: host:8GiB,disk:/path:1TiB,dir:/path,service:host:port."
    tenant_quota: str | None = None
    "Bytes of one cache_salt (or API key) in each tier."
    eviction: EvictionPolicy = "lru"
    "Which blocks go first."
    gds: GdsChoice = "auto"
    "GPUDirect Storage."

    def config(self) -> EngineConfig:
        """The engine's configuration.

        Raises:
            StartupError: a number is out of range.
        """
        for name in ("block_size", "chunk_size", "max_batch", "max_model_len", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise StartupError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise StartupError(
                f"--gpu-memory-utilization is a share, above 0 up to 1, not {self.gpu_memory_utilization}"
            )
        return EngineConfig(
            device=config.check_device(self.device),
            dtype=self.dtype,
            load_format=self.load_format,
            block_tokens=self.block_size,
            gpu_memory_utilization=self.gpu_memory_utilization,
            kv_memory=parse_size(self.kv_memory) if self.kv_memory is not None else None,
            max_model_len=self.max_model_len,
            max_batch=self.max_batch,
            token_budget=self.chunk_size,
            threads=self.threads or 0,
            gds=self.gds,
        )

    def quota(self) -> int | None:
        """Bytes of ``tenant_quota``. ``StartupError``."""
        return None if self.tenant_quota is None else parse_size(self.tenant_quota)


DEFAULT_OPTIONS = EngineOptions()
