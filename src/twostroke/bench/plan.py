"""Which runs there are, and in which order. Pure."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from twostroke.bench import workload
from twostroke.bench.results import Point
from twostroke.bench.workload import Chat, Grid, Item, TraceLine

Mode = Literal["prefill-only", "decode-only", "pd"]
MODES: tuple[Mode, ...] = ("prefill-only", "decode-only", "pd")
ENOUGH = 0.9  # share of the requests that must meet the goal
_BISECTIONS = 3
_MOST_DOUBLINGS = 10


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that decides what is sent: two folders with equal settings can be compared run by run."""

    model: str | None = None
    grid: Grid = Grid()
    modes: tuple[Mode, ...] = ("pd",)
    rates: tuple[float, ...] = ()  # instead of the grid's one
    chat: Chat | None = None  # instead of random prompts
    trace: str | None = None  # a file, instead of random prompts
    trace_scale: float = 1.0
    repeats: int = 1
    cold: bool = True  # each run finds caches without its prompts; else every prompt was sent once before
    goal: dict[str, float] = {}
    sweep: bool = False
    up: str = ""  # more arguments of ``up``, for every scheme
    timeout: float = 600.0  # seconds for a request


class Workloads:
    """Makes the requests of a point, by its workload's name."""

    def __init__(self, settings: Settings, vocab: int, trace: Sequence[TraceLine] = ()) -> None:
        self._settings = settings
        self._vocab = vocab
        self._trace = trace

    @property
    def names(self) -> list[str]:
        """The workloads of the settings."""
        if self._settings.chat is not None:
            return ["chat"]
        if self._settings.trace is not None:
            return ["trace"]
        return [str(length) for length in self._settings.grid.input_lens]

    def items(self, point: Point) -> list[Item]:
        """What to send, and when."""
        grid = replace(self._settings.grid, request_rate=point.rate)
        if point.workload == "chat" and self._settings.chat is not None:
            items = workload.chats(self._settings.chat, grid, self._vocab)
        elif point.workload == "trace":
            items = workload.trace(self._trace, grid, self._vocab, self._settings.trace_scale)
        else:
            items = workload.random_prompts(grid, int(point.workload), self._vocab)
        return [replace(item, output_len=1) for item in items] if point.mode == "prefill-only" else items

    def longest(self, name: str) -> tuple[int, int]:
        """The longest prompt and the longest answer of a workload, in tokens."""
        items = self.items(Point("", "pd", name, math.inf))
        return max(len(item.prompt) for item in items), max(item.output_len for item in items)


def points(settings: Settings, scheme: str, repeat: int, workloads: Sequence[str]) -> Iterator[Point]:
    """The runs of a scheme in one repeat."""
    for mode in settings.modes:
        for name in workloads:
            for rate in settings.rates or (settings.grid.request_rate,):
                yield Point(scheme, mode, name, rate, repeat)


def next_rate(attained: Mapping[float, float], first: float) -> float | None:
    """The rate to try next, to find the highest at which enough requests meet the goal; None when it is known well
    enough. ``attained`` is the share that met it by the rates tried so far, ``first`` the rate to begin with.

    Doubles or halves until the answer lies between two rates, then bisects (in the geometric sense) three times.
    """
    good = [rate for rate, share in attained.items() if share >= ENOUGH]
    bad = [rate for rate, share in attained.items() if share < ENOUGH]
    if not attained:
        return first
    few = len(attained) <= _MOST_DOUBLINGS
    if not bad:
        return max(good) * 2 if few else None
    high = min(bad)
    below = [rate for rate in good if rate < high]
    if not below:
        return high / 2 if few else None
    low = max(below)
    return math.sqrt(low * high) if high / low > 1.001 * 2 ** (1 / 2**_BISECTIONS) else None
