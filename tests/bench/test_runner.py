"""The runner, with a server of the test's instead of real processes: order, resuming, deaths, full disks."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace
from starlette.types import Send

from tests.bench.made import result
from tests.bench.serving import Server, refuse, serving, two_tokens
from twostroke.bench import results, runner, sources
from twostroke.bench.checks import Machine, ModelFacts
from twostroke.bench.folder import Folder, Metadata
from twostroke.bench.plan import Settings, Workloads
from twostroke.bench.results import Point, Result
from twostroke.bench.runner import Bench, prepare
from twostroke.bench.schemes import Scheme
from twostroke.bench.workload import Grid
from twostroke.cli import explain
from twostroke.config import GiB
from twostroke.errors import StartupError

SETTINGS = Settings(grid=Grid(input_lens=(5, 9), num_prompts=2, request_rate=float("inf"), output_len=2))
SCHEMES = {"a": Scheme("--colocated 1"), "b": Scheme("--prefill 1 --decode 1")}
MODEL = ModelFacts("m", 100, 50, 1000, 10)


class Shown:
    """What the user would see."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.runs: list[str] = []
        self.weights = 0.0

    def run(self, point: Point, weight: float) -> None:
        self.runs.append(point.name)

    def advance(self, weight: float) -> None:
        self.weights += weight

    def ended(self, result: Result) -> None:
        self.lines.append(f"ended {result.point.name}")

    def say(self, text: str) -> None:
        self.lines.append(text)

    def detail(self, text: str) -> None:
        self.lines.append(text)


class Fake:
    """A scheme that runs: the test's server. It dies when told."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.death = asyncio.Event()

    async def died(self) -> str:
        await self.death.wait()
        return "worker-0 was killed by SIGKILL"


class Rig:
    """A benchmark of two schemes in a folder, over a server that the test scripts."""

    def __init__(self, path: Path, server: Server, settings: Settings) -> None:
        self.started: list[str] = []
        self.fakes: list[Fake] = []
        self.server = server
        self.folder = Folder(path)
        self.shown = Shown()
        workloads = Workloads(settings, MODEL.vocab)
        prepared = prepare(settings, SCHEMES, workloads, MODEL, Machine(0, 32 * GiB), explain)
        self.folder.open(Metadata(settings, dict(SCHEMES), {}, {}, {}))
        self.bench = Bench(self.folder, settings, prepared, workloads, MODEL.vocab, self.shown)

    @asynccontextmanager
    async def running(
        self, scheme: Scheme, line: Callable[[str, int], list[str]], say: Callable[[str], None]
    ) -> AsyncIterator[Fake]:
        self.started.append(" ".join(line("/s", 1)))
        self.fakes.append(Fake(self.server.url))
        yield self.fakes[-1]

    def files(self) -> list[str]:
        return sorted(file.name for file in (self.folder.path / "runs").iterdir())


@asynccontextmanager
async def rig(
    path: Path, monkeypatch: pytest.MonkeyPatch, answer: object = two_tokens, settings: Settings = SETTINGS
) -> AsyncIterator[Rig]:
    async with serving(answer) as server:  # type: ignore[arg-type]
        made = Rig(path, server, settings)
        monkeypatch.setattr(runner, "running", made.running)
        yield made


async def test_schemes_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig(tmp_path / "o", monkeypatch, settings=replace(SETTINGS, repeats=2)) as made:
        assert len(made.bench.todo()) == 8
        await made.bench.run()
    assert made.started == ["up --colocated 1", "up --prefill 1 --decode 1"] * 2
    assert made.shown.runs == [f"{s}.pd.{n}.rate-inf.{r}" for r in (0, 1) for s in "ab" for n in (5, 9)]
    assert made.files() == sorted(f"{name}.json" for name in made.shown.runs)
    assert made.bench.todo() == []
    assert made.shown.weights == sum(made.bench.weight(run.point) for run in sources.read(made.folder.path))
    salts = [body["cache_salt"] for body in made.server.bodies if "warm-up" not in str(body["cache_salt"])]
    assert sorted(set(map(str, salts))) == sorted(made.shown.runs), "no run finds blocks of another"


@pytest.mark.parametrize(("prompts", "warm"), [(2, 1 + 2), (40, 10 + 10), (400, 16 + 32)])
async def test_warming_up_is_bounded_by_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: int, warm: int
) -> None:
    """A quarter of it; for each worker a prompt at least, and so many at most."""
    grid = replace(SETTINGS.grid, num_prompts=prompts)
    async with rig(tmp_path / "o", monkeypatch, settings=replace(SETTINGS, grid=grid)) as made:
        await made.bench.run()  # a scheme of one worker, and one of two
    sent = sum("warm-up" in str(body["cache_salt"]) for body in made.server.bodies)
    assert sent == warm * len(grid.input_lens)


async def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig(tmp_path / "o", monkeypatch) as made:
        await made.bench.run()
        before = {file: (tmp_path / "o/runs" / file).read_bytes() for file in made.files()}
        (tmp_path / "o/runs" / "b.pd.9.rate-inf.0.json").unlink()
    async with rig(tmp_path / "o", monkeypatch) as again:
        await again.bench.run()
        assert again.shown.runs == ["b.pd.9.rate-inf.0"]
        assert again.started == ["up --prefill 1 --decode 1"]
    del before["b.pd.9.rate-inf.0.json"]
    assert all((tmp_path / "o/runs" / file).read_bytes() == data for file, data in before.items())


async def test_decode_only_puts_the_kv_in_place_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig(tmp_path / "o", monkeypatch, settings=replace(SETTINGS, modes=("decode-only",))) as made:
        await made.bench.run()
    ids = [id_ for id_ in made.server.ids if id_.startswith("a.decode-only.5")]
    assert len(ids) == 4
    assert all("priming" in id_ for id_ in ids[:2])
    assert not any("priming" in id_ for id_ in ids[2:])
    assert made.shown.weights == sum(made.bench.weight(run.point) for run in sources.read(made.folder.path))
    prompts = [str(body["prompt"]) for body in made.server.bodies if body["cache_salt"] == "a.decode-only.5.rate-inf.0"]
    assert sorted(prompts[:2]) == sorted(prompts[2:])


async def test_a_scheme_that_dies_is_started_again_and_the_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies in the first run; the second is measured by its successor."""
    made: Rig

    async def answer(server: Server, send: Send) -> None:
        if server.bodies[-1]["cache_salt"] == "a.pd.5.rate-inf.0":
            made.fakes[0].death.set()
            await asyncio.Event().wait()
        await two_tokens(server, send)

    async with rig(tmp_path / "o", monkeypatch, answer) as made:
        await made.bench.run()
        assert made.started == ["up --colocated 1"] * 2 + ["up --prefill 1 --decode 1"]
        assert [point.name for point in made.bench.todo()] == ["a.pd.5.rate-inf.0"]
    failed = results.from_json((tmp_path / "o/runs/a.pd.5.rate-inf.0.failed-0.json").read_bytes(), "x")
    assert (failed.error, failed.completed) == ("worker-0 was killed by SIGKILL", 0)
    async with rig(tmp_path / "o", monkeypatch) as again:
        await again.bench.run()
        assert again.bench.todo() == []


