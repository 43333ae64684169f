"""The verbs of ``twostroke kv``, which look into tiers. What they need is imported when one is chosen."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from twostroke.config import parse_size

app = App(
    name="kv",
    help="Look at, pin, check and clean the KV blocks of tiers.",
    help_epilogue="WHERE is a PATH, as in --store disk:PATH:SIZE or dir:PATH; the http://HOST:PORT of a running "
    "worker, for all of its tiers; or the HOST:PORT of a running cache service. What runs wants its TWOSTROKE_SECRET. "
    "Files that a running worker or service owns (disk) can be looked at by PATH, and changed only through it.",
)
Where = Annotated[str, Parameter(help="PATH, http://HOST:PORT of a worker, or HOST:PORT of a cache service.")]
Keys = Annotated[str, Parameter(help="As `twostroke kv ls` shows them.")]
All = Annotated[bool, Parameter(help="Every block that is there now.")]
Prompt = Annotated[Path | None, Parameter(help="A file with the text that prompts begin with; for a running worker.")]
Salt = Annotated[str, Parameter(help="The cache_salt of the requests that use the prompt.")]


@app.command
def stats(where: Where, /) -> int:
    """What is there: blocks and bytes of each layout."""
    from twostroke import kvs

    return kvs.stats(where)


@app.command
def ls(where: Where, /, *, limit: int = 50) -> int:
    """List blocks, the youngest first.

    Parameters
    ----------
    limit
        Most blocks to list; of what runs, at most 500.
    """
    from twostroke import kvs

    return kvs.ls(where, limit)


@app.command
def verify(where: Where, /) -> int:
    """Read every block and check it. The exit code is 1 if any is damaged. What runs sets that aside at once.

    In files nothing is changed.
    """
    from twostroke import kvs

    return kvs.verify(where)


@app.command
def gc(where: Where, /, *, keep: str | None = None) -> int:
    """Remove what is damaged or unfinished.

    Parameters
    ----------
    keep
        In shared directories also the least recently used blocks, until each layout takes no more than this.
    """
    from twostroke import kvs

    return kvs.gc(where, None if keep is None else parse_size(keep))


@app.command
def clear(where: Where, /, *, fingerprint: str | None = None) -> int:
    """Remove every block, pinned ones too. The exit code is 1 if some could not be.

    Parameters
    ----------
    fingerprint
        In files: only those of this layout.
    """
    from twostroke import kvs

    return kvs.clear(where, fingerprint)


@app.command
def pin(where: Where, /, *keys: Keys, all: All = False, prompt: Prompt = None, salt: Salt = "") -> int:
    """Never evict these blocks; where blocks outlive a restart, so do pins. They count to the tier's budget."""
    from twostroke import kvs

    return kvs.pin(where, keys, every=all, prompt=prompt, salt=salt, pinned=True)


@app.command
def unpin(where: Where, /, *keys: Keys, all: All = False, prompt: Prompt = None, salt: Salt = "") -> int:
    """Let blocks be evicted again."""
    from twostroke import kvs

    return kvs.pin(where, keys, every=all, prompt=prompt, salt=salt, pinned=False)
