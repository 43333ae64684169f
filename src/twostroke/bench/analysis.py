"""What results mean: repeats put together, where the time of a request went, and what limits a scheme. Pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np
from msgspec import Struct

from twostroke.bench.client import Record
from twostroke.bench.results import Result, Stamp, Stats

PHASES = ("to the worker", "queue", "load from a tier", "prefill", "first token's way", "hand-over, exposed", "decode")
_RESAMPLES = 1000
_ORDER = {"pd": 0, "prefill-only": 1, "decode-only": 2}
_BUSY = 0.8  # share of the time from which a worker is said to be the limit


class Key(Struct, frozen=True, order=True):
    """What repeats have in common."""

    mode: str
    workload: str
    rate: float
    scheme: str


class Group(Struct):
    """All repeats of a point that count, and their requests together."""

    key: Key
    runs: list[Result]

    @property
    def records(self) -> list[Record]:
        """Completed requests of all repeats."""
        return [record for run in self.runs for record in run.good]

    @property
    def length(self) -> float:
        """Prompt tokens: as the workload says, or their mean."""
        first = self.runs[0]
        return first.point.length or first.total_input_tokens / max(1, first.completed)

    @property
    def place(self) -> tuple[int, str, float, float]:
        """Where it stands among others: whole requests first, then by length and rate."""
        return _ORDER.get(self.key.mode, len(_ORDER)), self.key.mode, self.length, self.key.rate

    @property
    def failed(self) -> int:
        """Requests of all repeats that failed."""
        return sum(run.failed for run in self.runs)

    def median(self, figure: str) -> float | None:
        """Median over the repeats of ``ttft``, ``tpot``, ``itl`` or ``e2el`` (each repeat's p50, ms), or of a
        throughput (a field of ``Result``).
        """
        values = self.values(figure)
        return float(np.median(values)) if values else None

    def values(self, figure: str) -> list[float]:
        """The figure of each repeat."""
        if figure in ("ttft", "tpot", "itl", "e2el"):
            stats = (run.stats.get(figure, Stats()) for run in self.runs)
            found = [one.p50 if one.p50 is not None else one.median for one in stats]
        else:
            found = [getattr(run, figure) for run in self.runs]
        return [float(value) for value in found if value is not None]

    def interval(self, figure: str) -> tuple[float, float] | None:
        """95 % confidence interval of the median of ``ttft``, ``tpot`` or ``e2el`` in ms, by resampling the requests of
        all repeats; None of fewer than three.
        """
        values = [1e3 * value for record in self.records if (value := getattr(record, figure)) is not None]
        if len(values) < 3:
            return None
        draws = np.random.default_rng(0).choice(values, (_RESAMPLES, len(values)))
        low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
        return float(low), float(high)


def groups(runs: Iterable[Result]) -> list[Group]:
    """Runs by what they have in common, shortest prompts first; those that died are left out."""

    def key(run: Result) -> Key:
        return Key(run.point.mode, run.point.workload, run.point.rate, run.point.scheme)

    counted = sorted((run for run in runs if not run.error and run.completed), key=key)
    made = [Group(one, list(some)) for one, some in groupby(counted, key)]
    return sorted(made, key=lambda group: group.place)


class Way(Struct):
    """Where the time of one request went, in seconds: ``phases`` add up to its E2EL. For ``hidden`` of prefill's time
    the hand-over went on beside it.
    """

    phases: dict[str, float]
    hidden: float = 0.0


def way(record: Record, stamps: Sequence[Stamp]) -> Way | None:
    """The way of a request through the workers; None where its timeline is not known."""
    times: dict[tuple[str, str], float] = {}
    detail: dict[tuple[str, str], Mapping[str, str | int | float]] = {}
    for worker, event, time, more in stamps:
        times.setdefault((worker, event), time)
        detail.setdefault((worker, event), more)
    prefills = [worker for worker, event in times if event == "prefill_ended" and (worker, "prefill_started") in times]
    if not prefills or record.error:
        return None
    producer = min(prefills, key=lambda worker: times[worker, "prefill_ended"])
    received = times.get((producer, "received"), 0.0)
    started, ended = times[producer, "prefill_started"], times[producer, "prefill_ended"]
    # What another worker loads meanwhile, of what this one computes, takes no time of the request's.
    load = min(float(detail.get((producer, "store"), {}).get("load_ms", 0)) / 1e3, max(0.0, started - received))
    exposed, hidden = 0.0, 0.0
    for (worker, event), time in times.items():
        if event == "kv_complete" and (worker, "attached") in times:
            exposed = min(float(detail[worker, event].get("exposed_ms", 0)) / 1e3, record.e2el - record.ttft)
            hidden = max(0.0, min(time, ended) - max(times[worker, "attached"], started))
    lengths = (
        max(0.0, received),
        max(0.0, started - max(received, 0.0) - load),
        load,
        ended - started,
        max(0.0, record.ttft - ended),
        exposed,
        max(0.0, record.e2el - record.ttft - exposed),
    )
    return Way(dict(zip(PHASES, lengths, strict=True)), hidden)


def ways(run: Result) -> list[tuple[Record, Way]]:
    """The ways of all completed requests whose timelines are known, the fastest first."""
    found = ((record, way(record, run.timelines.get(record.id, []))) for record in run.good)
    return sorted(((record, one) for record, one in found if one is not None), key=lambda pair: pair[0].e2el)


def typical(run: Result) -> dict[str, Way]:
    """The ways of the median and of the p99 request, by E2EL."""
    known = ways(run)
    if not known:
        return {}
    return {
        name: known[min(len(known) - 1, math.ceil(share * len(known)) - 1)][1]
        for name, share in (("median", 0.5), ("p99", 0.99))
    }


def shares(run: Result) -> dict[str, float]:
    """Share of each phase in the time that requests took, all together; empty without timelines."""
    known = [one.phases for _, one in ways(run)]
    total = sum(sum(phases.values()) for phases in known)
    return {phase: sum(phases[phase] for phases in known) / total for phase in PHASES} if total else {}


def busy(run: Result, begin: str, end: str) -> dict[str, float]:
    """Share of a run's time that each worker had a request between two events, by worker. A producer that is done with
    its part of a request has not finished it.
    """
    spans: dict[str, list[tuple[float, float]]] = {}
    for record in run.good:
        begun: dict[str, float] = {}
        for worker, event, time, detail in run.timelines.get(record.id, []):
            if detail.get("reason") == "handover":
                continue
            if event == begin:
                begun.setdefault(worker, record.start + time)
            elif event == end and worker in begun:
                spans.setdefault(worker, []).append((begun[worker], record.start + time))
    return {worker: _covered(found) / run.duration for worker, found in sorted(spans.items())}


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, until = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def verdict(run: Result) -> str:
    """What limits a scheme, in words, from the measured shares."""
    part = shares(run)
    if not part:
        return "its server tells no timelines, so where the time went is not known"
    most = max(part, key=lambda phase: part[phase])
    prefilling = busy(run, "prefill_started", "prefill_ended")
    decoding = busy(run, "first_token", "finished")
    fallbacks = sum(stamp[1] == "fallback" for stamps in run.timelines.values() for stamp in stamps)
    said = [f"{most} takes {_percent(part[most])} of a request's time"]
    limit, decodes = max(prefilling.values(), default=0.0), max(decoding.values(), default=0.0)
    if limit >= _BUSY and part["queue"] + part["prefill"] > part["decode"]:
        names = " and ".join(f"{worker} {_percent(share)}" for worker, share in prefilling.items())
        cure = "add prefill workers" if len(decoding) and set(prefilling) != set(decoding) else "add workers"
        said.append(f"prefill computes {names} of the time: {cure}, or send less at once")
    elif most == "decode" and decodes >= _BUSY:
        names = " and ".join(f"{worker} {_percent(share)}" for worker, share in decoding.items())
        said.append(f"decoding keeps busy {names} of the time: add decode workers, or answer fewer requests at once")
    elif most == "hand-over, exposed":
        said.append("KV arrives after prefill has ended: a faster link, or smaller chunks, would help")
    elif most == "load from a tier":
        said.append("KV comes from a tier more slowly than requests: a faster tier, or more host memory, would help")
    elif limit < _BUSY:
        said.append(f"no worker is busy all the time (prefill at most {_percent(limit)}): it could take more")
    known = [one for _, one in ways(run)]
    hidden, exposed = sum(one.hidden for one in known), sum(one.phases["hand-over, exposed"] for one in known)
    if hidden + exposed:
        said.append(f"the hand-over keeps a request waiting for {1e3 * exposed / len(known):.1f} ms after prefill")
    if fallbacks:
        said.append(f"{fallbacks} hand-overs failed and were computed again")
    return "; ".join(said)


def concurrency(run: Result) -> tuple[list[float], list[int], list[int]]:
    """How many requests wait for their first token and how many get tokens: times in seconds, waiting, running."""
    changes: list[tuple[float, int, int]] = []
    for record in run.good:
        first, last = record.start + record.ttft, record.start + record.e2el
        changes += [(record.start, 1, 0), (first, -1, 1), (last, 0, -1)]
    times, waiting, running = [0.0], [0], [0]
    for time, more_waiting, more_running in sorted(changes):
        times.append(time)
        waiting.append(waiting[-1] + more_waiting)
        running.append(running[-1] + more_running)
    return times, waiting, running


def states(run: Result) -> list[tuple[str, str, list[float], list[float]]]:
    """What each server said of itself: its name, "running" or "waiting", times in seconds, requests."""
    found = []
    for server, series in run.watched.values.items():
        for state in ("running", "waiting"):
            seen = [(at, n) for at, n in zip(run.watched.times, series.get(state, []), strict=False) if n is not None]
            if seen:
                found.append((server, state, [at for at, _ in seen], [n for _, n in seen]))
    return found


def traffic(run: Result) -> tuple[list[float], dict[str, list[float]]]:
    """Bytes a second on each link, and from and to each tier, over time, from the counters of all servers together:
    times in seconds, rates from each time to the next by name.
    """
    times = np.asarray(run.watched.times)
    if len(times) < 2:
        return [], {}
    moved: dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]] = {}
    for series in run.watched.values.values():
        for name, column in series.items():
            known = [(at, so_far) for at, so_far in zip(times, column, strict=True) if so_far is not None]
            if name in ("running", "waiting") or not known:
                continue
            so_far = np.interp(times, [at for at, _ in known], [value for _, value in known])
            grown = np.clip(np.diff(so_far), 0, None)  # a server that starts again counts from 0
            moved[name] = moved.get(name, np.zeros(len(grown))) + grown / np.diff(times)
    return times.tolist(), {name: [*rate.tolist(), 0.0] for name, rate in sorted(moved.items())}


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 or not share else f"{100 * share:.1f} %"
