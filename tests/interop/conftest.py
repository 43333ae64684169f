"""Our workers behind the real routers of other systems."""

import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.ports import free_ports
from tests.e2e.system import System, launch
from tests.interop.environment import Unreachable, prepare
from twostroke.messages import SECRET_HEADER

SECRET = "known to workers, and to no router"
ROLES = {"prefill-0": "prefill", "decode-0": "decode"}
ROUTERS = {  # command, and the path that says that it is ready
    "sglang-router": (["sglang-router", "launch", "--pd-disaggregation"], "/readiness"),
    "mini-lb": (["sglang-router", "launch", "--pd-disaggregation", "--mini-lb"], "/health"),
    "vllm-router": (["vllm-router", "--vllm-pd-disaggregation"], "/readiness"),
}
_START_SECONDS = 60.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slow")


@pytest.fixture(scope="package")
def workers(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Iterator[System]:
    """A prefill and a decode worker that share a secret. Their prefill takes several chunks."""
    model, logs = tiny_model("Qwen3ForCausalLM"), tmp_path_factory.mktemp("logs")
    engine = ["--dtype", "float32", "--chunk-size", "64", "--kv-memory", "64MiB", "--served-name", "tiny"]
    engine += ["--bootstrap-hosts", "127.0.0.1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWOSTROKE_SECRET", SECRET)
        with launch(logs, ROLES, engine=engine, model=model) as system:
            yield system


@pytest.fixture
def alone(workers: System) -> str:
    """The URL of a worker that serves requests alone, without anybody's blocks."""
    return workers.workers["prefill-0"].url


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that nobody has told the secret."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield session


@pytest.fixture
async def insider() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that knows the secret."""
    async with aiohttp.ClientSession(headers={SECRET_HEADER: SECRET}) as session:
        yield session


@pytest.fixture(scope="package", params=ROUTERS)
def router(request: pytest.FixtureRequest, workers: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a foreign router before our prefill and decode worker."""
    try:
        commands = prepare()
    except Unreachable as error:
        pytest.skip(str(error))
    command, ready = ROUTERS[request.param]
    prefill, decode = workers.workers["prefill-0"].url, workers.workers["decode-0"].url
    port, metrics = map(str, free_ports(2))
    bootstrap = [] if request.param == "vllm-router" else [prefill.rsplit(":", 1)[1]]
    arguments = [
        *("--prefill", prefill, *bootstrap, "--decode", decode, "--host", "127.0.0.1", "--port", port),
        *("--policy", "random", "--prometheus-host", "127.0.0.1", "--prometheus-port", metrics),
    ]
    log = tmp_path_factory.mktemp(request.param) / "router.log"
    with started([str(commands / command[0]), *command[1:], *arguments], f"http://127.0.0.1:{port}", ready, log) as url:
        yield url


@contextmanager
def started(command: Sequence[str], url: str, ready: str, log: Path) -> Iterator[str]:
    """Run a foreign router, from when it is ready."""
    offline = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=offline) as process:
        try:
            _wait_ready(process, url + ready, log)
            yield url
        finally:
            process.kill()  # it would take its time, and nothing of it is of interest here


def _wait_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"it ended:\n{log.read_text()[-2000:]}"
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.1)
    raise AssertionError(f"it is not ready:\n{log.read_text()[-2000:]}")
