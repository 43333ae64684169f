"""From tokens to text that may be shown: incremental detokenisation and stop strings. Pure.

Text once returned is never changed, so a stream and a whole reply show the same.
"""

from collections.abc import Callable, Sequence

from twostroke.tokenizer import REPLACEMENT

Decode = Callable[[Sequence[int]], str]

_HELD = 3  # an unfinished UTF-8 character has at most 3 bytes, each shown as U+FFFD at worst
_KEEP = 16  # tokens that stay as context: enough bytes to find the character boundary again
_LIMIT = 2 * _KEEP  # window length at which old tokens are dropped


class Detokenizer:
    """Text of a growing list of tokens, piece by piece.

    Decodes a sliding window of the latest tokens and returns what is new at its end. Up to three U+FFFD at the end
    are held back, since the next token may turn them into a character. Decoding a window instead of everything keeps
    the cost of a token constant; the window needs a past because tokenizers treat the first token specially.

    Args:
        decode: text of token ids.
        skip: ids without text (special tokens); they must not push real tokens out of the window.
        context: the prompt's last tokens, so that a leading space survives in tokenizers that drop it at the start.
    """

    def __init__(self, decode: Decode, skip: frozenset[int] = frozenset(), context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._skip = skip
        self._window = [token for token in context if token not in skip]
        start = decode(self._window) if self._window else ""
        if start.endswith(REPLACEMENT):  # the prompt ends inside a character: what follows stands alone
            self._window, start = [], ""
        self._sent = len(start)  # characters of the window's text that were returned, or belong to the context

    def feed(self, token: int) -> str:
        """The text that became certain with this token; often empty for a part of a character."""
        if token in self._skip:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        certain = len(text)
        while certain > len(text) - _HELD and text.endswith(REPLACEMENT, 0, certain):
            certain -= 1
        piece = text[self._sent : certain]
        self._sent = max(self._sent, certain)
        if len(self._window) >= _LIMIT:
            self._drop(held=len(text) - self._sent)
        return piece

    def flush(self) -> str:
        """What was held back. Nothing may be fed afterwards."""
        text = self._decode(self._window) if self._window else ""
        return text[self._sent :]

    def _drop(self, held: int) -> None:
        """Forget old tokens. UTF-8 synchronises itself, so texts of the long and the short window end alike."""
        tail = self._window[-_KEEP:]
        size = len(self._decode(tail))
        if size > held:
            self._window, self._sent = tail, size - held


class StopFinder:
    """Ends text before the first stop string, and holds back what may be the beginning of one.

    The first stop string is the one that is complete first (at a tie the longest), so how the text is cut into pieces
    does not matter.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.matched: str | None = None  # the stop string found; nothing may be fed afterwards

    def feed(self, text: str) -> str:
        """The text that no stop string can reach any more."""
        if not self._stops:
            return text
        text = self._held + text
        if found := self._first(text):
            start, self.matched = found
            self._held = ""
            return text[:start]
        hold = self._may_begin(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> tuple[int, str] | None:
        hits = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(hits)[1:] if hits else None

    def _may_begin(self, text: str) -> int:
        """Length of the longest end of ``text`` that is the beginning of a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
