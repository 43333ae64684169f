"""Tiny models with random weights, made once a session: whole workers can serve them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.tiny import make_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model by architecture, a key of ``tests.tiny.ARCHITECTURES``."""

    @cache
    def make(architecture: str) -> Path:
        return make_model(architecture, tmp_path_factory.mktemp(architecture.replace("+", "-")))

    return make
