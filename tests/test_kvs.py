"""``twostroke kv`` over what tiers have left."""

import asyncio
from pathlib import Path

import pytest

from tests.store.blocks import BYTES, FINGERPRINT, Given, Taken, keys
from tests.store.test_faults import MANY, make
from twostroke import cli
from twostroke.store.tier import Tier


async def _fill(path: Path) -> None:
    for name in ("disk", "dir"):
        tier = make(name, path)
        await tier.open()
        await tier.put(MANY, Given(MANY))
        await tier.close()


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What a disk and a directory tier have left in one place."""
    asyncio.run(_fill(tmp_path))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """What a verb prints."""
    assert cli.run(["kv", *arguments]) == code
    return capsys.readouterr().out


def damage(left: Path) -> None:
    """One block of each tier."""
    file = next(left.glob(f"*/??/{MANY[3].hex()}"))
    raw = bytearray(file.read_bytes())
    raw[4100] ^= 1
    file.write_bytes(raw)
    (segment,) = left.glob("*/000000.segment")
    raw = bytearray(segment.read_bytes())
    slots = int.from_bytes(raw[12:16], "little")
    raw[4096 + -(-slots * 128 // 4096) * 4096] ^= 1
    segment.write_bytes(raw)


def test_stats_and_ls(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, 0, "stats", str(left))
    assert shown.count(FINGERPRINT) == 2
    assert shown.count(" 40 ") == 2
    listed = said(capsys, 0, "ls", str(left), "--limit", "7")
    assert listed.count(f"{BYTES:,}") == 7
    assert any(key.hex() in listed for key in MANY)


def test_verify_and_gc(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "80 blocks are good, 0 damaged" in said(capsys, 0, "verify", str(left))
    damage(left)
    shown = said(capsys, 1, "verify", str(left))
    assert "78 blocks are good, 2 damaged" in shown
    assert MANY[3].hex() in shown
    assert "removed 2 damaged" in said(capsys, 0, "gc", str(left))
    assert "78 blocks are good, 0 damaged" in said(capsys, 0, "verify", str(left))


def test_gc_keeps_what_was_used_last(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "evicted 30" in said(capsys, 0, "gc", str(left), "--keep", str(10 * 8192))
    assert len(list(left.glob("*/??/*"))) == 10


def test_what_a_worker_owns_is_left_alone(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tier: Tier = make("disk", left)

    async def use() -> int:
        await tier.open()
        shown = await asyncio.to_thread(said, capsys, 1, "clear", str(left))
        assert "a worker uses it" in shown
        assert "cleared 1 of 2" in shown
        got = await tier.get(MANY, Taken())
        await tier.close()
        return got

    assert asyncio.run(use()) == len(MANY)
    assert "cleared 1 of 1" in said(capsys, 0, "clear", str(left))
    assert list(left.iterdir()) == []


def test_clear_one_layout(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cleared 0 of 0" in said(capsys, 0, "clear", str(left), "--fingerprint", "0" * 32)
    assert "80 blocks are good" in said(capsys, 0, "verify", str(left))
    assert keys(0)[0] == MANY[0]


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, 0, "stats", str(tmp_path))
    assert cli.run(["kv", "stats", str(tmp_path / "none")]) == 2
    assert "no directory" in capsys.readouterr().err
