"""What the verbs take and refuse, before anything starts; and ``bench client`` against a server."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench.serving import refuse, serving, two_tokens
from twostroke import cli
from twostroke.bench import results, session, workload
from twostroke.bench.plan import Settings


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that stderr says, last."""
    assert cli.run(("bench", *arguments)) == 2
    err = capsys.readouterr().err
    assert err.count("twostroke: ") == 1
    return err


@pytest.mark.parametrize("verb", ["run", "client", "report"])
def test_help_shows_every_option(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", verb, "--help"]) == 0
    assert "--output" in capsys.readouterr().out


def test_the_command_line_waits_for_no_library() -> None:
    code = "import sys, twostroke.cli; print({'numpy', 'plotly', 'matplotlib', 'aiohttp', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Settings:
    """The settings that ``bench run`` makes of arguments."""
    taken: list[Settings] = []

    def run(settings: Settings, *_: object, **__: object) -> int:
        taken.append(settings)
        return 7

    monkeypatch.setattr(session, "run", run)
    assert cli.run(["bench", "run", "--output", "o", *arguments]) == 7
    return taken[0]


def test_presets_and_what_changes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, "--preset", "reference").grid == workload.REFERENCE
    assert asked(monkeypatch).grid == workload.QUICK
    assert asked(monkeypatch, "--preset", "chat").chat == workload.Chat()
    settings = asked(
        monkeypatch, "m", "--input-lens", "10,20", "--num-prompts", "3", "--request-rate", "1,inf", "--mode", "all",
        "--goodput", "ttft:2000", "tpot:40", "--rate-sweep", "--warm", "--repeat", "2", "--seed", "1",
        "--prompt-tokens", "40",
        "--up", "--dtype float32",
    )  # fmt: skip
    assert (settings.model, settings.grid.input_lens, settings.grid.num_prompts) == ("m", (10, 20), 3)
    assert (settings.rates, settings.modes) == ((1, float("inf")), ("prefill-only", "decode-only", "pd"))
    assert (settings.goal, settings.sweep, settings.cold) == ({"ttft": 2000, "tpot": 40}, True, False)
    assert settings.grid.prompt_tokens == 40
    assert (settings.repeats, settings.grid.seed, settings.up) == (2, 1, "--dtype float32")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run",), "--output"),
        (("run", "--output", "o", "--input-lens", "a"), "numbers with commas"),
        (("run", "--output", "o", "--input-lens", "0"), "above 0"),
        (("run", "--output", "o", "--request-rate", "0"), "above 0"),
        (("run", "--output", "o", "--goodput", "speed:1"), "knows ttft"),
        (("run", "--output", "o", "--goodput", "ttft"), "limits in ms"),
        (("run", "--output", "o", "--rate-sweep"), "--goodput"),
        (("run", "--output", "o", "--schemes", "pdd"), "no scheme 'pdd'"),
        (("run", "--output", "o", "--scheme-file", "/none.toml"), "/none.toml"),
        (("run", "/no/model", "--output", "o"), "no such model"),
        (("client", "--base-url", "http://127.0.0.1:9"), "cannot be reached"),
        (("client", "--base-url", "http://127.0.0.1:9", "--output-len", "0"), "above 0"),
        (("client", "--base-url", "http://127.0.0.1:9", "--request-rate", "1,2"), "one --request-rate"),
        (("client", "--base-url", "http://127.0.0.1:9", "--vocab-size", "1"), "--vocab-size"),
        (("run", "--output", "o", "--trace", "t", "--request-rate", "1"), "times of its own"),
        (("run", "--output", "o", "--trace", "t", "--rate-sweep", "--goodput", "ttft:1"), "times of its own"),
        (("run", "--output", "o", "--repeat", "0"), "--repeat"),
        (("run", "--output", "o", "--timeout", "0"), "--timeout"),
        (("client", "--base-url", "http://127.0.0.1:9", "--output", "/"), "there already"),
        (("client", "--base-url", "http://127.0.0.1:9", "--trace", "/none"), "/none"),
        (("report",), "at least one"),
        (("report", "/none"), "there is no /none"),
    ],
)
def test_what_cannot_work_says_why(
    arguments: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


async def bench_client(url: str, *arguments: str) -> int:
    """``bench client`` in a thread: it has an event loop of its own."""
    command = ["bench", "client", "--base-url", url, "--model", "m", "--num-prompts", "3", "--request-rate", "inf"]
    return await asyncio.to_thread(cli.run, [*command, *arguments])


async def test_a_client_writes_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "r.json"
    async with serving(two_tokens) as server:
        assert await bench_client(server.url, "--input-len", "7", "--output", str(file), "--goodput", "ttft:60000") == 0
    result = results.from_json(file.read_bytes(), "r.json")
    assert (result.completed, result.failed, result.point.workload, result.attained) == (3, 0, "7", 1.0)
    assert len(server.bodies) == 4, "one warms up"
    assert "generator: late by" in capsys.readouterr().out


async def test_a_client_says_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    async def answer(server: object, send: object) -> None:
        await (two_tokens if len(server.bodies) == 1 else refuse)(server, send)  # type: ignore[attr-defined,arg-type]

    async with serving(answer) as server:
        assert await bench_client(server.url) == 1
        assert "status 503" in capsys.readouterr().out
        assert await bench_client(server.url) == 2, "it does not even warm up"


async def test_a_trace() -> None:
    """Of a trace every line is sent, and what it shares is shared, in blocks that are scaled as well."""
    trace = Path(__file__).parents[2] / "benchmarks" / "mooncake_sample.jsonl"
    command = ["bench", "client", "--model", "m", "--trace", str(trace), "--trace-scale", "0.01"]
    async with serving(two_tokens) as server:
        assert await asyncio.to_thread(cli.run, [*command, "--base-url", server.url]) == 0
    prompts = [list(body["prompt"]) for body in server.bodies[1:]]  # type: ignore[call-overload]
    assert sorted(map(len, prompts)) == [5, 6, 9, 13, 19, 20, 22, 29, 31, 35]
    (whole,) = [prompt for prompt in prompts if len(prompt) == 5]
    assert sum(prompt[:5] == whole for prompt in prompts) == 8, "all but two lines begin with the first block"


def test_a_run_refuses_when_it_is_told_to(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(os.environ, "COLUMNS", "200")
    model = str(tiny_model("LlamaForCausalLM"))
    arguments = ("run", model, "--output", str(tmp_path / "o"), "--schemes", "single", "--input-lens", "50,5000")
    assert cli.run(("bench", *arguments, "--unavailable", "refuse")) == 2
    shown = capsys.readouterr()
    assert "5,000 + 10 tokens do not fit into the context of 512" in shown.out
    assert "nothing was started" in shown.err
    assert not (tmp_path / "o").exists()
