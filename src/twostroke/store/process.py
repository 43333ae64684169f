"""The process of the cache service."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable

import uvloop

from twostroke.api.serving import bind
from twostroke.config import StoreConfig, check_quota, cluster_secret
from twostroke.kv.copying import kernels
from twostroke.kv.memory import Area
from twostroke.store.disk import disk_tier
from twostroke.store.eviction import POLICIES
from twostroke.store.host import HostTier
from twostroke.store.server import Server
from twostroke.store.slots import SlotTier

log = logging.getLogger(__name__)
_OWNER = "service"


def tiers(config: StoreConfig) -> Callable[[str, int], list[SlotTier]]:
    """Makes the tiers of a layout: its share of memory and disk. All memory is taken here, before any client waits for
    it: only what slots it is cut into depends on the layout.

    Raises:
        MemoryTooSmall: the machine has not enough.
    """
    policy = POLICIES[config.eviction]
    share, shares = (config.memory or 0) // config.layouts, 0 if config.memory is None else config.layouts
    areas = [Area(share, "the share of a layout", "lower --memory") for _ in range(shares)]

    def make(fingerprint: str, block_bytes: int) -> list[SlotTier]:
        made: list[SlotTier] = []
        if shares:
            made.append(HostTier(block_bytes, share, policy, areas.pop()))
        if config.disk is not None:
            size = config.disk.size // config.layouts
            made.append(disk_tier(config.disk.path, block_bytes, fingerprint, size, _OWNER, policy))
        for tier in made:
            tier.quota = check_quota(config.tenant_quota, block_bytes)
        return made

    return make


def run(config: StoreConfig) -> int:
    """Serve until a signal. Raises ``StartupError`` if it cannot start."""
    make = tiers(config)
    kernels()
    listening = bind(config.host, config.port)  # not before: whoever can connect does not wait for memory
    return uvloop.run(_run(config, listening, make))


async def _run(config: StoreConfig, listening: socket.socket, make: Callable[[str, int], list[SlotTier]]) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = Server(listening, make, cluster_secret(), ttl=config.ttl, layouts=config.layouts)
    server.start()
    log.warning("serving on %s:%d", *listening.getsockname()[:2])
    await stop.wait()
    await server.close()
    return 0
