"""Schemes, and what is checked before one starts."""

from pathlib import Path

import pytest

from twostroke.bench import checks, schemes
from twostroke.bench.checks import Machine, ModelFacts, Room, read_model
from twostroke.bench.plan import Settings, Workloads
from twostroke.bench.runner import prepare, up_line
from twostroke.bench.schemes import SCHEMES, Scheme
from twostroke.bench.workload import Grid
from twostroke.cli import explain
from twostroke.config import GiB
from twostroke.errors import StartupError

MODEL = ModelFacts("m", context=8192, vocab=1000, weight_bytes=GiB // 4, kv_values=11_520)
MISSING = ("Unknown option", "Unknown command", "Invalid value")
LAPTOP = Machine(gpus=0, free_memory=16 * GiB)


def check(up: str, machine: Machine = LAPTOP, **fields: int) -> Room:
    scheme = Scheme(up, **fields)  # type: ignore[arg-type]
    return checks.check_scheme(scheme, up_line(scheme, Settings())("/s", 1), MODEL, machine, explain)


def test_every_built_in_scheme_is_understood_or_says_what_is_missing() -> None:
    """What the command line does not know yet is unavailable, with its own words; nothing is listed anywhere."""
    for name, scheme in SCHEMES.items():
        reason = ""
        try:
            room = checks.check_scheme(scheme, up_line(scheme, Settings())("/s", 1), MODEL, LAPTOP, explain)
        except StartupError as error:
            reason = error.message
        assert room.workers in (1, 2) if not reason else any(word in reason for word in MISSING), name
    assert check("--prefill 1 --decode 1").workers == 2


def test_room() -> None:
    assert check("--colocated 3 --dtype bfloat16") == Room(3, 8192, GiB // 23_040)
    assert check("") == Room(2, 8192, GiB // 46_080)  # it may turn out as float32
    assert check("--colocated 1 --max-model-len 500").tokens == 500
    assert check("--colocated 1 --kv-memory 23040KiB --dtype bfloat16").tokens == 1024
    assert check("--colocated 1 --kv-memory 23040KiB --dtype float32").tokens == 512
    assert check("--prefill 1 --decode 1", Machine(2, 0)) == Room(2, 8192, 0)  # GPUs have memory of their own


@pytest.mark.parametrize(
    ("up", "machine", "reason"),
    [
        ("--no-such-option 1", LAPTOP, "Unknown option"),
        ("--link carrier-pigeon", LAPTOP, "carrier-pigeon"),
        ("--colocated 9", Machine(0, 2 * GiB), "9 workers need about"),
        ("--colocated 1 --device cuda", LAPTOP, "needs a GPU"),
        ("--colocated 1 --chunk-size 0", LAPTOP, "--chunk-size"),
    ],
)
def test_what_cannot_run_says_why(up: str, machine: Machine, reason: str) -> None:
    with pytest.raises(StartupError, match=reason):
        check(up, machine)
    with pytest.raises(StartupError, match="needs 2 GPUs, there are 0"):
        check("--colocated 1", gpus=2)


def test_what_runs_beside_it_is_checked_too() -> None:
    scheme = Scheme("--colocated 1", beside=("no-such-verb --port {port}",))
    with pytest.raises(StartupError, match="no-such-verb"):
        checks.check_scheme(scheme, up_line(scheme, Settings())("/s", 1), MODEL, LAPTOP, explain)


def test_prepare_reports_and_leaves_out() -> None:
    settings = Settings(grid=Grid(input_lens=(100, 9000)), modes=("pd", "decode-only"), repeats=2)
    chosen = {
        "single": Scheme("--colocated 1"),
        "odd": Scheme("--odd"),
        "small": Scheme("--colocated 1 --kv-memory 8MiB"),
    }
    done = prepare(settings, chosen, Workloads(settings, 1000), MODEL, LAPTOP, explain)
    assert list(done.schemes) == ["single", "small"]
    assert [point.name for point in done.points["single"]] == [
        "single.pd.100.rate-128.0", "single.decode-only.100.rate-128.0",
        "single.pd.100.rate-128.1", "single.decode-only.100.rate-128.1",
    ]  # fmt: skip
    assert {point.mode for point in done.points["small"]} == {"pd"}
    assert "Unknown option" in done.skipped["odd"]
    assert "do not fit into the context of 8,192" in done.skipped["single, 9000"]
    assert "a pool holds 182" in done.skipped["small, 100, decode-only"]


def test_placeholders() -> None:
    scheme = Scheme("--store 'dir:{scratch}' --x {port}", beside=("store --port {port}",))
    assert scheme.arguments("/a b", 7) == ["--store", "dir:/a b", "--x", "7"]
    assert scheme.companions("/a b", 7) == [["store", "--port", "7"]]
    assert up_line(scheme, Settings(model="m", up="--threads 1"))("/s", 7) == [
        "up", "m", "--store", "dir:/s", "--x", "7", "--threads", "1"
    ]  # fmt: skip


def test_schemes_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('[other-way]\nup = "--prefill 1 --decode 1 --devices cuda:1,cuda:0"\ngpus = 2\n')
    assert schemes.read_schemes(file) == {"other-way": Scheme("--prefill 1 --decode 1 --devices cuda:1,cuda:0", gpus=2)}
    for text in ("[x", "[x]\nabout = 'no up'", "[x]\nup = ''\ncolour = 3"):
        file.write_text(text)
        with pytest.raises(StartupError, match=r"s\.toml"):
            schemes.read_schemes(file)
    with pytest.raises(StartupError, match=r"none\.toml"):
        schemes.read_schemes(tmp_path / "none.toml")


@pytest.mark.parametrize("names", [["pdd"], ["pd", "pd"], ["../x"]])
def test_names(names: list[str]) -> None:
    with pytest.raises(StartupError):
        schemes.select(names, {**SCHEMES, "../x": Scheme("")})
    assert list(schemes.select(["pd", "single"], SCHEMES)) == ["pd", "single"]


def test_facts_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"max_position_embeddings": 512, "vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4,'
        ' "num_key_value_heads": 2, "hidden_size": 32}'
    )
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10)
    assert read_model(tmp_path, "m") == ModelFacts("m", 512, 320, 10, 2 * 2 * 2 * 8)
