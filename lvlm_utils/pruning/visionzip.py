"""VisionZip (Yang et al., CVPR 2025, arXiv:2412.04467): keep dominant patches, merge the others into contextual ones.

Steps as in the official code (dvlab-research/VisionZip, 3151f6d): by the penultimate layer's [CLS] row, summed over
heads; [CLS] itself is the first dominant token; contextual tokens lie at equal steps among the patches that are left,
and each of the others is added to the one whose key is most like its own: target plus mean, not their mean.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot
from transformers import PreTrainedModel

from lvlm_utils.models import LVLM, bare
from lvlm_utils.pruning.budget import check_keep, kept
from lvlm_utils.pruning.tokens import Plan, Tokens
from lvlm_utils.pruning.vision import has_cls

KIND = "visual, before the LLM"
NEEDS_CLS = True
OFFICIAL = "dvlab-research/VisionZip 3151f6d"
DEVIATIONS = (
    "Tokens and their order match. contextual=0 merges nothing and more contextual tokens than patches left take all "
    "of these (the official code fails at both). In the LLM with positions='contiguous' the tokens stand in the "
    "official order ([CLS], dominant, contextual); with 'original' at their patches' places, [CLS] at that of the "
    "first dropped patch. Tiles of LLaVA-NeXT: each on its own."
)
LAYER = -2  # of the tower
CONTEXTUAL = 10 / 64  # share of the contextual tokens: 54 + 10, 108 + 20, 162 + 30


def merge(hidden: Tensor, cls_attention: Tensor, keys: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """Tokens (batch, dominant + contextual, C), and which token (0 is [CLS]) each of them stands for.

    ValueError unless there are 1 to N + 1 dominant tokens; `contextual` is at most what they leave.
    """
    batch, size = hidden.shape[:2]
    if not 1 <= dominant <= size or contextual < 0:
        raise ValueError(f"{dominant} dominant and {contextual} contextual tokens cannot be had from {size} tokens.")
    score = cls_attention.float().sum(1)[:, 1:]
    chosen = torch.zeros(batch, size, dtype=torch.bool, device=hidden.device)
    chosen[:, 0] = True
    chosen.scatter_(1, score.topk(dominant - 1).indices + 1, True)
    order = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)  # dominant ones first, both in reading order
    first, rest = order[:, :dominant], order[:, dominant:]
    left = rest.shape[1]
    contextual = min(contextual, left)
    tokens = _take(hidden, first)
    if not contextual:
        return tokens, first
    step = max(1, left // contextual)
    target = torch.zeros(left, dtype=torch.bool, device=hidden.device)
    target[: contextual * step : step] = True
    unit = normalize(_take(keys.float(), rest), dim=-1)
    nearest = (unit[:, ~target] @ unit[:, target].transpose(1, 2)).argmax(2)
    given = one_hot(nearest, contextual).float()
    values = _take(hidden.float(), rest)
    mean = given.transpose(1, 2) @ values[:, ~target] / given.sum(1).clamp(min=1)[..., None]
    tokens = torch.cat([tokens, (values[:, target] + mean).to(hidden.dtype)], 1)
    return tokens, torch.cat([first, rest[:, target]], 1)


def reduce(
    hidden: Tensor, cls_attention: Tensor, keys: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, Tensor]:
    """Tokens (batch, dominant + contextual, C), [CLS] first, and the dominant ones, (batch, dominant); 0 is [CLS].

    hidden (batch, N + 1, C) and keys (batch, N + 1, d; mean over heads) of the layer, [CLS] first; cls_attention
    (batch, heads, N + 1). Fewer tokens where `contextual` is more than the dominant ones leave; ValueError for a
    number of dominant tokens out of 1 to N + 1.
    """
    tokens, places = merge(hidden, cls_attention, keys, dominant, contextual)
    return tokens, places[:, :dominant]


def _take(x: Tensor, places: Tensor) -> Tensor:
    """x (batch, tokens, width) at places (batch, n)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def split(keep: int) -> tuple[int, int]:
    """How many dominant and contextual tokens `keep` tokens are, in the official proportion 54 to 10."""
    contextual = round(keep * CONTEXTUAL)
    return keep - contextual, contextual


def plan(
    lvlm_or_model: LVLM | PreTrainedModel,
    keep: float | int = 64,
    dominant: int | None = None,
    contextual: int | None = None,
    positions: str = "contiguous",
) -> Plan:
    """`keep` counts all tokens of a picture, [CLS] too; or `dominant` and `contextual` say how many of each.

    ValueError where the tower has no [CLS] token, where the features are not of one layer of it, where the projector
    mixes patches, and for more tokens than a picture has patches.
    """
    check_keep(keep)
    if (dominant is None) != (contextual is None):
        raise ValueError("Give dominant and contextual together, or keep alone.")
    if not has_cls(lvlm_or_model):
        raise ValueError("VisionZip needs a [CLS] token, which this vision tower has not: take vispruner or tome.")
    layer = getattr(bare(lvlm_or_model).config, "vision_feature_layer", None)
    if not isinstance(layer, int):
        raise ValueError("VisionZip takes [CLS] from the layer of the features, of which there is not one: prumerge.")
    layer = layer if layer < 0 else layer - 1  # hidden_states[0] is what goes into layer 0

    def choose(tokens: Tokens) -> tuple[Tensor, Tensor]:
        for pictures in tokens.pictures:
            hidden, keys = pictures.raw("hidden"), pictures.raw("keys").mean(1)
            patches = hidden.shape[1] - 1
            numbers = split(kept(keep, patches)) if dominant is None else (dominant, contextual)
            if sum(numbers) > patches:
                raise ValueError(f"{numbers[0]} dominant and {numbers[1]} contextual are more than {patches} patches.")
            merged, place = merge(hidden, pictures.raw("cls"), keys, *numbers)
            used = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device).scatter(1, place, True)
            place = place - 1
            place[:, 0] = used[:, 1:].to(torch.uint8).argmin(1)  # the first patch that goes leaves its place to [CLS]
            if positions == "contiguous":
                place = place.sort(1).values
            new = pictures.project(merged)
            whole = new.new_zeros(len(new), patches, new.shape[-1])
            whole = whole.scatter(1, place[..., None].expand_as(new), new)
            pictures.keep(torch.zeros_like(used[:, 1:]).scatter(1, place, True), whole)
        return tokens.chosen()

    return Plan({0: choose}, positions, sees={"cls": LAYER, "keys": LAYER, "hidden": layer}, asks=False)
