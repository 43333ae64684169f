# ruff: noqa: ASYNC221, ASYNC240 - nothing else runs on these tests' event loops
"""Tiers and what goes wrong with them, for real: full and read-only disks, damaged files, killed writers."""

import asyncio
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.blocks import BYTES, FINGERPRINT, OTHER, Given, Taken, key, keys
from twostroke.store import directory, disk, slots
from twostroke.store.directory import DirectoryTier
from twostroke.store.disk import disk_tier
from twostroke.store.format import HEADER_BYTES, Header, pack
from twostroke.store.segment import Segment
from twostroke.store.tier import Tier, TierFailed

MANY = keys(*range(40))
NAMES = ["disk", "dir"]
MiB = 1 << 20


def make(name: str, path: Path, size: int = 2 * MiB) -> Tier:
    """A tier in files."""
    if name == "disk":
        return disk_tier(path, BYTES, FINGERPRINT, size, "w")
    return DirectoryTier(path, BYTES, FINGERPRINT, size)


async def filled(name: str, path: Path) -> None:
    """Leave ``MANY`` behind in a tier that is closed."""
    tier = make(name, path)
    await tier.open()
    assert await tier.put(MANY, Given(MANY)) == len(MANY)
    await tier.close()


async def survey(tier: Tier) -> int:
    """How many of ``MANY`` can be had; none of them is ever wrong."""
    here = [one for one, there in zip(MANY, await tier.contains(MANY), strict=True) if there]
    target = Taken()
    await tier.get(here, target)
    assert target.right(here)
    return len(target.blocks)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("only root may mount")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


# -- the file system -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
async def test_a_full_disk(tmpfs: Path, name: str) -> None:
    """The tier goes on with what fits."""
    tier = make(name, tmpfs, 64 * MiB)
    await tier.open()
    for first in range(0, 400, 20):
        some = keys(*range(first, first + 20))
        await tier.put(some, Given(some))
        assert not list(tmpfs.glob("*/tmp/*")), "nothing unfinished is left"
    blocks = tier.usage().blocks
    assert 10 < blocks < 200
    found = [one for one in keys(*range(400)) if (await tier.contains([one]))[0]]
    assert len(found) == blocks
    target = Taken()
    assert await tier.get(found, target) == blocks
    assert target.right(found)
    await tier.close()


