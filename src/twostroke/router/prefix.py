"""Which workers probably hold the KV of a prompt's beginning. Pure bookkeeping over request bodies, never exact.

The router tokenizes nothing. Prompts that begin alike are, as JSON, bytes that begin alike: the body from its prompt
on is cut into chunks, and each chunk's hash covers all chunks before it, like the block keys of the workers. A wrong
guess costs a choice that is less good, nothing else.
"""

from collections import OrderedDict
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

CHUNK = 256  # bytes
MAX_CHUNKS = 256  # of one body: longer prompts are alike if their first 64 KiB are
MAX_ENTRIES = 1 << 16
HOLDERS = 4  # workers remembered for each chunk, the latest ones
BYTES_A_TOKEN = 4  # roughly, of text and of lists of token ids alike

_PROMPTS = (b'"messages"', b'"prompt"', b'"text"', b'"input_ids"')
_SALT = b'"cache_salt"'
_LOOK = 1024  # bytes of a body in which its prompt begins, or all of it counts


def tokens_of(body_bytes: int) -> int:
    """How many prompt tokens a body of this size has, roughly."""
    return body_bytes // BYTES_A_TOKEN


def chain(body: bytes, tenant: str = "") -> Sequence[int]:
    """Hashes of the full chunks of the prompt in ``body``, each of them over everything before it too, and the salt,
    which is the ``tenant``'s if the body names none.
    """
    head = body[:_LOOK]
    start = min((place for place in map(head.find, _PROMPTS) if place >= 0), default=0)
    hashes, parent = [], _salt(body, tenant)
    for at in range(start, min(len(body) - CHUNK, start + (MAX_CHUNKS - 1) * CHUNK) + 1, CHUNK):
        parent = xxh3_64_intdigest(body[at : at + CHUNK], parent)
        hashes.append(parent)
    return hashes


def _salt(body: bytes, tenant: str) -> int:
    """Tenants do not see each other's blocks. 0 without a salt."""
    key = body.find(_SALT)
    if key < 0:
        return xxh3_64_intdigest(tenant.encode()) if tenant else 0
    start = body.find(b'"', key + len(_SALT)) + 1
    return xxh3_64_intdigest(body[start : body.find(b'"', start)]) if start else 0


class PrefixMap:
    """Chunk hash → the workers that computed or received it last. Bounded; the chunk unused for longest goes first."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._holders: OrderedDict[int, tuple[str, ...]] = OrderedDict()
        self._max_entries = max_entries

    def __len__(self) -> int:
        return len(self._holders)

    def match(self, hashes: Sequence[int]) -> dict[str, int]:
        """For each worker that holds a beginning, how many tokens of it."""
        held: dict[str, int] = {}
        for depth, hash_ in enumerate(hashes):
            # Who lost a chunk and holds a later one can use neither.
            still = [who for who in self._holders.get(hash_, ()) if held.get(who, 0) == depth]
            if not still:
                break
            for who in still:
                held[who] = depth + 1
        return {who: depth * CHUNK // BYTES_A_TOKEN for who, depth in held.items()}

    def remember(self, hashes: Sequence[int], workers: Sequence[str]) -> None:
        """``workers`` hold this beginning now."""
        for hash_ in reversed(hashes):  # so that a chunk is never forgotten before those behind it, which need it
            before = self._holders.pop(hash_, ())
            self._holders[hash_] = (*workers, *(who for who in before if who not in workers))[:HOLDERS]
        while len(self._holders) > self._max_entries:
            self._holders.popitem(last=False)
