"""The tokenizer of a model directory: text to token ids and back, and the chat template.

Encoding and decoding go straight to the Rust tokenizer: it is thread-safe, and several times cheaper per token than the
Python wrapper around it, which is only used for the chat template.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from twostroke.errors import BadRequest, ModelError

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not (yet) UTF-8
_PLAIN_CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"


class Tokenizer:
    """Wraps a Hugging Face fast tokenizer (``hf``: a ``PreTrainedTokenizerFast``)."""

    def __init__(self, hf: Any) -> None:  # noqa: ANN401 - transformers is untyped
        self._hf = hf
        self._rust: tokenizers.Tokenizer = hf.backend_tokenizer
        self.special_ids: frozenset[int] = frozenset(hf.all_special_ids)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Load from a model directory, without the network.

        Raises:
            ModelError: there is no usable tokenizer in it.
        """
        from transformers import AutoTokenizer  # seconds to import, so not before it is needed

        try:
            hf = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise ModelError(f"cannot load a tokenizer from {path}: {error}") from error
        if getattr(hf, "backend_tokenizer", None) is None:
            raise ModelError(f"the tokenizer in {path} has no fast version (tokenizer.json)")
        return cls(hf)

    @classmethod
    def of_bytes(cls, vocab_size: int = 256) -> "Tokenizer":
        """A stand-in for a model without a tokenizer: token ids are bytes, other ids are shown as ``<id>``."""
        from transformers import PreTrainedTokenizerFast

        rust = tokenizers.Tokenizer(
            BPE(vocab=_byte_alphabet() | {f"<{i}>": i for i in range(256, vocab_size)}, merges=[])
        )
        rust.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        rust.decoder = decoders.ByteLevel()
        return cls(PreTrainedTokenizerFast(tokenizer_object=rust, chat_template=_PLAIN_CHAT))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of ``text``; ``special`` adds what the model expects around a prompt, such as BOS."""
        return self._rust.encode(text, add_special_tokens=special).ids

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins.

        Raises:
            BadRequest: the model has no chat template, or its template refuses these messages.
        """
        from jinja2 import TemplateError

        if not self._hf.chat_template:
            raise BadRequest("this model has no chat template: use /v1/completions", param="messages")
        try:
            text = self._hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            raise BadRequest(f"the model's chat template refuses these messages: {error}", param="messages") from error
        return self.encode(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens. Bytes that are not UTF-8 become U+FFFD."""
        return self._rust.decode(ids, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """Text of one token, special or not, as shown in logprobs."""
        return self._rust.decode([token], skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """Bytes of one token, exact also where they are only a part of a character."""
        piece = self.piece(token)
        if REPLACEMENT not in piece:
            return piece.encode()
        name = self._rust.id_to_token(token) or ""
        if name.startswith("<0x") and len(name) == 6:  # SentencePiece's spelling of a raw byte
            return bytes([int(name[3:5], 16)])
        alphabet = _byte_alphabet()
        return bytes(alphabet[c] for c in name) if all(c in alphabet for c in name) else piece.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """Byte of each character of byte-level BPE: printable Latin-1 stands for itself, the other bytes for U+0100 on."""
    letters = set(ByteLevel.alphabet())
    alphabet = {chr(byte): byte for byte in range(256) if chr(byte) in letters}
    rest = (byte for byte in range(256) if chr(byte) not in letters)
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(rest)}
