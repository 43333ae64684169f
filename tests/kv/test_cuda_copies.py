"""What can be said about CUDA's driver where there is none. What it copies is tested in tests/cuda."""

from ctypes.util import find_library

import pytest

from twostroke.errors import StartupError
from twostroke.kv.cuda_copies import check_driver


@pytest.mark.skipif(find_library("cuda") is not None, reason="there is a driver here")
def test_a_machine_without_the_driver_is_told_what_it_needs() -> None:
    with pytest.raises(StartupError, match="needs one for CUDA 13"):
        check_driver()
