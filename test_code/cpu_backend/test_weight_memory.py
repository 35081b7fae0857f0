"""Building a model on a CPU rank takes the memory of its weights, and draws the values that Megatron draws."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

from test_code.support import tiny

pytestmark = pytest.mark.cpu

ROWS, COLUMNS = 512, 384
NAMES = ("tensor_model_parallel", "partition_dim", "partition_stride")


def layer(kind: str, dtype: torch.dtype) -> Any:
    """Return a layer of Megatron with new weights."""
    from megatron.core.tensor_parallel import layers

    config = tiny.config(params_dtype=dtype)
    settings = {"config": config, "init_method": config.init_method}
    if kind == "embedding":
        return layers.VocabParallelEmbedding(ROWS, COLUMNS, **settings)
    if kind == "columns":
        return layers.ColumnParallelLinear(COLUMNS, ROWS, bias=False, **settings)
    return layers.RowParallelLinear(
        COLUMNS, ROWS, bias=False, input_is_parallel=True, skip_bias_add=True, **settings
    )  # fmt: skip


def built(kind: str, dtype: torch.dtype, tp: int) -> list[tuple[torch.Tensor, list, int]]:
    """Build a layer with Megatron's own initialisation and with ours.

    Returns:
        Each time the weight, the attributes that name the rank's part of it, and the most bytes allocated at a time.
    """
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import layers

    tiny.init_parallel(tp=tp)
    ours, found = layers._initialize_affine_weight_cpu, []
    for initialize in (ours.__wrapped__, ours):
        torch.manual_seed(7)
        tensor_parallel.model_parallel_cuda_manual_seed(7)
        made: list = []
        with patch.object(layers, ours.__name__, initialize):
            peak = tiny.peak_bytes(lambda made=made: made.append(layer(kind, dtype)))
        weight = made[0].weight
        found.append((weight.detach().clone(), [getattr(weight, name) for name in NAMES], peak))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["embedding", "columns", "rows"])
def test_weights_are_drawn_in_place_as_megatron_draws_them(ranks, kind, tp, dtype):
    for (weight, attributes, before), (own, own_attributes, peak) in ranks(tp).run(built, kind, dtype, tp):
        assert torch.equal(weight, own)
        assert attributes == own_attributes and attributes[0]
        if tp == 1 and dtype == torch.float32:
            # The rest are states of generators.
            assert peak < 1.1 * own.nbytes < 2.9 * own.nbytes < before
