"""Block keys: a block's name is a hash over everything that decides its content, behind a tag of whose it is."""

import hashlib
from array import array
from collections.abc import Sequence

KEY_BYTES = 24  # of which the first name the tenant, and 16 are a hash
TENANT_BYTES = 8
NOBODY = bytes(TENANT_BYTES)  # the tag of blocks without a salt

BlockKey = bytes  # KEY_BYTES
Tenant = bytes  # TENANT_BYTES


def root_key(fingerprint: str, salt: str) -> BlockKey:
    """The parent of every first block: layout fingerprint and tenant salt, so nothing is shared across either."""
    root = hashlib.blake2b(salt.encode(), digest_size=KEY_BYTES, key=fingerprint.encode()).digest()
    return root if salt else NOBODY + root[TENANT_BYTES:]


def tenant_of(key: BlockKey) -> Tenant:
    """Whose block this is: the same for all blocks of one salt and layout. The salt cannot be told from it."""
    return key[:TENANT_BYTES]


def prompt_key(fingerprint: str, salt: str, token_ids: Sequence[int]) -> str:
    """A name for a whole prompt, in hex: equal for two workers only if all of its blocks are."""
    root = root_key(fingerprint, salt)
    return hashlib.blake2b(array("I", token_ids).tobytes(), digest_size=16, key=root).hexdigest()


def block_keys(parent: BlockKey, token_ids: Sequence[int], block_tokens: int) -> list[BlockKey]:
    """Keys of the full blocks of ``token_ids``, chained from ``parent``; a partial last block has none.

    Args:
        parent: the root key, or the key of the block that ends right before ``token_ids``.
        token_ids: ids in 0 .. 2**32 - 1.
        block_tokens: tokens a block.
    """
    ids = array("I", token_ids)
    text, size = ids.tobytes(), block_tokens * ids.itemsize
    keys, tenant, empty = [], tenant_of(parent), hashlib.blake2b(digest_size=KEY_BYTES - TENANT_BYTES)
    for start in range(0, len(text) - size + 1, size):
        hashed = empty.copy()  # takes half the time of making one
        hashed.update(parent + text[start : start + size])
        parent = tenant + hashed.digest()
        keys.append(parent)
    return keys
