"""Frozen configurations, one a process, and the only reader of the environment."""

import os
import re
import runpy
from collections.abc import Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from itertools import takewhile
from pathlib import Path
from typing import Literal

from msgspec import Struct

from twostroke.errors import StartupError
from twostroke.messages import Role

Schedule = Literal["concurrent", "serial"]
Policy = Literal["prefix-aware", "least-loaded", "round-robin"]
OnLoss = Literal["continue", "error"]  # of the worker that streams an answer
LinkChoice = Literal["auto", "shm", "cuda-ipc", "nixl", "tcp", "store"]
GdsChoice = Literal["auto", "on", "off"]
EvictionPolicy = Literal["lru", "s3-fifo"]
LoadFormat = Literal["auto", "dummy"]  # read the weights, or make random ones from config.json alone

GiB = 1 << 30
CPU_KV_MEMORY = GiB  # where ``kv_memory`` is None; on a GPU that is what weights and activations leave
TOKEN_BUDGET = {"cpu": 512, "cuda": 8192}  # by device type, where ``token_budget`` is None
_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_URL = re.compile(r"https?://[^/\s?#]+/?")
_HOST = re.compile(r"[A-Za-z0-9._-]+(:[0-9]{1,5})?|[0-9a-f]*:[0-9a-f.]*:[0-9a-f:.]*|\[[0-9a-f:.]+\]:[0-9]{1,5}")
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")
_LINK_DEVICE = re.compile(r"[A-Za-z0-9_.-]{1,32}")
_MOONCAKE = re.compile(r"([A-Za-z0-9._-]+|\[[0-9a-f:.]+\]):([0-9]{1,5})(?::(.+))?")
_API_KEY = re.compile(r"[\x21-\x2b\x2d-\x7e]{1,512}")
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


class HostTier(Struct, frozen=True, forbid_unknown_fields=True, tag="host"):
    """KV blocks in this worker's host memory."""

    size: int  # bytes

    def __str__(self) -> str:
        return f"host:{self.size}"


class DiskTier(Struct, frozen=True, forbid_unknown_fields=True, tag="disk"):
    """KV blocks in files of this worker's own under a path."""

    path: Path
    size: int  # bytes

    def __str__(self) -> str:
        return f"disk:{self.path}:{self.size}"


class DirectoryTier(Struct, frozen=True, forbid_unknown_fields=True, tag="dir"):
    """KV blocks in files under a path that many workers share."""

    path: Path
    size: int | None = None  # bytes; None is no limit

    def __str__(self) -> str:
        return f"dir:{self.path}" + (f":{self.size}" if self.size is not None else "")


class ServiceTier(Struct, frozen=True, forbid_unknown_fields=True, tag="service"):
    """KV blocks in a cache service."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"service:{self.host}:{self.port}"


class ValkeyTier(Struct, frozen=True, forbid_unknown_fields=True, tag="valkey"):
    """KV blocks in a Valkey or Redis server."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"valkey:{self.host}:{self.port}"


class MooncakeTier(Struct, frozen=True, forbid_unknown_fields=True, tag="mooncake"):
    """KV blocks in a Mooncake Store."""

    host: str  # of its master
    port: int
    size: int = 0  # bytes of memory that each worker adds to the store

    def __str__(self) -> str:
        return f"mooncake:{self.host}:{self.port}" + (f":{self.size}" if self.size else "")


TierConfig = HostTier | DiskTier | DirectoryTier | ServiceTier | ValkeyTier | MooncakeTier
SHARED_TIERS = (DirectoryTier, ServiceTier, ValkeyTier, MooncakeTier)  # that other workers see, too


class EngineConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """What the engine needs to know, apart from the model itself."""

    device: str = "auto"  # "cpu", "cuda", "cuda:1"; auto is a GPU if torch sees one
    dtype: str = "auto"  # bfloat16, or float32 on a CPU that is slower with bfloat16
    load_format: LoadFormat = "auto"
    block_tokens: int = 16
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory for weights, activations and KV together
    kv_memory: int | None = None  # bytes of the KV pool; None is CPU_KV_MEMORY, or what the utilization leaves
    max_model_len: int | None = None  # tokens; None is what the model and the pool allow
    max_batch: int = 256  # sequences in one step
    token_budget: int | None = None  # tokens in one step: decodes first, then prefill chunks; None is TOKEN_BUDGET
    threads: int = 0  # of the matrix products; 0 is all cores
    gds: GdsChoice = "auto"  # whether a GPU reads and writes tiers in files by itself


class WorkerConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """One worker process."""

    model: str | None = None  # a Hugging Face directory, a GGUF file, or a hub id; None is the embedded model
    served_name: str | None = None
    role: Role = "both"
    name: str = "worker-0"
    host: str = "127.0.0.1"
    port: int = 8100
    bootstrap_hosts: tuple[str, ...] = ()  # prefill workers that any request may name, as "host" or "host:port"
    engine: EngineConfig = EngineConfig()
    link: LinkChoice = "auto"  # offer and read over every link there is, or over this one alone
    link_devices: tuple[str, ...] = ()  # network devices that NIXL may use, such as "mlx5_2"; none is all
    store: tuple[TierConfig, ...] = ()  # the tiers below the pool, the fastest first
    tenant_quota: int | None = None  # bytes that one salt may have in each of them
    eviction: EvictionPolicy = "lru"  # of the tiers in host memory and on disk
    api_keys: tuple[str, ...] = ()  # of clients; none is no check
    lease_seconds: float = 30.0  # a lease that nobody renews ends after this
    handover_timeout: float = 2.5  # silence from the producer after which the consumer computes for itself
    progress_timeout: float = 120.0  # without a step, an engine with something to do no longer counts as at work
    attach_timeout: float = 5.0  # how long either end waits for the other to appear
    queue_timeout: float = (
        600.0  # a request that has no slots by then gets 429; nor is anything new of it awaited longer
    )
    max_queue: int = 1024  # waiting requests, above which new ones get 429
    max_body: int = 16 << 20  # bytes
    routers: tuple[str, ...] = ()  # URLs of routers to join
    drain_timeout: float = 30.0  # seconds in which what was begun is finished, once the worker is to leave


class RouterConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The router process. The URLs are of workers by the role that the router gives them."""

    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    colocated: tuple[str, ...] = ()
    schedule: Schedule = "concurrent"
    policy: Policy = "prefix-aware"
    host: str = "127.0.0.1"
    port: int = 8000
    heartbeat: float = 1.0  # seconds between looks at each worker
    max_body: int = 16 << 20  # bytes
    on_loss: OnLoss = "continue"
    # Tokens to compute, below which a decode worker needs no hand-over: a step with up to 32 rows more takes about as
    # long (reading the weights limits it), while a hand-over takes four requests more and 3 ms.
    short_prompt: int = 32
    max_queue: int = 1024  # requests without a first byte, above which new ones get 429
    queue_timeout: float = 600.0  # for which a request waits until a decode worker has room
    retries: int = 2  # times that one request is sent to another worker because one was lost, or refused it
    api_keys: tuple[str, ...] = ()  # of clients; none is no check


class UpConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole system on one machine: a router and its workers, which listen on loopback."""

    model: str | None = None  # as in WorkerConfig
    prefill: int = 1  # workers of each kind
    decode: int = 1
    colocated: int = 0
    host: str = "127.0.0.1"  # of the router
    port: int = 8000
    schedule: Schedule = "concurrent"
    policy: Policy = "prefix-aware"
    insecure: bool = False
    engine: EngineConfig = EngineConfig()  # of each worker; they share the cores, and the utilization of one GPU
    devices: tuple[str, ...] = ()  # workers take them in turn; none is by ``engine.device``
    on_loss: OnLoss = "continue"
    link: LinkChoice = "auto"  # of each worker
    link_devices: tuple[str, ...] = ()  # of each worker
    store: tuple[TierConfig, ...] = ()  # of each worker, too
    tenant_quota: int | None = None  # of each worker
    eviction: EvictionPolicy = "lru"
    api_keys: tuple[str, ...] = ()  # of the router, and of each worker


class StoreConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The cache service."""

    memory: int | None = None  # bytes
    disk: DiskTier | None = None
    ttl: float | None = None  # seconds
    layouts: int = 1  # of blocks, that is models, that share memory and disk equally
    tenant_quota: int | None = None  # bytes that one salt may have of each, for each model
    eviction: EvictionPolicy = "lru"
    host: str = "127.0.0.1"
    port: int = 8300


def parse_seconds(text: str) -> float:
    """Seconds of "90s", "30min", "1h" or "2d".

    Raises:
        StartupError: the text is no time, or not positive.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(s|min|h|d)?", text.strip())
    seconds = float(match[1]) * {"s": 1, "min": 60, "h": 3600, "d": 86400}[match[2] or "s"] if match else 0.0
    if seconds <= 0:
        raise StartupError(f"{text!r} is not a time; write for example 90s, 30min, 1h or 2d")
    return seconds


def check_pools(prefill: int, decode: int, colocated: int) -> None:
    """Can these many workers of each kind serve any request?

    Raises:
        StartupError: a count is negative, there is no worker, or one half of a pair is missing and nobody stands in.
    """
    if min(prefill, decode, colocated) < 0:
        raise StartupError("the number of workers cannot be negative")
    if prefill + decode + colocated == 0:
        raise StartupError("no workers: give at least one prefill and one decode worker, or one colocated worker")
    if bool(prefill) != bool(decode) and not colocated:
        have, lack = ("prefill", "decode") if prefill else ("decode", "prefill")
        raise StartupError(
            f"{have} workers alone serve no request: add at least one {lack} worker (--{lack}), or use --colocated"
        )


