"""The memory of a GPU worker's pool: one CUDA allocation that same-host peers map through CUDA IPC.

It comes from cudaMalloc, not from torch's allocator: its handle names this allocation alone, and closing gives it back.
``cuda.bindings`` brings a CUDA runtime of its own, beside torch's; both use the one primary context of each device, so
pointers of one are good in the other.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from cuda.bindings import driver, runtime

from twostroke.errors import HandoverFailed, MemoryTooSmall, StartupError
from twostroke.kv.cuda_copies import check_driver
from twostroke.kv.memory import Bytes, host_id
from twostroke.messages import CudaMemory, PoolAddress

log = logging.getLogger(__name__)
_GRAIN = 2 << 20  # bytes; of less than that, CUDA exports a larger block that other allocations share


def call(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a CUDA function returned, without its status.

    Raises:
        RuntimeError: the status was not success.
    """
    status, *values = result
    if status != 0:
        runtime.cudaGetLastError()  # take it, or a later call reports it again
        raise RuntimeError(status.name)
    return tuple(values)


@contextmanager
def current(device: int) -> Iterator[None]:
    """Make the device this thread's current one, for torch and for ``cuda.bindings``. ``RuntimeError`` if it cannot."""
    with torch.cuda.device(device):
        call(runtime.cudaSetDevice(device))
        yield


@contextmanager
def releasing(what: str) -> Iterator[None]:
    """Go on if it fails, and say so: a GPU that failed has nothing left to give back."""
    try:
        yield
    except RuntimeError as error:
        log.warning("%s was not released: %s", what, error)


class _Array:
    """Memory that torch can view as a tensor."""

    def __init__(self, pointer: int, shape: tuple[int, int]) -> None:
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "|u1", "data": (pointer, False), "version": 3}


class CudaPool:
    """``num_slots`` slots of ``block_bytes`` bytes on a GPU that this process owns and same-host peers may read."""

    def __init__(self, num_slots: int, block_bytes: int, instance: str, device: torch.device) -> None:
        """Zeroed memory on ``device``.

        Raises:
            MemoryTooSmall: the GPU has not enough memory left for all slots.
            StartupError: the GPU's memory cannot be shared among processes here, or its driver is too old.
        """
        check_driver()
        size = -(-num_slots * block_bytes // _GRAIN) * _GRAIN
        advice = "lower --kv-memory or --gpu-memory-utilization"
        self._device = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.empty_cache()  # what torch keeps in store is free
        free, _ = torch.cuda.mem_get_info(self._device)
        if size > free:
            raise MemoryTooSmall(
                f"a KV pool of {size / 2**20:.0f} MiB does not fit into the {free / 2**20:.0f} MiB of GPU memory that "
                f"are free: {advice}"
            )
        with current(self._device):
            try:
                (self._pointer,) = call(runtime.cudaMalloc(size))
            except RuntimeError as error:
                raise MemoryTooSmall(
                    f"a KV pool of {size / 2**20:.0f} MiB does not fit into GPU memory ({error}): {advice}"
                ) from error
            try:
                (handle,) = call(runtime.cudaIpcGetMemHandle(self._pointer))
            except RuntimeError as error:
                raise StartupError(f"GPU memory cannot be shared among processes here (CUDA IPC): {error}") from error
            array = _Array(self._pointer, (num_slots, block_bytes))
            self.slots: torch.Tensor = torch.as_tensor(array, device=torch.device("cuda", self._device))
            self.slots.zero_()
            torch.cuda.synchronize()
        self.address = PoolAddress(
            host=host_id(),
            pid=os.getpid(),
            instance=instance,
            num_slots=num_slots,
            block_bytes=block_bytes,
            memory=CudaMemory(
                device=str(torch.cuda.get_device_properties(self._device).uuid),
                handle=bytes(handle.reserved).hex(),
                offset=0,
            ),
        )

    def close(self) -> None:
        """Give the memory back, ``slots`` with it: no tensor may view it any more, and no kernel run on it."""
        with releasing("the KV pool"), current(self._device):
            call(runtime.cudaFree(self._pointer))


def register(memory: Bytes, device: int) -> Callable[[], None]:
    """Have GPUs copy from and to this memory by themselves, until what is returned is called.

    Without that the driver copies through memory of its own, several times slower; so a refusal is no more than said.
    """
    address = memory.ctypes.data
    with current(device):
        try:
            flags = runtime.cudaHostRegisterPortable
            if not memory.flags.writeable:  # another process's
                flags |= runtime.cudaHostRegisterReadOnly
            call(runtime.cudaHostRegister(address, memory.nbytes, flags))
        except RuntimeError as error:
            log.warning("%.0f MiB of host memory cannot be registered with CUDA: %s", memory.nbytes / 2**20, error)
            return lambda: None

    def unregister() -> None:
        with releasing("registered memory"), current(device):
            call(runtime.cudaHostUnregister(address))

    return unregister


@dataclass(frozen=True)
class PeerPool:
    """A peer's pool in our address space. Addresses are good for copies on the GPU that it was mapped for."""

    base: int  # address of the mapping
    slots: int  # address of the first slot


def map_peer(address: PoolAddress, device: int) -> PeerPool:
    """Map the pool of a peer on this machine for our GPU ``device``, which becomes this thread's current one.

    Raises:
        HandoverFailed: the peer is gone or this very process, its pool is smaller than the address says or not in GPU
            memory, or its GPU cannot be reached from ours.
    """
    memory = address.memory
    if not isinstance(memory, CudaMemory):
        raise HandoverFailed(f"the peer's pool is {memory.kind}, ours {CudaMemory.kind}: they exchange no blocks")
    if address.pid == os.getpid():
        raise HandoverFailed("the peer's pool is this process's own: CUDA IPC only maps those of other processes")
    handle = runtime.cudaIpcMemHandle_t()
    handle.reserved = bytes.fromhex(memory.handle)
    try:
        call(runtime.cudaSetDevice(device))
        (base,) = call(runtime.cudaIpcOpenMemHandle(handle, runtime.cudaIpcMemLazyEnablePeerAccess))
    except RuntimeError as error:
        raise HandoverFailed(f"the peer's pool on GPU {memory.device} cannot be mapped: {error}") from error
    pool = PeerPool(base, base + memory.offset)
    try:
        # To read beyond the mapping would be the end of our own context, not of the hand-over alone.
        start, size = call(driver.cuMemGetAddressRange(base))
        if pool.slots + address.num_slots * address.block_bytes > int(start) + size:
            raise HandoverFailed("the peer's pool is smaller than its address says")
    except RuntimeError as error:
        unmap(pool)
        raise HandoverFailed(f"the peer's pool has an unknown size: {error}") from error
    except HandoverFailed:
        unmap(pool)
        raise
    return pool


def unmap(pool: PeerPool) -> None:
    """Let go of a peer's pool. No copy may still read it."""
    with releasing("a peer's pool"):
        call(runtime.cudaIpcCloseMemHandle(pool.base))
