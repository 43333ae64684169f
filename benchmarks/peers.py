"""Environments of other systems, each of its own: from PyPI by pip, and from Debian by apt-get, without root.

``python -m benchmarks.peers`` makes all of them and says what cannot be had here. LMCache takes minutes.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import venv
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from twostroke.config import cache_dir

PACKAGES = {
    "lmcache": ("lmcache==0.5.6", "torch==2.13.0"),  # a range would bring in a torch with several GB of CUDA libraries
    "mooncake": ("mooncake-transfer-engine-non-cuda==0.3.13.post1", "numpy==2.4.6"),
    "valkey": ("redis==8.1.0", "hiredis==3.4.2", "numpy==2.4.6"),
}
_LIBRARIES = {"mooncake": ("libibverbs.so.1",)}
_DEBIAN = {"mooncake": ("libibverbs1", "libnl-3-200", "libnl-route-3-200")}  # which has them
_SERVERS = (("valkey-server", "valkey-tools"), ("redis-server", "redis-tools"))  # program, where its executable lies
_SECONDS = 900.0


class Unavailable(Exception):
    """It cannot be had here. ``str`` says why."""


@dataclass(frozen=True)
class Environment:
    """Where a peer is installed."""

    path: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Its site-packages."""
        return next(self.path.glob("lib/python*/site-packages"))

    @property
    def libraries(self) -> list[Path]:
        """Shared libraries from Debian, each after those that it needs."""
        found = sorted(self.path.glob("debian/**/lib*.so.?*"), key=lambda path: ("ibverbs" in path.name, path.name))
        return [path for path in found if not path.is_symlink()]

    def variables(self) -> dict[str, str]:
        """The environment variables that its programs need."""
        folders = dict.fromkeys(str(path.parent) for path in self.libraries)
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(folders), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}

    def enter(self) -> None:
        """Have this process find its packages, after our own."""
        for library in self.libraries:
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        sys.path.append(str(self.packages))


def find(name: str, folder: Path | None = None) -> Environment | None:
    """An environment that was made earlier."""
    path = _path(name, folder)
    return Environment(path) if (path / "complete").exists() else None


def prepare(name: str, folder: Path | None = None) -> Environment:
    """The environment, made now unless it was before.

    Raises:
        Unavailable: it cannot be made.
    """
    if found := find(name, folder):
        return found
    path = _path(name, folder)
    print(f"making an environment for {name}: {' '.join(PACKAGES[name])} in {path}", flush=True)
    shutil.rmtree(path, ignore_errors=True)
    venv.create(path, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(path / "bin" / "python"), "install", "--quiet"]
    _run([*pip, "--disable-pip-version-check", *PACKAGES[name]], name)
    if not all(map(_loads, _LIBRARIES.get(name, ()))):
        _debian(path / "debian", _DEBIAN[name])
    (path / "complete").touch()
    return Environment(path)


def server(folder: Path | None = None) -> Path:
    """Debian's Valkey server, or Redis where there is no Valkey.

    Raises:
        Unavailable: neither is installed, and neither can be fetched.
    """
    path = (folder or cache_dir() / "peers") / "server"
    for program, _ in _SERVERS:
        if found := shutil.which(program) or next(iter(path.glob(f"usr/bin/{program}")), None):
            return Path(found)
    why = ""
    for program, package in _SERVERS:
        try:
            _debian(path, (package,))
        except Unavailable as error:
            why = str(error)
            continue
        if found := next(iter(path.glob(f"usr/bin/{program}")), None):
            return found
    raise Unavailable(f"no Valkey server: {why}")


def _path(name: str, folder: Path | None) -> Path:
    what = sha256(" ".join((sys.version, *PACKAGES[name])).encode()).hexdigest()[:8]
    return (folder or cache_dir() / "peers") / f"{name}-{what}"


def _loads(library: str) -> bool:
    with suppress(OSError):
        ctypes.CDLL(library)
        return True
    return False


def _debian(path: Path, packages: tuple[str, ...]) -> None:
    """Unpack packages under ``path``, so that nothing is installed and no root is needed."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise Unavailable(f"{' '.join(packages)}: this is no Debian")
    path.mkdir(parents=True, exist_ok=True)
    _run(["apt-get", "download", *packages], packages[0], path)
    for file in path.glob("*.deb"):
        _run(["dpkg", "-x", str(file), str(path)], packages[0])
        file.unlink()


def _run(command: list[str], what: str, folder: Path | None = None) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False, cwd=folder)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{what}: {command[0]} took more than {_SECONDS:.0f} s") from error
    if done.returncode:
        raise Unavailable(f"{what}: {' '.join(command[:4])} …: {done.stderr.strip()[-300:]}")


def main() -> None:
    """Make all environments."""
    missing = []
    for name in PACKAGES:
        try:
            print(f"{name}: {prepare(name).path}")
        except Unavailable as error:
            missing.append(str(error))
    try:
        print(f"server: {server()}")
    except Unavailable as error:
        missing.append(str(error))
    if missing:
        sys.exit("\n".join(missing))


if __name__ == "__main__":
    main()