def check_urls(urls: Sequence[str]) -> None:
    """Refuse worker URLs that can never be reached, and one worker named twice.

    Raises:
        StartupError: not ``http://host:port``, or given more than once.
    """
    for url in urls:
        if not _URL.fullmatch(url):
            raise StartupError(f"{url!r} is not the URL of a worker or router; write for example http://127.0.0.1:8100")
    if twice := {url for url in urls if urls.count(url) > 1}:
        raise StartupError(f"{', '.join(sorted(twice))} is given more than once")


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


def parse_store(text: str | None) -> tuple[TierConfig, ...]:
    """The tiers of "host:8GiB,disk:/path:100GiB", in this order. None or "" is no store.

    Raises:
        StartupError: a tier is none, incomplete, or there twice.
    """
    tiers = tuple(_parse_tier(part.strip()) for part in text.split(",")) if text else ()
    kinds = [str(tier).partition(":")[0] for tier in tiers]
    if twice := {kind for kind in kinds if kinds.count(kind) > 1}:
        raise StartupError(f"--store has {', '.join(sorted(twice))} more than once")
    return tiers


def check_link(link: LinkChoice, store: Sequence[TierConfig]) -> None:
    """Can blocks travel in this way?

    Raises:
        StartupError: not through this store.
    """
    if link == "store" and not any(isinstance(tier, SHARED_TIERS) for tier in store):
        raise StartupError("--link store needs a tier that both ends share: add for example --store dir:/mnt/shared")


def check_quota(quota: int | None, block_bytes: int) -> int | None:
    """The same quota, if a tenant can have a block with it.

    Raises:
        StartupError: it cannot.
    """
    if quota is not None and quota < block_bytes:
        raise StartupError(f"--tenant-quota {quota} does not hold one block of {block_bytes:,} bytes")
    return quota


def check_service(store: Sequence[TierConfig], secret: str) -> None:
    """Will a cache service that runs apart from ``up`` let its workers in? Without a secret, ``up`` makes one up.

    Raises:
        StartupError: it will not.
    """
    if not secret and any(isinstance(tier, ServiceTier) for tier in store):
        raise StartupError("--store service:… needs the service's secret: set TWOSTROKE_SECRET to the same for both")


def parse_disk(text: str) -> DiskTier:
    """PATH:SIZE.

    Raises:
        StartupError: it is not.
    """
    path, _, size = text.rpartition(":")
    if not path:
        raise StartupError(f"--disk {text!r} is not PATH:SIZE; write for example /var/cache/kv:100GiB")
    return DiskTier(Path(path), parse_size(size))


def _parse_tier(text: str) -> TierConfig:
    kind, _, rest = text.partition(":")
    path, _, size = rest.rpartition(":")
    if kind == "host" and rest:
        return HostTier(parse_size(rest))
    if kind == "disk" and path:
        return DiskTier(Path(path), parse_size(size))
    if kind in ("service", "valkey") and path and size.isdecimal() and 0 < int(size) < 1 << 16:
        return (ServiceTier if kind == "service" else ValkeyTier)(path.strip("[]"), int(size))
    if kind == "mooncake" and (where := _MOONCAKE.fullmatch(rest)) and 0 < int(where[2]) < 1 << 16:
        return MooncakeTier(where[1].strip("[]"), int(where[2]), parse_size(where[3]) if where[3] else 0)
    if kind == "dir" and rest:
        return (
            DirectoryTier(Path(path), parse_size(size)) if path and _SIZE.fullmatch(size) else DirectoryTier(Path(rest))
        )
    raise StartupError(
        f"--store {text!r} is no tier; write for example host:8GiB, disk:/var/cache/kv:100GiB, dir:/mnt/shared, "
        "service:HOST:PORT, valkey:HOST:PORT or mooncake:HOST:PORT[:SIZE]"
    )


def check_device(text: str, *, auto: bool = True) -> str:
    """A device as torch names it, or "auto". Whether there is one shows when it is used.

    Raises:
        StartupError: no device is called that.
    """
    if not (_DEVICE.fullmatch(text) or (auto and text == "auto")):
        raise StartupError(f"{text!r} is not a device; write {'auto, ' if auto else ''}cpu, cuda or for example cuda:1")
    return text


def check_link_devices(listed: str | None, link: LinkChoice) -> tuple[str, ...]:
    """Names of network devices, "mlx5_2,mlx5_3". Whether they are there shows when NIXL is asked for them.

    Raises:
        StartupError: no device is called that, or the link that was asked for has none.
    """
    if listed is None:
        return ()
    if link not in ("auto", "nixl"):
        raise StartupError(f"--link-device chooses network devices for NIXL, and --link {link} excludes that")
    names = tuple(name.strip() for name in listed.split(","))
    for name in names:
        if not _LINK_DEVICE.fullmatch(name):
            raise StartupError(f"{name!r} is not a network device; write for example mlx5_2 or mlx5_2,mlx5_3")
    return names


