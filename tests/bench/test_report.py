"""The report: what is in it, and that a browser draws it without network and without complaint."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.bench.made import colocated_stamps, pd_stamps, result, watched
from tests.bench.test_sources import FILES
from twostroke.bench import analysis
from twostroke.bench.charts import charts, limits, ratios
from twostroke.bench.folder import Folder, Metadata
from twostroke.bench.html import Page
from twostroke.bench.plan import Settings
from twostroke.bench.report import PALETTE, _sent, write_report
from twostroke.bench.results import Point, Result
from twostroke.bench.schemes import Scheme
from twostroke.bench.workload import MAX_TRACE, Chat, Grid
from twostroke.errors import StartupError

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def runs() -> list[Result]:
    """Two schemes, two lengths, two repeats, two rates; one died, one request failed, one has hostile names."""
    made = []
    for repeat in (0, 1):
        for length, ttft in (("100", 0.35), ("1000", 0.5)):
            for rate in (2.0, 4.0):
                point = Point("single", "pd", length, rate, repeat)
                single = result(ttft=ttft, stamps=colocated_stamps(), errors={3: "<b>lost</b>"})
                pd = result("pd", ttft=ttft * 0.8, stamps=pd_stamps())
                pd.watched = watched()
                made += [replace(single, point=point), replace(pd, point=replace(point, scheme="pd"))]
    died = result("pd", "2000")
    died.error = "prefill-0 was killed by SIGKILL"
    return [*made, died, result(mode="decode-only", workload="100")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result folder with its report."""
    one = Folder(tmp_path_factory.mktemp("bench") / "o")
    schemes = {"single": Scheme("--colocated 1", "one </script><script>alert(1)</script>"), "pd": Scheme("--prefill 1")}
    skipped = {"pd-disk": "no such option"}
    one.open(Metadata(Settings(goal={"ttft": 500.0}), schemes, {"name": "m"}, {"cores": 2}, skipped))
    for run in runs():
        one.write(run)
    list(write_report([one.path], one.path, None))
    return one.path


