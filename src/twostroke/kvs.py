"""``twostroke kv``: what tiers have left in files, shown, checked and cleaned."""

import heapq
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from twostroke.store import inspection
from twostroke.store.inspection import Folder, SharedFolder

_console = Console(highlight=False, soft_wrap=True)
_WHOLE = Column("layout", no_wrap=True, min_width=32)


def stats(path: Path) -> int:
    """Blocks and bytes of each layout under a path."""
    table = Table(_WHOLE, "tier", "blocks", "MiB in use", "MiB of files", "youngest", "oldest", "in use", box=None)
    for folder in inspection.folders(path):
        entries = [entry for entry in folder.entries() if entry.error is None]
        times = [entry.written for entry in entries]
        table.add_row(
            folder.fingerprint,
            folder.kind,
            f"{len(entries):,}",
            _mib(sum(entry.length for entry in entries)),
            _mib(folder.size()),
            _age(max(times, default=None)),
            _age(min(times, default=None)),
            "yes" if folder.owned else "",
        )
    _console.print(table)
    return 0


def ls(path: Path, limit: int) -> int:
    """The youngest blocks."""
    found = ((entry, folder) for folder in inspection.folders(path) for entry in folder.entries())
    for entry, folder in heapq.nlargest(limit, found, key=lambda one: one[0].written):
        about = entry.error or f"{entry.length:,} bytes, {_age(entry.written)} old"
        _console.print(f"{entry.key.hex()}  {folder.kind:4}  layout {folder.fingerprint}  {about}", markup=False)
    return 0


def verify(path: Path) -> int:
    """1 if any block is damaged."""
    good = bad = 0
    for folder in inspection.folders(path):
        for entry in folder.entries(verified=True):
            good += entry.error is None
            if entry.error is not None:
                bad += 1
                _console.print(f"{folder.path} {entry.key.hex()}: {entry.error}", markup=False)
    _console.print(f"{good:,} blocks are good, {bad:,} damaged")
    return 1 if bad else 0


def gc(path: Path, keep: int | None) -> int:
    """Remove what is of no use."""
    found = inspection.folders(path)
    _skip([folder for folder in found if folder.owned])
    removed = sum(folder.collect() for folder in found)
    evicted = 0
    if keep is not None:
        evicted = sum(folder.evict(keep) for folder in found if isinstance(folder, SharedFolder))
    _console.print(f"removed {removed:,} damaged or unfinished blocks, evicted {evicted:,}")
    return 0


def clear(path: Path, fingerprint: str | None) -> int:
    """1 if something is in use."""
    found = [folder for folder in inspection.folders(path) if fingerprint in (None, folder.fingerprint)]
    kept = [folder for folder in found if not inspection.clear(folder)]
    _skip(kept)
    _console.print(f"cleared {len(found) - len(kept)} of {len(found)} layouts")
    return 1 if kept else 0


def _skip(folders: Sequence[Folder]) -> None:
    for folder in folders:
        _console.print(f"{folder.path} is left alone: a worker uses it", markup=False)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _age(written: float | None) -> str:
    if written is None:
        return ""
    seconds = max(time.time() - written, 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