@pytest.mark.parametrize("name", NAMES)
async def test_a_disk_that_is_full_from_the_start_and_then_is_not(
    tmpfs: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(disk, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(directory, "PAUSE_SECONDS", 0.0)
    (tmpfs / "other").write_bytes(bytes(980 * 1024))
    tier = make(name, tmpfs)
    await tier.open()
    assert await tier.put(MANY, Given(MANY)) < len(MANY)
    (tmpfs / "other").unlink()
    assert await tier.put(MANY, Given(MANY)) == len(MANY)
    assert await survey(tier) == len(MANY)
    await tier.close()


async def test_a_directory_that_becomes_read_only(tmpfs: Path) -> None:
    """What is there can be read; nothing is written, and nothing raises."""
    await filled("dir", tmpfs)
    tier = make("dir", tmpfs)
    await tier.open()
    subprocess.run(["mount", "-o", "remount,ro", tmpfs], check=True)
    assert await survey(tier) == len(MANY)
    more = keys(100, 101)
    assert await tier.put(more, Given(more)) == 0
    assert not any(await tier.contains(more))
    await tier.close()


async def test_a_directory_that_is_read_only_from_the_start(tmpfs: Path) -> None:
    """A node that may only read finds what others have written; of another model's there is no tier for it."""
    await filled("dir", tmpfs)
    subprocess.run(["mount", "-o", "remount,ro", tmpfs], check=True)
    tier = make("dir", tmpfs)
    await tier.open()
    assert await survey(tier) == len(MANY)
    more = keys(100, 101)
    assert await tier.put(more, Given(more)) == 0
    await tier.close()
    other = DirectoryTier(tmpfs, BYTES, OTHER)
    with pytest.raises(TierFailed, match="ead-only"):
        await other.open()
    await other.close()


async def test_a_disk_that_is_read_only_at_start(tmpfs: Path) -> None:
    await filled("disk", tmpfs)
    subprocess.run(["mount", "-o", "remount,ro", tmpfs], check=True)
    tier = make("disk", tmpfs)
    with pytest.raises(TierFailed, match="ead-only"):
        await tier.open()
    subprocess.run(["mount", "-o", "remount,rw", tmpfs], check=True)
    await tier.open()
    assert await survey(tier) == len(MANY)
    await tier.close()


@pytest.mark.parametrize("name", NAMES)
async def test_files_that_are_removed_under_us(tmp_path: Path, name: str) -> None:
    """The next write fails; opened again, the tier is empty and works."""
    path = tmp_path / "there"
    tier = make(name, path)
    await tier.open()
    await tier.put(MANY[:20], Given(MANY[:20]))
    shutil.rmtree(path)
    assert await survey(tier) in (0, 20)
    with pytest.raises(TierFailed):
        await tier.put(MANY, Given(MANY))
    await tier.open()
    assert tier.usage().blocks == 0
    assert await tier.put(MANY, Given(MANY)) == len(MANY)
    assert await survey(tier) == len(MANY)
    await tier.close()


async def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    for name in NAMES:
        tier = make(name, tmp_path / "file")
        with pytest.raises(TierFailed):
            await tier.open()
        with pytest.raises(TierFailed):
            await tier.open()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("disk", "preadv"),
        ("disk", "pwritev"),
        ("dir", "preadv"),
        ("dir", "pwritev"),
        ("dir", "rename"),
        ("dir", "open"),
    ],
)
async def test_an_io_error(tmp_path: Path, name: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a dying disk gives them: the tier fails, nothing wrong comes of it, and opened again it works."""
    await filled(name, tmp_path)
    tier = make(name, tmp_path)
    await tier.open()
    more, work, calls = keys(*range(100, 120)), getattr(os, call), iter(range(10**9))

    def fail(*arguments: object, **more: object) -> object:
        if next(calls) % 3 == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return work(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        target = Taken()
        with pytest.raises(TierFailed, match="nput/output error"):
            await (tier.put(more, Given(more)) if call in ("pwritev", "rename") else tier.get(MANY, target))
        assert target.right(MANY)
        assert not list(tmp_path.glob("*/tmp/*")), "nothing unfinished is left"
    await tier.open()
    assert await survey(tier) == len(MANY)
    assert await tier.put(more, Given(more)) == len(more)
    target = Taken()
    assert await tier.get(more, target) == len(more)
    assert target.right(more)
    await tier.close()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("days", [-1, 1])
async def test_a_clock_that_is_moved_by_a_day(
    tmp_path: Path, name: str, days: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is used, and before a restart: what is there stays, and there is room for what is new."""
    await filled(name, tmp_path)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + days * 86400)
    tier = make(name, tmp_path, MiB)
    await tier.open()
    assert await survey(tier) == len(MANY)
    for first in range(100, 300, 20):
        some = keys(*range(first, first + 20))
        assert await tier.put(some, Given(some)) == len(some)
        usage = tier.usage()
        assert usage.used <= usage.capacity
    target = Taken()
    assert await tier.get(some, target) == len(some), "the newest are there"
    assert target.right(some)
    await tier.close()


