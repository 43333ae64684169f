"""Our workers behind the real routers of other systems, and what they answer when nobody is in front of them."""

import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.e2e.ports import free_ports
from tests.e2e.system import System, launch
from tests.interop.environment import Unreachable, prepare

ROLES = {"prefill-0": "prefill", "decode-0": "decode", "colocated-0": "both"}
_START_SECONDS = 60.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def commands() -> Path:
    """Where the routers' commands are."""
    try:
        return prepare()
    except Unreachable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Iterator[System]:
    """A prefill, a decode and a colocated worker. Their prefill takes several chunks."""
    model, logs = tiny_model("Qwen3ForCausalLM"), tmp_path_factory.mktemp("logs")
    engine = ["--dtype", "float32", "--chunk-size", "64", "--kv-memory", "64MiB"]
    with launch(logs, ROLES, engine=engine, model=model) as system:
        yield system


@contextmanager
def started(command: Sequence[str | Path], port: int, log: Path) -> Iterator[str]:
    """A foreign router on ``port`` that is ready; its URL."""
    offline = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=offline) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_ready(process, f"{url}/readiness", log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"it ended:\n{log.read_text()[-2000:]}"
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.1)
    raise AssertionError(f"not ready:\n{log.read_text()[-2000:]}")


def port_of(system: System, worker: str) -> str:
    """The port of one of our workers."""
    return system.workers[worker].url.rsplit(":", 1)[1]


@pytest.fixture(scope="module")
def sglang_router(workers: System, commands: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of SGLang's router, which takes our prefill worker's own port for its bootstrap port."""
    prefill, decode = workers.workers["prefill-0"].url, workers.workers["decode-0"].url
    port, metrics = free_ports(2)
    command: list[str | Path] = [
        *(commands / "sglang-router", "launch", "--host", "127.0.0.1", "--port", str(port)),
        *("--pd-disaggregation", "--prefill", prefill, port_of(workers, "prefill-0"), "--decode", decode),
        *("--policy", "round_robin", "--prometheus-port", str(metrics), "--prometheus-host", "127.0.0.1"),
    ]
    with started(command, port, tmp_path_factory.mktemp("sglang") / "router.log") as url:
        yield url


@pytest.fixture(scope="module")
def vllm_router(workers: System, commands: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of vLLM's router."""
    prefill, decode = workers.workers["prefill-0"].url, workers.workers["decode-0"].url
    port, metrics = free_ports(2)
    command: list[str | Path] = [
        *(commands / "vllm-router", "--host", "127.0.0.1", "--port", str(port)),
        *("--vllm-pd-disaggregation", "--prefill", prefill, "--decode", decode),
        *("--policy", "round_robin", "--prometheus-port", str(metrics), "--prometheus-host", "127.0.0.1"),
    ]
    with started(command, port, tmp_path_factory.mktemp("vllm") / "router.log") as url:
        yield url
