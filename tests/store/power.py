"""A log of everything that is done to files below a folder, and what a disk may look like when the power fails."""

import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SECTOR = 512  # bytes that a disk writes as a whole, or not at all


class Done(NamedTuple):
    """One change. Names are relative to the folder."""

    kind: str  # create, write, allocate, rename, unlink, mkdir, rmdir
    name: str
    offset: int = 0
    data: bytes = b""
    other: str = ""  # the new name


class Recorder:
    """Notes changes in their order, by whatever thread."""

    def __init__(self, root: Path) -> None:
        self.log: list[Done] = []
        self._root = str(root)
        self._lock = threading.Lock()

    def note(self, kind: str, path: str, offset: int = 0, data: bytes = b"", other: str = "") -> None:
        if path.startswith(self._root + "/"):
            self.log.append(Done(kind, self._within(path), offset, data, other and self._within(other)))

    def _within(self, path: str) -> str:
        return os.path.relpath(path, self._root)

    def around(self, work: Callable[..., Any], describe: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        """A call that is noted if it succeeds; no two at once, so that the log is the order in which they happened."""

        def call(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - as ``os`` has it
            with self._lock:
                described = describe(*arguments, **named)
                result = work(*arguments, **named)
                if described:
                    self.note(*described)
                return result

        return call


def _path(path: Any, dir_fd: int | None = None) -> str:  # noqa: ANN401
    return os.path.join(_named(dir_fd), os.fspath(path)) if dir_fd is not None else os.fspath(path)


def _named(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


@contextmanager
def recorded(root: Path) -> Iterator[Recorder]:
    """Record what this process does below ``root``."""
    recorder = Recorder(root)

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> tuple[Any, ...]:  # noqa: ANN401
        full = _path(path, dir_fd)
        assert not flags & os.O_TRUNC, "not modelled"
        return ("create", full) if flags & os.O_CREAT and not os.path.exists(full) else ()

    described: dict[str, Callable[..., tuple[Any, ...]]] = {
        "open": opened,
        "pwritev": lambda fd, buffers, at: ("write", _named(fd), at, b"".join(map(bytes, buffers))),
        "posix_fallocate": lambda fd, _at, size: ("allocate", _named(fd), size),
        "rename": lambda old, new: ("rename", _path(old), 0, b"", _path(new)),
        "unlink": lambda path, dir_fd=None: ("unlink", _path(path, dir_fd)),
        "mkdir": lambda path, mode=0o777: ("mkdir", _path(path)),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, describe in described.items():
            patch.setattr(os, name, recorder.around(getattr(os, name), describe))
        yield recorder


def replay(log: Sequence[Done], root: Path, rng: random.Random | None = None) -> None:
    """Do it all again in a new folder. With ``rng`` as the power fails at the end of it: nothing was synced, so any
    write may have been lost, a file may have grown or not, and of the last write some sectors are there.
    """
    root.mkdir()
    for index, done in enumerate(log):
        path = root / done.name
        match done.kind:
            case "mkdir":
                path.mkdir(exist_ok=True)
            case "create":
                path.touch()
            case "allocate":
                os.truncate(path, done.offset)
            case "rename":
                path.rename(root / done.other)
            case "unlink":
                path.unlink()
            case _:
                _write(path, done, rng, last=index == len(log) - 1)


def _write(path: Path, done: Done, rng: random.Random | None, *, last: bool) -> None:
    fate = "done" if rng is None else "torn" if last else rng.choice(["done", "done", "lost", "grown"])
    with path.open("r+b") as file:
        if fate == "grown":
            file.truncate(max(path.stat().st_size, done.offset + len(done.data)))
        elif fate != "lost":
            for at in range(0, len(done.data), SECTOR):
                if fate == "done" or (rng and rng.random() < 0.5):
                    file.seek(done.offset + at)
                    file.write(done.data[at : at + SECTOR])


def tree(root: Path) -> dict[str, bytes | None]:
    """Every file's bytes, by its name; None for a folder."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
