"""Tiny models with random weights, made once a session: whole workers can serve them. And who may run beside whom."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.tiny import make_model

_LONGEST = ("faults", "simulation", "e2e", "interop", "store", "links")  # begun first, so that all end together
_GROUP = re.compile(r"\[([^]:]+):")


class _Together(LoadScopeScheduling):  # type: ignore[misc]
    """With ``-n``, tests of a module stay together, as they share fixtures; or those whose parameter is ``group:…``."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        if named := _GROUP.search(test):
            return f"{file} {named[1]}"
        return "interop" if "/interop/" in file else file  # whose modules share workers


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> _Together:
    """Groups are begun in the order of their tests."""
    config.option.loadscopereorder = False
    return _Together(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """One after the other, tests keep the order of their names."""
    if hasattr(config, "workerinput"):
        items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    folder = item.path.parent.name
    return _LONGEST.index(folder) if folder in _LONGEST else len(_LONGEST)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model by architecture, a key of ``tests.tiny.ARCHITECTURES``."""

    @cache
    def make(architecture: str) -> Path:
        return make_model(architecture, tmp_path_factory.mktemp(architecture.replace("+", "-")))

    return make
