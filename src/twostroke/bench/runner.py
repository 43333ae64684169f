"""Runs a benchmark: starts each scheme, measures its runs one after the other, stops it."""

import asyncio
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

import aiohttp
import msgspec
from msgspec import Struct
from msgspec.structs import replace

from twostroke.bench import checks, plan, results
from twostroke.bench.checks import Machine, ModelFacts, Room
from twostroke.bench.client import Client, Load, judge
from twostroke.bench.dialect import Asking
from twostroke.bench.folder import Folder
from twostroke.bench.plan import Settings, Workloads
from twostroke.bench.results import Point, Result, Stamp
from twostroke.bench.schemes import Scheme, Understand
from twostroke.bench.system import System, SystemDied, running
from twostroke.bench.watch import watching
from twostroke.bench.workload import Item, derive, tokens
from twostroke.errors import StartupError
from twostroke.messages import TimelineEvent

_AT_ONCE = 16  # timelines asked for at a time
_PRIMING_TOKENS = 2  # so that decode workers get the KV, too
_WARM_PROMPTS = 16  # of each workload for each worker,
_WARM_TOKENS = 20_000  # but no more tokens, or one prompt
_WARM_OUTPUT = 10  # tokens
_DEATHS = 2  # in a row, after which a scheme is given up in this repeat


class Progress(Protocol):
    """Is shown to the user."""

    def run(self, point: Point, weight: float) -> None:
        """A run begins that takes about ``weight`` of work."""

    def advance(self, weight: float) -> None:
        """So much of it is done."""

    def ended(self, result: Result) -> None:
        """A run is over."""

    def say(self, text: str) -> None:
        """Something worth a line."""

    def detail(self, text: str) -> None:
        """What a process of the scheme wrote."""


class Prepared(Struct):
    """What can run: schemes with the room they have, their runs, and what cannot, with the reason."""

    schemes: dict[str, Scheme]
    rooms: dict[str, Room]
    points: dict[str, list[Point]]  # by scheme, of all repeats
    skipped: dict[str, str]


def prepare(
    settings: Settings,
    schemes: Mapping[str, Scheme],
    workloads: Workloads,
    model: ModelFacts,
    machine: Machine,
    understand: Understand,
) -> Prepared:
    """Check everything that can be checked before anything starts."""
    done = Prepared({}, {}, {}, {})
    longest = {name: workloads.longest(name) for name in workloads.names}
    for name, scheme in schemes.items():
        try:
            room = checks.check_scheme(scheme, up_line(scheme, settings)("/scratch", 1), model, machine, understand)
        except StartupError as error:
            done.skipped[name] = error.message
            continue
        runs = [p for r in range(settings.repeats) for p in plan.points(settings, name, r, workloads.names)]
        done.points[name] = []
        for point in runs:
            primed = point.mode == "decode-only" or not settings.cold
            try:
                checks.check_length(room, *longest[point.workload])
                if primed:
                    items = workloads.items(point)
                    checks.check_in_place(room, sum(len(item.prompt) + item.output_len for item in items))
            except StartupError as error:
                done.skipped.setdefault(f"{name}, {point.workload}{f', {point.mode}' * primed}", error.message)
            else:
                done.points[name].append(point)
        if done.points[name]:
            done.schemes[name], done.rooms[name] = scheme, room
    return done


def up_line(scheme: Scheme, settings: Settings) -> Callable[[str, int], list[str]]:
    """Makes the command line of ``up``, but for its port, of a scratch directory and of the port of its companion."""

    def line(scratch: str, port: int) -> list[str]:
        model = [settings.model] if settings.model is not None else []
        return ["up", *model, *scheme.arguments(scratch, port), *shlex.split(settings.up)]

    return line


