"""What a benchmark sends, and when. Pure: the same seed gives the same token ids on any machine.

Token ids come from the raw output of PCG64, which NumPy promises never to change (unlike its distributions).
"""

import hashlib
import math
import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from twostroke.errors import StartupError

TRACE_BLOCK = 512  # tokens behind one hash id of a Mooncake trace
MAX_TRACE = 1_000_000  # lines


class Item(Struct, frozen=True):
    """One request: its prompt, how many tokens it shall generate, and when it is sent (seconds after the start)."""

    prompt: list[int]
    output_len: int
    at: float
    group: int = 0  # conversation, or line of a trace


class Grid(Struct, frozen=True, forbid_unknown_fields=True):
    """Prompts of one random length at a time. The defaults are the reference test's."""

    input_lens: tuple[int, ...] = (100, 1000, 10_000, 20_000, 50_000)
    output_len: int = 10
    num_prompts: int = 160
    prompt_tokens: int | None = None  # of a run at most: of long prompts there are fewer then
    request_rate: float = 128.0  # requests a second; inf sends all at once
    burstiness: float = 1.0  # 1 is Poisson; less is burstier, more is more even
    seed: int = 45

    def count(self, length: int) -> int:
        """How many prompts of this length a run has."""
        return min(self.num_prompts, max(1, (self.prompt_tokens or self.num_prompts * length) // length))


class Chat(Struct, frozen=True, forbid_unknown_fields=True):
    """Conversations that share a system prompt and grow by a turn at a time. Lengths are in tokens."""

    conversations: int = 6
    turns: int = 4
    system_len: int = 256
    user_len: int = 64
    output_len: int = 24
    pause: float = 3.0  # seconds between the turns of a conversation


REFERENCE = Grid()
CLIENT = Grid(input_lens=(1000,), num_prompts=16, request_rate=4.0)
QUICK = Grid(input_lens=(100, 500, 1000), num_prompts=8, request_rate=4.0)


def derive(seed: int, *parts: object) -> int:
    """A seed for each purpose, 64 bits: ``derive(45, 1000)`` is the one for prompts of 1,000 tokens."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def tokens(seed: int, count: int, vocab: int) -> list[int]:
    """``count`` random token ids of the middle three quarters of a vocabulary; special ids lie at its ends."""
    low, high = vocab // 8, max(vocab - vocab // 8, vocab // 8 + 1)
    raw = np.random.PCG64(seed).random_raw(count)
    ids: list[int] = (low + raw % np.uint64(high - low)).tolist()
    return ids


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """When requests are sent, in seconds: gamma-distributed gaps, rescaled so that the last is sent at count / rate.

    Raises:
        StartupError: the rate or the burstiness is not above 0.
    """
    if not (rate > 0 and burstiness > 0):
        raise StartupError(f"request rate and burstiness must be above 0, not {rate} and {burstiness}")
    if math.isinf(rate) or count == 0:
        return [0.0] * count
    draw = random.Random(seed)  # noqa: S311 - its gammavariate is the same on every machine
    times = list(accumulate(draw.gammavariate(burstiness, 1 / burstiness) for _ in range(count)))
    return [time * (count / rate) / times[-1] for time in times]


def random_prompts(grid: Grid, length: int, vocab: int) -> list[Item]:
    """The grid's requests of one length: no two share a prefix, but by chance."""
    seed = derive(grid.seed, length)
    count = grid.count(length)
    ids = tokens(seed, count * length, vocab)
    times = arrivals(count, grid.request_rate, grid.burstiness, derive(seed, "arrivals"))
    prompts = [ids[i * length : (i + 1) * length] for i in range(count)]
    return [Item(prompt, grid.output_len, at) for prompt, at in zip(prompts, times, strict=True)]


def chats(chat: Chat, grid: Grid, vocab: int) -> list[Item]:
    """All turns of all conversations in order of time. A turn's prompt is everything before it, with made-up answers of
    the length that real ones have: the prompt depends on the seed alone, and the load on no answer.
    """
    system = tokens(derive(grid.seed, "system"), chat.system_len, vocab)
    starts = arrivals(chat.conversations, grid.request_rate, grid.burstiness, derive(grid.seed, "arrivals"))
    step = chat.user_len + chat.output_len
    items = []
    for i, start in enumerate(starts):
        talk = tokens(derive(grid.seed, "chat", i), step * chat.turns, vocab)
        for turn in range(chat.turns):
            prompt = [*system, *talk[: turn * step + chat.user_len]]
            items.append(Item(prompt, chat.output_len, start + turn * chat.pause, i))
    return sorted(items, key=lambda item: item.at)


class TraceLine(Struct, frozen=True):
    """One line of a trace in Mooncake's format; ``timestamp`` is in milliseconds."""

    timestamp: Annotated[float, Meta(ge=0)]
    input_length: Annotated[int, Meta(ge=1, le=10_000_000)]
    output_length: Annotated[int, Meta(ge=1, le=1_000_000)]
    hash_ids: list[int] = []


def read_trace(text: bytes, name: str) -> list[TraceLine]:
    """The lines of a trace, one JSON object each.

    Raises:
        StartupError: a line is no such object; it is named.
    """
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            lines.append(msgspec.json.decode(line, type=TraceLine))
        except msgspec.MsgspecError as error:
            raise StartupError(f"{name}, line {number}: {error}") from error
        if len(lines) > MAX_TRACE:
            raise StartupError(f"{name} has more than {MAX_TRACE} lines")
    if not lines:
        raise StartupError(f"{name} holds no requests")
    return lines


def trace(lines: Sequence[TraceLine], grid: Grid, vocab: int, scale: float = 1.0) -> list[Item]:
    """Requests of a trace. Equal hash ids are equal blocks of tokens, so what was shared there is shared here.
    ``scale`` shortens prompts, answers and blocks alike, for models with a smaller context; times stay.

    At most ``grid.num_prompts`` lines are taken. Tokens beyond the last hash id are the request's own.
    """
    block = max(1, round(TRACE_BLOCK * scale))
    start = lines[0].timestamp
    items = []
    for number, line in enumerate(lines[: grid.num_prompts]):
        length = max(1, round(line.input_length * scale))
        ids: list[int] = []
        for hash_id in line.hash_ids[: math.ceil(length / block)]:
            ids += tokens(derive(grid.seed, "block", hash_id), block, vocab)
        own = max(0, length - len(ids))
        ids += tokens(derive(grid.seed, "own", number), own, vocab)
        output = max(1, round(line.output_length * scale))
        items.append(Item(ids[:length], output, (line.timestamp - start) / 1000, number))
    return items


def words(ids: Sequence[int]) -> str:
    """A prompt as text, for servers that take no token ids: one short word for each id, the same on any machine."""
    return " ".join(_word(one) for one in ids)


def _word(number: int) -> str:
    syllables = []
    while True:
        number, rest = divmod(number, 75)
        syllables.append("bdfgklmnprstvwz"[rest // 5] + "aeiou"[rest % 5])
        if not number:
            return "".join(syllables)
