"""Folding batch norms: the same function in eval mode, whatever kind of batch norm, wherever it stands."""
import pytest
import torch
from torch import nn

from util.fold import fold_batchnorm


def cases():
    """name: (module, how many batch norms stay)."""
    def conv(**kind):
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **kind), nn.ReLU())

    def alone(**kind):
        return nn.Sequential(nn.BatchNorm2d(3, **kind), nn.Conv2d(3, 4, 3))

    for place, make in (("after a convolution", conv), ("before one", alone)):
        yield place, make(), 0
        yield f"{place}, without affine", make(affine=False), 0
        yield f"{place}, without statistics", make(track_running_stats=False), 1
        yield f"{place}, without either", make(affine=False, track_running_stats=False), 1
    yield "itself a batch norm", nn.BatchNorm2d(3), 0
    yield "two, after a ReLU", nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.BatchNorm2d(3)), 0


@torch.no_grad()
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case[0])
def test_the_folded_module_is_the_same_function(case):
    torch.manual_seed(0)
    _, module, left = case
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
