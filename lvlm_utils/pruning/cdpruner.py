"""CDPruner (Zhang et al., NeurIPS 2025): keep tokens that are relevant to the question and unlike each other.

Matches the official code (Theia-4869/CDPruner, 9541616) for a given relevance: greedy MAP inference of a determinantal
point process whose kernel is relevance x cosine x relevance, the relevance scaled to 0..1 in every picture.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import PreTrainedModel

from lvlm_utils.models import LVLM
from lvlm_utils.pruning.budget import check_keep, kept
from lvlm_utils.pruning.pictures import Pictures
from lvlm_utils.pruning.tokens import Plan, Tokens

KIND = "visual, before the LLM"
NEEDS_CLS = False
OFFICIAL = "Theia-4869/CDPruner 9541616"
DEVIATIONS = (
    "Same indices for a given relevance; it is scaled for each picture, not over the batch. The official relevance "
    "needs CLIP's text tower, which an LVLM lacks: by default minus the cosine of a visual token and the mean "
    "embedding of the question."
)
SMALL = 1e-6  # keeps the least relevant token, and what has no volume left, above zero


def select(features: Tensor, relevance: Tensor, keep: float | int) -> Tensor:
    """Which tokens stay, bool (batch, tokens).

    features (batch, tokens, width), projected; relevance (batch, tokens) on any scale, the more the better.
    """
    tokens = features.shape[1]
    chosen = picks(features, relevance, kept(keep, tokens))
    return torch.zeros_like(relevance, dtype=torch.bool).scatter(1, chosen, True)


def picks(features: Tensor, relevance: Tensor, number: int) -> Tensor:
    """Greedy picks in their order, (batch, number): always the token that adds most to the kernel's determinant.

    The rows of the kernel's Cholesky factor are grown one by one (Chen et al., 2018).
    """
    relevance = relevance.float()
    low, high = relevance.aminmax(dim=1, keepdim=True)
    scaled = (relevance - low + SMALL) / (high - low).clamp(min=SMALL)
    vectors = normalize(features.float(), dim=-1) * scaled[..., None]
    kernel = vectors @ vectors.transpose(1, 2)
    gain = kernel.diagonal(dim1=1, dim2=2)  # what every token would add
    floor = gain * SMALL
    batch, tokens = gain.shape
    factor = kernel.new_zeros(batch, number, tokens)
    order = torch.empty(batch, number, dtype=torch.long, device=features.device)
    for turn in range(number):
        pick = gain.argmax(1, keepdim=True)
        order[:, turn] = pick[:, 0]
        row = kernel.take_along_dim(pick[..., None], 1)[:, 0]
        if turn:
            before = factor[:, :turn].take_along_dim(pick[:, None], 2)
            row = row - (before.transpose(1, 2) @ factor[:, :turn])[:, 0]
        volume, least = gain.gather(1, pick), floor.gather(1, pick)
        row = torch.where(volume > least, row / volume.clamp(min=SMALL**2).sqrt(), 0)  # a copy of picked ones adds none
        factor[:, turn] = row
        gain = (gain - row.square()).scatter(1, pick, -torch.inf)
    return order


def by_question(pictures: Pictures) -> Tensor:
    """Minus the cosine of the projected tokens with the mean embedding of the question, (P, V).

    The sign is that of the official code. Where groups are not known, the question is all text behind the pictures.
    """
    tokens = pictures.tokens
    visual = tokens.visual
    behind = visual.flip(1).cumsum(1).flip(1) == 0
    asked = tokens.here(tokens.groups.question) if tokens.groups is not None else behind
    asked = (asked & tokens.alive & ~visual).float()[..., None]
    mean = (tokens.hidden.float() * asked).sum(1) / asked.sum(1).clamp(min=1)
    return -cosine_similarity(pictures.projected.float(), mean[pictures.rows][:, None], dim=-1)


def plan(
    lvlm_or_model: LVLM | PreTrainedModel,
    keep: float | int = 64,
    relevance: Tensor | Callable[[Pictures], Tensor] = by_question,
    positions: str = "contiguous",
) -> Plan:
    """`keep` is a share or number for each picture, tile or frame that the tower sees.

    relevance: (P, V) for the pictures of the prompts that are asked, or a function that gives it for `Pictures`.
    """
    check_keep(keep)

    def choose(tokens: Tokens) -> Tensor:
        for pictures in tokens.pictures:
            values = relevance(pictures) if callable(relevance) else relevance
            if values.shape != pictures.slots.shape:
                raise ValueError(f"relevance is {tuple(values.shape)}, the pictures are {tuple(pictures.slots.shape)}.")
            pictures.keep(select(pictures.projected, values.to(pictures.projected.device), keep))
        return tokens.chosen()

    return Plan({0: choose}, positions)
