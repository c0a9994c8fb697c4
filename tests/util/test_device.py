"""util/device.py: how much memory is available, and an error that can be caught where there is too little."""
import pathlib
import resource

import pytest
import torch

from util import device
from util.errors import out_of_memory


@pytest.mark.skipif(not pathlib.Path("/proc/meminfo").exists(), reason="not Linux")
def test_a_process_gets_an_error_above_its_limit():
    before = resource.getrlimit(resource.RLIMIT_AS)
    free = device.available(torch.device("cpu"))
    assert 0 < free <= device.kilobytes("/proc/meminfo", "MemTotal")
    try:
        device.limit_memory()
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        assert 0.5 < (limit - device.kilobytes("/proc/self/status", "VmSize")) / free < 1.5
        with pytest.raises(RuntimeError) as error:
            torch.empty(2 * free, dtype=torch.uint8)
        assert out_of_memory(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
