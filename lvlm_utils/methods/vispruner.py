"""VisPruner (Zhang et al., ICCV 2025): the patches that [CLS] attends to most, and the most diverse of the others.

Matches the official code (Theia-4869/VisPruner, aefa01a) index for index in float32, for all budgets at which that
runs. Near-duplicates go in rounds of 8 (Algorithm 1): tokens at even places of the list are compared with those at odd
places, the most similar ones are removed, and what is left of the even ones comes, most similar first, before the
odd ones in the next round.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lvlm_utils.methods.fastervlm import FasterVLM
from lvlm_utils.pruning.keep import in_float32, kept

REMOVED = 8  # in a round
NEAR = 64  # neighbours listed for every token; only speed depends on it


@in_float32
def select(features: Tensor, cls_attention: Tensor, keep: float | int, important: float = 0.5) -> Tensor:
    """Which patches stay, bool (batch, patches).

    features (batch, patches, width) before the projector; cls_attention (batch, patches), mean over the heads; `keep`
    a share or number of patches, of which the share `important` (rounded down) is taken by attention.
    """
    _check(important)
    batch, patches, _ = features.shape
    number = kept(keep, patches)
    most = int(number * important)
    order = cls_attention.argsort(dim=1, descending=True, stable=True)
    diverse = _diverse(features, order[:, most:], number - most)
    chosen = torch.cat([order[:, :most], diverse], 1)
    return torch.zeros(batch, patches, dtype=torch.bool, device=features.device).scatter(1, chosen, True)


def _diverse(features: Tensor, order: Tensor, number: int) -> Tensor:
    """Algorithm 1: the `number` least similar ones (batch, number) of the patches `order` (batch, R)."""
    if number == 0:
        return order[:, :0]
    unit = normalize(features.float(), dim=-1)
    unit = unit.take_along_dim(order[..., None], 1)
    similar = unit @ unit.transpose(1, 2)  # once for all rounds; rows and columns are those of `order`
    near, place = _near(similar), _count(order)  # place: the list, as rows of `similar`
    while (left := place.shape[1]) > number:
        if left * 2 <= similar.shape[1]:  # forget what has gone
            order, similar = order.gather(1, place), _part(similar, place, place)
            near, place = _near(similar), _count(order)
        even, odd = place[:, ::2], place[:, 1::2]
        removed = min(REMOVED, left - number, even.shape[1])
        ranked = _closest(similar, near, even, odd).argsort(dim=1, descending=True, stable=True)
        place = torch.cat([even.gather(1, ranked[:, removed:]), odd], 1)
    return order.gather(1, place)


def _closest(similar: Tensor, near: tuple[Tensor, Tensor], even: Tensor, odd: Tensor) -> Tensor:
    """Largest cosine of every `even` token with any `odd` one: the first odd one in the list of its nearest, if any."""
    batch, tokens, _ = similar.shape
    cosines, nearest = (part.take_along_dim(even[..., None], 1) for part in near)
    is_odd = torch.zeros(batch, tokens, dtype=torch.bool, device=odd.device).scatter(1, odd, True)
    found = is_odd.gather(1, nearest.flatten(1)).view_as(nearest)
    closest = cosines.masked_fill(~found, -torch.inf).amax(2)
    return _part(similar, even, odd).amax(2) if bool(closest.isneginf().any()) else closest


def _near(similar: Tensor) -> tuple[Tensor, Tensor]:
    """The largest cosines of every token, and with whom."""
    return similar.topk(min(NEAR, similar.shape[2]), dim=2)


def _count(order: Tensor) -> Tensor:
    return torch.arange(order.shape[1], device=order.device).expand_as(order)


def _part(square: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """square (batch, R, R) at some rows and columns (batch, some)."""
    return square.take_along_dim(rows[..., None], 1).take_along_dim(columns[:, None], 2)


def _check(important: float) -> None:
    if not 0 <= important <= 1:
        raise ValueError(f"important={important!r} is no share in [0, 1]: 0.5 takes half of the budget by attention.")


@dataclass
class VisPruner(FasterVLM):
    """Keep the patches that [CLS] attends to most, and the most diverse of the others (VisPruner).

    keep: share or number of the patches of every picture, tile or frame that the tower sees (the code's
        `visual_token_num`).
    important: share of these, rounded down, that is taken by attention (`important_ratio`); 1 is FasterVLM, 0 diversity
        alone.
    positions: "contiguous" as in the code.
    """

    keep: float | int = 64
    important: float = 0.5

    official = "Theia-4869/VisPruner aefa01a"
    deviations = (
        "Same indices wherever the official code runs; at odd remainders and tiny budgets, where it crashes, "
        "ceil(R/2) - r of the even tokens survive and r is at most their number. Cosines are float32 at every dtype."
    )

    def fit(self, lvlm):
        _check(self.important)
        return super().fit(lvlm)

    def pick(self, pictures):
        return select(pictures.features, self.attention(pictures), self.keep, self.important)
