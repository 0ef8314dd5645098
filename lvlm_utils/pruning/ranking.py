"""Which tokens of every row are the best ones, for methods that rank: rows may have unequal numbers of candidates."""

import torch
from torch import Tensor

from lvlm_utils.pruning.budget import check_keep, kept

Tokens = object


def top(score: Tensor, number: int) -> Tensor:
    """The `number` highest of every row, bool (batch, tokens); of equal ones the first."""
    best = score.argsort(dim=1, descending=True, stable=True)[:, :number]
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, best, True)


def ranks(score: Tensor, among: Tensor) -> Tensor:
    """Rank (batch, tokens) of every token `among` (bool) its row, 0 for the highest score; the others come behind."""
    order = score.float().masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    behind = (~among).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True)  # candidates at -inf stay in front
    order = order.gather(1, behind)
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(score.shape[1], device=score.device).expand_as(order)
    )


def numbers(keep: float | int, have: Tensor) -> Tensor:
    """How many of the `have` (batch,) visual tokens of each prompt stay; ValueError as `kept`, for any prompt."""
    check_keep(keep)
    kept(keep, int(have.min()))
    return torch.full_like(have, keep) if isinstance(keep, int) else (have.double() * keep).long().clamp(min=1)


def at_start(tokens: Tokens) -> Tensor:
    """Visual tokens (batch,) that went into layer 0: what shares in deeper layers are shares of."""
    prefill = tokens.prefill
    if not prefill.at:
        return tokens.visual.sum(1)
    stage, visual = prefill.stages[prefill.at[0]], prefill.visual.to(tokens.place.device)
    return (visual.gather(1, stage.place.to(visual.device)) & stage.alive.to(visual.device)).sum(1)


def depths(official: tuple[int, ...], of: int, layers: int) -> tuple[int, ...]:
    """Layers of a model with `of` layers as the same shares of a depth of `layers`, from 0, rounded half up."""
    return tuple(int(number * layers / of + 0.5) for number in official)
