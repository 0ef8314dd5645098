"""How many tokens stay and which are the best: what `keep` and `drop` mean, the same in every method."""

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from functools import wraps
from numbers import Integral
from typing import Any, Literal, get_args, get_origin

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lvlm_utils.families import decoder_of
from lvlm_utils.models import LVLM, bare
from lvlm_utils.session import plain_arithmetic

PRIME = 2**31 - 1


def check_keep(keep: float | int) -> None:
    """ValueError unless `keep` is a share (a float above 0, at most 1.0) or a number of tokens (an int from 1)."""
    share = isinstance(keep, float | np.floating) and 0 < keep <= 1
    number = isinstance(keep, Integral) and not isinstance(keep, bool) and keep >= 1
    if not share and not number:
        raise ValueError(f"keep={keep!r} is neither a share in (0, 1] nor a number of tokens: 0.5 is half, 64 is 64.")


def check_drop(drop: float) -> None:
    """ValueError unless `drop` is a share from 0 (nothing is dropped) to below 1."""
    known = isinstance(drop, float | np.floating | Integral) and not isinstance(drop, bool)
    if not known or not 0 <= drop < 1:
        raise ValueError(f"drop={drop!r} is no share in [0, 1): 0.3 drops 30%.")


def check_options(method: object) -> None:
    """ValueError for a field `keep` or `drop` that is none, and for a value that is not one of those in its Literal.

    What is the field's default is right; a Literal beside other types is compared with text alone.
    """
    for field in fields(method) if is_dataclass(method) else ():
        value, kind = getattr(method, field.name), get_origin(field.type)
        parts = (field.type, *get_args(field.type))
        known = [one for part in parts if get_origin(part) is Literal for one in get_args(part)]
        several = isinstance(kind, type) and issubclass(kind, Iterable)
        if value is field.default or (not several and isinstance(value, str) and value in known):
            continue
        if field.name in CHECKS:
            CHECKS[field.name](value)
        elif known and (several or kind is Literal or isinstance(value, str)):
            if wrong := [one for one in (value if several else [value]) if one not in known]:
                raise ValueError(f"{field.name}={wrong[0]!r} is not one of {', '.join(map(str, known))}.")


CHECKS = {"keep": check_keep, "drop": check_drop}


def everything(keep: float | int) -> bool:
    """Whether `keep` is the share 1.0. (The number 1 is one token.)"""
    return keep == 1 and not isinstance(keep, Integral)


def kept(keep: float | int, tokens: int) -> int:
    """How many of `tokens` stay: `keep` itself, or that share of them, rounded down, at least one."""
    check_keep(keep)
    if not tokens:
        raise ValueError("No visual tokens to prune: a prompt has no picture, or all its tokens were dropped before.")
    if not isinstance(keep, Integral):
        return max(1, int(tokens * float(keep)))
    if keep > tokens:
        raise ValueError(f"keep={keep} is more than the {tokens} visual tokens there are.")
    return int(keep)


def numbers(keep: float | int, have: Tensor) -> Tensor:
    """`kept` for every row: how many of `have` (batch,) tokens stay, (batch,). ValueError as `kept`, for any row."""
    least = kept(keep, int(have.min()))
    if isinstance(keep, Integral):
        return torch.full_like(have, least)
    return (have.double() * float(keep)).long().clamp(min=1)


def top(score: Tensor, keep: float | int | Tensor) -> Tensor:
    """The highest of every row of `score` (batch, tokens), bool; of equal ones the first.

    What is -inf is no candidate, so that rows may have unequal numbers of them. keep: a share or number of a row's
    candidates, or numbers (batch,).
    """
    candidates = score != -torch.inf
    number = keep if isinstance(keep, Tensor) else numbers(keep, candidates.sum(1))
    order = score.argsort(dim=1, descending=True, stable=True)
    best = torch.arange(score.shape[1], device=score.device) < number[:, None]
    return torch.zeros_like(candidates).scatter(1, order, best) & candidates


def all_but_lowest(scores: Tensor, droppable: Tensor, drop: float | Tensor) -> Tensor:
    """Which tokens stay, bool (batch, tokens): all but the lowest of the `droppable`, of equal ones the earlier.

    drop: the share (of the droppable, rounded down) that goes; or a tensor (batch,), of shares where it is floating,
    of numbers of tokens where it is whole.
    """
    order = scores.masked_fill(~droppable, torch.inf).argsort(dim=1, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return ~droppable | (torch.zeros_like(order).scatter(1, order, places) >= dropped(drop, droppable))


def dropped(drop: float | Tensor, droppable: Tensor) -> Tensor:
    """How many tokens of every row go, (batch, 1), for the `drop` of `all_but_lowest`."""
    if not isinstance(drop, Tensor):
        check_drop(drop)
    elif not drop.is_floating_point():
        return drop[:, None]
    share = drop[:, None] if isinstance(drop, Tensor) else float(drop)
    return (droppable.sum(1, keepdim=True).double() * share).long()


def depth_of(lvlm: LVLM | PreTrainedModel) -> int:
    """Number of layers of the language model."""
    return len(decoder_of(bare(lvlm)).layers)


def depths(official: tuple[int, ...], of: int, layers: int) -> tuple[int, ...]:
    """Layers of a model with `of` layers as the same shares of a depth of `layers`, from 0, rounded half up."""
    return tuple(int(number * layers / of + 0.5) for number in official)


def mixed(x: Tensor) -> Tensor:
    """Whole numbers -> whole numbers in [0, PRIME) without a pattern; no product leaves 64 bits."""
    x = x % PRIME
    for factor in (0x2C1B3C6D, 0x297A2D39, 0x1B56C4E9):
        x = (x ^ (x >> 15)) * factor % PRIME
    return x ^ (x >> 13)


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function on tensors (the first argument is one) that computes in their dtypes, also under torch.autocast."""

    @wraps(function)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with plain_arithmetic(x.device):
            return function(x, *args, **kwargs)

    return run
