"""Starts and stops the real servers that benchmarks measure."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

START_SECONDS = 180.0


@contextmanager
def running(module: Sequence[str], ready: str | int) -> Iterator[None]:
    """``python -m <module>`` until the block ends, from when the URL ``ready`` answers with 200, or that port takes
    connections.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *module], stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (answers(ready) if isinstance(ready, str) else listens(ready)):
            assert process.poll() is None, f"{module} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{module} is not ready after {START_SECONDS:.0f} s"
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def free_port() -> int:
    """A port on loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def get(url: str) -> object:
    """The JSON behind a URL."""
    with urllib.request.urlopen(url, timeout=10) as reply:
        return json.load(reply)


def answers(url: str) -> bool:
    """Whether a URL answers with 200."""
    with suppress(urllib.error.URLError, ConnectionError, TimeoutError), urllib.request.urlopen(url, timeout=2):
        return True
    return False


def listens(port: int) -> bool:
    """Whether somebody takes connections at this port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