def test_the_page_says_what_there_is_to_say(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    files = list((folder / "charts").iterdir())
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    names = {file.stem for file in files}
    assert {"pd-ttft", "pd-tpot", "pd-total_token_throughput", "pd-waterfall", "pd-percentiles", "pd-itl"} <= names
    assert {"pd-goodput", "pd-pareto", "pd-requests-single", "pd-requests-pd", "decode-only-ttft"} <= names
    assert "pd-traffic-pd" in names
    assert "pd-traffic-single" not in names, "it moved nothing"
    for words in (
        "killed by SIGKILL",
        "no such option",
        "Against single",
        "waiting for 20.0 ms after prefill",
        "&lt;b&gt;lost",
    ):
        assert words in page
    assert "<script>alert" not in page
    shown = page.replace("http://www.w3.org", "")
    assert not re.search(r"(src|href)=[\"']?https?:", shown), "it asks for nothing from a network"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_draws_it_without_a_complaint(folder: Path, tmp_path: Path, theme: str) -> None:
    command = [
        *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *(f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr", "--virtual-time-budget=20000"),
        *(["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []),
        *("--dump-dom", f"file://{folder / 'report.html'}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert "data-failed" not in done.stdout
    plots = len(re.findall(r'id="plot-\d+"', done.stdout))
    assert plots > 10
    assert f'data-drawn="{plots}"' in done.stdout
    assert len(re.findall(r'<svg class="main-svg"[^>]*style="background', done.stdout)) == plots
    ink = "#e4e9ef" if theme == "dark" else "#1d2733"
    assert f"fill: rgb({', '.join(str(int(ink[i : i + 2], 16)) for i in (1, 3, 5))})" in done.stdout


def test_charts_hold_the_figures() -> None:
    found = analysis.groups(runs())
    made = {chart.name: chart for chart in charts(found)}
    lines = {series.name: series for series in made["pd-ttft"].series}
    assert lines["single"].x == [100, 1000]
    assert lines["pd"].y == pytest.approx([295, 415])
    low, high = lines["pd"].low[0], lines["pd"].high[0]
    assert low < 295 < high
    stack = made["pd-waterfall"]
    assert stack.series[0].x == ["pd, median", "pd, p99", "single, median", "single, p99"]
    longest = next(g for g in found if (g.key.scheme, g.key.workload, g.key.rate) == ("pd", "1000", 2.0))
    median = analysis.typical(longest.runs[0])["median"]
    assert sum(one.y[0] for one in stack.series) == pytest.approx(1e3 * sum(median.phases.values()))
    goodput = {series.name: series for series in made["pd-goodput"].series}
    assert goodput["pd, 100"].x == [2, 4]
    assert goodput["single, 1000"].y == pytest.approx([25, 25])  # of four, one is within 500 ms and one failed
    assert "pd-goodput" not in {chart.name for chart in charts(analysis.groups([result()]))}, "one rate is no curve"
    assert made["decode-only-ttft"].kind == "bars", "one length is no line"


def test_a_scheme_s_requests_and_bytes_over_time() -> None:
    made = {chart.name: chart for chart in charts(analysis.groups(runs()))}
    lines = {series.name: series for series in made["pd-requests-pd"].series}
    assert list(lines) == ["no token yet", "gets tokens", "p, running", "d, running"], "nobody waited in a worker"
    assert (lines["p, running"].x, lines["p, running"].y) == ([0, 1, 3], [1, 2, 0])
    assert max(lines["no token yet"].y) == 1
    moved = {series.name: series.y for series in made["pd-traffic-pd"].series}
    assert moved["link shm"] == [0, 20 / 2**20, 0]
    hostile = replace(result("../a: b"), watched=watched())
    names = [chart.name for chart in charts(analysis.groups([hostile]))]
    assert "pd-requests-.._a__b" in names


def test_ratios_are_of_the_same_point() -> None:
    rows = {(g.key.scheme, g.key.workload, g.key.mode): ratio for g, ratio in ratios(analysis.groups(runs()), "single")}
    assert rows["pd", "1000", "pd"]["ttft"] == pytest.approx(415 / 510)
    assert rows["single", "1000", "pd"]["ttft"] == 1
    assert set(ratios(analysis.groups([result("pd")]), "single")[0][1].values()) == {None}


def test_limits_are_of_the_longest_prompts() -> None:
    said = dict(limits(analysis.groups(runs())))
    assert list(said)[:2] == ["pd (pd, 1,000 tokens)", "single (pd, 1,000 tokens)"]


def test_folders_side_by_side_and_results_of_others(folder: Path, tmp_path: Path) -> None:
    """Of vLLM, of aiperf with its requests, and of aiperf a summary alone, of which little can be drawn."""
    summary = tmp_path / "summary.json"
    shutil.copy(FILES / "aiperf" / "profile_export_aiperf.json", summary)
    sources = [folder, FILES / "vllm_bench_serve.json", FILES / "aiperf", summary]
    list(write_report(sources, tmp_path / "all", "vllm_bench_serve"))
    page = (tmp_path / "all" / "report.html").read_text()
    for words in (
        "o: single",
        "o: pd",
        "<td>aiperf</td>",
        "<td>summary</td>",
        "Against vllm_bench_serve",
        "518 tokens",
    ):
        assert words in page


@pytest.mark.parametrize(("base", "words"), [("nobody", "no scheme 'nobody'"), (None, "nothing to report")])
def test_what_cannot_be_reported(tmp_path: Path, base: str | None, words: str) -> None:
    one = Folder(tmp_path / "o")
    one.open(Metadata(Settings(), {"single": Scheme("")}, {}, {}, {}))
    run = result(errors=dict.fromkeys(range(4), "lost") if base is None else {})
    one.write(run)
    with pytest.raises(StartupError, match=words):
        list(write_report([one.path], one.path, base))


def test_the_same_results_make_the_same_page() -> None:
    def page() -> bytes:
        made = Page("x")
        for chart in charts(analysis.groups(runs())):
            made.chart(chart, {}, PALETTE)
        return made.write("plotly")

    assert page() == page()


def test_what_was_sent_in_words() -> None:
    assert _sent(Settings()) == "160 random prompts a run, 10 tokens an answer"
    assert _sent(Settings(chat=Chat())) == "6 conversations of 4 turns, 24 tokens an answer"
    bounded = replace(Settings().grid, prompt_tokens=5000)
    assert _sent(Settings(grid=bounded)).startswith("160 random prompts (of at most 5,000 tokens together) a run")
    settings = Settings(trace="/data/t.jsonl", grid=Grid(num_prompts=MAX_TRACE), trace_scale=0.5)
    assert _sent(settings) == "all requests of the trace t.jsonl, lengths times 0.5"
    assert _sent(replace(settings, grid=Grid(num_prompts=5))).startswith("at most 5 requests of the trace")
