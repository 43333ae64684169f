"""What can be compared: each scheme is a command line of ``twostroke up``, and of what must run beside it.

Whether a scheme can run here is asked of the command line itself, so a scheme may name what is still to come.
"""

import shlex
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from twostroke.errors import StartupError

Understand = Callable[[Sequence[str]], Mapping[str, object]]  # what a command line means; StartupError if nothing


class Scheme(Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of ``up``. ``{scratch}`` stands for an empty directory that is removed afterwards, ``{port}`` for a
    free port of this machine, the same in ``up`` and ``beside``.
    """

    up: str
    about: str = ""
    beside: tuple[str, ...] = ()  # other command lines, started first: "store --port {port}"
    gpus: int = 0  # how many it needs

    def arguments(self, scratch: str, port: int) -> list[str]:
        """Its part of the command line of ``up``."""
        return [part.format(scratch=scratch, port=port) for part in shlex.split(self.up)]

    def companions(self, scratch: str, port: int) -> list[list[str]]:
        """The command lines of what runs beside it."""
        return [[part.format(scratch=scratch, port=port) for part in shlex.split(line)] for line in self.beside]


SCHEMES: dict[str, Scheme] = {
    "single": Scheme("--colocated 1", "one worker that does both, with all cores"),
    "colocated": Scheme("--colocated 2", "two workers that each do both: as many as pd has"),
    "cpu-offload": Scheme("--colocated 2 --store host:1GiB", "colocated, with a tier in host memory"),
    "pd": Scheme("--prefill 1 --decode 1", "prefill and decode apart, KV over a direct link while prefill computes"),
    "pd-serial": Scheme("--prefill 1 --decode 1 --schedule serial", "pd, where decode is asked once prefill is done"),
    "pd-service": Scheme(
        "--prefill 1 --decode 1 --link store --store service:127.0.0.1:{port}",
        "pd, KV through a cache service",
        beside=("store --memory 1GiB --port {port}",),
    ),
    "pd-disk": Scheme("--prefill 1 --decode 1 --link store --store dir:{scratch}", "pd, KV through a shared directory"),
    "pd-tiered": Scheme(
        "--prefill 1 --decode 1 --store host:512MiB,dir:{scratch}", "pd, over host memory and a shared directory"
    ),
}


def read_schemes(file: Path) -> dict[str, Scheme]:
    """Schemes of a TOML file: a table for each, with the fields of ``Scheme``.

    Raises:
        StartupError: it cannot be read, or a scheme is none.
    """
    try:
        return msgspec.convert(tomllib.loads(file.read_text()), dict[str, Scheme])
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise StartupError(f"{file}: {error}") from error


def select(names: Sequence[str], known: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The schemes of these names, in this order.

    Raises:
        StartupError: one is unknown or named twice, or a name would not do as a file's.
    """
    for name in names:
        if name not in known:
            raise StartupError(f"there is no scheme {name!r}; there are {', '.join(known)}")
        if names.count(name) > 1:
            raise StartupError(f"the scheme {name!r} is named twice")
        if not name.replace("-", "").replace("_", "").isalnum():
            raise StartupError(f"{name!r} is no name for a scheme: letters, digits, - and _ are")
    return {name: known[name] for name in names}
