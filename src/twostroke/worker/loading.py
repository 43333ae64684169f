"""From a configuration to everything that a worker needs to serve: weights, pool, engine, link."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from twostroke import models
from twostroke.config import EngineConfig, WorkerConfig
from twostroke.engine.engine import Engine
from twostroke.engine.model import Model
from twostroke.errors import MemoryTooSmall, StartupError
from twostroke.kv.memory import PoolMemory
from twostroke.kv.pool import Pool
from twostroke.links.link import Link
from twostroke.links.shm import SharedMemoryLink
from twostroke.messages import ModelCard
from twostroke.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What serves once a model is loaded."""

    card: ModelCard
    tokenizer: Tokenizer
    engine: Engine
    memory: PoolMemory
    link: Link


def load(config: WorkerConfig, instance: str, say: Callable[[str], None]) -> Loaded:
    """Load the model and make its pool. Takes seconds; ``say`` is told what is being done.

    Raises:
        StartupError: the model, the memory or the settings do not allow it.
    """
    directory: Path = models.resolve(config.model, say)
    say(f"loading {directory.name}")
    settings = config.engine
    model = Model(directory, dtype=settings.dtype, block_tokens=settings.block_tokens, threads=settings.threads)
    tokenizer = Tokenizer.load(directory)
    num_slots = settings.kv_memory // model.layout.block_bytes
    if num_slots < 1:
        raise MemoryTooSmall(
            f"a KV pool of {settings.kv_memory:,} bytes does not hold one block of {model.layout.block_bytes:,} bytes: "
            "raise --kv-memory or lower --block-size"
        )
    context = _context(settings, model, num_slots)
    say(f"making a pool of {num_slots} slots, {num_slots * model.layout.block_bytes / 2**20:.0f} MiB")
    memory = PoolMemory(num_slots, model.layout.block_bytes, instance)
    model.bind(torch.from_numpy(memory.slots))
    card = ModelCard(
        name=config.served_name or models.default_name(config.model),
        vocab_size=model.vocab_size,
        max_model_len=context,
        eos_token_ids=model.eos,
        created=int(time.time()),
    )
    engine = Engine(model, Pool(num_slots), max_batch=settings.max_batch, token_budget=settings.token_budget)
    return Loaded(card, tokenizer, engine, memory, SharedMemoryLink(memory.slots))


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
