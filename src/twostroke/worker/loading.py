"""From a configuration to everything that a worker needs to serve: weights, pool, engine, links."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from twostroke import config as configs
from twostroke import models
from twostroke.api.serving import bind
from twostroke.config import (
    CPU_KV_MEMORY,
    TOKEN_BUDGET,
    EngineConfig,
    TierConfig,
    WorkerConfig,
)
from twostroke.engine.engine import Engine
from twostroke.engine.model import Model
from twostroke.engine.runner import Limits
from twostroke.errors import MemoryTooSmall, StartupError
from twostroke.kv.board import Board
from twostroke.kv.layout import Layout
from twostroke.kv.memory import PoolMemory, SlotMemory
from twostroke.kv.pool import Lease, Pool
from twostroke.links import nixl
from twostroke.links.link import Link
from twostroke.links.nixl import NixlLink, NixlServer
from twostroke.links.shm import SharedMemoryLink
from twostroke.links.staging import Staging, of_thread, staging, warm
from twostroke.links.tcp import TcpLink, TcpServer
from twostroke.messages import CudaMemory, MemoryFile, ModelCard, NixlMemory, PoolAddress, TcpEndpoint
from twostroke.store.directory import DirectoryTier
from twostroke.store.disk import disk_tier
from twostroke.store.eviction import POLICIES
from twostroke.store.host import AT_ONCE, HostTier
from twostroke.store.mooncake import MooncakeTier
from twostroke.store.service import ServiceTier
from twostroke.store.slots import SlotTier
from twostroke.store.tier import Register, Tier
from twostroke.tokenizer import Tokenizer

GPU_AT_ONCE = 64  # blocks that are copied between a GPU and the host tier before anybody looks again
_SLOWEST = 1 << 20  # bytes a second that a link must bring, while it is not known how fast we compute them

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What serves once a model is loaded."""

    card: ModelCard
    tokenizer: Tokenizer
    engine: Engine
    memory: SlotMemory
    board: Board  # says which leases on it are alive
    links: tuple[Link, ...]  # what we read other workers' pools with, best first
    servers: tuple[NixlServer | TcpServer, ...]  # what gives others access to our slots
    offers: tuple[PoolAddress, ...]  # every way in which others may read our pool, best first
    staging: Callable[[], Staging]  # the calling thread's access to our slots
    tiers: tuple[Tier, ...]  # of our store, not yet open

    def serve(self, exported: Callable[[str, int], Lease | None]) -> None:
        """Let others read. ``exported``: see ``TcpServer.start``."""
        for server in self.servers:
            if isinstance(server, TcpServer):  # nobody asks the owner of memory that NIXL reads
                server.start(exported)

    def close(self) -> None:
        """Let go of pools, ours and others'. The engine has stopped."""
        for server in self.servers:
            server.close()
        for link in self.links:
            link.close()
        self.memory.close()
        self.board.close()


