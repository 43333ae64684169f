"""What of prefill attention on CUDA needs no GPU."""

import os
from pathlib import Path

import pytest

from twostroke.engine.cuda_prefill import keep_compiled

NAMES = [f"{name}_CACHE_{what}" for name in ("FLASH_ATTENTION_CUTE_DSL", "QUACK") for what in ("ENABLED", "DIR")]


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is as before, at the end
        monkeypatch.delenv(name)


def test_what_is_compiled_stays_in_a_folder_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled()
    ours = tmp_path / "twostroke"
    assert ours.is_dir()
    assert [os.environ[name] for name in NAMES] == ["1", str(ours / "flash-attention"), "1", str(ours / "quack")]


def test_without_such_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above all not in the packages' own place."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled()
    assert [os.environ.get(name) for name in NAMES] == ["0", None, "0", None]


def test_who_has_said_where_is_not_overruled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("QUACK_CACHE_DIR", "/elsewhere")
    keep_compiled()
    assert os.environ["QUACK_CACHE_DIR"] == "/elsewhere"
