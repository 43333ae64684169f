"""A result folder: ``metadata.json``, and ``runs/`` with a file for each run. Nothing in it is ever overwritten."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from twostroke.bench import results
from twostroke.bench.plan import Settings
from twostroke.bench.results import Point, Result
from twostroke.bench.schemes import Scheme
from twostroke.errors import StartupError

METADATA = "metadata.json"


class Metadata(Struct):
    """What all runs of a folder have in common."""

    settings: Settings
    schemes: dict[str, Scheme]
    model: dict[str, Any]
    machine: dict[str, Any]
    skipped: dict[str, str]  # what could not run, and why
    version: int = results.VERSION


class Folder:
    """Holds the results of one benchmark; an interrupted one goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._runs = path / "runs"

    def open(self, metadata: Metadata) -> None:
        """Begin, or go on: then the settings must be the same; schemes may be added.

        Raises:
            StartupError: there is another benchmark in it, or something else, or it cannot be written.
        """
        file = self.path / METADATA
        if file.exists():
            before = read_metadata(self.path)
            if before.settings != metadata.settings:
                raise StartupError(
                    f"{self.path} holds a benchmark with other settings ({_difference(before, metadata)})"
                )
            for name, scheme in before.schemes.items():
                if metadata.schemes.setdefault(name, scheme) != scheme:
                    raise StartupError(f"{self.path} holds results of another scheme {name!r}")
            metadata.machine = {**metadata.machine, "commits": _commits(before.machine, metadata.machine)}
            metadata.skipped = {**before.skipped, **metadata.skipped}
        elif self.path.exists() and any(self.path.iterdir()):
            raise StartupError(f"{self.path} is not empty and holds no benchmark; name a new folder")
        try:
            self._runs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(f"cannot make {self._runs}: {error.strerror}") from error
        results.write(file, msgspec.json.format(msgspec.json.encode(plain(metadata)), indent=1) + b"\n")

    def read(self, point: Point) -> Result | None:
        """The result of a run, if it is there and counts."""
        file = self._file(point)
        return results.from_json(file.read_bytes(), file.name) if file.exists() else None

    def write(self, result: Result) -> None:
        """Keep a run. One that does not count is kept under a number of its own, and will be tried again.

        Raises:
            StartupError: the disk is full, or the file is there.
        """
        file = self._file(result.point)
        if result.error:
            tries = len(list(self._runs.glob(f"{result.point.name}.failed-*.json")))
            file = file.with_name(f"{result.point.name}.failed-{tries}.json")
        if file.exists():
            raise StartupError(f"{file} is there already")
        results.write(file, results.to_json(result))

    def _file(self, point: Point) -> Path:
        return self._runs / f"{point.name}.json"


def plain(metadata: Metadata) -> Any:  # noqa: ANN401 - any JSON
    """Metadata as JSON takes it."""
    return results.jsonable(msgspec.to_builtins(metadata))


def read_metadata(path: Path) -> Metadata:
    """Metadata of a result folder.

    Raises:
        StartupError: it is damaged, or of another version.
    """
    file = path / METADATA
    try:
        metadata = msgspec.json.decode(file.read_bytes(), type=Metadata, strict=False)
    except (OSError, msgspec.MsgspecError) as error:
        raise StartupError(f"{file} cannot be read: {error}") from error
    if metadata.version != results.VERSION:
        raise StartupError(f"{file} is of version {metadata.version}, this is {results.VERSION}")
    return metadata


def _difference(before: Metadata, now: Metadata) -> str:
    old, new = msgspec.to_builtins(before.settings), msgspec.to_builtins(now.settings)
    return ", ".join(f"{name}: {old[name]} there, {new[name]} asked for" for name in new if old[name] != new[name])


def _commits(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Of every time that the benchmark was gone on with."""
    known = list(before.get("commits", [before.get("commit", "")]))
    return known if now.get("commit") in known else [*known, str(now.get("commit"))]
