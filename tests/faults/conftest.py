"""Fleets for the matrix, and how often each row is played."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.fleet import Fleets


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slow")


@pytest.fixture(scope="package")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleets]:
    running = Fleets(tmp_path_factory.mktemp("faults"))
    yield running
    running.close()
