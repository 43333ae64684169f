"""What the configuration accepts and refuses."""

import os
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twostroke import config
from twostroke.config import DirectoryTier, DiskTier, HostTier, RouterConfig, UpConfig
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


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_devices(device: str) -> None:
    assert config.check_device(device) == device


@pytest.mark.parametrize(
    "device", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:0 ", "CUDA", "cpu:0", "mps", "cuda:٣"]
)
def test_what_is_no_device(device: str) -> None:
    with pytest.raises(StartupError, match="is not a device"):
        config.check_device(device)


def test_one_device_of_several_is_never_auto() -> None:
    assert config.check_device("cuda:1", auto=False) == "cuda:1"
    with pytest.raises(StartupError, match="is not a device"):
        config.check_device("auto", auto=False)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with two GPUs and a CUDA build of torch; its version file."""
    nodes = ["null", "nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-caps", "nvidia"]
    monkeypatch.setattr("os.listdir", {"/dev": nodes}.__getitem__)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    version = tmp_path / "version.py"
    version.write_text("from typing import Optional\ncuda: Optional[str] = '13.0'\n")
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(config, "find_spec", {"torch": spec}.get)
    return version


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 2),
        ("", 0),
        ("-1", 0),
        ("1", 1),
        ("1, 0", 2),
        ("0,-1,1", 1),
        ("0,2,1", 1),
        ("7", 0),
        ("GPU-8f1e0d3c", 1),
        ("MIG-a,MIG-b,MIG-c", 2),
    ],
)
def test_gpus_are_those_that_are_visible(
    driver: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert config.gpus() == count


def test_gpus_that_torch_cannot_use_do_not_count(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.write_text("cuda = None\n")
    assert config.gpus() == 0
    monkeypatch.setattr(config, "find_spec", {}.get)
    assert config.gpus() == 0


def test_gpus_are_as_many_as_torch_says() -> None:
    assert config.gpus() == torch.cuda.device_count()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_loopback_needs_no_secret(host: str) -> None:
    config.check_bind(host, "")


@pytest.mark.parametrize("host", ["127.0.0.1.evil.example", "127.evil.example", "10.0.0.1", "::", "", "0"])
def test_what_only_looks_like_loopback(host: str) -> None:
    assert not config.is_loopback(host)


def test_hosts() -> None:
    config.check_hosts(["10.0.0.1", "10.0.0.1:8100", "prefill-0.svc", "prefill_0:1", "::1", "[::1]:9"])
    for host in ("", "http://10.0.0.1", "a b", "10.0.0.1:", "a/b", "[::1]:", "*"):
        with pytest.raises(StartupError, match="no host"):
            config.check_hosts([host])


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


def test_a_store_is_a_list_of_tiers() -> None:
    text = "host:8GiB, disk:/var/kv:1.5TiB,dir:/mnt/shared:2G"
    tiers = config.parse_store(text)
    assert tiers == (
        HostTier(8 << 30),
        DiskTier(Path("/var/kv"), 3 << 39),
        DirectoryTier(Path("/mnt/shared"), 2 << 30),
    )
    assert config.parse_store(",".join(map(str, tiers))) == tiers
    assert config.parse_store("dir:/mnt/a:b") == (DirectoryTier(Path("/mnt/a:b")),)
    assert config.parse_store("dir:/mnt") == (DirectoryTier(Path("/mnt")),)
    assert config.parse_store(None) == config.parse_store("") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("host", "no tier"),
        ("host:", "no tier"),
        ("host:much", "not a size"),
        ("disk:/path", "no tier"),
        ("disk:/path:-1", "not a size"),
        ("tape:1GiB", "no tier"),
        ("host:1GiB,", "no tier"),
        ("host:1GiB,host:2GiB", "host more than once"),
    ],
)
def test_what_is_no_store(text: str, words: str) -> None:
    with pytest.raises(StartupError, match=words):
        config.parse_store(text)


def test_blocks_can_only_travel_through_a_store_that_is_shared() -> None:
    config.check_link("auto", ())
    config.check_link("store", config.parse_store("host:1GiB,dir:/mnt"))
    for store in ("", "host:1GiB,disk:/mnt:1GiB"):
        with pytest.raises(StartupError, match="--link store needs"):
            config.check_link("store", config.parse_store(store))


def test_link_devices() -> None:
    assert config.check_link_devices(None, "tcp") == ()
    assert config.check_link_devices("mlx5_2, mlx5_3", "auto") == ("mlx5_2", "mlx5_3")
    for listed in ("", "mlx5_2,", "a b", "mlx5_2:1", "x" * 33):
        with pytest.raises(StartupError, match="is not a network device"):
            config.check_link_devices(listed, "nixl")
    with pytest.raises(StartupError, match="--link tcp excludes"):
        config.check_link_devices("mlx5_2", "tcp")


@pytest.mark.parametrize("before", [None, "debug"])
def test_ucx_prints_errors_only_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    monkeypatch.delenv("UCX_LOG_LEVEL", raising=False)
    if before:
        monkeypatch.setenv("UCX_LOG_LEVEL", before)
    config.quieten_ucx()
    assert os.environ.pop("UCX_LOG_LEVEL") == (before or "error")


def test_tiers_behind_a_port() -> None:
    text = "host:1073741824,service:10.0.0.7:8300,valkey:cache:6379,mooncake:master:50051:1024"
    tiers = config.parse_store(text)
    mooncake = config.MooncakeTier("master", 50051, 1024)
    assert tiers[1:] == (config.ServiceTier("10.0.0.7", 8300), config.ValkeyTier("cache", 6379), mooncake)
    assert ",".join(map(str, tiers)) == text
    assert config.parse_store("mooncake:[::1]:50051") == (config.MooncakeTier("::1", 50051),)
    for bad in (
        "service:8300",
        "service:host:0",
        "valkey:host:99999",
        "valkey:host:port",
        "mooncake:h",
        "mooncake:h:0",
    ):
        with pytest.raises(StartupError, match="no tier"):
            config.parse_store(bad)
    with pytest.raises(StartupError, match="size"):
        config.parse_store("mooncake:host:50051:much")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("90", 90), ("1.5 h", 5400), ("30min", 1800), ("2d", 172800)]
)
def test_times(text: str, seconds: float) -> None:
    assert config.parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1s", "0", "1 week"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(StartupError, match="not a time"):
        config.parse_seconds(text)


def test_a_service_needs_a_secret_that_up_would_make_up() -> None:
    config.check_service(config.parse_store("host:1GiB,dir:/mnt"), "")
    config.check_service(config.parse_store("service:127.0.0.1:8300"), "secret")
    with pytest.raises(StartupError, match="TWOSTROKE_SECRET"):
        config.check_service(config.parse_store("service:127.0.0.1:8300"), "")


def test_api_keys_are_those_given_and_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TWOSTROKE_API_KEYS", raising=False)
    assert config.api_keys() == ()
    monkeypatch.setenv("TWOSTROKE_API_KEYS", "b, c,,a")
    assert config.api_keys(["a"]) == ("a", "b", "c")
    assert config.child_environment("s", ("x", "y"))["TWOSTROKE_API_KEYS"] == "x,y"
    for bad in ("two words", "a,b", "\u00e4", "x" * 513):
        with pytest.raises(StartupError, match="API key"):
            config.api_keys([bad])


def test_a_quota_holds_a_block() -> None:
    assert config.check_quota(None, 10) is None
    assert config.check_quota(10, 10) == 10
    with pytest.raises(StartupError, match="does not hold one block"):
        config.check_quota(9, 10)
