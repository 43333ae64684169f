"""A pool's memory, shared with real other processes."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from tests.e2e.system import left_shared, shared_files
from tests.peer_process import content, peer_process
from twostroke.errors import HandoverFailed, MemoryTooSmall
from twostroke.kv.memory import Area, PoolMemory, host_id, map_peer, started
from twostroke.messages import CudaMemory, MemoryFile, PoolAddress, encode

READER = """
import sys, msgspec
from twostroke.kv.memory import map_peer
from twostroke.messages import PoolAddress
slots = map_peer(msgspec.json.decode(sys.argv[1], type=PoolAddress))
print(slots.shape, slots.flags.writeable, bytes(slots[2]).hex())
sys.stdin.readline()
print(bytes(slots[2]).hex())
"""


def mapped() -> int:
    """How many pools this process maps."""
    gc.collect()  # tracebacks of errors can still hold a mapping
    return Path("/proc/self/maps").read_text().count("twostroke-pool")


def address_of(fd: int) -> PoolAddress:
    """A pool in one of our own files."""
    return PoolAddress(host_id(), os.getpid(), "peer", num_slots=2, block_bytes=8, memory=MemoryFile(fd))


def test_owner_sees_its_slots() -> None:
    memory = PoolMemory(3, 100, "me")
    memory.slots[1] = 7
    assert memory.slots.shape == (3, 100)
    assert memory.slots.dtype == np.uint8
    assert [int(slot.sum()) for slot in memory.slots] == [0, 700, 0]
    memory.close()


def test_another_process_reads_the_pool_as_it_changes() -> None:
    memory = PoolMemory(3, 8, "me")
    memory.slots[2] = range(8)
    command = [sys.executable, "-c", READER, encode(memory.address).decode()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == "(3, 8) False 0001020304050607\n"
        memory.slots[2] = 255
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "ffffffffffffffff\n"
    memory.close()


def test_a_peer_cannot_be_written() -> None:
    memory = PoolMemory(2, 8, "me")
    slots = map_peer(memory.address)
    with pytest.raises(ValueError, match="read-only"):
        slots[0] = 1
    memory.close()


def test_the_owner_killed_while_mapped_leaves_the_reader_unharmed_and_nothing_behind() -> None:
    before, files = mapped(), shared_files()
    with peer_process(4, 5000) as (process, address):
        slots = map_peer(address)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (slots == content(4, 5000)).all()
        with pytest.raises(HandoverFailed, match="cannot be mapped"):
            map_peer(address)
        assert mapped() == before + 1
    del slots
    assert mapped() == before
    assert left_shared(files) == set()


@pytest.mark.parametrize("instance", ["another", "pee", "peer2", ""])
def test_another_instance_is_refused(instance: str) -> None:
    """The pid was reused, or the worker started again."""
    memory = PoolMemory(2, 8, "peer")
    before = mapped()
    with pytest.raises(HandoverFailed, match="another instance"):
        map_peer(msgspec.structs.replace(memory.address, instance=instance))
    assert mapped() == before
    memory.close()


def test_gpu_memory_is_refused() -> None:
    memory = PoolMemory(2, 8, "peer")
    gpu = CudaMemory(device="GPU", handle="00" * 64, offset=0)
    with pytest.raises(HandoverFailed, match="is GPU memory, ours a memory file"):
        map_peer(msgspec.structs.replace(memory.address, memory=gpu))
    memory.close()


@pytest.mark.parametrize(
    "change",
    [
        {"num_slots": 3},  # more than there are
        {"block_bytes": 2**31 - 1, "num_slots": 2**31 - 1},
        {"memory": MemoryFile(2**31 - 1)},
        {"pid": 2**31 - 1},
        {"pid": 0},
    ],
)
def test_an_address_that_leads_nowhere_is_refused(change: dict[str, int | MemoryFile]) -> None:
    memory = PoolMemory(2, 4096, "peer")
    with pytest.raises(HandoverFailed, match="cannot be mapped"):
        map_peer(msgspec.structs.replace(memory.address, **change))
    memory.close()


def test_a_file_that_is_no_pool_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100_000))
    with (tmp_path / "file").open("rb") as file:
        address = address_of(file.fileno())
        with pytest.raises(HandoverFailed, match="another instance"):
            map_peer(address)


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    """Opening a named pipe to read blocks until somebody writes; a peer's word must not be able to do that to us."""
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    address = address_of(pipe)
    with pytest.raises(HandoverFailed, match="cannot be mapped"):
        map_peer(address)
    os.close(pipe)


def test_a_closed_pool_cannot_be_mapped() -> None:
    memory = PoolMemory(2, 8, "peer")
    memory.close()
    with pytest.raises(HandoverFailed):
        map_peer(memory.address)


def test_one_area_is_cut_into_other_slots() -> None:
    files = len(os.listdir("/proc/self/fd"))
    area = Area(100)
    before = PoolMemory(4, 25, "a longer name", area)
    after = PoolMemory(12, 8, "after", area)
    after.slots[11] = 7
    before.close()
    assert map_peer(after.address)[11].tolist() == [7] * 8
    with pytest.raises(HandoverFailed, match="another instance"):
        map_peer(before.address)
    with pytest.raises(ValueError, match="buffer"):
        PoolMemory(13, 8, "too many", Area(13 * 8 - 1))
    del area, before, after
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == files


def test_too_little_memory_is_said_before_anything_is_taken() -> None:
    slots = psutil.virtual_memory().available // 2**20 + 1024
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MemoryTooSmall, match="lower --kv-memory"):
        PoolMemory(slots, 2**20, "me")
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_process_is_told_by_its_start() -> None:
    script = "open('/proc/self/comm', 'w').write(') Z 1 ('); print(flush=True); input()"  # a name that looks like more
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        before = started(process.pid)
        process.stdout.readline()
        assert started(process.pid) == before != started(os.getppid())
        assert before is not None
        assert int(before) >= int(started(os.getpid()) or 0) > 0
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert started(process.pid) is None, "it is a zombie"
    assert started(process.pid) is None
    assert started(0) is started(2**31 - 1) is None
