"""Planning the processes of one machine, and the life of a child. The whole system is tested end to end elsewhere."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from io import StringIO

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from twostroke import config as configs
from twostroke import up
from twostroke.children import Child
from twostroke.cli import app
from twostroke.config import EngineConfig, UpConfig, parse_store
from twostroke.messages import Slots
from twostroke.router.worker import WorkerReport


@given(st.integers(0, 5), st.integers(0, 5), st.integers(1, 5), st.integers(1, 64))
def test_cores_are_divided_whole(prefill: int, decode: int, colocated: int, cores: int) -> None:
    config = UpConfig(prefill=prefill, decode=decode, colocated=colocated)
    plans = up.plan_workers(config, cores, 0, range(100, 200))
    threads = [plan.threads for plan in plans]
    assert len({plan.name for plan in plans}) == len({plan.port for plan in plans}) == prefill + decode + colocated
    assert min(threads) >= 1
    assert max(threads) - min(threads) <= 1
    assert sum(threads) == max(cores, len(plans))


def test_threads_that_were_asked_for_are_given() -> None:
    plans = up.plan_workers(UpConfig(engine=EngineConfig(threads=3)), 2, 0, [1, 2])
    assert [plan.threads for plan in plans] == [3, 3]


@pytest.mark.parametrize(
    ("device", "devices", "gpus", "placed"),
    [
        ("auto", (), 0, "cpu cpu cpu cpu"),
        ("auto", (), 1, "cuda:0 cuda:0 cuda:0 cuda:0"),
        ("auto", (), 2, "cuda:0 cuda:1 cuda:0 cuda:1"),
        ("auto", (), 8, "cuda:0 cuda:1 cuda:2 cuda:3"),
        ("cuda", (), 3, "cuda:0 cuda:1 cuda:2 cuda:0"),
        ("cuda", (), 0, "cuda:0 cuda:0 cuda:0 cuda:0"),
        ("cpu", (), 2, "cpu cpu cpu cpu"),
        ("cuda:1", (), 2, "cuda:1 cuda:1 cuda:1 cuda:1"),
        ("auto", ("cuda:1", "cuda", "cpu"), 2, "cuda:1 cuda:0 cpu cuda:1"),
        ("auto", ("cuda",), 2, "cuda:0 cuda:0 cuda:0 cuda:0"),
    ],
)
def test_workers_take_devices_in_turn(device: str, devices: tuple[str, ...], gpus: int, placed: str) -> None:
    """Prefill first, then decode, then colocated; those on one GPU share its memory."""
    config = UpConfig(prefill=1, decode=2, colocated=1, engine=EngineConfig(device=device), devices=devices)
    plans = up.plan_workers(config, 4, gpus, range(4))
    assert [plan.role for plan in plans] == ["prefill", "decode", "decode", "both"]
    assert [plan.device for plan in plans] == placed.split()
    for place in set(placed.split()):
        assert sum(plan.utilization for plan in plans if plan.device == place) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("gpus", "line"),
    [(0, "CPU cores: prefill-0 3, decode-0 3 threads"), (1, "devices: prefill-0 cuda:0, decode-0 cuda:0")],
)
def test_what_is_shared_out_is_shown(monkeypatch: pytest.MonkeyPatch, gpus: int, line: str) -> None:
    monkeypatch.setattr(configs, "gpus", lambda: gpus)
    console = Console(file=StringIO(), width=200)
    system = up.System(UpConfig(engine=EngineConfig(threads=3)), console)
    slots = Slots(total=1, free=1, cached=0, leased=0)
    report = WorkerReport(
        "decode-0", "decode", "http://a:1", 7, "i", "ready", "", slots, "shm", 0, 0, 0, "m", 3, "cuda:5"
    )
    system._announce([report])
    assert isinstance(console.file, StringIO)
    printed = console.file.getvalue().splitlines()
    assert printed[0].endswith(line)
    assert printed[2].split() == ["decode-0", "decode", "http://a:1", "7", "cuda:5", "3"]


class Ending:
    """Stands in for a child process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.left = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self, *, left: bool) -> None:
        self.left = left
        self.ended.set_result(None)


