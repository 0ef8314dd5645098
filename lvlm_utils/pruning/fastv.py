"""FastV (Chen et al., ECCV 2024): drop the visual tokens that the last prompt token attends to least.

Matches the official inference code (pkunlp-icler/FastV, d165972): the score is the last query's row of layer K - 1,
mean over heads, and positions stay. Its paper speaks of attention from all tokens. K = 2 as in the paper. Where the
code looks at sample 0 and at fixed places, every sample here has its own choice among its own visual tokens.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lvlm_utils.models import LVLM
from lvlm_utils.pruning.budget import check_keep, kept
from lvlm_utils.pruning.tokens import Plan, Tokens


def select(last_attention: Tensor, keep: float | int) -> Tensor:
    """Which visual tokens stay, bool (batch, visual), from the last query's attention (batch, heads, visual)."""
    score = last_attention.mean(1)
    best = score.topk(kept(keep, score.shape[1])).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, best, True)


def plan(
    lvlm_or_model: LVLM | PreTrainedModel, keep: float | int = 0.5, layer: int = 2, positions: str = "original"
) -> Plan:
    """Layers below `layer` (the paper's K) see everything; `keep` is a share or number of a prompt's visual tokens.

    ValueError for layer 0, which has no attention before it, and for a `keep` outside its range.
    """
    check_keep(keep)
    if layer == 0:
        raise ValueError("FastV scores by the attention of the layer before, so that layer must be at least 1.")
    if keep == 1.0 and isinstance(keep, float):
        return Plan({}, positions)

    def choose(tokens: Tokens) -> Tensor:
        last, visual = tokens.attention("last", layer - 1), tokens.visual
        stay = ~visual
        for row, own in enumerate(visual):
            stay[row, own] = select(last[row : row + 1, :, own], keep)[0]
        return stay

    return Plan({layer: choose}, positions, needs={layer - 1: ("last",)})
