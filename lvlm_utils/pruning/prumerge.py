"""PruMerge (Shang et al., 2024, arXiv:2403.15388): keep the patches that stand out, and merge the others into them.

Steps as in the official code (42Shawn/LLaVA-PruMerge, 097c041): queries and keys of the tower's last layer as one
head; what stands out are the outliers of the [CLS] row by the interquartile range; the 32 patches with the nearest
keys are added to each, weighted by that row; one more token is the weighted sum of all that was not kept.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from lvlm_utils.models import LVLM
from lvlm_utils.pruning.budget import check_keep
from lvlm_utils.pruning.budget import kept as budget
from lvlm_utils.pruning.tokens import Plan, Tokens
from lvlm_utils.pruning.vision import has_cls

KIND = "visual, before the LLM"
NEEDS_CLS = True
OFFICIAL = "42Shawn/LLaVA-PruMerge 097c041"
DEVIATIONS = (
    "Tokens and their order match. The share is each picture's own, not one for the flattened batch; a picture without "
    "outliers keeps its most attended patch (the official code divides by zero), and a stride below 1 counts as 1. "
    "`keep` in place of the adaptive number is ours. In the LLM with positions='contiguous' the tokens stand in the "
    "official order (most attended first, the extra token last); with 'original' at their patches' places, the extra "
    "token at that of the last dropped patch. Where nothing was dropped the LLM gets no extra token."
)
NEIGHBOURS = 32
LAYER = -1  # of the tower


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
    standing = torch.empty_like(order).scatter(1, order, place.expand_as(order))
    key = standing.where(standing < first, 2 * patches)
    if plus:
        rest = standing >= first
        if keep is None:
            step = (1 / (first.double() / patches)).long()  # the code's int(1 / ratio), with its rounding
            sampled = (place % (step // 3).clamp(min=1) == 0) & (place < patches - 1)
        else:
            left, seen = patches - first, rest.cumsum(1)
            sampled = seen * (keep - first) // left.clamp(min=1) > (seen - 1) * (keep - first) // left.clamp(min=1)
        key = key.where(~(rest & sampled), patches + place)
    counts = (key < 2 * patches).sum(1)
    return key.argsort(dim=1, stable=True)[:, : int(counts.max())], counts


def merge(
    features: Tensor, cls_query: Tensor, keys: Tensor, plus: bool = False, keep: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (batch, most + 1, C) in the official order, the extra one behind the kept; `rank`'s order and counts."""
    keys = keys.float()
    attention = torch.einsum("bd,bnd->bn", cls_query.float() * keys.shape[-1] ** -0.5, keys).softmax(-1)[:, 1:]
    order, counts = rank(attention, plus, keep)
    patches, most = attention.shape[1], order.shape[1]
    unit = normalize(keys[:, 1:], dim=-1)
    own = order[..., None]
    likeness = unit.gather(1, own.expand(-1, -1, unit.shape[-1])) @ unit.transpose(1, 2)
    near = likeness.scatter_(2, own, -torch.inf).topk(min(NEIGHBOURS, patches - 1)).indices
    weights = attention[:, None].expand(-1, most, -1).gather(2, near)
    weights = torch.zeros_like(likeness).scatter_(2, near, weights).scatter_(2, own, 1.0)
    real = torch.arange(most, device=order.device) < counts[:, None]
    dropped = attention.masked_fill(_mask(order.where(real, patches), patches), 0)
    last = dropped[:, None] @ features.float()
    tokens = torch.cat([weights @ features.float(), torch.zeros_like(last)], 1)
    tokens = tokens.scatter(1, counts[:, None, None].expand_as(last), last)
    return tokens.to(features.dtype), order, counts


def reduce(
    features: Tensor, cls_query: Tensor, keys: Tensor, plus: bool = False
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Merged tokens of each sample, (k + 1, C) with the extra one last, and the k kept patches in the same order.

    features (batch, N, C) go into the projector; cls_query (batch, D) and keys (batch, N + 1, D), [CLS] first, are of
    the last layer with its heads side by side, before scaling.
    """
    tokens, order, counts = merge(features, cls_query, keys, plus)
    place = torch.arange(tokens.shape[1], device=order.device)
    sizes = counts.tolist()
    kept = order[place[:-1] < counts[:, None]].split(sizes)
    return tokens[place <= counts[:, None]].split([size + 1 for size in sizes]), kept


def _mask(places: Tensor, size: int) -> Tensor:
    """(batch, n) places -> bool (batch, size); the place `size` stands for none."""
    empty = torch.zeros(len(places), size + 1, dtype=torch.bool, device=places.device)
    return empty.scatter(1, places, True)[:, :size]


def plan(
    lvlm_or_model: LVLM | PreTrainedModel,
    keep: float | int | None = None,
    positions: str = "contiguous",
    plus: bool = False,
) -> Plan:
    """Without `keep` each picture keeps as many patches as stand out; `keep` counts all its tokens, the extra one too.

    ValueError where the tower has no [CLS] token, or the projector mixes patches, or `keep` is below 2 tokens.
    """
    if keep is not None:
        check_keep(keep)
    if not has_cls(lvlm_or_model):
        raise ValueError("PruMerge needs a [CLS] token, which this vision tower has not: take vispruner or tome.")

    def choose(tokens: Tokens) -> tuple[Tensor, Tensor]:
        for pictures in tokens.pictures:
            query, keys = pictures.raw("query").flatten(1), pictures.raw("keys").transpose(1, 2).flatten(2)
            patches = keys.shape[1] - 1
            number = None if keep is None else budget(keep, patches) - 1
            if number == 0:
                raise ValueError(f"keep={keep!r} is 1 token of {patches}: PruMerge needs 2, a patch and the extra one.")
            merged, order, counts = merge(pictures.features, query, keys, plus, number)
            place = order.where(torch.arange(order.shape[1], device=order.device) < counts[:, None], patches)
            kept = _mask(place, patches)
            spare = torch.arange(patches, device=order.device).masked_fill(kept, -1).amax(1, keepdim=True)
            place = torch.cat([place, torch.full_like(spare, patches)], 1)
            place = place.scatter(1, counts[:, None], spare.where(spare >= 0, patches))
            if positions == "contiguous":
                place = place.sort(1).values
            hidden = pictures.project(merged)
            whole = hidden.new_zeros(len(hidden), patches + 1, hidden.shape[-1])
            whole = whole.scatter(1, place[..., None].expand_as(hidden), hidden)
            pictures.keep(_mask(place, patches), whole[:, :-1])
        return tokens.chosen()

    return Plan({0: choose}, positions, sees={"query": LAYER, "keys": LAYER}, asks=False)
