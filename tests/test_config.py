"""What the configuration accepts and refuses."""

from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostroke import config
from twostroke.config import RouterConfig, UpConfig
from twostroke.errors import StartupError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1048576", 1 << 20),
        ("512MiB", 512 << 20),
        ("4 GB", 4 << 30),
        ("1.5g", 3 << 29),
        (" 2k ", 2048),
        ("1T", 1 << 40),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert config.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1 PB", "GiB", "1e9", "1,5G", "nan", "0.1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(StartupError, match="is not a size"):
        config.parse_size(text)


@given(st.text() | st.from_regex(r"[0-9]+(\.[0-9]+)? ?[KMGT]i?B", fullmatch=True) | st.just("9" * 400))
def test_any_text_is_a_positive_size_or_refused(text: str) -> None:
    with suppress(StartupError):
        assert config.parse_size(text) > 0


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_loopback_needs_no_secret(host: str) -> None:
    config.check_bind(host, "")


def test_other_addresses_need_a_secret_or_the_word() -> None:
    with pytest.raises(StartupError, match="TWOSTROKE_SECRET"):
        config.check_bind("0.0.0.0", "")
    config.check_bind("0.0.0.0", "secret")
    config.check_bind("0.0.0.0", "", insecure=True)


@pytest.mark.parametrize("counts", [(1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (8, 8, 0)])
def test_pools_that_can_serve(counts: tuple[int, int, int]) -> None:
    config.check_pools(*counts)


@pytest.mark.parametrize(
    ("counts", "words"),
    [((0, 0, 0), "no workers"), ((1, 0, 0), "--decode"), ((0, 2, 0), "--prefill"), ((1, 1, -1), "negative")],
)
def test_pools_that_cannot(counts: tuple[int, int, int], words: str) -> None:
    with pytest.raises(StartupError, match=words):
        config.check_pools(*counts)


def test_worker_urls() -> None:
    config.check_urls(["http://127.0.0.1:8100", "https://host/", "http://[::1]:9"])
    for bad in ("host:8100", "ftp://host", "http://", "http://host/path", ""):
        with pytest.raises(StartupError, match="not the URL"):
            config.check_urls([bad])
    with pytest.raises(StartupError, match="more than once"):
        config.check_urls(["http://a:1", "http://a:1"])


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TWOSTROKE_CACHE", str(tmp_path))
    assert config.cache_dir() == tmp_path
    monkeypatch.delenv("TWOSTROKE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert config.cache_dir() == Path("/x/twostroke")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert config.cache_dir() == Path.home() / ".cache" / "twostroke"


def test_children_share_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOSTROKE_SECRET", "old")
    monkeypatch.setenv("OTHER", "kept")
    environment = config.child_environment("new")
    assert (environment["TWOSTROKE_SECRET"], environment["OTHER"]) == ("new", "kept")


@pytest.mark.parametrize("kind", [RouterConfig, UpConfig])
def test_unknown_keys_and_choices_are_errors(kind: type[RouterConfig | UpConfig]) -> None:
    for fields in ({"prot": 1}, {"schedule": "sometimes"}, {"policy": "random"}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(fields, kind)
