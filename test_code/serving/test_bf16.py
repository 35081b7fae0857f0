"""The imitation of bf16 that the bounds of the tests of readers come from."""

from __future__ import annotations

import torch

from test_code.support import bf16

# Between 1 and 2, numbers of bf16 are this far apart.
UNIT = 2.0**-7


def test_rounding_by_chance_keeps_the_mean_and_has_twice_the_variance_of_the_nearest():
    x = 1 + torch.rand(1 << 18, generator=torch.Generator().manual_seed(0))
    error = bf16.stochastic(x, torch.Generator().manual_seed(1)) - x
    nearest = x.bfloat16().float() - x
    # Five standard deviations of the mean; squares vary less than they are large.
    limit = 5 / x.numel() ** 0.5
    assert abs(error.mean()) < limit * UNIT
    assert abs(error.square().mean() / (UNIT**2 / 6) - 1) < limit
    assert abs(nearest.square().mean() / (UNIT**2 / 12) - 1) < limit


def test_numbers_of_bf16_stay():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    x[:4] = torch.tensor([0.0, -0.0, float("inf"), float("-inf")])
    assert torch.equal(bf16.stochastic(x, torch.Generator().manual_seed(1)), x)


def test_a_model_is_imitated_inside_the_context_only():
    linear = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    before = linear(x)
    with bf16.imitated(linear, 0):
        inside = linear(x)
    assert torch.equal(inside.bfloat16().float(), inside) and not torch.equal(inside, before)
    assert torch.equal(linear(x), before)
