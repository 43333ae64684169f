"""What a worker refuses before it loads anything."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from twostroke.config import DiskTier, EngineConfig, HostTier, TierConfig, WorkerConfig
from twostroke.errors import StartupError
from twostroke.worker.loading import load


@pytest.mark.parametrize(
    ("device", "store"),
    [("cpu", [DiskTier(Path("disk"), 1 << 20)]), ("cuda:0", [HostTier(1 << 20)]), ("cuda:0", [])],
    ids=["no GPU", "no file", "no tier"],
)
def test_a_gpu_cannot_read_files_that_are_not_there(
    tiny_model: Callable[[str], Path], device: str, store: Sequence[TierConfig]
) -> None:
    engine = EngineConfig(device=device, gds="on")
    config = WorkerConfig(model=str(tiny_model("LlamaForCausalLM")), engine=engine, store=tuple(store))
    with pytest.raises(StartupError, match="--gds on is for a GPU with a tier in files"):
        load(config, "i", "s", lambda _: None)
