"""Block keys: a block's name is a hash over everything that decides its content."""

import hashlib
from array import array
from collections.abc import Sequence

BlockKey = bytes  # 16 bytes


def root_key(fingerprint: str, salt: str) -> BlockKey:
    """The parent of every first block: layout fingerprint and tenant salt, so nothing is shared across either."""
    return hashlib.blake2b(salt.encode(), digest_size=16, key=fingerprint.encode()).digest()


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
    keys = []
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        block = array("I", token_ids[start : start + block_tokens])
        parent = hashlib.blake2b(block.tobytes(), digest_size=16, key=parent).digest()
        keys.append(parent)
    return keys
