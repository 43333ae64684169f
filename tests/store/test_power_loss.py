"""The power fails at any point: what is on the disk then is opened, and not one block is wrong."""

import random
from pathlib import Path

import pytest

from tests.store.blocks import BYTES, FINGERPRINT, Given, Taken, keys
from tests.store.power import Done, recorded, replay, tree
from twostroke.store.directory import DirectoryTier
from twostroke.store.disk import disk_tier
from twostroke.store.slots import SlotTier

MANY = keys(*range(12))
LATE = MANY[-3:]
Files = SlotTier | DirectoryTier


def make(name: str, path: Path) -> Files:
    """A tier for fewer than ``MANY``, so that slots and names are used again."""
    if name == "disk":
        return disk_tier(path, BYTES, FINGERPRINT, 96 << 10, "w")
    return DirectoryTier(path, BYTES, FINGERPRINT, 8 * 8192)


async def life(name: str, path: Path) -> list[Done]:
    """What a tier does to its files: writing, evicting, pinning, removing, restarting."""
    with recorded(path) as recorder:
        for turn in range(2):
            tier = make(name, path)
            await tier.open()
            for first in range(0, len(MANY), 4):
                some = MANY[first : first + 4]
                await tier.put(some, Given(some))
                await tier.get(some, Taken())
                if first == 4:
                    await tier.pin(some[:1], not turn)
                    await tier.drop(some[1:2])
            await tier.close()
    return recorder.log


async def check(name: str, path: Path) -> int:
    """How many blocks are there; every one of them right. It works as if nothing had been."""
    tier = make(name, path)
    await tier.open()
    here = [one for one, there in zip(MANY, await tier.contains(MANY), strict=True) if there]
    found = Taken()
    await tier.get(here, found)
    assert found.right(here)
    for one in LATE:  # what is there by name and damaged is found out when it is read
        await tier.get([one], Taken())
    await tier.put(LATE, Given(LATE))
    target = Taken()
    assert await tier.get(LATE, target) == len(LATE)
    assert target.right(LATE)
    usage = tier.usage()
    assert usage.used <= usage.capacity
    await tier.close()
    return len(found.blocks)


@pytest.mark.parametrize("name", ["disk", "dir"])
async def test_the_power_fails_at_any_point(tmp_path: Path, name: str) -> None:
    """Cut after each change, in order; and with writes lost and the last one torn."""
    (tmp_path / "real").mkdir()
    log = await life(name, tmp_path / "real")
    assert len(log) > 50
    replay(log, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "real"), "the log is all that was done"
    found = {"in order": 0, "failing": 0}
    for cut in range(len(log) + 1):
        rng = random.Random(cut)
        replay(log[:cut], tmp_path / f"{cut}")
        found["in order"] += await check(name, tmp_path / f"{cut}")
        replay(log[:cut], tmp_path / f"{cut}-failing", rng)
        found["failing"] += await check(name, tmp_path / f"{cut}-failing")
    assert found["in order"] > found["failing"] > 0, "some blocks are lost, and some are not"
