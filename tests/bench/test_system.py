"""A scheme's processes: they start together, and nothing is left of them."""

import os
import tempfile
from pathlib import Path

import pytest

from tests.e2e.ports import free_ports
from tests.e2e.system import descendants
from twostroke.bench.schemes import Scheme
from twostroke.bench.system import SystemDied, running


async def test_a_scheme_that_cannot_start_says_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lines: list[str] = []
    scheme = Scheme("--colocated 1")

    def line(scratch: str, port: int) -> list[str]:
        assert Path(scratch).parent == tmp_path
        return ["up", str(tmp_path / "no-model"), *scheme.arguments(scratch, port)]

    with pytest.raises(SystemDied, match=r"up ended with exit code 2\n.*no such model"):
        async with running(scheme, line, lines.append):
            raise AssertionError("it did not start")
    assert any("no such model" in text for text in lines)
    assert descendants() == []
    assert os.listdir(tmp_path) == []


async def test_what_runs_beside_it_ends_with_it() -> None:
    """A router without its worker runs for ever; the scheme beside it fails at once."""
    (port,) = free_ports(1)
    scheme = Scheme("--colocated 0 --prefill 1", beside=(f"router --colocated http://127.0.0.1:9 --port {port}",))
    with pytest.raises(SystemDied, match="up ended with exit code 2"):
        async with running(scheme, lambda scratch, p: ["up", *scheme.arguments(scratch, p)], lambda _: None):
            raise AssertionError("it did not start")
    assert descendants() == []
