"""``twostroke up`` as a person uses it: start, ask, Ctrl-C; and the starts that cannot work."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from tests.e2e.ports import free_ports
from tests.e2e.system import Process, left_shared, shared_files
from twostroke import cli

TINY = "LlamaForCausalLM"


def twostroke(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "twostroke", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def read_until(process: "subprocess.Popen[str]", word: str) -> str:
    """What it prints, up to the line with ``word``."""
    assert process.stdout
    printed = ""
    for line in process.stdout:
        printed += line
        if word in line:
            return printed
    raise AssertionError(f"it ended without saying {word!r}:\n{printed}")


@pytest.mark.parametrize(
    ("end", "workers"),
    [(signal.SIGINT, ("prefill-0", "decode-0", "colocated-0")), (signal.SIGKILL, ("colocated-0",))],
    ids=["Ctrl-C", "kill -9"],
)
def test_start_ask_stop(
    tiny_model: Callable[[str], Path],
    end: signal.Signals,
    workers: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("XDG_RUNTIME_DIR", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    model = tiny_model(TINY)
    before = shared_files()
    (port,) = free_ports(1)
    counts = [arg for worker in workers for arg in (f"--{worker.removesuffix('-0')}", "1")]
    process = twostroke("up", str(model), "--port", str(port), *counts)
    try:
        printed = read_until(process, "curl")
        assert ("link: shm" in printed) == (len(workers) > 1)
        for worker in workers:
            assert worker in printed
        url = f"http://127.0.0.1:{port}/v1/completions"
        body = json.dumps({"prompt": "hello", "max_tokens": 5, "temperature": 0}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=30) as reply:
            assert json.load(reply)["usage"]["completion_tokens"] >= 1
        told = ["workers", "role", "colocated-0", "decode", "--url", f"http://127.0.0.1:{port}"]
        assert cli.run(told) == 0, "the same user needs no secret"
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == len(workers) + 1
        process.send_signal(end)
        assert process.wait(30) == (0 if end is signal.SIGINT else -signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == [], "children end with their parent, however it ends"
    finally:
        process.kill()
        process.communicate()
    assert os.listdir(tmp_path / "TMPDIR") == []
    assert left_shared(before) == set()
    left = [file.name for file in (tmp_path / "XDG_RUNTIME_DIR/twostroke").iterdir()]
    assert left == ([] if end is signal.SIGINT else [f"{port}.secret"])
    socket.create_server(("127.0.0.1", port)).close()  # free again


def test_a_dead_worker_ends_the_system_and_is_named(tiny_model: Callable[[str], Path]) -> None:
    (port,) = free_ports(1)
    process = twostroke("up", str(tiny_model(TINY)), "--port", str(port), "--prefill", "0", "--decode", "0",
                        "--colocated", "1")  # fmt: skip
    try:
        read_until(process, "curl")
        victim = next(c for c in psutil.Process(process.pid).children() if "serve" in c.cmdline())
        victim.kill()
        rest, _ = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "colocated-0 was killed by SIGKILL" in rest
    finally:
        process.kill()


def refused(*arguments: str, port: int | None = None) -> str:
    """What a start that cannot work says: one clear line, exit status 2, no traceback."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        process = Process("refused", port or free_ports(1)[0], arguments, log, {})
        try:
            assert process.ended(60), "it is still there"
        finally:
            process.kill()
        printed = log.read_text()
        assert process.status == 2, printed
        assert "Traceback" not in printed
        return printed


def test_missing_model(tmp_path: Path) -> None:
    assert "no-such-model" in refused("serve", str(tmp_path / "no-such-model"))


def test_truncated_weights(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    for file in tiny_model(TINY).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refused("serve", str(tmp_path))


def test_not_a_causal_model(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    for file in tiny_model(TINY).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "architectures": ["BertForSequenceClassification"], "model_type": "bert"})
    )
    assert "causal" in refused("serve", str(tmp_path))


def test_port_in_use(tiny_model: Callable[[str], Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for verb in ("serve", "up"):
            assert f"port {port}" in refused(verb, str(tiny_model(TINY)), port=port)


def test_too_little_memory_for_a_block(tiny_model: Callable[[str], Path]) -> None:
    printed = refused("serve", str(tiny_model(TINY)), "--kv-memory", "100")
    assert "does not hold one block" in printed


def test_more_memory_than_there_is(tiny_model: Callable[[str], Path]) -> None:
    assert "does not fit" in refused("serve", str(tiny_model(TINY)), "--kv-memory", "4000GiB")


def test_a_context_that_the_pool_cannot_hold(tiny_model: Callable[[str], Path]) -> None:
    printed = refused("serve", str(tiny_model(TINY)), "--kv-memory", "32KiB", "--max-model-len", "512")
    assert "needs --kv-memory" in printed
