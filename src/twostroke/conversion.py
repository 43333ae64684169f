"""Turns a GGUF file into a Hugging Face directory, once, and keeps it in the cache.

The work runs in a child process (``python -m twostroke.conversion``): its memory goes back when it ends, and a file
that crashes a reader costs an error message, not the server.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from twostroke.config import cache_dir
from twostroke.errors import ModelError

_REVISION = 1  # part of the digest; raise it when the conversion's result changes
_MAGIC = b"GGUF"


def converted(gguf: Path, progress: Callable[[str], None]) -> Path:
    """The cached directory of ``gguf``; converts it first if this content has not been seen before.

    The directory appears by one rename, so it is whole or absent whenever a process is killed. Processes that want the
    same model at the same time wait for the first.

    Raises:
        ModelError: the file is no GGUF, is truncated, or transformers does not know its architecture.
    """
    models = cache_dir() / "models"
    target = models / f"{gguf.stem}-{_digest(gguf)}"
    if target.is_dir():
        return target
    models.mkdir(parents=True, exist_ok=True)
    with _locked(models / f"{target.name}.lock", progress) as lock:
        if not target.is_dir():
            with _workspace(models, target.name) as work:
                progress(f"converting {gguf.name} (only the first time, about 20 s for a small model)")
                _run(gguf, work, lock, progress)
                _flush(work)
                work.rename(target)
    return target


def _digest(gguf: Path) -> str:
    """128 bits over all of the content, because two fine-tunes may share size, header and last tensor."""
    import xxhash

    digest = xxhash.xxh3_128(b"revision %d" % _REVISION)
    try:
        with gguf.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ModelError(f"{gguf} is not a GGUF file (name a directory for safetensors weights)")
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise ModelError(f"cannot read {gguf}: {error.strerror}") from error
    return digest.hexdigest()[:20]


@contextmanager
def _locked(path: Path, progress: Callable[[str], None]) -> Iterator[IO[bytes]]:
    """An exclusive hold on one model's place in the cache. The kernel ends it with the last process that holds it."""
    with path.open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that converts the same model")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


@contextmanager
def _workspace(models: Path, name: str) -> Iterator[Path]:
    """A temporary directory beside the target. Under the lock, any other one of that name was left by a killed one."""
    prefix = f".{name}."
    for stale in models.glob(f"{prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=models))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)  # not there any more after success


def _run(gguf: Path, work: Path, lock: IO[bytes], progress: Callable[[str], None]) -> None:
    """Convert in a child. It shares the lock, so that nobody takes over while it still writes."""
    command = [sys.executable, "-m", "twostroke.conversion", str(gguf), str(work), str(os.getpid())]
    with tempfile.TemporaryFile("w+") as complaints:
        with subprocess.Popen(  # noqa: S603 - our own interpreter and module; the file name is one argument
            command, stdout=subprocess.PIPE, stderr=complaints, text=True, pass_fds=[lock.fileno()]
        ) as child:
            try:
                for line in child.stdout or ():
                    progress(line.rstrip())
            except BaseException:
                child.kill()
                raise
        if child.returncode:
            complaints.seek(0)
            reason = (complaints.read().strip().splitlines() or [f"exit code {child.returncode}"])[-1]
            raise ModelError(f"cannot convert {gguf}: {reason}")


def _flush(work: Path) -> None:
    """Bytes reach the disk before the name does, so that a power cut leaves no short file under the final name."""
    for file in work.iterdir():
        with file.open("rb") as data:
            os.fsync(data.fileno())


def _check_whole(gguf: Path) -> None:
    """Reading the GGUF header maps every tensor, which fails where the file ends too early."""
    import gguf as gguf_format

    try:
        gguf_format.GGUFReader(str(gguf))
    except (ValueError, IndexError, KeyError, OSError, MemoryError) as error:
        raise ModelError(f"the file is truncated or corrupt ({error})") from error


def _convert(gguf: Path, work: Path) -> None:
    """Dequantize to bfloat16 and write safetensors, tokenizer and chat template into ``work``."""
    print("importing torch and transformers", flush=True)  # noqa: T201 - the parent's progress lines
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    print("converting the tokenizer", flush=True)  # noqa: T201
    AutoTokenizer.from_pretrained(**place).save_pretrained(work)
    print("converting the weights", flush=True)  # noqa: T201
    dense = GgufConfig(gguf_file=gguf.name, dequantize=True)
    AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16, quantization_config=dense).save_pretrained(work)


def main(arguments: list[str]) -> int:
    """``conversion SOURCE DIRECTORY PARENT``: the child process."""
    from twostroke.parent import follow

    gguf, work = Path(arguments[0]).resolve(), Path(arguments[1])
    follow(int(arguments[2]))
    try:
        _check_whole(gguf)
    except ModelError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    _convert(gguf, work)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