async def test_two_nodes_that_evict_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find the directory too full at once, over and over; each file goes once, and nobody minds."""
    monkeypatch.setattr(directory, "_SCAN_SECONDS", 0.0)
    nodes = [make("dir", tmp_path, 30 * 8192) for _ in range(2)]
    for node in nodes:
        await node.open()

    async def use(node: Tier, first: int) -> None:
        some = keys(*range(first, first + 10))
        assert await node.put(some, Given(some)) > 0
        target = Taken()
        await node.get(some, target)
        assert target.right(some)

    for turn in range(8):
        await asyncio.gather(*(use(node, 100 * turn + 5 * index) for index, node in enumerate(nodes)))
        assert len(list(tmp_path.glob("*/??/*"))) <= 30 + 10, "at most what the other was writing"
    for node in nodes:
        assert node.usage().damaged == 0
        assert node.usage().evictions > 0
        await node.close()
    assert not list(tmp_path.glob("*/tmp/*"))


# -- damaged files ---------------------------------------------------------------------------------------------------


async def test_every_flipped_bit_of_a_block_file(tmp_path: Path) -> None:
    """Of header and payload: one bit in each of many places."""
    await filled("dir", tmp_path)
    tier = make("dir", tmp_path)
    await tier.open()
    file = next(tmp_path.glob(f"*/??/{MANY[0].hex()}"))
    good = file.read_bytes()
    places = [*range(96), *range(4096, 4096 + BYTES, 37)]
    for place in places:
        file.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        target = Taken()
        assert await tier.get(MANY[:2], target) == 0
        assert 0 not in target.blocks
        assert not file.exists(), "it is never looked at again"
    assert tier.usage().damaged == len(places)
    bad = list(tmp_path.glob("*/bad/*"))
    assert 0 < len(bad) <= 16
    file.write_bytes(good)
    assert await tier.get(MANY[:2], Taken()) == 2
    await tier.close()


async def test_every_flipped_bit_of_a_segment(tmp_path: Path) -> None:
    await filled("disk", tmp_path)
    (path,) = list(tmp_path.glob("*/000000.segment"))
    good = path.read_bytes()
    slots = int.from_bytes(good[12:16], "little")
    data = 4096 + -(-slots * HEADER_BYTES // 4096) * 4096
    places = [*range(40), *range(4096, 4096 + 3 * HEADER_BYTES, 5), *range(data, data + 3 * 4096, 301)]
    for place in places:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        tier = make("disk", tmp_path)
        await tier.open()
        assert await survey(tier) >= 0
        await tier.close()
        path.write_bytes(good)


@pytest.mark.parametrize("name", NAMES)
async def test_files_that_are_cut_off(tmp_path: Path, name: str) -> None:
    await filled(name, tmp_path)
    pattern = "*/*.segment" if name == "disk" else "*/??/*"
    for number, file in enumerate(sorted(tmp_path.glob(pattern))):
        with file.open("r+b") as out:
            out.truncate([0, 100, 4096, 5000, file.stat().st_size - 1][number % 5])
    tier = make(name, tmp_path)
    await tier.open()
    assert await survey(tier) < len(MANY)
    await tier.put(MANY, Given(MANY))
    assert await survey(tier) == len(MANY)
    await tier.close()


async def test_a_segment_that_is_cut_off_while_it_is_used(tmp_path: Path) -> None:
    """The tier fails, and opened again goes on without it."""
    tier = make("disk", tmp_path)
    await tier.open()
    await tier.put(MANY, Given(MANY))
    for file in tmp_path.glob("*/*.segment"):
        os.truncate(file, 4096)
    with pytest.raises(TierFailed, match="cut off"):
        await survey(tier)
    await tier.open()
    assert tier.usage().blocks == 0
    await tier.put(MANY, Given(MANY))
    assert await survey(tier) == len(MANY)
    await tier.close()


async def test_blocks_that_are_swapped(tmp_path: Path) -> None:
    """Whole and well, but under each other's names."""
    await filled("dir", tmp_path)
    one, other = (next(tmp_path.glob(f"*/??/{MANY[i].hex()}")) for i in (0, 1))
    good = one.read_bytes(), other.read_bytes()
    one.write_bytes(good[1])
    other.write_bytes(good[0])
    tier = make("dir", tmp_path)
    await tier.open()
    assert await survey(tier) == len(MANY) - 2
    assert tier.usage().damaged == 2
    await tier.close()


async def test_headers_that_are_swapped(tmp_path: Path) -> None:
    await filled("disk", tmp_path)
    (path,) = list(tmp_path.glob("*/000000.segment"))
    raw = bytearray(path.read_bytes())
    first, second = raw[4096 : 4096 + HEADER_BYTES], raw[4096 + HEADER_BYTES : 4096 + 2 * HEADER_BYTES]
    raw[4096 : 4096 + 2 * HEADER_BYTES] = second + first
    path.write_bytes(raw)
    tier = make("disk", tmp_path)
    await tier.open()
    assert await survey(tier) == len(MANY) - 2
    assert tier.usage().damaged == 2
    await tier.put(MANY, Given(MANY))
    assert await survey(tier) == len(MANY)
    await tier.close()


@pytest.mark.parametrize("name", NAMES)
async def test_blocks_of_another_version_or_layout(tmp_path: Path, name: str) -> None:
    await filled(name, tmp_path)
    pattern = "*/*.segment" if name == "disk" else "*/??/*"
    for number, file in enumerate(sorted(tmp_path.glob(pattern))):
        raw = bytearray(file.read_bytes())
        if number % 2 == 0:
            raw[8] = 77  # the version
        elif name == "dir":
            raw[:HEADER_BYTES] = pack(Header(key(number), bytes.fromhex(OTHER), BYTES, 0, bytes(16)))
        else:
            raw[24:40] = bytes.fromhex(OTHER)
        file.write_bytes(raw)
    tier = make(name, tmp_path)
    await tier.open()
    assert await survey(tier) == 0
    await tier.put(MANY, Given(MANY))
    assert await survey(tier) == len(MANY)
    await tier.close()


