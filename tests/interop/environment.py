"""The environment of other systems' routers: ``python -m tests.interop.environment`` makes it, once, in some 15 s."""

import fcntl
import shutil
import subprocess
import sys
import venv
from hashlib import sha256
from pathlib import Path

from twostroke.config import cache_dir

_REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_SECONDS = 300.0


class Unreachable(Exception):
    """The package registry cannot be reached."""


def prepare() -> Path:
    """The directory of the routers' commands, which are installed now unless they were before.

    Raises:
        Unreachable: they were not, and there is no network.
        RuntimeError: pip fails otherwise, and says why.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = f"routers-{version}-{sha256(_REQUIREMENTS.read_bytes()).hexdigest()[:12]}"
    environment = cache_dir() / name
    environment.parent.mkdir(parents=True, exist_ok=True)
    with environment.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (environment / "complete").exists():
            _install(environment)
            (environment / "complete").touch()
    return environment / "bin"


def _install(environment: Path) -> None:
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install"]
    options = ["--quiet", "--disable-pip-version-check", "--no-compile", "--retries", "1", "-r", str(_REQUIREMENTS)]
    done = subprocess.run([*pip, *options], capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        if "connection broken" in done.stderr:
            raise Unreachable(
                f"the routers are not installed, and no registry is reached: {done.stderr.splitlines()[-1]}"
            )
        raise RuntimeError(f"{_REQUIREMENTS.name} cannot be installed: {done.stderr[-1000:]}")


if __name__ == "__main__":
    try:
        prepare()
    except (Unreachable, RuntimeError) as error:
        sys.exit(str(error))
