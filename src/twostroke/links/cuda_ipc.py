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


class CudaIpcLink(CopyingLink[PeerPool]):
    """Reads pools of GPU workers on this machine: on the same GPU, or on one that ours can reach as a peer.

    Copies run on a stream of their own, which waits for no other: whoever publishes slots must have waited for the
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
            (self._stream,) = call(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))

    def close(self) -> None:
        """See ``Link.close``."""
        super().close()
        with releasing("the link's stream"), current(self._device):
            call(runtime.cudaStreamDestroy(self._stream))

    def _map(self, peer: PoolAddress) -> PeerPool:
        return map_peer(peer, self._device)  # our GPU is the copying thread's current one from then on

    def _copy(self, source: PeerPool, remote: Sequence[Slot], local: Sequence[Slot]) -> None:
        assert all(0 <= slot < len(self._own) for slot in local), "we copy into our own slots"
        size = self._block_bytes
        theirs, ours, counts = zip(*runs(remote, local), strict=True)
        targets, origins = addresses(self._own.data_ptr(), ours, size), addresses(source.slots, theirs, size)
        try:
            try:
                copy(targets, origins, np.array(counts, np.uint64) * np.uint64(size), int(self._stream))
            finally:
                call(runtime.cudaStreamSynchronize(self._stream))  # releases the GIL
        except RuntimeError as error:
            raise HandoverFailed(f"the peer's slots cannot be copied: {error}") from error

    def _unmap(self, source: PeerPool) -> None:
        unmap(source)
