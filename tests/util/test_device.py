"""util/device.py: how much memory is available, and an error that can be caught where there is too little."""
import pathlib
import resource

import pytest
import torch

from util import device
from util.errors import out_of_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(not pathlib.Path("/proc/meminfo").exists(), reason="not Linux")
def test_a_process_knows_its_limit_and_gets_an_error_above_it():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = device.kilobytes("/proc/self/status", "VmSize")
    try:
        assert 0 < device.available(CPU) <= device.kilobytes("/proc/meminfo", "MemTotal")
        resource.setrlimit(resource.RLIMIT_AS, (taken + 10 ** 9, hard))
        assert 0.8e9 < device.available(CPU) <= 1e9
        device.limit_memory()                                             # a lower limit stays
        assert resource.getrlimit(resource.RLIMIT_AS)[0] <= taken + 10 ** 9
        with pytest.raises(RuntimeError) as error:
            torch.empty(2 * 10 ** 9, dtype=torch.uint8)
        assert out_of_memory(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
