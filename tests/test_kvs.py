"""``twostroke kv`` over what tiers have left."""

import asyncio
from pathlib import Path

import pytest

from tests.store.blocks import BYTES, FINGERPRINT, Given, Taken, keys
from tests.store.test_faults import MANY, make
from tests.store.test_service import client, serving
from twostroke import cli
from twostroke.config import DiskTier, StoreConfig
from twostroke.store.host import HostTier
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


def test_pins(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = [key.hex() for key in MANY[:3]]
    assert "pinned 6 blocks" in said(capsys, 0, "pin", str(left), *some)
    listed = said(capsys, 0, "ls", str(left), "--limit", "100").splitlines()
    assert sorted(line.split()[0] for line in listed if line.endswith(", pinned")) == sorted(2 * some)
    assert "evicted 37" in said(capsys, 0, "gc", str(left), "--keep", "1")
    assert "unpinned 6 blocks" in said(capsys, 0, "unpin", str(left), *some)
    assert "evicted 3" in said(capsys, 0, "gc", str(left), "--keep", "1")
    assert "pinned 0 blocks" in said(capsys, 1, "pin", str(left), keys(99)[0].hex())
    assert "pinned 40 blocks" in said(capsys, 0, "pin", str(left), "--all")
    assert " 40 " in said(capsys, 0, "stats", str(left))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pin", "{}"], "which blocks"),
        (["pin", "{}", "--all", "aa"], "which blocks"),
        (["pin", "{}", "aa"], "not the key"),
        (["pin", "{}", "--prompt", "{}/x"], "through a running worker"),
        (["pin", "127.0.0.1:1", "--prompt", "/nowhere"], "no text"),
        (["stats", "127.0.0.1:1"], "refused"),
        (["stats", "http://127.0.0.1:1"], "no worker answers"),
        (["gc", "127.0.0.1:1", "--keep", "1"], "for a PATH"),
        (["clear", "127.0.0.1:1", "--fingerprint", "aa"], "for a PATH"),
    ],
)
def test_orders_that_make_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert cli.run(["kv", *(part.format(tmp_path) for part in arguments)]) == 2
    assert words in capsys.readouterr().err.replace("\n", " ")


async def test_a_running_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory and its disk, while it serves; with its secret alone."""
    monkeypatch.setenv("TWOSTROKE_SECRET", "s")
    config = StoreConfig(memory=64 << 10, disk=DiskTier(tmp_path / "kv", 2 << 20), ttl=3600)
    async with serving(config) as (server, port), client(port) as tier:
        where = f"service:127.0.0.1:{port}"

        async def kv(code: int, *arguments: str) -> str:
            return await asyncio.to_thread(said, capsys, code, *arguments)

        assert await kv(0, "stats", where) == await kv(0, "stats", where[8:])
        await tier.put(MANY, Given(MANY))
        (shop,) = [task.result() for task in server._shops.values()]
        await shop.store.settle()
        shown = await kv(0, "stats", where)
        assert shown.count(FINGERPRINT) == 2
        assert "disk" in shown
        some = [key.hex() for key in MANY[:4]]
        assert "pinned 8 blocks" in await kv(0, "pin", where, *some)
        listed = (await kv(0, "ls", where, "--limit", "500")).splitlines()
        assert len(listed) == 80
        assert sorted(line.split()[0] for line in listed if line.endswith(", pinned")) == sorted(2 * some)
        shop._ttl = 0.0
        await shop.expire()
        assert list(await tier.contains(MANY)) == [True] * 4 + [False] * 36, "a pin is longer than a lifetime"
        assert await tier.get(MANY, Taken()) == 4
        assert "8 blocks are good, 0 damaged" in await kv(0, "verify", where)
        assert isinstance(shop._tiers[0], HostTier)
        shop._tiers[0].arena.slots[shop._tiers[0]._shelf.slots()[MANY[2]], 5] ^= 1
        assert "7 blocks are good, 1 damaged" in await kv(1, "verify", where)
        assert "removed 0" in await kv(0, "gc", where)
        assert f"{tmp_path / 'kv'}" in await kv(1, "clear", str(tmp_path / "kv")), "it is the service's own"
        assert "cleared 7 blocks" in await kv(0, "clear", where)
        assert await tier.get(MANY, Taken()) == 0
        monkeypatch.setenv("TWOSTROKE_SECRET", "another")
        assert cli.run(["kv", "stats", where]) == 2
        assert "secret" in capsys.readouterr().err


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, 0, "stats", str(tmp_path))
    assert cli.run(["kv", "stats", str(tmp_path / "none")]) == 2
    assert "no directory" in capsys.readouterr().err
