"""The tokenizer of a model directory."""

from pathlib import Path

import pytest

from tests.tiny_tokenizer import EOS, build_tokenizer
from twostroke.errors import BadRequest, ModelError
from twostroke.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("text", ["hello world", "你好世界", "🙂 naïve\n\ttabs", "\x00\x7f"])
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_have_no_text_but_a_piece(tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.special_ids
    assert tokenizer.decode([eos]) == ""
    assert tokenizer.piece(eos) == EOS


def test_bytes_of_tokens_join_to_the_text(tokenizer: Tokenizer) -> None:
    text = "🙂 你 café"
    assert b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text)) == text.encode()


def test_chat_applies_the_template(tokenizer: Tokenizer) -> None:
    ids = tokenizer.chat([{"role": "user", "content": "hello"}])
    assert "".join(tokenizer.piece(token) for token in ids) == f"<user>hello{EOS}<assistant>"


def test_chat_template_may_refuse(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="unknown role robot"):
        tokenizer.chat([{"role": "robot", "content": "hello"}])


def test_chat_without_a_template(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no chat template"):
        build_tokenizer(tmp_path, template=None).chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("text", ["hello world", "你好 🙂 naïve\n\ttabs", "\x00\x7f", " two  spaces "])
def test_a_stand_in_maps_bytes(text: str) -> None:
    stand_in = Tokenizer.of_bytes()
    assert stand_in.encode(text) == list(text.encode())
    assert stand_in.decode(stand_in.encode(text)) == text


def test_every_token_of_a_stand_in_has_its_byte_or_its_number() -> None:
    stand_in = Tokenizer.of_bytes(300)
    assert b"".join(map(stand_in.token_bytes, range(256))) == bytes(range(256))
    assert stand_in.decode([256, 104, 299, 105]) == "<256>h<299>i"
    assert stand_in.encode("<256>") == list(b"<256>")
    assert (stand_in.piece(256), stand_in.token_bytes(256)) == ("<256>", b"<256>")
    assert (stand_in.piece(300), stand_in.token_bytes(300)) == ("", b"")
    assert stand_in.special_ids == frozenset()


def test_a_stand_in_chats() -> None:
    messages = [{"role": "system", "content": "be <b>"}, {"role": "user", "content": "hi"}]
    assert Tokenizer.of_bytes().chat(messages) == list(b"be <b>hi")


def test_no_tokenizer_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load a tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ truncated")
    with pytest.raises(ModelError):
        Tokenizer.load(tmp_path)
