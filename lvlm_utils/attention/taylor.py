"""Attention times its gradient, summed over pairs of token groups in the blocks in which both are made: never N x N."""

import torch
from torch import Tensor

from lvlm_utils.attention.streaming import HIDDEN
from lvlm_utils.attention.visibility import Visibility


@torch.no_grad()
def pair_sums(
    query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, scale: float, view: Visibility, groups: Tensor,
    absolute: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums of I_ij = sum over heads of |A_ij dL/dA_ij|, with its absolute value "inside" that sum or "outside".

    Gives the sums over the queries i of one group and the keys j of another, (batch, G, G), and the part of them that
    is on the diagonal, (batch, G). As O_i = sum_j A_ij V_j, dL/dA_ij = dO_i . V_j.

    query (batch, heads, tokens, width), key and value (batch, key heads, tokens, width): what the attention function
    gets; gradient (batch, tokens, heads, width): dO, by what it gives; groups (batch, tokens, G): 1 or 0, and all 0 for
    padding. Everything is summed in the dtype of the groups.
    """
    dtype, (_, heads, _, width) = groups.dtype, query.shape
    sums = groups.new_zeros(len(groups), groups.shape[2], groups.shape[2])
    diagonal = sums[:, 0].clone()
    blocks = [(n, block) for part in view.parts for n in range(part.start, part.stop) for block in part.blocks]
    for prompt, block in blocks:
        rows, keys = slice(block.top, block.bottom), slice(block.first, block.end)
        # heads that share a key head stand one below the other: (key heads, heads x queries, width)
        queries = query[prompt, :, rows].to(dtype).mul(scale).reshape(key.shape[1], -1, width)
        scores = (queries @ key[prompt, :, keys].to(dtype).mT).view(heads, -1, block.end - block.first)
        visible = view.visible(block.top, block.bottom, slice(block.mixed, block.end), slice(prompt, prompt + 1))
        scores[..., block.mixed - block.first :].masked_fill_(~visible, HIDDEN)
        outputs = gradient[prompt, rows].to(dtype).transpose(0, 1).reshape(key.shape[1], -1, width)
        by_weights = (outputs @ value[prompt, :, keys].to(dtype).mT).view_as(scores)
        terms = scores.softmax(-1).mul_(by_weights)
        flow = terms.abs_().sum(0) if absolute == "inside" else terms.sum(0).abs_()
        sums[prompt] += groups[prompt, rows].T @ (flow @ groups[prompt, keys])
        itself = slice(max(block.top, block.first), min(block.bottom, block.end))  # rows beyond are padding
        diagonal[prompt] += flow.diagonal(block.top - block.first) @ groups[prompt, itself]
    return sums, diagonal
