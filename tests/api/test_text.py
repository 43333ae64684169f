"""Detokenisation and stop strings: any tokens and any cuts give the same text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostroke.api.text import Detokenizer, StopFinder
from twostroke.tokenizer import REPLACEMENT, Tokenizer

_ALPHABET = "abc"
_STOPS = st.lists(st.text(_ALPHABET, min_size=1, max_size=4), max_size=4)


@given(data=st.data())
def test_pieces_join_to_the_whole_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 330), max_size=200))
    detokenizer = Detokenizer(tokenizer.decode, tokenizer.special_ids)
    pieces = [detokenizer.feed(token) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


@given(text=st.text(max_size=100))
def test_real_text_comes_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace(REPLACEMENT, "")
    detokenizer = Detokenizer(tokenizer.decode, tokenizer.special_ids)
    pieces = [detokenizer.feed(token) for token in tokenizer.encode(text)]
    assert REPLACEMENT not in "".join(pieces)
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""


@given(data=st.data())
def test_bytes_of_no_character_still_join(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Long runs of broken UTF-8, which never show where a character begins."""
    odd = [token for token in range(330) if REPLACEMENT in tokenizer.piece(token)]
    ids = data.draw(st.lists(st.sampled_from(odd), min_size=30, max_size=300))
    detokenizer = Detokenizer(tokenizer.decode, tokenizer.special_ids)
    text = "".join(detokenizer.feed(token) for token in ids) + detokenizer.flush()
    assert text == tokenizer.decode(ids)


@given(prompt=st.text(max_size=20), answer=st.text(max_size=50))
def test_context_adds_nothing(tokenizer: Tokenizer, prompt: str, answer: str) -> None:
    detokenizer = Detokenizer(tokenizer.decode, tokenizer.special_ids, tokenizer.encode(prompt)[-4:])
    text = "".join(detokenizer.feed(token) for token in tokenizer.encode(answer)) + detokenizer.flush()
    assert text == answer


def test_context_keeps_a_leading_blank() -> None:
    def decode(ids: object) -> str:
        """As SentencePiece does: the first blank of a text is dropped."""
        assert isinstance(ids, list)
        return "".join(f" w{i}" for i in ids).removeprefix(" ")

    assert Detokenizer(decode).feed(7) == "w7"
    assert Detokenizer(decode, context=[1, 2]).feed(7) == " w7"


def test_special_tokens_do_not_displace_the_context() -> None:
    def decode(ids: object) -> str:
        assert isinstance(ids, list)
        return "".join(f" w{i}" for i in ids).removeprefix(" ")

    detokenizer = Detokenizer(decode, skip=frozenset({0}))
    tokens = [1] * 40 + [0] * 100 + [2] * 40
    text = "".join(detokenizer.feed(token) for token in tokens) + detokenizer.flush()
    assert text == " ".join(["w1"] * 40 + ["w2"] * 40)


@given(stops=_STOPS, text=st.text(_ALPHABET, max_size=30), data=st.data())
def test_cuts_do_not_matter(stops: list[str], text: str, data: st.DataObject) -> None:
    whole = _search(stops, [text])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert _search(stops, pieces) == whole


@given(stops=_STOPS, text=st.text(_ALPHABET, max_size=30))
def test_text_ends_before_the_first_complete_stop_string(stops: list[str], text: str) -> None:
    shown, matched = _search(stops, [text])
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert (shown, matched) == (text, None)
    else:
        longest = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
        assert (shown, matched) == (text[: ends[0]].removesuffix(longest), longest)


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [(["ab", "STO", "P"], "ab"), (["STO", "NE"], "STONE"), (["x STO"], "x STO"), (["S", "S", "T", "O", "P"], "S")],
)
def test_holds_back_a_possible_beginning(pieces: list[str], shown: str) -> None:
    assert _search(["STOP"], pieces)[0] == shown
    finder = StopFinder(["STOP"])
    assert finder.feed("x STO") == "x "


def _search(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    finder, shown = StopFinder(stops), ""
    for piece in pieces:
        shown += finder.feed(piece)
        if finder.matched is not None:
            return shown, finder.matched
    return shown + finder.flush(), None
