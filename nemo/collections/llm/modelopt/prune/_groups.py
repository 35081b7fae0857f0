"""Pruning of query groups, which modelopt removed in 0.41: slices of the attention weights.

Shapes: G query groups, n heads per group, d channels per head, h hidden size. ``linear_qkv.weight`` is
``[G * (n + 2) * d, h]``, each group's queries, key and value together; ``linear_proj.weight`` is ``[h, G * n * d]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def rank_heads(squares: Tensor, groups: int, channels: int, keep_groups: int, keep_per_group: int) -> Tensor:
    """Return the heads to keep: in the most important groups the most important heads.

    A head's importance is the L2 norm of its channels' (Minitron, arXiv 2407.14679), a group's that of its heads.

    Args:
        squares: ``[G * n * d]``, the sum over the data of the squared mean activation at the output projection.
        groups: G.
        channels: d.
        keep_groups: number of groups to keep.
        keep_per_group: number of heads to keep in each.

    Returns:
        ``[keep_groups, keep_per_group]`` head numbers in ascending order.
    """
    importance = squares.view(groups, -1, channels).sum(-1)  # [G, n]
    kept = importance.sum(-1).topk(keep_groups).indices.sort().values
    heads = importance[kept].topk(keep_per_group, dim=-1).indices.sort(dim=-1).values
    return heads + kept[:, None] * importance.shape[1]


def slice_attention(attention: nn.Module, heads: Tensor, groups: int, channels: int) -> None:
    """Keep the given heads of a self-attention module, and the key and value of their groups, in place.

    Args:
        attention: Megatron's ``SelfAttention``.
        heads: ``[keep_groups, keep_per_group]``.
        groups: G before.
        channels: d.
    """
    module: Any = attention
    per_group = module.num_attention_heads_per_partition // groups
    heads = heads.to(module.linear_proj.weight.device)
    kept = heads[:, 0] // per_group  # [keep_groups]
    local = heads - kept[:, None] * per_group
    keys = torch.tensor([per_group, per_group + 1], device=heads.device).expand(len(kept), 2)
    rows = _channels_of((kept[:, None] * (per_group + 2) + torch.cat([local, keys], dim=1)).flatten(), channels)
    columns = _channels_of(heads.flatten(), channels)
    for linear, dim, index in ((module.linear_qkv, 0, rows), (module.linear_proj, 1, columns)):
        linear.weight = nn.Parameter(linear.weight.detach().index_select(dim, index).contiguous())
    if module.linear_qkv.bias is not None:
        module.linear_qkv.bias = nn.Parameter(module.linear_qkv.bias.detach()[rows].contiguous())
    _set(module.linear_qkv, output_size=len(rows), output_size_per_partition=len(rows), out_features=len(rows))
    _set(module.linear_proj, input_size=len(columns), input_size_per_partition=len(columns), in_features=len(columns))
    _set(
        module,
        num_attention_heads_per_partition=heads.numel(),
        num_query_groups_per_partition=len(kept),
        query_projection_size=len(columns),
        kv_projection_size=len(kept) * channels,
    )
    _set(
        module.core_attention,
        num_attention_heads=heads.numel(),
        num_attention_heads_per_partition=heads.numel(),
        num_query_groups_per_partition=len(kept),
        hidden_size_per_partition=len(columns),
        num_gqa_groups=len(kept),
        num_gqa_groups_per_partition=len(kept),
    )


def prune_groups(
    attentions: Mapping[str, nn.Module], squares: Mapping[str, Tensor], heads: int, groups: int, config: Any
) -> None:
    """Prune the heads and query groups of every attention layer and record the sizes in the configuration.

    Args:
        attentions: name in the model -> module, layers that were dropped may be among them.
        squares: name -> ``[G * n * d]``, what `rank_heads` takes.
        heads: number of heads to keep in all.
        groups: number of query groups to keep.
        config: the model's ``TransformerConfig``, still with the original heads and groups.
    """
    before, channels = config.num_query_groups or config.num_attention_heads, config.kv_channels
    for name, attention in attentions.items():
        kept = rank_heads(squares[name].float(), before, channels, groups, heads // groups)
        slice_attention(attention, kept, before, channels)
    config.num_attention_heads, config.num_query_groups = heads, groups


def _channels_of(units: Tensor, channels: int) -> Tensor:
    """Return the channel numbers of heads, ``[len(units) * channels]``."""
    return (units[:, None] * channels + torch.arange(channels, device=units.device)).flatten()


def _set(module: nn.Module, **sizes: int) -> None:
    """Write the sizes that this class of module has."""
    for name, value in sizes.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)