async def test_a_scheme_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig(tmp_path / "o", monkeypatch, refuse) as made:
        await made.bench.run()
    assert len(made.started) == 4
    assert sum("given up" in line for line in made.shown.lines) == 2
    assert made.files() == []


async def test_failed_requests_do_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(server: Server, send: Send) -> None:
        failing = str(server.bodies[-1]["cache_salt"]).startswith("a.pd.9")
        await (refuse if failing else two_tokens)(server, send)

    async with rig(tmp_path / "o", monkeypatch, answer) as made:
        await made.bench.run()
    counts = {run.point.name: (run.completed, run.failed) for run in sources.read(tmp_path / "o")}
    assert counts.pop("a.pd.9.rate-inf.0") == (0, 2)
    assert set(counts.values()) == {(2, 0)}


async def test_a_full_disk_stops_it_and_leaves_no_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig(tmp_path / "o", monkeypatch) as made:
        monkeypatch.setattr(os, "fsync", lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        with pytest.raises(StartupError, match="No space left"):
            await made.bench.run()
        assert made.files() == []
        monkeypatch.undo()


async def test_a_sweep_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = replace(SETTINGS.grid, input_lens=(5,), request_rate=4.0)
    settings = replace(SETTINGS, grid=grid, sweep=True, goal={"ttft": 500.0})
    async with rig(tmp_path / "o", monkeypatch, settings=settings) as made:
        for rate, ttft in ((4.0, 0.1), (8.0, 0.1), (16.0, 0.9)):
            point = Point("a", "pd", "5", rate)
            made.folder.write(replace(result("a", ttft=ttft), point=point))
        assert made.bench._next("a", 0, set()) == Point("a", "pd", "5", 11.314)


# -- the folder ------------------------------------------------------------------------------------------------------


def metadata(settings: Settings = SETTINGS, **schemes: Scheme) -> Metadata:
    return Metadata(settings, schemes or dict(SCHEMES), {}, {"commit": "c"}, {})


def test_a_folder_takes_no_other_benchmark(tmp_path: Path) -> None:
    Folder(tmp_path / "o").open(metadata(a=SCHEMES["a"]))
    Folder(tmp_path / "o").open(metadata(b=SCHEMES["b"]))
    with pytest.raises(StartupError, match=r"other settings \(repeats: 1 there, 2 asked for\)"):
        Folder(tmp_path / "o").open(metadata(replace(SETTINGS, repeats=2)))
    with pytest.raises(StartupError, match="another scheme 'a'"):
        Folder(tmp_path / "o").open(metadata(a=Scheme("--colocated 7")))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "o")
    folder.open(metadata())
    folder.write(result())
    with pytest.raises(StartupError, match="there already"):
        folder.write(result())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(StartupError, match="not empty"):
        Folder(tmp_path / "mine").open(metadata())
    (tmp_path / "o/metadata.json").write_text("{")
    with pytest.raises(StartupError, match="cannot be read"):
        Folder(tmp_path / "o").open(metadata())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="cannot make"):
        Folder(tmp_path / "file" / "o").open(metadata())
