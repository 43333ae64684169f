"""``twostroke kv``: what tiers hold, shown, pinned, checked and cleaned: in files, in a running worker or a service."""

import heapq
import re
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Column, Table

from twostroke import operate
from twostroke.config import check_urls, cluster_secret
from twostroke.errors import StartupError
from twostroke.messages import Manage, Managed, ManagedTier, encode
from twostroke.store import inspection
from twostroke.store.inspection import Folder, SharedFolder

_console = Console(highlight=False, soft_wrap=True)
_SERVICE = re.compile(r"(?:service:)?(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_SECONDS = 600.0  # in which all blocks of a store are read


class Running:
    """The store of a running worker, or a cache service."""

    def __init__(self, where: str) -> None:
        self._where = where

    def do(self, order: Manage) -> list[ManagedTier]:
        """Have it done. ``StartupError`` if it is refused, or nobody answers."""
        if service := _SERVICE.fullmatch(self._where):
            return self._ask_service(service[1].strip("[]"), int(service[2]), order)
        check_urls([self._where])
        reply = operate.ask(self._where.rstrip("/"), "/internal/store", encode(order), who="worker", seconds=_SECONDS)
        return self._checked(msgspec.json.decode(reply, type=Managed).tiers)

    def _ask_service(self, host: str, port: int, order: Manage) -> list[ManagedTier]:
        from twostroke.store.service import manage
        from twostroke.store.tier import TierFailed

        if order.prompt is not None:
            raise StartupError("a cache service knows no tokenizer: pin prompts through a worker, http://HOST:PORT")
        try:
            return self._checked(manage(host, port, cluster_secret(), order).tiers)
        except (TierFailed, OSError) as error:
            raise StartupError(f"{self._where}: {error}") from error

    @staticmethod
    def _checked(tiers: list[ManagedTier]) -> list[ManagedTier]:
        for tier in tiers:
            if tier.problem:
                _console.print(f"{tier.report.name}: {tier.problem}", markup=False)
        return tiers


def running(where: str) -> Running | None:
    """Whoever runs there; None for a path."""
    if where.startswith(("http://", "https://", "service:")):
        return Running(where)
    return Running(where) if _SERVICE.fullmatch(where) and not Path(where).exists() else None


def stats(where: str) -> int:
    """Blocks and bytes of each layout."""
    if there := running(where):
        table = Table(_layout(), "tier", "blocks", "pinned", "MiB", "at most", "hits", "out of service", box=None)
        for one in there.do(Manage("stats")):
            report = one.report
            table.add_row(
                one.layout,
                report.name,
                f"{report.blocks:,}",
                f"{report.pinned:,}",
                _mib(report.used),
                _mib(report.capacity) if report.capacity else "",
                f"{report.hits:,}",
                report.reason,
            )
    else:
        table = Table(_layout(), "tier", "blocks", "pinned", "MiB", "files", "youngest", "oldest", "used")
        table.box = None
        for folder in inspection.folders(Path(where)):
            _count(table, folder)
    _console.print(table)
    return 0


def _layout() -> Column:
    """The one that is not cut."""
    return Column("layout", no_wrap=True, min_width=32)


def _count(table: Table, folder: Folder) -> None:
    entries = [entry for entry in folder.entries() if entry.error is None]
    times = [entry.written or 0.0 for entry in entries]
    table.add_row(
        folder.fingerprint,
        folder.kind,
        f"{len(entries):,}",
        f"{sum(entry.pinned for entry in entries):,}",
        _mib(sum(entry.length for entry in entries)),
        _mib(folder.size()),
        _age(max(times, default=None)),
        _age(min(times, default=None)),
        "yes" if folder.owned else "",
    )


def ls(where: str, limit: int) -> int:
    """The youngest blocks."""
    if there := running(where):
        for one in there.do(Manage("ls", limit=limit)):
            for block in one.blocks:
                about = f"{block.length:,} bytes" + (f", {_age(block.written)} old" if block.written else "")
                _list(block.key, one.report.name, one.layout, about, pinned=block.pinned)
        return 0
    found = ((entry, folder) for folder in inspection.folders(Path(where)) for entry in folder.entries())
    for entry, folder in heapq.nlargest(limit, found, key=lambda one: one[0].written or 0.0):
        about = entry.error or f"{entry.length:,} bytes, {_age(entry.written)} old"
        _list(entry.key.hex(), folder.kind, folder.fingerprint, about, pinned=entry.pinned)
    return 0


def _list(key: str, tier: str, layout: str, about: str, *, pinned: bool) -> None:
    _console.print(f"{key}  {tier:4}  layout {layout}  {about}{', pinned' if pinned else ''}", markup=False)


def verify(where: str) -> int:
    """1 if any block is damaged."""
    good = bad = 0
    if there := running(where):
        for one in there.do(Manage("verify")):
            good, bad = good + one.good, bad + one.damaged
        _console.print(f"{good:,} blocks are good, {bad:,} damaged" + (" and set aside" if bad else ""))
        return 1 if bad else 0
    for folder in inspection.folders(Path(where)):
        for entry in folder.entries(verified=True):
            good += entry.error is None
            if entry.error is not None:
                bad += 1
                _console.print(f"{folder.path} {entry.key.hex()}: {entry.error}", markup=False)
    _console.print(f"{good:,} blocks are good, {bad:,} damaged")
    return 1 if bad else 0


def gc(where: str, keep: int | None) -> int:
    """Remove what is of no use."""
    evicted = 0
    if there := running(where):
        if keep is not None:
            raise StartupError("--keep is for a PATH: what runs keeps to its own budget")
        removed = sum(one.changed for one in there.do(Manage("gc")))
    else:
        found = inspection.folders(Path(where))
        _skip([folder for folder in found if folder.owned])
        removed = sum(folder.collect() for folder in found)
        if keep is not None:
            evicted = sum(folder.evict(keep) for folder in found if isinstance(folder, SharedFolder))
    _console.print(f"removed {removed:,} damaged or unfinished blocks, evicted {evicted:,}")
    return 0


def clear(where: str, fingerprint: str | None) -> int:
    """1 if something is in use."""
    if there := running(where):
        if fingerprint is not None:
            raise StartupError("--fingerprint is for a PATH")
        done = there.do(Manage("clear"))
        _console.print(f"cleared {sum(one.changed for one in done):,} blocks")
        return 1 if any(one.problem for one in done) else 0
    found = [folder for folder in inspection.folders(Path(where)) if fingerprint in (None, folder.fingerprint)]
    kept = [folder for folder in found if not inspection.clear(folder)]
    _skip(kept)
    _console.print(f"cleared {len(found) - len(kept)} of {len(found)} layouts")
    return 1 if kept else 0


def pin(where: str, keys: Sequence[str], *, every: bool, prompt: Path | None, salt: str, pinned: bool) -> int:
    """1 if nothing was there to be pinned, or unpinned."""
    if bool(keys) + every + (prompt is not None) != 1:
        raise StartupError("say which blocks: KEYs as `twostroke kv ls` shows them, --all, or --prompt FILE")
    if wrong := [key for key in keys if inspection.key_of(key) is None]:
        raise StartupError(f"{wrong[0]!r} is not the key of a block")
    if there := running(where):
        text = None if prompt is None else _text(prompt)
        action, listed = ("pin" if pinned else "unpin"), (list(keys) or None)
        order = msgspec.convert({"action": action, "keys": listed, "prompt": text, "salt": salt}, Manage)
        count = sum(one.changed for one in there.do(order))
    elif prompt is not None:
        raise StartupError("a PATH knows no tokenizer: pin prompts through a running worker, http://HOST:PORT")
    else:
        found = inspection.folders(Path(where))
        _skip([folder for folder in found if folder.owned])
        wanted = None if every else {bytes.fromhex(key) for key in keys}
        count = sum(folder.pin(wanted, pinned) for folder in found)
    _console.print(f"{'pinned' if pinned else 'unpinned'} {count:,} blocks")
    return 0 if count else 1


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{file} is no text: {error}") from error


def _skip(folders: Sequence[Folder]) -> None:
    for folder in folders:
        _console.print(
            f"{folder.path} is left alone: a worker uses it. Ask that: http://HOST:PORT instead of the path",
            markup=False,
        )


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
