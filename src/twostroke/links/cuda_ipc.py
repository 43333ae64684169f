"""The CUDA IPC link: a same-host peer's GPU memory is mapped once, then slots are copied from device to device."""

from collections.abc import Sequence

import numpy as np
import torch
from cuda.bindings import runtime

from twostroke.errors import HandoverFailed
from twostroke.kv.cuda_copies import addresses, copy
from twostroke.kv.cuda_memory import PeerPool, call, current, map_peer, releasing, unmap
from twostroke.kv.pool import Slot
from twostroke.links.copying import CopyingLink, runs
from twostroke.messages import CudaMemory, PoolAddress

_STREAMS = 4  # copies that are no longer than a block pause between each other: others go on meanwhile


class CudaIpcLink(CopyingLink[PeerPool]):
    """Reads pools of GPU workers on this machine: on the same GPU, or on one that ours can reach as a peer.

    Copies run on streams of their own, which wait for no other: whoever publishes slots must have waited for the
    kernels that write them, and whoever leases slots for those that still read them.
    """

    name = CudaMemory.link

    def __init__(self, own: torch.Tensor) -> None:
        """``own``: our slots, ``uint8 [num_slots, block_bytes]``, contiguous on a GPU."""
        assert own.is_cuda, "own slots are on a GPU"
        assert own.is_contiguous(), "a slot is one run of bytes"
        super().__init__(block_bytes=own.shape[1])
        self._own = own
        self._device: int = own.device.index
        with current(self._device):
            flags = runtime.cudaStreamNonBlocking
            self._streams = [call(runtime.cudaStreamCreateWithFlags(flags))[0] for _ in range(_STREAMS)]

    def close(self) -> None:
        """See ``Link.close``."""
        super().close()
        with releasing("the link's streams"), current(self._device):
            for stream in self._streams:
                call(runtime.cudaStreamDestroy(stream))

    def _map(self, peer: PoolAddress) -> PeerPool:
        return map_peer(peer, self._device)  # our GPU is the copying thread's current one from then on

    def _copy(self, source: PeerPool, remote: Sequence[Slot], local: Sequence[Slot]) -> None:
        if not remote:
            return
        copies, size = runs(remote, local), self._block_bytes
        assert int((copies.local + copies.counts).max()) <= len(self._own), "we copy into our own slots"
        targets = addresses(self._own.data_ptr(), copies.local, size)
        origins = addresses(source.slots, copies.remote, size)
        sizes, share = copies.counts * np.uint64(size), -(-len(targets) // _STREAMS)
        begun = []
        try:
            try:
                for nth, first in enumerate(range(0, len(targets), share)):
                    part = slice(first, first + share)
                    begun.append(self._streams[nth])
                    copy(targets[part], origins[part], sizes[part], int(begun[-1]))
            finally:
                ends = [runtime.cudaStreamSynchronize(stream) for stream in begun]  # releases the GIL
                for end in ends:
                    call(end)
        except RuntimeError as error:
            raise HandoverFailed(f"the peer's slots cannot be copied: {error}") from error

    def _unmap(self, source: PeerPool) -> None:
        unmap(source)
