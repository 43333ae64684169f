"""Cutting of streams: whatever a worker sends, in whatever pieces, nothing is torn, lost, or held without end."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from twostroke.api.http import DONE
from twostroke.router import reply
from twostroke.router.reply import Frames

_EVENTS = st.sampled_from([b"data: 1\n\n", b"data: \xf0\x9f\x99\x82\r\n\r\n", b"a\nb\n\n", b": ping\n\n", DONE])
_TORN = st.sampled_from([b"", b"data: x", b"\n", b"\r\n", b"\r\n\r", b"::\n", b":9 [[0", b"data: [DONE"])
_FRAGMENTS = _EVENTS | _TORN | st.sampled_from([b":9 [[0,[1]]]\n", b":0 \n", b":", b"7", b" ", b":999999999 \n"])


def cut(text: bytes, sizes: list[int]) -> list[bytes]:
    """The text in pieces of these sizes, in turn."""
    pieces: list[bytes] = []
    at = 0
    while at < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[at : at + size])
        at += size
    return pieces


def fed(pieces: list[bytes]) -> tuple[bytes, bytes, bool]:
    """What it gives for a stream: events, lines, and whether it ended well."""
    frames, events, lines = Frames(), b"", b""
    try:
        for piece in pieces:
            part = frames.feed(piece)
            events, lines = events + part.events, lines + part.lines
        frames.end()
        return events, lines, True
    except ConnectionError:
        return events, lines, False


@given(st.lists(_FRAGMENTS).map(b"".join) | st.binary(max_size=100), st.lists(st.integers(1, 9), min_size=1))
@example(b"data: [DONE]\n\ndata: 1\n\n", [1])  # something after the last event
@example(b"data: [DONE]\n\na\nb\n\ndata: [DONE]\n\n", [1])
@example(b":14 \ndata: [DONE]\n\n:1 \nx", [5])
def test_frames_are_understood_or_refused_however_they_arrive(text: bytes, sizes: list[int]) -> None:
    found = fed(cut(text, sizes))
    at_once = fed([text] if text else [])
    assert found[2] == at_once[2]
    if found[2]:
        assert found == at_once


@pytest.mark.parametrize("text", [b"data: ", b": ping", b"\n", b":12345 [[0,[1]]]\n"])
def test_what_has_no_end_is_not_kept(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply, "_MAX_EVENT", 10_000)
    stream = Frames()

    def feed() -> None:
        for _ in range(200):
            stream.feed(text + b"x" * 99)

    with pytest.raises(ConnectionError, match=r"too long|broken"):
        feed()


def test_a_frame_that_says_it_is_too_long_is_refused_at_once() -> None:
    with pytest.raises(ConnectionError, match="too long"):
        Frames().feed(b":999999999 \n")


def test_a_long_event_is_kept_in_pieces() -> None:
    """Were they joined each time, this would take minutes."""
    piece, count, frames = b"x" * 1000, 30_000, Frames()
    events = frames.feed(b":%d [[0,[1]]]\n" % (len(piece) * count + 2)).events
    for _ in range(count):
        events += frames.feed(piece).events
    assert events == b""
    assert frames.feed(b"\n\n").events == piece * count + b"\n\n"
