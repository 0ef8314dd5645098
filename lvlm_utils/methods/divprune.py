"""DivPrune (Alvar et al., CVPR 2025): keep the visual tokens that lie furthest from each other (max-min diversity).

Matches the official code (vbdi/divprune, 799e2d9) pick for pick in float32: cosine distance of the tokens as they go
into the LLM, first the one whose nearest neighbour is furthest, then always the one furthest from all picked.
"""

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lvlm_utils.pruning.engine import PictureMethod, Positions
from lvlm_utils.pruning.keep import check_keep, in_float32, kept


@in_float32
def picks(features: Tensor, number: int) -> Tensor:
    """The first `number` picks in their order, (batch, number), among features (batch, tokens, width)."""
    unit = normalize(features.float(), dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = distance.amin(2)  # of every token to any other, from the second pick on to the picked ones
    order = torch.empty(len(unit), number, dtype=torch.long, device=unit.device)
    for turn in range(number):
        pick = nearest.argmax(1, keepdim=True)
        order[:, turn] = pick[:, 0]
        row = distance.take_along_dim(pick[..., None], 1)[:, 0]
        nearest = row if turn == 0 else torch.minimum(nearest, row)
        nearest = nearest.scatter(1, pick, -torch.inf)
    return order


def select(features: Tensor, keep: float | int) -> Tensor:
    """Which tokens stay, bool (batch, tokens); a share of features (batch, tokens, width) is rounded to the nearest."""
    check_keep(keep)
    tokens = features.shape[1]
    number = kept(keep, tokens) if isinstance(keep, Integral) else max(1, round(float(keep) * tokens))
    return torch.zeros_like(features[..., 0], dtype=torch.bool).scatter(1, picks(features, number), True)


@dataclass
class DivPrune(PictureMethod):
    """Keep the visual tokens that lie furthest from each other (DivPrune).

    keep: share (rounded to the nearest) or number of the tokens of every picture, tile or frame that the tower sees
        (the code's `SUBSET_RATIO`).
    positions: "contiguous" as in the code.
    """

    keep: float | int = 0.098
    positions: Positions = "contiguous"

    official = "vbdi/divprune 799e2d9"
    deviations = "Same picks in float32, in which distances are computed at every dtype; a picture or tile at a time."

    def pick(self, pictures):
        return select(pictures.projected, self.keep)