@pytest.mark.parametrize("name", NAMES)
async def test_foreign_files_are_left_alone(tmp_path: Path, name: str) -> None:
    await filled(name, tmp_path)
    folder = next(tmp_path.iterdir())
    for path in (tmp_path / "notes.txt", folder / "README", tmp_path / "sub" / "x"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    tier = make(name, tmp_path)
    await tier.open()
    assert await survey(tier) == len(MANY)
    assert (folder / "README").read_text() == (tmp_path / "sub" / "x").read_text() == "mine"
    await tier.close()


# -- processes and budgets -------------------------------------------------------------------------------------------

WRITER = """
import asyncio, sys
from pathlib import Path
from tests.store.blocks import Given, keys
from tests.store.test_faults import make

async def main():
    tier = make(sys.argv[1], Path(sys.argv[2]))
    await tier.open()
    print("open", flush=True)
    for first in range(10**9):
        some = keys(*range(3 * first % 200, 3 * first % 200 + 20))
        await tier.put(some, Given(some))

asyncio.run(main())
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_writer_that_is_killed_at_any_point(tmp_path: Path, name: str) -> None:
    """Again and again, in the same files; what can be read afterwards is right, and the lock is gone."""

    async def look(turn: int) -> None:
        tier = make(name, tmp_path)
        await tier.open()
        assert turn == 0 or tier.usage().blocks > 0
        await survey(tier)
        await tier.close()
        folders = [path for path in tmp_path.iterdir() if path.is_dir()]
        assert len(folders) == 1, "the same folder is taken over"

    for turn in range(4):
        command = [sys.executable, "-c", WRITER, name, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"open\n"
            time.sleep(0.05 + 0.037 * turn)
            process.send_signal(signal.SIGKILL)
        asyncio.run(look(turn))


async def test_what_other_models_left_makes_room(tmp_path: Path) -> None:
    """Folders that nobody owns count against the budget; a running worker's do not."""
    old = disk_tier(tmp_path, BYTES, OTHER, MiB, "w")
    await old.open()
    more = keys(*range(100))
    await old.put(more, Given(more))
    tier = make("disk", tmp_path, MiB)
    await tier.open()
    await tier.put(more, Given(more))
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(OTHER)]) == 1
    await tier.close()
    await old.close()
    tier = make("disk", tmp_path, MiB)
    await tier.open()
    await tier.put(more, Given(more))
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.segment")) <= MiB
    assert tier.usage().blocks == 100
    await tier.close()


async def test_a_budget_that_was_larger(tmp_path: Path) -> None:
    await filled("disk", tmp_path)
    small = make("disk", tmp_path, MiB // 8)
    await small.open()
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.segment")) <= MiB // 8
    assert 0 < await survey(small) < len(MANY)
    await small.close()


def sparse(path: Path, blocks: int, block_bytes: int) -> None:
    """A segment with a good header for each slot, and nothing in the slots."""
    layout = bytes.fromhex(FINGERPRINT)
    folder = path / f"{FINGERPRINT}-w"
    folder.mkdir(parents=True)
    directory = os.open(folder, os.O_RDONLY)
    Segment.create(directory, "000000.segment", 1, block_bytes, layout).close()
    os.close(directory)
    with (folder / "000000.segment").open("r+b") as out:
        first = bytearray(out.read(4096))
        first[12:16] = blocks.to_bytes(4, "little")
        table = b"".join(pack(Header(key(i), layout, block_bytes, i, bytes(16))) for i in range(blocks))
        out.seek(0)
        out.write(bytes(first) + table)
        out.truncate(Segment.file_bytes(blocks, block_bytes))


async def test_100_000_blocks_are_found_again_at_once(tmp_path: Path) -> None:
    """37 GB of the embedded model's blocks, all but their headers sparse."""
    size = 368_640
    sparse(tmp_path, 100_000, size)
    tier = disk_tier(tmp_path, size, FINGERPRINT, 64 << 30, "w")
    await tier.open()
    assert tier.usage().blocks == 100_000
    assert all(await tier.contains(keys(*range(0, 100_000, 25))))
    assert await tier.get(keys(5), Taken()) == 0
    assert tier.usage().damaged == 1
    await tier.close()


async def test_nothing_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for name in NAMES:
        for _ in range(3):
            tier = make(name, tmp_path / name)
            await tier.open()
            await tier.put(MANY, Given(MANY))
            await survey(tier)
            await tier.open()
            await tier.close()
    assert len(os.listdir("/proc/self/fd")) <= before
