"""BatchNorm statistics computed anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from easgd_local import recalibrate


def network() -> nn.Sequential:
    torch.manual_seed(3)
    norms = nn.BatchNorm1d(5, momentum=0.3), nn.BatchNorm1d(5, affine=False)
    return nn.Sequential(nn.Linear(3, 5), norms[0], nn.Dropout(0.5), norms[1])


def batches(count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(7, 3, generator=torch.Generator().manual_seed(i)) for i in range(count)]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 1), lambda x: [x]])
def test_statistics_become_the_mean_over_the_batches(wrap):
    model = network()
    recalibrate(model, [wrap(batch) for batch in batches()])
    hidden = [model[0](batch) for batch in batches()]
    expected = sum(h.mean(0) for h in hidden) / 3
    torch.testing.assert_close(model[1].running_mean, expected.detach(), rtol=1e-5, atol=1e-6)
    expected = sum(h.var(0) for h in hidden) / 3
    torch.testing.assert_close(model[1].running_var, expected.detach(), rtol=1e-5, atol=1e-6)


def test_nothing_but_the_statistics_changes():
    model = network().train()
    model[3].eval()
    weights = {name: value.clone() for name, value in model.named_parameters()}
    before = torch.get_rng_state()
    recalibrate(model, batches())
    assert [module.training for module in model] == [True, True, True, False]
    assert (model[1].momentum, model[3].momentum) == (0.3, 0.1)
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), before)  # no dropout


def test_statistics_of_nothing_are_refused_and_nothing_has_changed():
    model = network()
    recalibrate(model, batches())
    mean = model[1].running_mean.clone()
    with pytest.raises(ValueError, match=r"^batches: there is none"):
        recalibrate(model, [])
    assert torch.equal(model[1].running_mean, mean)


def test_a_model_without_batch_norm_needs_no_batches():
    recalibrate(nn.Linear(3, 2), [])
