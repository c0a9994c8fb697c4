"""Folding batch norms: the same function in eval mode, whatever kind of batch norm, wherever it stands."""
import pytest
import torch
from torch import nn

from util.fold import fold_batchnorm


def conv(**kind):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **kind), nn.ReLU())


CASES = {                                    # name: (module, how many batch norms stay)
    "after a convolution": (conv(), 0), "without affine": (conv(affine=False), 0),
    "without statistics": (conv(track_running_stats=False), 1),
    "before a convolution": (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), 0),
    "two, after a ReLU": (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3)), 0),
    "itself a batch norm": (nn.BatchNorm2d(3), 0)}


@torch.no_grad()
@pytest.mark.parametrize("module, left", CASES.values(), ids=CASES)
def test_the_folded_module_is_the_same_function(module, left):
    torch.manual_seed(0)
    module = module.double()
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            for value in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
                if value is not None:
                    nn.init.uniform_(value, 0.5, 2)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    folded = fold_batchnorm(module)          # from training mode
    torch.testing.assert_close(folded(x), module.eval()(x), rtol=1e-9, atol=1e-9)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == left and not folded.training
    for value in folded.parameters():        # the copy shares no memory with the original
        value.zero_()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