def load(config: WorkerConfig, instance: str, secret: str, say: Callable[[str], None]) -> Loaded:
    """Load the model and make its pool. Takes seconds; ``say`` is told what is being done.

    ``secret``: the cluster's; only who knows it may read our pool over TCP.

    Raises:
        StartupError: the model, the memory or the settings do not allow it.
    """
    settings = config.engine
    device = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if config.link not in ("auto", "store", NixlMemory.link, TcpEndpoint.link, _mapping_link(device)):
        either = f"{_mapping_link(device)}, nixl or tcp"
        raise StartupError(f"--link {config.link} does not go with device {device}: use {either}")
    files = any(isinstance(tier, configs.DiskTier | configs.DirectoryTier) for tier in config.store)
    if settings.gds == "on" and (device == "cpu" or not files):
        raise StartupError("--gds on is for a GPU with a tier in files: --store disk:PATH:SIZE or dir:PATH")
    directory: Path = models.resolve(config.model, say, settings.load_format)
    say(f"loading {directory.name}")
    model = Model(
        directory,
        dtype=settings.dtype,
        block_tokens=settings.block_tokens,
        device=device,
        threads=settings.threads,
        load_format=settings.load_format,
    )
    tokenizer = Tokenizer.load(directory) if models.has_tokenizer(directory) else Tokenizer.of_bytes(model.vocab_size)
    token_budget = settings.token_budget or TOKEN_BUDGET[model.device.type]
    limits = Limits(settings.max_batch, token_budget, settings.max_model_len or model.max_position)
    num_slots = _pool_bytes(settings, model, limits, say) // model.layout.block_bytes
    if num_slots < 1:
        raise MemoryTooSmall(
            f"the KV pool does not hold one block of {model.layout.block_bytes:,} bytes: raise --kv-memory or "
            "--gpu-memory-utilization, or lower --block-size"
        )
    context = _context(settings, model, num_slots)
    say(f"making a pool of {num_slots} slots, {num_slots * model.layout.block_bytes / 2**20:.0f} MiB")
    memory, slots, mapping = _make_pool(model, num_slots, instance)
    model.bind(slots, limits, say)
    card = ModelCard(
        name=config.served_name or models.default_name(config.model),
        vocab_size=model.vocab_size,
        max_model_len=context,
        eos_token_ids=model.eos,
        created=int(time.time()),
    )
    engine = Engine(model, Pool(num_slots), max_batch=settings.max_batch, token_budget=token_budget)
    links: list[Link] = []
    offers: list[PoolAddress] = []
    servers: list[NixlServer | TcpServer] = []
    make_access = staging(slots)
    access = of_thread(staging(slots, settings.gds) if files else make_access)

    def slowest() -> float:
        return max(engine.speed, _SLOWEST)

    if config.link in ("auto", mapping.name):
        links.append(mapping)
        offers.append(memory.address)
    if registered := _register(config, slots, memory.address, secret):
        servers.append(registered)
        links.append(NixlLink(slots, secret, config.link_devices, slowest=slowest))
        offers.append(registered.address)
    if config.link in ("auto", TcpEndpoint.link):
        serving = TcpServer(bind(config.host, 0), memory.address, make_access, secret)
        servers.append(serving)
        links.append(TcpLink(memory.address, make_access, secret, slowest=slowest))
        offers.append(serving.address)
    tiers = tuple(_make_tier(tier, model.layout, model.device, config, secret, access) for tier in config.store)
    for tier in tiers:
        if isinstance(tier, SlotTier | DirectoryTier):  # others are their servers'
            tier.quota = configs.check_quota(config.tenant_quota, model.layout.block_bytes)
    return Loaded(
        card, tokenizer, engine, memory, Board(instance), tuple(links), tuple(servers), tuple(offers), access, tiers
    )


def _make_tier(
    tier: TierConfig,
    layout: Layout,
    device: torch.device,
    config: WorkerConfig,
    secret: str,
    access: Callable[[], Staging],
) -> Tier:
    policy = POLICIES[config.eviction]
    register, prepare = _for_gpu(layout, device, access)
    match tier:
        case configs.HostTier(size):
            at_once = AT_ONCE if device.type == "cpu" else GPU_AT_ONCE
            return HostTier(layout.block_bytes, size, policy, at_once=at_once, register=register, prepare=prepare)
        case configs.DiskTier(path, size):
            return disk_tier(path, layout.block_bytes, layout.fingerprint, size, config.name, policy)
        case configs.DirectoryTier(shared, limit):
            return DirectoryTier(shared, layout.block_bytes, layout.fingerprint, limit)
        case configs.ServiceTier(host, port):
            return ServiceTier(
                host, port, layout.block_bytes, layout.fingerprint, secret, register=register, prepare=prepare
            )
        case configs.ValkeyTier(host, port):
            return _valkey_tier(host, port, layout)
        case configs.MooncakeTier(host, port, memory):
            return _mooncake_tier(host, port, memory, layout)


def _for_gpu(
    layout: Layout, device: torch.device, access: Callable[[], Staging]
) -> tuple[Register | None, Callable[[], object] | None]:
    """What tiers in memory need so that a GPU copies by itself: how to register memory with it, and what to call in
    each thread before it moves a block. Nothing for a CPU.
    """
    if device.type == "cpu":
        return None, None
    from twostroke.kv.cuda_memory import register  # it needs what only a GPU's machine has

    index = torch.cuda.current_device() if device.index is None else device.index
    return lambda memory: register(memory, index), lambda: warm(access, layout.block_bytes)


