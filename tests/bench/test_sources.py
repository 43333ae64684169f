"""Result files of other tools, as these tools wrote them (``files/``): vLLM 0.32, and aiperf 0.13, whose run met a
model with a small context, so that half of its requests failed.
"""

import gzip
import json
import math
import shutil
from pathlib import Path

import pytest

from tests.bench.made import result
from twostroke.bench import results, sources
from twostroke.bench.client import Load, judge
from twostroke.bench.results import METRICS, Point
from twostroke.errors import StartupError

FILES = Path(__file__).with_name("files")
VLLM = FILES / "vllm_bench_serve.json"


def test_a_file_of_vllm_is_read_whole() -> None:
    (run,) = sources.read(VLLM)
    assert run.point == Point("vllm_bench_serve", "pd", "64", 2.0)
    assert (run.completed, run.failed, run.total_input_tokens, run.total_output_tokens) == (6, 0, 384, 48)
    assert run.stats["ttft"].p99 == pytest.approx(651.587, abs=1e-3)
    assert [round(record.start, 2) for record in run.records] == [0, 0.56, 1.01, 1.49, 1.99, 2.53]


def test_our_arithmetic_finds_vllm_s_figures_from_its_stamps() -> None:
    """Every figure that its summary has, from its requests."""
    (run,) = sources.read(VLLM)
    again = results.summarize(run.point, Load(run.records, run.duration, 0.0, judge(run.records, 0.0, 1.0)), {})
    for metric in METRICS:
        for part in ("mean", "median", "std", "p50", "p90", "p99"):
            assert getattr(again.stats[metric], part) == pytest.approx(getattr(run.stats[metric], part)), (metric, part)
    for name in ("request_throughput", "output_throughput", "total_token_throughput"):
        assert getattr(again, name) == pytest.approx(getattr(run, name))


def test_a_file_of_vllm_without_details() -> None:
    """As without --save-detailed, and with a label and all requests at once."""
    details = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors")
    fields = {name: value for name, value in json.loads(VLLM.read_text()).items() if name not in details}
    run = sources.decode(json.dumps({**fields, "label": "mine", "request_rate": "inf"}).encode(), "x")
    assert run.point == Point("mine", "pd", "64", math.inf)
    assert run.records == []
    assert run.stats["tpot"].median == pytest.approx(15.581, abs=1e-3)


def test_the_requests_of_aiperf() -> None:
    (run,) = sources.read(FILES / "aiperf")
    assert (run.point.scheme, run.completed, run.failed) == ("aiperf", 3, 3)
    assert "the prompt has 518 tokens" in run.records[0].error
    assert run.duration == pytest.approx(0.666618, abs=1e-6), "from the first request to the last answer"
    assert run.total_output_tokens == 24, "by the server's count: its own tokenizer makes 47 of their text"
    assert run.stats["ttft"].p50 == pytest.approx(22.557, abs=1e-3)
    assert run.stats["e2el"].p50 == pytest.approx(55.360, abs=1e-3)
    assert run.stats["tpot"].p50 == pytest.approx((55.360358 - 20.042392) / 7, abs=1e-3)
    assert run.records[3].chunks == pytest.approx([0.022557, 0.022704, 0.027389, 0.032924], abs=1e-6)


def test_a_summary_of_aiperf_alone(tmp_path: Path) -> None:
    file = tmp_path / "theirs.json"
    shutil.copy(FILES / "aiperf" / "profile_export_aiperf.json", file)
    (run,) = sources.read(file)
    assert (run.point.scheme, run.completed, run.failed, run.point.length) == ("theirs", 3, 3, 292)
    assert run.stats["ttft"].p99 == pytest.approx(64.771, abs=1e-3)
    assert run.stats["tpot"].p50 == pytest.approx(2.717, abs=1e-3)
    assert (run.total_input_tokens, run.total_output_tokens) == (877, 47)
    assert run.request_throughput == pytest.approx(3 / 0.439122176)


def test_a_folder_of_files_and_one_of_ours(tmp_path: Path) -> None:
    shutil.copy(VLLM, tmp_path / "b.json")
    (tmp_path / "a.json").write_bytes(results.to_json(result("pd")))
    assert [run.point.scheme for run in sources.read(tmp_path)] == ["pd", "b"]


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"duration": "long"}', b"\xff", b'{"aiperf_version": "0.13.0"}'])
def test_what_is_no_result_is_refused_by_name(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(data)
    with pytest.raises(StartupError, match="x is no benchmark result"):
        sources.read(file)


@pytest.mark.parametrize(("data", "words"), [(b"", "x holds no request"), (b'{"metadata":{}}', "x is no benchmark")])
def test_records_that_are_none(data: bytes, words: str) -> None:
    with pytest.raises(StartupError, match=words):
        sources.of_aiperf_records(data, "x")


def test_compressed_results_and_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(VLLM.read_bytes()))
    (tmp_path / "notes.txt").write_text("none")
    (run,) = sources.read(tmp_path)
    assert (run.point.scheme, run.completed) == ("a", 6)
    (tmp_path / "b.json.gz").write_bytes(b"\x1f\x8b cut off")
    with pytest.raises(StartupError, match="cannot be read"):
        sources.read(tmp_path)


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no benchmark results"):
        sources.read(tmp_path)
