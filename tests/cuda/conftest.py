"""Without a GPU, nothing here is even imported: what it tests needs packages that only come with one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


class _Skipped(pytest.Module):
    """A module that is left alone."""

    def collect(self) -> Iterator[pytest.Item | pytest.Collector]:
        pytest.skip("needs a GPU", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """pytest's hook: who collects this file; ``None`` is the usual one."""
    if torch.cuda.is_available():
        return None
    return _Skipped.from_parent(parent, path=module_path)
