"""VisionZip (Yang et al., CVPR 2025, arXiv:2412.04467): keep dominant patches, merge the others into contextual ones.

Steps as in the official code (dvlab-research/VisionZip, 3151f6d): by the penultimate layer's [CLS] row, summed over
heads; [CLS] itself is the first dominant token; contextual tokens lie at equal steps among the patches that are left,
and each of the others is added to the one whose key is most like its own: target plus mean, not their mean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from lvlm_utils.methods.prumerge import placed
from lvlm_utils.models import bare
from lvlm_utils.pruning.engine import PictureMethod, Positions
from lvlm_utils.pruning.keep import in_float32, kept

CONTEXTUAL = 10 / 64  # share of the contextual tokens: 54 + 10, 108 + 20, 162 + 30


@in_float32
def reduce(
    hidden: Tensor, cls_attention: Tensor, keys: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, Tensor]:
    """Tokens (batch, dominant + contextual, C), [CLS] first, and the dominant ones, (batch, dominant); 0 is [CLS].

    hidden (batch, N + 1, C) and keys (batch, N + 1, d; mean over heads) of the layer, [CLS] first; cls_attention
    (batch, heads, N + 1). Fewer tokens where `contextual` is more than the dominant ones leave; ValueError for a
    number of dominant tokens out of 1 to N + 1.
    """
    batch, size = hidden.shape[:2]
    if not 1 <= dominant <= size or contextual < 0:
        raise ValueError(f"{dominant} dominant and {contextual} contextual tokens cannot be had from {size} tokens.")
    score = cls_attention.float().sum(1)[:, 1:]
    best = score.topk(dominant - 1).indices.sort(1).values + 1
    chosen = torch.cat([best.new_zeros(batch, 1), best], 1)
    others, target = left_over(chosen, size, contextual)
    tokens, contextual = hidden.take_along_dim(chosen[..., None], 1), min(contextual, others.shape[1])
    if not contextual:
        return tokens, chosen
    unit = normalize(keys.float().take_along_dim(others[..., None], 1), dim=-1)
    nearest = (unit[:, ~target] @ unit[:, target].transpose(1, 2)).argmax(2)
    given = one_hot(nearest, contextual).float()
    values = hidden.float().take_along_dim(others[..., None], 1)
    mean = given.transpose(1, 2) @ values[:, ~target] / given.sum(1).clamp(min=1)[..., None]
    return torch.cat([tokens, (values[:, target] + mean).to(hidden.dtype)], 1), chosen


def left_over(dominant: Tensor, size: int, contextual: int) -> tuple[Tensor, Tensor]:
    """The tokens that are not `dominant` (batch, n), (batch, size - n), and which of them, at equal steps, become the
    contextual ones, bool (size - n,)."""
    taken = torch.zeros(len(dominant), size, dtype=torch.uint8, device=dominant.device).scatter(1, dominant, 1)
    left = size - dominant.shape[1]
    step = max(1, left // max(contextual, 1))
    index = torch.arange(left, device=dominant.device)
    others = taken.argsort(dim=1, stable=True)[:, :left]
    return others, (index % step == 0) & (index < contextual * step)


def split(keep: int) -> tuple[int, int]:
    """How many dominant and contextual tokens `keep` tokens are, in the official proportion 54 to 10."""
    contextual = round(keep * CONTEXTUAL)
    return keep - contextual, contextual


@dataclass
class VisionZip(PictureMethod):
    """Keep the patches that [CLS] attends to most, and merge the others into a few contextual tokens (VisionZip).

    keep: share or number of all tokens of a picture, [CLS] too; 54 of 64 are dominant, as in the code.
    dominant, contextual: how many of each, in place of `keep`.
    positions: "contiguous" as in the code.
    """

    keep: float | int = 64
    dominant: int | None = None
    contextual: int | None = None
    positions: Positions = "contiguous"

    needs_cls = True
    features = -2  # layer of the tower
    official = "dvlab-research/VisionZip 3151f6d"
    deviations = (
        "Tokens and their order match. contextual=0 merges nothing and more contextual tokens than patches left take "
        "all of these (the official code fails at both). In the LLM tokens have the official order ([CLS], dominant, "
        "contextual) if positions are contiguous, else the places of their patches, [CLS] that of the first dropped "
        "patch. Tiles of LLaVA-NeXT: each on its own."
    )

    def fit(self, lvlm):
        if (self.dominant is None) != (self.contextual is None):
            raise ValueError("Give dominant and contextual together, or keep alone.")
        layer = getattr(bare(lvlm).config, "vision_feature_layer", None)
        if not isinstance(layer, int):
            raise ValueError("VisionZip takes [CLS] from the layer of features, and there are several: take prumerge.")
        return self.filled(features=layer if layer < 0 else layer - 1)  # hidden_states[0] is what goes into layer 0

    def sees(self):
        return {"cls": -2, "keys": -2, "hidden": self.features}

    def pick(self, pictures):
        hidden, keys = pictures.raw("hidden"), pictures.raw("keys").float().mean(1)
        size = hidden.shape[1]
        dominant, contextual = self.dominant, self.contextual
        if dominant is None:
            dominant, contextual = split(kept(self.keep, size - 1))
        if dominant + contextual >= size:
            raise ValueError(f"{dominant} dominant and {contextual} contextual are more than {size - 1} patches.")
        tokens, own = reduce(hidden, pictures.raw("cls"), keys, dominant, contextual)
        others, target = left_over(own, size, contextual)
        places = torch.cat([own, others[:, target]], 1) - 1
        used = torch.zeros(len(own), size, dtype=torch.uint8, device=own.device).scatter(1, places + 1, 1)
        places[:, 0] = used[:, 1:].argmin(1)  # the first patch that goes leaves its place to [CLS]
        return placed(pictures, tokens, places, self.positions)
