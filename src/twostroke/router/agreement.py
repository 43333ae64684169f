"""Whether workers can serve together. Pure. Every refusal names both sides."""

from collections.abc import Iterable

from twostroke.messages import WorkerInfo
from twostroke.router.policy import Pool


def disagreement(info: WorkerInfo, pool: Pool, others: Iterable[tuple[WorkerInfo, Pool]]) -> str | None:
    """Why a worker cannot serve beside ``others`` in this pool; ``None`` if it can.

    The router sends any request to any worker, so all serve one model. Workers that prefill or decode hand blocks over
    to each other, so these have one layout: data type, block size, shape and weights. A worker that still starts has
    none, and disagrees with nobody.
    """
    for other, other_pool in others:
        theirs: list[tuple[str, object, object]] = [("model", info.model, other.model)]
        if "colocated" not in (pool, other_pool):
            theirs += [
                ("dtype", info.dtype, other.dtype),
                ("block size", info.block_tokens, other.block_tokens),
                ("layout (shape or weights)", info.fingerprint, other.fingerprint),
            ]
        for what, ours, its in theirs:
            if ours and its and ours != its:
                return (
                    f"worker {info.id} at {info.url} has {what} {ours}, worker {other.id} at {other.url} has {its}: "
                    "workers of one router serve the same model, dtype and block size"
                )
    return None
