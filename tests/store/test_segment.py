"""One segment file. What the disk tier makes of several is in test_tiers.py and test_faults.py."""

import os
from pathlib import Path

import pytest

from tests.store.blocks import FINGERPRINT, keys
from twostroke.kv.direct import PAGE, aligned
from twostroke.store.format import Sealed, verify
from twostroke.store.segment import Segment

LAYOUT = bytes.fromhex(FINGERPRINT)


@pytest.mark.parametrize("size", [2 * PAGE, PAGE - 8])
def test_blocks_come_back_wherever_they_were_in_memory(tmp_path: Path, size: int) -> None:
    memory = aligned(size + PAGE)
    memory[:] = os.urandom(len(memory))
    payloads = [memory[first : first + size] for first in (0, 8, PAGE)]
    directory = os.open(tmp_path, os.O_RDONLY)
    segment = Segment.create(directory, "000000.segment", 3, size, LAYOUT)
    for slot, (one, payload) in enumerate(zip(keys(1, 2, 3), payloads, strict=True)):
        segment.label(slot, one, segment.payload(slot).load(payload))
        segment.payload(slot).flush()
    segment.commit(range(3))
    segment.close()
    again = Segment.open(directory, "000000.segment", size, LAYOUT)
    for slot, (one, payload) in enumerate(zip(keys(1, 2, 3), payloads, strict=True)):
        assert verify(Sealed(again.payload(slot).read(), again.digest(slot, one))).payload == payload
    again.close()
    os.close(directory)
