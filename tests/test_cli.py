"""The command line: what it shows, what it refuses, and what it hands on."""

import os
import subprocess
import sys

import pytest

from twostroke import __version__, cli
from twostroke.config import EngineConfig, RouterConfig, StoreConfig, UpConfig, WorkerConfig

VERBS = ["up", "serve", "router", "chat", "workers drain", "workers role", "workers list"]


def taken(monkeypatch: pytest.MonkeyPatch, module: str, arguments: list[str]) -> object:
    """The config that ``arguments`` make; the process itself is not started."""
    configs: list[object] = []

    def run(config: object) -> int:
        configs.append(config)
        return 7

    monkeypatch.setattr(f"{module}.run", run)
    assert cli.run(arguments) == 7
    return configs[0]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What stderr says about arguments that cannot be started: one line."""
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("twostroke: ")
    assert err.count("\n") == 1
    return err


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_a_screen(verb: str) -> None:
    command = [sys.executable, "-m", "twostroke", *verb.split(), "--help"]
    environment = {**os.environ, "COLUMNS": "100"}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    assert 5 < len(shown) <= 44
    assert max(len(line) for line in shown) <= 100


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_defaults(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run([*verb.split(), "--help"])
    shown = capsys.readouterr().out
    assert "[default: " in shown
    assert "parent-pid" not in shown


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_torch_is_not_imported_for_the_command_line() -> None:
    code = (
        "import sys, twostroke.cli, twostroke.config, twostroke.up; twostroke.cli.run(['up', '--help']); "
        "twostroke.config.gpus(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (("up", "--prefil", "2"), "--prefill"),
        (("serve", "--rol", "decode"), "--role"),
        (("router", "--decod", "http://a:1"), "--decode"),
        (("serv",), "serve"),
        (("chatt",), "chat"),
    ],
)
def test_the_right_word_is_suggested(
    arguments: tuple[str, ...], suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"Did you mean {suggestion}" in refused(capsys, *arguments).replace('"', "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("up", "--prefill", "two"), "--prefill"),
        (("up", "--prefill", "0", "--decode", "0"), "no workers"),
        (("up", "--prefill", "2"), "--decode"),
        (("up", "--decode", "1"), "--prefill"),
        (("up", "--colocated", "-1"), "negative"),
        (("up", "--schedule", "later"), "concurrent"),
        (("router", "--on-loss", "cry"), "continue"),
        (("up", "--port", "0"), "--port"),
        (("up", "--port", "65536"), "--port"),
        (("up", "--host", "0.0.0.0"), "cluster secret"),
        (("up", "--kv-memory", "lots"), "not a size"),
        (("up", "--block-size", "0"), "--block-size"),
        (("up", "--chunk-size", "-5"), "--chunk-size"),
        (("up", "--threads", "-1"), "--threads"),
        (("up", "--max-batch", "0"), "--max-batch"),
        (("up", "--gpu-memory-utilization", "0"), "--gpu-memory-utilization"),
        (("up", "--gpu-memory-utilization", "1.01"), "--gpu-memory-utilization"),
        (("up", "--gpu-memory-utilization", "nan"), "--gpu-memory-utilization"),
        (("up", "--device", "gpu"), "not a device"),
        (("up", "--devices", "cuda:0,,cuda:1"), "not a device"),
        (("up", "--devices", "auto"), "not a device"),
        (("up", "--devices", "cuda:0", "--device", "cpu"), "one of them"),
        (("up", "/no/such/model", "--port", "18923"), "no such model"),
        (("up", "a", "b"), "b"),
        (("serve", "--role", "colocated"), "both"),
        (("serve", "--host", "0.0.0.0"), "cluster secret"),
        (("serve", "--dtype", "int4"), "bfloat16"),
        (("serve", "--load-format", "pickle"), "dummy"),
        (("serve", "--device", "cuda:x"), "not a device"),
        (("serve", "--devices", "cuda:0"), "--device"),
        (("router", "--short-prompt", "-1"), "--short-prompt"),
        (("router", "--max-queue", "0"), "--max-queue"),
        (("router", "--retries", "-1"), "--retries"),
        (("serve", "--router", "localhost:8000"), "http://"),
        (("serve", "--drain-timeout", "-1"), "--drain-timeout"),
        (("workers", "list", "--url", "nowhere"), "not the URL"),
        (("workers", "list", "--url", "http://127.0.0.1:1"), "no router answers"),
        (("workers", "role", "w", "king"), "prefill"),
        (("workers", "drian", "w"), "drain"),
        (("router", "--colocated", "localhost:8100"), "http://"),
        (("router", "--colocated", "http://a:1", "http://a:1"), "more than once"),
        (("chat", "--url", "nowhere"), "not a URL"),
        (("chat", "--url", "http://127.0.0.1:1"), "no server answers"),
    ],
)
def test_one_line_says_what_is_wrong(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TWOSTROKE_SECRET", raising=False)
    assert words in refused(capsys, *arguments)


def test_a_broken_command_exits_with_2_and_no_traceback() -> None:
    command = [sys.executable, "-m", "twostroke", "router", "--decode", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


# -- what is handed on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ([], (1, 1, 0)),
        (["--colocated", "2"], (0, 0, 2)),
        (["--prefill", "2", "--decode", "3"], (2, 3, 0)),
        (["--prefill", "1", "--colocated", "1"], (1, 0, 1)),
    ],
)
def test_up_counts(monkeypatch: pytest.MonkeyPatch, arguments: list[str], counts: tuple[int, int, int]) -> None:
    config = taken(monkeypatch, "twostroke.up", ["up", *arguments])
    assert isinstance(config, UpConfig)
    assert (config.prefill, config.decode, config.colocated) == counts


def test_up_hands_on_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "up m --host ::1 --port 9 --schedule serial --policy round-robin --insecure --dtype float32"
    flags += " --max-model-len 99 --kv-memory 2MiB --block-size 8 --chunk-size 64 --threads 3 --max-batch 5"
    flags += " --load-format dummy --gpu-memory-utilization 0.5 --devices cuda:1,cpu --on-loss error --link nixl"
    flags += " --link-device mlx5_2,mlx5_3"
    engine = EngineConfig(
        dtype="float32",
        load_format="dummy",
        block_tokens=8,
        gpu_memory_utilization=0.5,
        kv_memory=2 << 20,
        max_model_len=99,
        max_batch=5,
        token_budget=64,
        threads=3,
    )
    assert taken(monkeypatch, "twostroke.up", flags.split()) == UpConfig(
        "m",
        1,
        1,
        0,
        "::1",
        9,
        "serial",
        "round-robin",
        True,
        engine,
        ("cuda:1", "cpu"),
        "error",
        "nixl",
        ("mlx5_2", "mlx5_3"),
    )


def test_serve_hands_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    config = taken(monkeypatch, "twostroke.worker.worker", ["serve", "--device", "cuda:1"])
    assert config == WorkerConfig(engine=EngineConfig(device="cuda:1"))


def test_serve_hands_on_its_link(monkeypatch: pytest.MonkeyPatch) -> None:
    config = taken(monkeypatch, "twostroke.worker.worker", ["serve", "--link", "tcp"])
    assert config == WorkerConfig(link="tcp")
    config = taken(monkeypatch, "twostroke.worker.worker", ["serve", "--link-device", "mlx5_2"])
    assert config == WorkerConfig(link_devices=("mlx5_2",))


def test_no_flags_mean_the_configs_own_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken(monkeypatch, "twostroke.up", ["up"]) == UpConfig()
    assert taken(monkeypatch, "twostroke.worker.worker", ["serve"]) == WorkerConfig()
    urls = ("http://a:1",)
    assert taken(monkeypatch, "twostroke.router.router", ["router", "--colocated", *urls]) == RouterConfig(
        colocated=urls
    )


def test_serve_hands_on_its_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "serve --router http://a:1 http://b:2 --drain-timeout 5"
    config = taken(monkeypatch, "twostroke.worker.worker", flags.split())
    assert config == WorkerConfig(routers=("http://a:1", "http://b:2"), drain_timeout=5.0)


def test_router_hands_on_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "router --short-prompt 9 --max-queue 8 --retries 7 --policy prefix-aware"
    config = taken(monkeypatch, "twostroke.router.router", flags.split())
    assert config == RouterConfig(short_prompt=9, max_queue=8, retries=7, policy="prefix-aware")


def test_router_takes_several_urls_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "router --prefill http://a:1 http://b:1 --decode http://c:1 --decode http://d:1 --on-loss error"
    config = taken(monkeypatch, "twostroke.router.router", flags.split())
    assert config == RouterConfig(
        prefill=("http://a:1", "http://b:1"), decode=("http://c:1", "http://d:1"), on_loss="error"
    )


def test_keys_and_quotas_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOSTROKE_API_KEYS", "e")
    flags = ["--api-key", "a", "--api-key", "b", "--tenant-quota", "2MiB"]
    config = taken(monkeypatch, "twostroke.worker.worker", ["serve", *flags])
    assert config == WorkerConfig(tenant_quota=2 << 20, api_keys=("a", "b", "e"))
    config = taken(monkeypatch, "twostroke.up", ["up", *flags])
    assert config == UpConfig(tenant_quota=2 << 20, api_keys=("a", "b", "e"))
    assert taken(monkeypatch, "twostroke.router.router", ["router", *flags[:2]]) == RouterConfig(api_keys=("a", "e"))
    config = taken(monkeypatch, "twostroke.store.process", ["store", "--memory", "1GiB", *flags[4:]])
    assert config == StoreConfig(memory=1 << 30, tenant_quota=2 << 20)