async def test_a_drained_worker_leaves_and_any_other_death_counts() -> None:
    system = up.System(UpConfig(), Console(file=StringIO(), width=200))
    prefill, decode, last, router = (Ending(name) for name in ("prefill-0", "decode-0", "decode-1", "router"))
    system._workers, system._router = [prefill, decode, last], [router]  # type: ignore[list-item]
    dying = asyncio.create_task(system._first_death())
    decode.end(left=True)
    await asyncio.sleep(0.01)
    assert not dying.done()
    prefill.end(left=False)
    assert (await dying).name == "prefill-0"
    system._workers = [last]  # type: ignore[list-item]
    last.end(left=True)
    assert (await system._first_death()).name == "decode-1"


def test_free_ports_differ() -> None:
    assert len(set(up.free_ports(20))) == 20


EVERYTHING = EngineConfig(
    dtype="float32",
    load_format="dummy",
    block_tokens=8,
    gpu_memory_utilization=0.6,
    kv_memory=1 << 20,
    max_model_len=9,
    max_batch=5,
    token_budget=64,
    threads=3,
)


STORE = parse_store("host:1GiB,disk:/a/b:2GiB,dir:/c")
SOME = UpConfig("m", 2, 1, 1, insecure=True, engine=EVERYTHING, link="nixl", link_devices=("a", "b"), store=STORE)


@pytest.mark.parametrize("config", [UpConfig(), SOME])
@pytest.mark.parametrize("gpus", [0, 2])
def test_the_children_understand_their_command_lines(config: UpConfig, gpus: int) -> None:
    plans = up.plan_workers(config, 4, gpus, range(8100, 8110))
    for arguments in (*(up.serve_arguments(plan, config) for plan in plans), up.router_arguments(plans, config)):
        command, bound, _ = app.parse_args([*arguments, "--parent-pid", "1"], exit_on_error=False)
        assert command.__name__ == arguments[0]
        assert bound.arguments["parent_pid"] == 1
    for plan in plans:
        _, bound, _ = app.parse_args(up.serve_arguments(plan, config), exit_on_error=False)
        assert bound.arguments["link"] == config.link
        assert parse_store(bound.arguments["options"].store) == config.store
        assert bound.arguments.get("link_device") == (",".join(config.link_devices) or None)
        assert bound.arguments["options"].config() == msgspec.structs.replace(
            config.engine, device=plan.device, gpu_memory_utilization=plan.utilization, threads=plan.threads
        )


async def test_a_child_reports_its_lines_and_its_end() -> None:
    lines: list[tuple[str, str]] = []
    child = await Child.start("x", ["router", "--prefill", "x"], os.environ, lambda *line: lines.append(line))
    async with asyncio.timeout(20):
        await child.ended
    assert not child.running
    assert lines == [("x", next(iter(child.last_lines)))]
    assert child.epitaph().startswith("x ended with exit code 2\n  twostroke: 'x' is not")
    child.signal(signal.SIGTERM)  # to nobody


async def test_a_killed_child_says_by_what() -> None:
    child = await Child.start("x", ["router", "--colocated", "http://127.0.0.1:1"], os.environ, lambda *_: None)
    child.signal(signal.SIGKILL)
    async with asyncio.timeout(20):
        await child.ended
    assert child.epitaph() == "x was killed by SIGKILL"


def test_a_child_dies_with_its_parent_however_that_dies() -> None:
    child = textwrap.dedent("""
        import os, time
        from twostroke.parent import follow
        follow(os.getppid())
        print(os.getpid(), flush=True)
        time.sleep(60)
    """)
    parent = textwrap.dedent(f"""
        import subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", {child!r}])
        time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        process.kill()
    if psutil.pid_exists(pid):
        psutil.wait_procs([psutil.Process(pid)], timeout=5)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_child_whose_parent_is_gone_already_does_not_start() -> None:
    code = "from twostroke.parent import follow; follow(1); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
