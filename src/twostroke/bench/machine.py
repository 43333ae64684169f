"""Where and with what something was measured."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from twostroke import __version__, config
from twostroke.bench.checks import Machine

_PACKAGES = ("torch", "transformers", "numpy", "aiohttp", "uvicorn")


def machine() -> Machine:
    """What there is to run schemes on."""
    return Machine(config.gpus(), psutil.virtual_memory().available)


def describe() -> dict[str, object]:
    """Hardware, versions, commit and date."""
    info = {}
    if (file := Path("/proc/cpuinfo")).exists():
        rows = (line.partition(":") for line in file.read_text().splitlines())
        info = {name.strip(): value.strip() for name, _, value in rows}
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": info.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "bf16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in info.get("flags", "").split()],
        "memory": psutil.virtual_memory().total,
        "gpus": _gpus(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {"twostroke": __version__, **{name: found for name in _PACKAGES if (found := _version(name))}},
        "commit": commit(),
    }


def commit() -> str:
    """Of the sources that run, if they are a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()  # noqa: S603
    except OSError:
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _gpus() -> list[str]:
    """Names of the GPUs, as the driver tells them."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
