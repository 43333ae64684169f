"""The embedded model and what transformers itself generates with it, the reference of all end-to-end tests."""

import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.prompts import LONGEST, TEXTS
from tests.e2e.system import System, descendants, launch, left_shared, shared_files
from tests.tiny import VOCAB, generate, make_model
from twostroke import models

FLOAT32 = ("--dtype", "float32")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # as workers choose it
ROLES = {"prefill-0": "prefill", "decode-0": "decode"}
HAND_OVER = ("--short-prompt", "0")  # also what the decode worker could compute itself, or knows


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def _nothing_left() -> Iterator[None]:
    """No process and no shared-memory file outlives the tests."""
    before = shared_files()
    yield
    assert descendants() == []
    assert left_shared(before) == set()


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The embedded model's directory."""
    return models.resolve(None, lambda _: None)


class Reference:
    """Greedy generation by transformers, in float32, one prompt at a time, on the device that the workers use."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(DEVICE)
        self.generate = cache(self._generate)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids."""
        return tuple(self._tokenizer(text).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def prompts(self) -> list[tuple[int, ...]]:
        """All test prompts: 1 to 4,000 tokens."""
        return [self.encode(text) for text in TEXTS] + [self.encode(LONGEST)[:4000]]

    def _generate(self, prompt: tuple[int, ...], tokens: int) -> list[int]:
        ids = torch.tensor([prompt], device=DEVICE)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # two would wait for each other, where others want the cores too
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=self._model.config.vocab_size,  # no such token: never ends early, like ignore_eos
                pad_token_id=0,
            )
        torch.set_num_threads(threads)
        return [int(token) for token in out[0, len(prompt) :]]


@pytest.fixture(scope="session")
def reference(embedded: Path) -> Reference:
    return Reference(embedded)


class Tiny:
    """A tiny model with random weights: what depends on settings rather than on a real model is proved with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = make_model("Qwen3ForCausalLM", directory, max_position_embeddings=4096)

    def prompts(self) -> list[tuple[int, ...]]:
        """Prompts of 1 to 1,000 tokens, some around whole blocks."""
        pick = random.Random(1)
        return [tuple(pick.randrange(2, VOCAB) for _ in range(n)) for n in (1, 2, 15, 16, 17, 64, 65, 193, 400, 1000)]

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Greedy generation by transformers; never ends early."""
        return generate(self.directory, prompt, tokens, ends=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One prefill and one decode worker in float32, with chunks shorter than most prompts."""
    engine = [*FLOAT32, "--chunk-size", "192"]
    with launch(tmp_path_factory.mktemp("logs"), ROLES, engine=engine, router=HAND_OVER) as running:
        yield running
