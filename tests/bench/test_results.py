"""The arithmetic, against streams computed by hand, and the files."""

import errno
import json
import math
import os
from pathlib import Path

import pytest

from twostroke.bench import results
from twostroke.bench.client import Load, Record, judge
from twostroke.bench.dialect import BadStream, Reading
from twostroke.bench.results import Point, Stats
from twostroke.errors import StartupError

POINT = Point("pd", "pd", "100", 4.0)

# Three answers. By hand: TTFT 100, 300, 200 ms; E2EL 400, 300, 1200 ms;
# TPOT (400-100)/3 = 100, none (one token), (1200-200)/4 = 250 ms; ITL 50, 250 | none | 200, 800 ms.
A = Record("a", 0.0, 0.0, 100, 4, 4, [0.1, 0.15, 0.4])  # two of its four tokens came in one chunk
B = Record("b", 0.5, 0.5, 100, 1, 1, [0.3])
C = Record("c", 1.0, 1.0, 100, 5, 5, [0.2, 0.4, 1.2])
FAILED = Record("d", 1.5, 1.5, 100, 5, 2, [9.0, 9.5], error="the stream ended early")


def loaded(*records: Record, duration: float = 2.0) -> Load:
    return Load(list(records), duration, 1e9, judge(records, 0.001, duration))


def test_figures_of_hand_computed_streams() -> None:
    result = results.summarize(POINT, loaded(A, B, C, FAILED), {})
    assert (result.completed, result.failed) == (3, 1)
    assert (result.total_input_tokens, result.total_output_tokens) == (300, 10)
    assert (result.request_throughput, result.output_throughput, result.total_token_throughput) == (1.5, 5, 155)
    assert result.request_goodput is None
    ttft, tpot, itl, e2el = (result.stats[name] for name in ("ttft", "tpot", "itl", "e2el"))
    assert ttft.mean == pytest.approx(200)
    assert ttft.median == ttft.p50 == pytest.approx(200)
    assert ttft.std == pytest.approx(math.sqrt(20_000 / 3))
    assert ttft.p90 == pytest.approx(280)  # between 200 and 300, at 0.9 of two gaps
    assert ttft.p99 == pytest.approx(298)
    assert tpot.mean == pytest.approx(175)
    assert tpot.p50 == pytest.approx(175)
    assert itl.mean == pytest.approx(325)  # (50 + 250 + 200 + 800) / 4
    assert e2el.mean == pytest.approx(1900 / 3)


def test_goodput_counts_what_meets_every_limit() -> None:
    ends = {
        (("ttft", 250.0),): 2,  # A and C; B waited for 300 ms, and the failed one never counts
        (("ttft", 250.0), ("tpot", 200.0)): 1,  # A
        (("tpot", 200.0),): 2,  # A, and B, which has a single token
        (("e2el", 1000.0),): 2,
        (("itl", 400.0),): 2,  # means: A 150, B none, C 500
    }
    for goal, good in ends.items():
        result = results.summarize(POINT, loaded(A, B, C, FAILED), dict(goal))
        assert result.request_goodput == good / 2.0
        assert result.attained == pytest.approx(good / 4)


def test_nothing_completed_is_no_average() -> None:
    result = results.summarize(POINT, loaded(FAILED), {"ttft": 1.0})
    assert result.stats["ttft"] == Stats()
    assert (result.completed, result.request_throughput, result.request_goodput) == (0, 0, 0)


def test_a_file_has_the_names_of_vllm_and_can_be_read_again() -> None:
    result = results.summarize(POINT, loaded(A, B, C, FAILED), {"ttft": 250.0}, workers=2)
    result.timelines = {"a": [("prefill-0", "admitted", 0.01, {"slots": 3})]}
    data = results.to_json(result)
    fields = json.loads(data)
    names = [
        *("duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput"),
        *("request_goodput", "output_throughput", "total_token_throughput", "input_lens", "output_lens", "ttfts"),
        *("itls", "start_times", "errors"),
    ]
    names += [f"{part}_{m}_ms" for part in ("mean", "median", "std", "p50", "p90", "p99") for m in results.METRICS]
    assert set(names) < set(fields)
    assert fields["ttfts"] == pytest.approx([0.1, 0.3, 0.2, 0])
    assert fields["itls"][2] == pytest.approx([0.2, 0.8])
    assert fields["output_lens"] == [4, 1, 5, 0]
    again = results.from_json(data, "x.json")
    assert again.point == POINT
    assert again.timelines == result.timelines
    assert [record.chunks for record in again.records] == [record.chunks for record in result.records]
    assert again.stats["ttft"].p99 == pytest.approx(298)
    assert again.attained == pytest.approx(0.5)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"duration": "long"}', b"\xff"])
def test_other_files_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(StartupError, match=r"x\.json"):
        results.from_json(data, "x.json")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StartupError, match="No space left on device; make room"):
        results.write(tmp_path / "a.json", b"{}")
    assert list(tmp_path.iterdir()) == []


# -- streams ---------------------------------------------------------------------------------------------------------


def read(*pieces: bytes) -> Reading:
    reading = Reading()
    for now, piece in enumerate(pieces):
        reading.feed(piece, float(now))
    return reading


def test_a_stream_of_completions_however_it_is_cut() -> None:
    stream = (
        b': comment\n\ndata: {"choices":[{"index":0,"text":"a","finish_reason":null}]}\n\n'
        b'data: {"choices":[{"text":"b","finish_reason":"length"}]}\r\n\r\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,"prompt_tokens_details":'
        b'{"cached_tokens":8}}}\n\ndata: [DONE]\n\n'
    )
    for size in (1, 7, 1000):
        reading = read(*(stream[i : i + size] for i in range(0, len(stream), size)))
        assert len(reading.chunks) == 2
        assert (reading.input_len, reading.output_len, reading.cached, reading.complete) == (9, 3, 8, True)


def test_a_chat_starts_with_its_first_token_not_with_the_role() -> None:
    reading = read(
        b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n',
        b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n',
        b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n',
    )
    assert reading.chunks == [1.0, 2.0]
    assert reading.complete


def test_a_stream_of_generate() -> None:
    event = b'data: {"text":"a","meta_info":{"prompt_tokens":4,"completion_tokens":%d,"finish_reason":%s}}\n\n'
    reading = read(event % (1, b"null"), event % (2, b'{"type":"length"}'))
    assert (reading.chunks, reading.output_len, reading.complete) == ([0.0, 1.0], 2, True)


@pytest.mark.parametrize(
    ("piece", "words"),
    [
        (b'data: {"error":{"message":"lost"}}\n\n', "lost"),
        (b"data: <html>\n\n", "not a chunk"),
        (b"x" * (5 << 20), "of more"),
    ],
)
def test_streams_that_are_failures(piece: bytes, words: str) -> None:
    with pytest.raises(BadStream, match=words):
        read(piece)