def gpus() -> int:
    """How many GPUs torch would see, found without the seconds that importing it takes: with a CUDA build of torch,
    the driver's device nodes, less what ``CUDA_VISIBLE_DEVICES`` hides.
    """
    torch = find_spec("torch")
    if not torch or not torch.origin or not runpy.run_path(str(Path(torch.origin).with_name("version.py")))["cuda"]:
        return 0
    nodes = sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in os.listdir("/dev"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return nodes
    names = takewhile(  # as CUDA reads them: up to the first that is none
        lambda name: name.startswith(("GPU-", "MIG-")) or (name.isdecimal() and int(name) < nodes),
        map(str.strip, visible.split(",")),
    )
    return min(nodes, len(list(names)))


def quieten_ucx() -> None:
    """Have UCX, which NIXL loads, print errors only: it would also print a line for each read that is given up. What
    the user has set stays.
    """
    os.environ.setdefault("UCX_LOG_LEVEL", "error")


def quieten_mooncake(patience: float) -> None:
    """Have Mooncake's client, which reads this when it is loaded, print errors only, and give up on a master that has
    not answered for ``patience`` seconds. What the user has set stays.
    """
    for name, value in (
        ("MC_LOG_LEVEL", "ERROR"),
        ("MC_RPC_TIMEOUT_MS", str(int(1000 * patience))),
        ("MC_RPC_CONNECT_TIMEOUT_MS", str(int(1000 * patience))),
        ("MC_STORE_CLIENT_SETUP_RETRIES", "1"),
    ):
        os.environ.setdefault(name, value)


def bind_mooncake(address: str) -> None:
    """Have Mooncake's clients, from now on, listen for transfers on this address alone, unless the user has set one."""
    os.environ.setdefault("MC_TCP_BIND_ADDRESS", address)


def cluster_secret() -> str:
    """The secret that internal channels require (``TWOSTROKE_SECRET``); empty when none is set."""
    return os.environ.get("TWOSTROKE_SECRET", "")


def valkey_password() -> str:
    """Of the Valkey or Redis server (``TWOSTROKE_VALKEY_PASSWORD``); empty when it needs none."""
    return os.environ.get("TWOSTROKE_VALKEY_PASSWORD", "")


def api_keys(given: Sequence[str] = ()) -> tuple[str, ...]:
    """The keys that clients may use: those that were given, and those of ``TWOSTROKE_API_KEYS``, with commas between.

    Raises:
        StartupError: one cannot stand in a header.
    """
    listed = os.environ.get("TWOSTROKE_API_KEYS", "").split(",")
    keys = tuple(dict.fromkeys(key.strip() for key in (*given, *listed) if key.strip()))
    if not all(_API_KEY.fullmatch(key) for key in keys):
        raise StartupError("an API key is up to 512 printable ASCII characters without blanks and commas")
    return keys


def child_environment(secret: str, keys: Sequence[str] = ()) -> dict[str, str]:
    """The environment of a process that this one starts, which shares ``secret`` and API keys with it."""
    shared = {"TWOSTROKE_SECRET": secret, **({"TWOSTROKE_API_KEYS": ",".join(keys)} if keys else {})}
    return {**os.environ, **shared}


def runtime_dir() -> Path:
    """Where running systems leave word for the same user's other commands."""
    if own := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(own) / "twostroke"
    return cache_dir() / "run"


def cache_dir() -> Path:
    """Where converted models are kept: ``TWOSTROKE_CACHE``, else the user's cache directory."""
    if own := os.environ.get("TWOSTROKE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twostroke"


def is_loopback(host: str) -> bool:
    """Whether this names an address that only this machine has."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def check_hosts(hosts: Sequence[str]) -> tuple[str, ...]:
    """The same hosts, unless one can never match a host that a request names.

    Raises:
        StartupError: neither ``host`` nor ``host:port``.
    """
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise StartupError(f"{host!r} is no host; write for example 10.0.0.1 or 10.0.0.1:8100")
    return tuple(hosts)


def check_bind(host: str, secret: str, insecure: bool = False) -> None:
    """Refuse to listen beyond loopback without a cluster secret.

    Raises:
        StartupError: ``host`` is not a loopback address, no secret is set, and ``insecure`` was not asked for.
    """
    if not is_loopback(host) and not secret and not insecure:
        raise StartupError(
            f"refusing to listen on {host} without a cluster secret: set TWOSTROKE_SECRET to the same value on every "
            "worker and router, or pass --insecure"
        )
