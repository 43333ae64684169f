"""Servers that tests of the store need."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from benchmarks import peers

from tests.e2e.ports import free_ports
from twostroke import config


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[int]:
    """The port of a real server of its own, with 4 MiB more than it takes for itself."""
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        pytest.skip("no valkey-server or redis-server is installed")
    (port,) = free_ports(1)
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    command += ["--maxmemory", "6mb", "--maxmemory-policy", "allkeys-lru"]
    with _running(command, port):
        yield port


class Master:
    """A real Mooncake master."""

    def __init__(self) -> None:
        self.port, self._metrics = free_ports(2)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """From when it listens."""
        import mooncake.store

        command = [str(Path(mooncake.store.__file__).with_name("mooncake_master")), "--rpc_address=127.0.0.1"]
        command += [f"--rpc_port={self.port}", f"--metrics_port={self._metrics}", "--metrics_host=127.0.0.1"]
        command += ["--logtostderr=1", "--minloglevel=3", "--default_kv_lease_ttl=1000"]
        environment = peers.find("mooncake")
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment.variables() if environment is not None else None,
        )
        _listening(self.port)

    def kill(self) -> None:
        """At once."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="package")
def mooncake_package() -> None:
    """Mooncake can be imported. Skipped where it is not installed."""
    environment = peers.find("mooncake")
    if find_spec("mooncake") is None and environment is not None:
        environment.enter()
    config.quieten_mooncake(2.0)
    try:
        import mooncake.store  # noqa: F401
    except ImportError as error:
        pytest.skip(f"{error}; python -m benchmarks.peers makes an environment that has Mooncake")


@pytest.fixture
def mooncake(mooncake_package: None) -> Iterator[Master]:
    """A master that knows of nobody's memory yet."""
    master = Master()
    master.start()
    try:
        yield master
    finally:
        master.kill()


@contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            _listening(port)
            yield
        finally:
            process.kill()


def _listening(port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise TimeoutError(f"nobody listens on {port}")
