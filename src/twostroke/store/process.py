"""The process of the cache service."""

import asyncio
import logging
import signal
from collections.abc import Callable

import uvloop

from twostroke.api.serving import bind
from twostroke.config import StoreConfig, check_quota, cluster_secret
from twostroke.kv.copying import kernel
from twostroke.store.disk import disk_tier
from twostroke.store.eviction import POLICIES
from twostroke.store.host import HostTier
from twostroke.store.server import Server
from twostroke.store.slots import SlotTier

log = logging.getLogger(__name__)
_OWNER = "service"


def tiers(config: StoreConfig) -> Callable[[str, int], list[SlotTier]]:
    """Makes the tiers of a layout: its share of memory and disk."""
    policy = POLICIES[config.eviction]

    def make(fingerprint: str, block_bytes: int) -> list[SlotTier]:
        made: list[SlotTier] = []
        if config.memory is not None:
            made.append(HostTier(block_bytes, config.memory // config.layouts, policy))
        if config.disk is not None:
            size = config.disk.size // config.layouts
            made.append(disk_tier(config.disk.path, block_bytes, fingerprint, size, _OWNER, policy))
        for tier in made:
            tier.quota = check_quota(config.tenant_quota, block_bytes)
        return made

    return make


def run(config: StoreConfig) -> int:
    """Serve until a signal. Raises ``StartupError`` if it cannot start."""
    return uvloop.run(_run(config))


async def _run(config: StoreConfig) -> int:
    kernel()  # before anybody waits for it
    listening = bind(config.host, config.port)
    listening.listen(128)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = Server(listening, tiers(config), cluster_secret(), ttl=config.ttl, layouts=config.layouts)
    server.start()
    log.warning("serving on %s:%d", *listening.getsockname()[:2])
    await stop.wait()
    await server.close()
    return 0
