"""PruMerge (Shang et al., 2024, arXiv:2403.15388): keep the patches that stand out, and merge the others into them.

Steps as in the official code (42Shawn/LLaVA-PruMerge, 097c041): queries and keys of the tower's last layer as one
head; what stands out are the outliers of the [CLS] row by the interquartile range; the 32 patches with the nearest
keys are added to each, weighted by that row; one more token is the weighted sum of all that was not kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from lvlm_utils.pruning.engine import Chosen, PictureMethod, Positions
from lvlm_utils.pruning.keep import in_float32, kept
from lvlm_utils.pruning.pictures import Pictures

NEIGHBOURS = 32


def rank(attention: Tensor, plus: bool = False, keep: int | None = None) -> tuple[Tensor, Tensor]:
    """Kept patches in the official order, (batch, most), and how many of these entries count in each sample, (batch,).

    From the [CLS] row `attention` (batch, patches). `plus` adds patches at equal steps of the reading order.
    `keep` sets how many it shall be, in place of the number of outliers.
    """
    patches = attention.shape[1]
    place = torch.arange(patches, device=attention.device)
    if keep is None:
        low, high = attention.quantile(attention.new_tensor([0.25, 0.75]), dim=1)
        first = (attention > (high + 1.5 * (high - low))[:, None]).sum(1, keepdim=True).clamp(min=1)
    else:
        first = place.new_full((len(attention), 1), max(1, keep // 4) if plus else keep)
    order = attention.argsort(dim=1, descending=True)
    ranks = order.argsort(dim=1)  # of every patch, 0 for the most attended one
    key = ranks.where(ranks < first, 2 * patches)
    if plus:
        others = ranks >= first
        if keep is None:
            step = (1 / (first.double() / patches)).long()  # the code's int(1 / ratio), with its rounding
            sampled = (place % (step // 3).clamp(min=1) == 0) & (place < patches - 1)
        else:
            more, left, number = keep - first, (patches - first).clamp(min=1), others.cumsum(1)
            sampled = number * more // left > (number - 1) * more // left
        key = key.where(~(others & sampled), patches + place)
    counts = (key < 2 * patches).sum(1)
    return key.argsort(dim=1, stable=True)[:, : int(counts.max())], counts


@in_float32
def reduce(
    features: Tensor, cls_query: Tensor, keys: Tensor, plus: bool = False, keep: int | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Merged tokens of each sample, (k + 1, C) with the extra one last, and the k kept patches in the same order.

    features (batch, N, C) go into the projector; cls_query (batch, D) and keys (batch, N + 1, D), [CLS] first, are of
    the last layer with its heads side by side, before scaling. `plus` and `keep` as in `rank`.
    """
    keys = keys.float()
    attention = torch.einsum("bd,bnd->bn", cls_query.float() * keys.shape[-1] ** -0.5, keys).softmax(-1)[:, 1:]
    order, counts = rank(attention, plus, keep)
    patches, most = attention.shape[1], order.shape[1]
    unit = normalize(keys[:, 1:], dim=-1)
    own = order[..., None]
    likeness = unit.take_along_dim(own, 1) @ unit.transpose(1, 2)
    near = likeness.scatter_(2, own, -torch.inf).topk(min(NEIGHBOURS, patches - 1)).indices
    weights = attention[:, None].take_along_dim(near, 2)
    weights = torch.zeros_like(likeness).scatter_(2, near, weights).scatter_(2, own, 1.0)
    real = torch.arange(most, device=order.device) < counts[:, None]
    dropped = attention.masked_fill(_mask(order.where(real, patches), patches), 0)
    merged, extra = ((part @ features.float()).to(features.dtype) for part in (weights, dropped[:, None]))
    sizes = counts.tolist()
    tokens = tuple(torch.cat([row[:size], last]) for row, last, size in zip(merged, extra, sizes))
    return tokens, order[real].split(sizes)


def _mask(places: Tensor, size: int) -> Tensor:
    """(batch, n) places -> bool (batch, size); the place `size` means none."""
    empty = torch.zeros(len(places), size + 1, dtype=torch.bool, device=places.device)
    return empty.scatter(1, places, True)[:, :size]


@dataclass
class PruMerge(PictureMethod):
    """Keep the patches that stand out in the attention of [CLS], and merge the others into them (PruMerge).

    keep: share or number of a picture's tokens, the extra one too, from 2 tokens; not given, each picture keeps as many
        patches as stand out, as in the code.
    positions: "contiguous" as in the code.
    """

    keep: float | int | None = None
    positions: Positions = "contiguous"

    needs_cls = True
    plus = False
    official = "42Shawn/LLaVA-PruMerge 097c041"
    deviations = (
        "Tokens and their order match. The share is each picture's own, not one for the flattened batch; a picture "
        "without outliers keeps its most attended patch (the official code divides by zero), a stride below 1 counts "
        "as 1. `keep` in place of the adaptive number is ours. In the LLM tokens have the official order (most "
        "attended first, the extra token last) if positions are contiguous, else the places of their patches, the "
        "extra one that of the last dropped patch. Where nothing was dropped the LLM gets no extra token."
    )

    def sees(self):
        return {"query": -1, "keys": -1}

    def pick(self, pictures):
        query, keys = pictures.raw("query").flatten(1), pictures.raw("keys").transpose(1, 2).flatten(2)
        patches = keys.shape[1] - 1
        number = None if self.keep is None else kept(self.keep, patches) - 1
        if number == 0:
            raise ValueError(f"keep={self.keep!r} is 1 token of {patches}: PruMerge needs 2, one of them extra.")
        tokens, own = reduce(pictures.features, query, keys, self.plus, number)
        free = ~_mask(pad_sequence(own, True, patches), patches)
        spare = torch.arange(patches, device=free.device).where(free, -1).amax(1).where(free.any(1), patches)
        places = pad_sequence([torch.cat([one, at[None]]) for one, at in zip(own, spare, strict=True)], True, patches)
        return placed(pictures, pad_sequence(tokens, True), places, self.positions)


def placed(pictures: Pictures, merged: Tensor, places: Tensor, positions: str) -> Chosen:
    """Merged features (P, n, C) after the projector, at their `places` (P, n) among the V patches; V means none.

    With contiguous positions they come in their own order, else each at its own place.
    """
    patches = pictures.slots.shape[1]
    if positions == "contiguous":
        places = places.sort(1).values
    new = pictures.project(merged)
    places = places.to(new.device)  # the projector may be on another device than the tower
    whole = new.new_zeros(len(new), patches + 1, new.shape[-1])
    return _mask(places, patches), whole.scatter(1, places[..., None].expand_as(new), new)[:, :-1]
