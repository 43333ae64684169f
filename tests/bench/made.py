"""Results made by hand, with timelines as workers write them."""

from collections.abc import Mapping

from twostroke.bench.client import Load, Record, judge
from twostroke.bench.results import Point, Result, Stamp, summarize
from twostroke.bench.watch import Watched

GOAL = {"ttft": 500.0}


def record(id_: str, start: float, ttft: float = 0.4, tokens: int = 5, gap: float = 0.05, error: str = "") -> Record:
    chunks = [ttft + gap * i for i in range(tokens)]
    return Record(id_, start, start, 100, tokens, tokens, chunks, error=error)


def colocated_stamps() -> list[Stamp]:
    """Queue 90 ms, prefill 250 ms, first token 340 ms after the start."""
    return [
        ("w", "received", 0.01, {"prompt_tokens": 100}),
        ("w", "admitted", 0.05, {}),
        ("w", "prefill_started", 0.1, {"cached_tokens": 0}),
        ("w", "prefill_ended", 0.35, {}),
        ("w", "first_token", 0.35, {}),
        ("w", "finished", 0.6, {"reason": "length", "output_tokens": 5}),
    ]


def pd_stamps() -> list[Stamp]:
    """Prefill 200 ms after a load of 30 ms; a hand-over of 150 ms, of which 20 ms are exposed."""
    return [
        ("d", "received", 0.01, {"prompt_tokens": 100}),
        ("p", "received", 0.02, {"prompt_tokens": 100}),
        ("d", "admitted", 0.02, {}),
        ("p", "admitted", 0.03, {}),
        ("p", "store", 0.07, {"load_ms": 30.0, "bytes": 1 << 20, "tiers": "host"}),
        ("p", "prefill_started", 0.1, {"cached_tokens": 10}),
        ("d", "attached", 0.17, {"link": "shm"}),
        ("p", "prefill_ended", 0.3, {}),
        ("p", "first_token", 0.3, {}),
        ("p", "finished", 0.3, {"reason": "handover", "output_tokens": 1}),
        ("d", "first_token", 0.31, {}),
        ("d", "kv_complete", 0.32, {"bytes": 10 << 20, "blocks": 7, "exposed_ms": 20.0}),
        ("d", "finished", 0.6, {"reason": "length", "output_tokens": 5}),
    ]


def watched() -> Watched:
    """Three samples of two workers; one did not answer once, and started again in between."""
    return Watched(
        [0.0, 1.0, 3.0],
        {
            "p": {"running": [1, 2, 0], "waiting": [0, 0, 0], "tier host, written": [0, 100, 300]},
            "d": {"running": [None, 0, 1], "link shm": [None, 50, 90], "tier host, written": [70, 0, 20]},
        },
    )


def result(
    scheme: str = "single",
    workload: str = "100",
    *,
    mode: str = "pd",
    rate: float = 4.0,
    repeat: int = 0,
    ttft: float = 0.4,
    stamps: list[Stamp] | None = None,
    errors: Mapping[int, str] = {},
    tokens: int = 5,
    duration: float = 2.0,
) -> Result:
    """Four requests, half a second apart."""
    records = [record(f"{scheme}-{i}", 0.5 * i, ttft + 0.01 * i, tokens, error=errors.get(i, "")) for i in range(4)]
    load = Load(records, duration, 1e9, judge(records, 0.01, duration))
    made = summarize(Point(scheme, mode, workload, rate, repeat), load, GOAL, 2 if scheme.startswith("pd") else 1)
    if stamps is not None:
        made.timelines = {one.id: stamps for one in records}
    return made