def _register(config: WorkerConfig, slots: torch.Tensor, pool: PoolAddress, secret: str) -> NixlServer | None:
    """Our slots for NIXL, if it was asked for, or is there and gains something over TCP: on a machine with RDMA."""
    asked = config.link == NixlMemory.link or bool(config.link_devices)
    if not asked and not (config.link == "auto" and nixl.installed() and nixl.has_rdma()):
        return None
    try:
        return NixlServer(slots, pool, secret, config.link_devices)
    except StartupError as error:
        if asked:
            raise
        log.warning("going without NIXL: %s", error.message)
        return None


def _valkey_tier(host: str, port: int, layout: Layout) -> Tier:
    try:
        from twostroke.store.valkey import ValkeyTier  # its client library is an extra
    except ImportError as error:
        raise StartupError("--store valkey:… needs its client: pip install 'twostroke[valkey]'") from error
    return ValkeyTier(host, port, layout.block_bytes, layout.fingerprint, configs.valkey_password())


def _mooncake_tier(host: str, port: int, memory: int, layout: Layout) -> Tier:
    try:
        return MooncakeTier(host, port, layout.block_bytes, layout.fingerprint, memory)
    except ImportError as error:
        raise StartupError(
            "--store mooncake:… needs its client: pip install 'twostroke[mooncake]', and apt-get install libibverbs1: "
            f"{error}"
        ) from error


def _mapping_link(device: str) -> str:
    """The link between pools in such memory on one machine."""
    return MemoryFile.link if device == "cpu" else CudaMemory.link


def _pool_bytes(settings: EngineConfig, model: Model, limits: Limits, say: Callable[[str], None]) -> int:
    """How large the pool is to be; on a GPU, what weights and the largest step leave of our share."""
    if settings.kv_memory is not None:
        return settings.kv_memory
    if model.device.type == "cpu":
        return CPU_KV_MEMORY
    say("compiling, and measuring the largest step")
    total = torch.cuda.get_device_properties(model.device).total_memory
    share, needed = int(total * settings.gpu_memory_utilization), model.runner.measure(limits)
    if needed + model.layout.block_bytes > share:
        raise MemoryTooSmall(
            f"weights and the largest step need {needed / 2**30:.1f} GiB, and --gpu-memory-utilization "
            f"{settings.gpu_memory_utilization} gives {share / 2**30:.1f} GiB: raise it, or lower --chunk-size"
        )
    return share - needed


def _make_pool(model: Model, num_slots: int, instance: str) -> tuple[SlotMemory, torch.Tensor, Link]:
    if model.device.type == "cpu":
        shared = PoolMemory(num_slots, model.layout.block_bytes, instance)
        return shared, torch.from_numpy(shared.slots), SharedMemoryLink(shared.slots)
    from twostroke.kv.cuda_memory import CudaPool  # these need what only a GPU's machine has
    from twostroke.links.cuda_ipc import CudaIpcLink

    pool = CudaPool(num_slots, model.layout.block_bytes, instance, model.device)
    return pool, pool.slots, CudaIpcLink(pool.slots)


def _context(settings: EngineConfig, model: Model, num_slots: int) -> int:
    """The longest request, in tokens: any one must fit into an empty pool, or it would wait for ever."""
    room = num_slots * settings.block_tokens
    asked = settings.max_model_len
    if asked is None:
        if room < model.max_position:
            log.warning("the pool holds %d tokens, fewer than the model's context of %d", room, model.max_position)
        return min(model.max_position, room)
    if asked > model.max_position:
        raise StartupError(f"--max-model-len {asked} is beyond the model's context of {model.max_position} tokens")
    if asked > room:
        needed = model.layout.blocks(asked) * model.layout.block_bytes
        raise MemoryTooSmall(
            f"--max-model-len {asked} needs --kv-memory {-(-needed // 2**20)}MiB; the pool holds {room}"
        )
    return asked
