"""What ``up`` made up opens its router to the same user's commands, and to nobody else."""

import os
from pathlib import Path

import pytest

from twostroke.lent import borrow, lend, secret_of


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "twostroke"


def test_lent_until_the_end_and_private(directory: Path) -> None:
    old = os.umask(0)
    try:
        with lend(8000, "s3cret") as possible:
            assert possible
            assert secret_of("http://127.0.0.1:8000") == secret_of("http://localhost:8000") == "s3cret"
            assert secret_of("http://127.0.0.1:8001") == secret_of("http://10.0.0.1:8000") == ""
            assert directory.stat().st_mode & 0o777 == 0o700
            assert [file.stat().st_mode & 0o777 for file in directory.iterdir()] == [0o600]
    finally:
        os.umask(old)
    assert list(directory.iterdir()) == []


def test_what_was_left_behind_is_replaced_and_what_is_anothers_stays() -> None:
    killed = lend(8000, "old")
    killed.__enter__()
    with lend(8000, "new"):
        assert borrow(8000) == "new"
        killed.__exit__(None, None, None)
        assert borrow(8000) == "new"
    assert borrow(8000) == ""


def test_a_file_that_others_could_have_written_or_read_is_not_believed(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    path = directory / "8000.secret"
    path.write_text("s3cret")
    path.chmod(0o644)
    assert borrow(8000) == ""
    path.unlink()
    other = directory / "other"
    other.write_text("s3cret")
    other.chmod(0o600)
    path.symlink_to(other)
    assert borrow(8000) == ""


def test_without_a_place_for_it_everything_else_goes_on(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)
    with lend(8000, "s3cret") as possible:
        assert not possible
    assert borrow(8000) == ""
