"""CDPruner (Zhang et al., NeurIPS 2025): keep tokens that are relevant to the question and unlike each other.

Matches the official code (Theia-4869/CDPruner, 9541616) for a given relevance: greedy MAP inference of a determinantal
point process whose kernel is relevance x cosine x relevance, the relevance scaled to 0..1 in every picture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from lvlm_utils.pruning.engine import PictureMethod, Positions
from lvlm_utils.pruning.keep import in_float32, kept
from lvlm_utils.pruning.pictures import Pictures

SMALL = 1e-6  # keeps the least relevant token, and what has no volume left, above zero


def select(features: Tensor, relevance: Tensor, keep: float | int) -> Tensor:
    """Which tokens stay, bool (batch, tokens).

    features (batch, tokens, width), projected; relevance (batch, tokens) on any scale, the more the better.
    """
    tokens = features.shape[1]
    chosen = picks(features, relevance, kept(keep, tokens))
    return torch.zeros_like(relevance, dtype=torch.bool).scatter(1, chosen, True)


@in_float32
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

    The sign is that of the official code. Where groups are not known, the question is all text after the pictures.
    """
    tokens = pictures.tokens
    visual = tokens.visual
    after = visual.flip(1).cumsum(1).flip(1) == 0
    asked = tokens.here(tokens.groups.question) if tokens.groups is not None else after
    asked = (asked & tokens.alive & ~visual).float()[..., None]
    mean = (tokens.hidden.float() * asked).sum(1) / asked.sum(1).clamp(min=1)
    return -cosine_similarity(pictures.projected.float(), mean[pictures.rows][:, None], dim=-1)


@dataclass
class CDPruner(PictureMethod):
    """Keep visual tokens that are relevant to the question and unlike each other (CDPruner).

    keep: share or number of the tokens of every picture, tile or frame that the tower sees (`visual_token_num`).
    relevance: "question", minus the cosine with the mean embedding of the question; or a function that gives the
        relevance (P, V) of `Pictures`, which results cannot state as an option.
    positions: "contiguous" as in the code.
    """

    keep: float | int = 64
    relevance: Literal["question"] | Callable[[Pictures], Tensor] = "question"
    positions: Positions = "contiguous"

    uses_question = True
    official = "Theia-4869/CDPruner 9541616"
    deviations = (
        "Same indices for a given relevance; it is scaled for each picture, not over the batch. The official relevance "
        "needs CLIP's text tower, which an LVLM lacks: by default minus the cosine of a visual token and the mean "
        "embedding of the question."
    )

    def pick(self, pictures):
        values = by_question(pictures) if self.relevance == "question" else self.relevance(pictures)
        if values.shape != pictures.slots.shape:
            raise ValueError(f"relevance is {tuple(values.shape)}, the pictures are {tuple(pictures.slots.shape)}.")
        return select(pictures.projected, values.to(pictures.projected.device), self.keep)
