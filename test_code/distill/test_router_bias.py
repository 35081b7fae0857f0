"""A teacher's routers use their biases, and Megatron's update of expert biases does not see them."""

from __future__ import annotations

import pytest
import torch

from nemo.collections.llm.modelopt.distill._router_bias import keep_from_update


class Router(torch.nn.Module):
    """Add a bias, as the router of a mixture of experts does."""

    def __init__(self, bias):
        super().__init__()
        if bias is None:
            self.expert_bias = None
        else:
            self.register_buffer("expert_bias", bias)

    def forward(self, x):
        """Return the scores."""
        if x is None:
            raise ValueError("no tokens")
        return x if self.expert_bias is None else x + self.expert_bias


@pytest.mark.parametrize("bias", [None, torch.tensor([1.0, -1.0])])
def test_the_bias_is_seen_only_while_the_router_runs(bias):
    teacher, x = torch.nn.Sequential(Router(bias)), torch.ones(3, 2)
    expected = teacher(x)
    keep_from_update(teacher)
    for _ in range(2):
        assert not any(hasattr(module, "expert_bias") for module in teacher.modules())
        assert torch.equal(teacher(x), expected)
    with pytest.raises(ValueError, match="no tokens"):
        teacher(None)
    assert not hasattr(teacher[0], "expert_bias")


def test_a_stand_in_for_a_teacher_is_left_alone():
    keep_from_update(object())
