"""``twostroke bench run`` as a person uses it, over real processes: one dies, Ctrl-C, and it goes on where it was."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.e2e.system import descendants
from tests.e2e.test_up import read_until


def bench(model: Path, output: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "twostroke", "bench", "run", str(model), "--output", str(output)),
            *("--schemes", "single", "--input-lens", "20,40,60", "--num-prompts", "6", "--request-rate", "3"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
    )


def files(output: Path) -> list[str]:
    return sorted(file.name for file in (output / "runs").iterdir())


def test_a_worker_dies_then_ctrl_c_then_the_rest(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output, temporary = tiny_model("LlamaForCausalLM"), tmp_path / "o", tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))

    def left() -> list[str]:
        return [name for folder in (temporary, "/dev/shm") for name in os.listdir(folder) if "twostroke" in name]

    process = bench(model, output)
    try:
        read_until(process, "single.pd.20.rate-3.0: TTFT")
        children = psutil.Process(process.pid).children(recursive=True)
        next(child for child in children if "serve" in child.cmdline()).kill()  # in the midst of the second run
        rest = read_until(process, "single.pd.60.rate-3.0: TTFT")
        assert "colocated-0 was killed by SIGKILL" in rest
        process.communicate(timeout=60)
        assert process.returncode == 1, "a run is missing"
    finally:
        process.kill()
    assert files(output) == [
        "single.pd.20.rate-3.0.json", "single.pd.40.rate-3.0.failed-0.json", "single.pd.60.rate-3.0.json"
    ]  # fmt: skip
    first = (output / "runs" / "single.pd.20.rate-3.0.json").read_bytes()
    assert len(json.loads(first)["twostroke"]["timelines"]) == 6

    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = bench(model, output)
        try:
            read_until(process, "single: starting")
            process.send_signal(number)
            said, _ = process.communicate(timeout=60)
            assert process.returncode == status
            assert "Traceback" not in said
        finally:
            process.kill()
        assert descendants() == []
        assert left() == []

    process = bench(model, output)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "1 runs to do, 2 are there already" in said
    assert "single.pd.40.rate-3.0.json" in files(output)
    assert (output / "runs" / "single.pd.20.rate-3.0.json").read_bytes() == first
    assert (output / "report.html").stat().st_size > 1 << 20
    assert left() == []
