"""A reference in PyTorch for TE's Triton kernels that send tokens to experts and back.

A map of rows `[tokens, 2 * experts + 1]` holds for each token the rows of its copies among the permuted tokens, the
experts that these belong to, and how many there are.
"""

from __future__ import annotations

import torch


def make_row_id_map(routing_map, num_tokens, num_experts):
    """Return the map of rows for a mask `[tokens, experts]`; permuted rows are ordered by expert, then by token."""
    mask = routing_map.bool()
    order = torch.full((num_experts, num_tokens), -1)
    order[mask.T] = torch.arange(int(mask.sum()))
    rows = torch.zeros(num_tokens, 2 * num_experts + 1, dtype=torch.int32)
    for token in range(num_tokens):
        # As in the kernel, the last expert's row comes first.
        experts = mask[token].nonzero().flatten().flip(0)
        rows[token, : len(experts)] = order[experts, token].int()
        rows[token, num_experts : num_experts + len(experts)] = experts.int()
        rows[token, -1] = len(experts)
    return rows


def _pairs(row_id_map, num_experts):
    """Return token, permuted row and expert of every copy, each `[copies]`."""
    used = torch.arange(num_experts) < row_id_map[:, -1:]
    tokens = torch.arange(len(row_id_map))[:, None].expand_as(used)[used]
    return tokens, row_id_map[:, :num_experts][used].long(), row_id_map[:, num_experts:-1][used].long()


def permute_with_mask_map(
    inp, row_id_map, probs, scale, num_tokens, num_experts, num_out_tokens, hidden_size, scale_hidden_dim
):
    """Return copies of the tokens by expert `[copies, h]`, no scales, and the copies' probabilities `[copies]`."""
    tokens, rows, experts = _pairs(row_id_map, num_experts)
    output = inp.new_zeros(num_out_tokens, hidden_size)
    output[rows] = inp[tokens]
    if probs is None:
        return output, None, None
    permuted = probs.new_zeros(num_out_tokens)
    permuted[rows] = probs[tokens, experts]
    return output, None, permuted


def unpermute_with_mask_map(inp, row_id_map, merging_probs, permuted_probs, num_tokens, num_experts, hidden_size):
    """Return the sum of each token's copies `[tokens, h]`, weighted if asked for, and probabilities put back."""
    tokens, rows, experts = _pairs(row_id_map, num_experts)
    copies = inp[rows].float()
    if merging_probs is not None:
        copies = copies * merging_probs[tokens, experts].float()[:, None]
    output = torch.zeros(num_tokens, hidden_size).index_add_(0, tokens, copies).to(inp.dtype)
    if permuted_probs is None:
        return output, None
    probs = permuted_probs.new_zeros(num_tokens, num_experts)
    probs[tokens, experts] = permuted_probs[rows]
    return output, probs


def unpermute_with_mask_map_bwd_with_merging_probs(
    fwd_output_grad, row_id_map, fwd_input, merging_probs, num_tokens, num_experts, num_out_tokens, hidden_size
):
    """Return the gradients of the copies and of the weights of `unpermute_with_mask_map`."""
    tokens, rows, experts = _pairs(row_id_map, num_experts)
    grads = fwd_output_grad[tokens].float()
    act_grad = fwd_output_grad.new_zeros(num_out_tokens, hidden_size)
    act_grad[rows] = (grads * merging_probs[tokens, experts].float()[:, None]).to(act_grad.dtype)
    probs_grad = merging_probs.new_zeros(num_tokens, num_experts)
    probs_grad[tokens, experts] = (grads * fwd_input[rows].float()).sum(-1).to(probs_grad.dtype)
    return act_grad, probs_grad


def make_chunk_sort_map(split_sizes, sorted_indices, num_tokens, num_splits):
    """Return the row `[tokens]` to which each row moves if the chunks are put in another order."""
    chunks = torch.arange(num_tokens).split(split_sizes.tolist())
    moved = torch.cat([chunks[index] for index in sorted_indices.tolist()])
    rows = torch.empty(num_tokens, dtype=torch.int32)
    rows[moved] = torch.arange(num_tokens, dtype=torch.int32)
    return rows


def sort_chunks_by_map(inp, row_id_map, probs, num_tokens, hidden_size, is_forward):
    """Return the rows moved by a map of `make_chunk_sort_map`, or in a backward pass moved back."""
    rows = row_id_map.long()

    def move(values):
        if values is None or not is_forward:
            return None if values is None else values[rows]
        moved = torch.empty_like(values)
        moved[rows] = values
        return moved

    return move(inp), move(probs)


KERNELS = (
    make_row_id_map,
    permute_with_mask_map,
    unpermute_with_mask_map,
    unpermute_with_mask_map_bwd_with_merging_probs,
    make_chunk_sort_map,
    sort_chunks_by_map,
)
