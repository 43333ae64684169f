"""The secret that ``up`` made up, lent to the same user on the same machine: one file for each port of a router.

Nobody else can read it (0600 in a directory of 0700). A file that was left behind by ``kill -9`` opens nothing: its
secret died with its processes.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from twostroke.config import is_loopback, runtime_dir

_MAX = 4096  # bytes


@contextmanager
def lend(port: int, secret: str) -> Iterator[bool]:
    """Lend the secret of the router on this port until the end; whether that was possible."""
    try:
        path = _write(port, secret)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        if borrow(port) == secret:  # else somebody has taken the port, and lends their own
            with suppress(OSError):
                path.unlink()


def borrow(port: int) -> str:
    """The secret of the router on this port of this machine; empty if none is lent to us."""
    try:
        file = os.open(_path(port), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return ""
    with open(file, "rb") as opened:
        status = os.fstat(file)
        private = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
        return opened.read(_MAX).decode("ascii", "replace") if private else ""


def secret_of(url: str) -> str:
    """``borrow`` for the router at a URL: empty unless that is on this machine's loopback."""
    parts = urlsplit(url)
    return borrow(parts.port or 80) if parts.hostname and is_loopback(parts.hostname) else ""


def _path(port: int) -> Path:
    return runtime_dir() / f"{port}.secret"


def _write(port: int, secret: str) -> Path:
    path = _path(port)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    own = path.parent.stat()
    if own.st_uid != os.geteuid() or own.st_mode & 0o022:
        raise PermissionError(f"others can write into {path.parent}")
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.unlink(missing_ok=True)
    file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(file, "wb") as opened:
        opened.write(secret.encode())
    fresh.replace(path)  # at once, so that nobody reads half of it
    return path