class Bench:
    """One benchmark, into one folder."""

    def __init__(
        self, folder: Folder, settings: Settings, prepared: Prepared, workloads: Workloads, vocab: int, show: Progress
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._prepared = prepared
        self._workloads = workloads
        self._vocab = vocab
        self._show = show

    def todo(self) -> list[Point]:
        """The runs that are not there yet. (How many a rate sweep adds shows as it goes.)"""
        return [p for runs in self._prepared.points.values() for p in runs if self._folder.read(p) is None]

    def weight(self, point: Point) -> float:
        """Roughly how much work a run is: decoding a token takes as long as prefilling about twenty."""
        items = self._workloads.items(point)
        primed = 1 + (point.mode == "decode-only" or not self._settings.cold)
        return float(sum(primed * len(item.prompt) + 20 * item.output_len for item in items))

    async def run(self) -> None:
        """Everything that is not there yet; the schemes in turn in each repeat (A B A B), each started anew."""
        for repeat in range(self._settings.repeats):
            for name in self._prepared.schemes:
                await self._scheme(name, repeat)

    async def _scheme(self, name: str, repeat: int) -> None:
        """All runs of a scheme in one repeat. A scheme that dies is started again for the next run."""
        deaths = 0
        failed: set[Point] = set()
        while deaths < _DEATHS and self._next(name, repeat, failed) is not None:
            scheme = self._prepared.schemes[name]
            self._show.say(f"{name}: starting ({scheme.about or scheme.up})")
            try:
                async with running(scheme, up_line(scheme, self._settings), self._show.detail) as system:
                    await self._warm_up(system, name)
                    while (point := self._next(name, repeat, failed)) is not None:
                        await self._keep(system, point, failed)
                        deaths = 0
            except SystemDied as error:
                deaths += 1
                self._show.say(f"{name} died: {error}")
        if deaths == _DEATHS:
            self._show.say(f"{name} is given up in repeat {repeat}")

    async def _keep(self, system: System, point: Point, failed: set[Point]) -> None:
        """Measure and write it down; if the system dies of it, that."""
        try:
            result = await self._measure(system, point)
        except SystemDied as error:
            failed.add(point)
            self._fail(point, str(error))
            raise
        self._folder.write(result)
        self._show.ended(result)

    def _next(self, name: str, repeat: int, failed: set[Point]) -> Point | None:
        """The next run of a scheme that is not there yet."""
        points = [p for p in self._prepared.points[name] if p.repeat == repeat]
        for point in points:
            if point not in failed and self._folder.read(point) is None:
                return point
        if not self._settings.sweep:
            return None
        nexts = (self._next_of_sweep(first) for first in points)
        return next((point for point in nexts if point is not None and point not in failed), None)

    def _next_of_sweep(self, first: Point) -> Point | None:
        """The next rate for a workload; what was found so far is in the folder, so a sweep can go on, too."""
        attained: dict[float, float] = {}
        while (rate := plan.next_rate(attained, first.rate)) is not None:
            point = replace(first, rate=round(rate, 3))
            result = self._folder.read(point)
            if result is None:
                return point
            if result.attained is None or point.rate in attained:
                return None
            attained[point.rate] = result.attained
        return None

    async def _warm_up(self, system: System, scheme: str) -> None:
        """The beginning of each workload, with other tokens: what is built when it first comes shall be there then, at
        each worker. No more than a quarter of a run, if that is a prompt for each.
        """
        workers = self._prepared.rooms[scheme].workers
        for name, point in {point.workload: point for point in self._prepared.points[scheme]}.items():
            longest, output = self._workloads.longest(name)
            quarter = len(self._workloads.items(point)) // 4
            count = max(workers, min(workers * _WARM_PROMPTS, workers * _WARM_TOKENS // longest, quarter))
            items = [
                Item(tokens(derive(0, "warm-up", name, i), longest, self._vocab), min(output, _WARM_OUTPUT), 0.0)
                for i in range(count)
            ]
            load = await self._load(system, items, f"warm-up-{name}", "warm-up")
            if error := next((record.error for record in load.records if record.error), ""):
                raise SystemDied(f"it does not answer: {error}")

    async def _measure(self, system: System, point: Point) -> Result:
        items = self._workloads.items(point)
        self._show.run(point, self.weight(point))
        salt = point.name if self._settings.cold else ""
        if point.mode == "decode-only" or not self._settings.cold:
            priming = [replace(item, output_len=_PRIMING_TOKENS, at=0.0) for item in items]
            await self._load(
                system, priming, f"{point.name}-priming", salt, lambda item: self._show.advance(len(item.prompt))
            )
            if point.mode == "decode-only":
                items = [replace(item, at=0.0) for item in items]
        async with watching(system.url) as watched:
            load = await self._load(
                system,
                items,
                point.name,
                salt,
                lambda item: self._show.advance(len(item.prompt) + 20 * item.output_len),
            )
        workers = self._prepared.rooms[point.scheme].workers
        result = results.summarize(point, load, self._settings.goal, workers)
        result.timelines, result.watched = await timelines(system.url, load), watched
        return result

    async def _load(
        self, system: System, items: Sequence[Item], name: str, salt: str, done: Callable[[Item], None] = lambda _: None
    ) -> Load:
        """Send; but when the system dies, there is nothing to wait for.

        Raises:
            SystemDied: it did.
        """
        client = Client(system.url, Asking(salt=salt or None), timeout=self._settings.timeout)
        loading = asyncio.create_task(client.load(items, name, done))
        died = asyncio.create_task(system.died())
        try:
            await asyncio.wait((loading, died), return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                raise SystemDied(died.result())
            return loading.result()
        finally:
            for task in (loading, died):
                task.cancel()
            await asyncio.wait((loading, died))

    def _fail(self, point: Point, reason: str) -> None:
        result = results.summarize(point, Load([], 1.0, 0.0, judge([], 0.0, 1.0)), {})
        result.error = reason
        self._folder.write(result)


class _Timeline(Struct):
    events: list[TimelineEvent]


async def timelines(url: str, load: Load) -> dict[str, list[Stamp]]:
    """What the server remembers of each request, in seconds after the request was sent; of other servers, nothing."""
    found: dict[str, list[Stamp]] = {}
    turns = asyncio.Semaphore(_AT_ONCE)

    async def ask(session: aiohttp.ClientSession, id_: str, sent: float) -> None:
        with suppress(aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError):
            async with turns, session.get(f"{url}/debug/requests/{id_}") as reply:
                if reply.status == 200:
                    events = msgspec.json.decode(await reply.read(), type=_Timeline).events
                    found[id_] = [(e.worker, e.event, round(e.time - sent, 6), e.detail) for e in events]

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        await asyncio.gather(*(ask(session, r.id, load.started + r.start) for r in load.records))
    return {record.id: found[record.id] for record in load.records if record.id in found}
