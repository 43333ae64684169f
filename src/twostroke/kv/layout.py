"""The layout of a block: what its bytes mean, and the fingerprint that two pools must share to exchange blocks."""

import hashlib
from dataclasses import dataclass

from twostroke.errors import StartupError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Layout:
    """Shape of one block, ``[layer][k|v][kv_head][token][head_dim]``: heads before tokens, so that a
    tensor-parallel split of the heads is a slice.
    """

    layers: int
    kv_heads: int
    head_dim: int  # elements
    block_tokens: int  # tokens
    dtype: str  # a key of DTYPE_BYTES
    model: str  # digest of the weights and the model's configuration

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise StartupError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        if self.block_tokens < 1:
            raise StartupError(f"a block of {self.block_tokens} tokens holds nothing; use 1 or more")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Elements of one block by dimension."""
        return (self.layers, 2, self.kv_heads, self.block_tokens, self.head_dim)

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one slot."""
        return self.token_bytes * self.block_tokens

    @property
    def fingerprint(self) -> str:
        """128 bits, in hex: equal exactly when blocks of two pools are interchangeable."""
        text = f"twostroke-layout-1:{self.shape}:{self.dtype}:{self.model}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def blocks(self, tokens: int) -> int:
        """How many blocks hold ``tokens`` tokens; the last one may be partial."""
        return -(-tokens // self.block_tokens)
