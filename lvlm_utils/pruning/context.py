"""Context pruning (Zhou et al., 2024, arXiv:2410.19732, Sec. 4): drop the text that gets the least attention.

There is no official code, so this is our reading. Eq. 4 sums a softmax row, which is always 1 and cannot rank; read as
attention received it is the column sum. The other readings are the same per query that can see the token (without the
advantage of early tokens), and the last prompt token's row.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lvlm_utils.models import LVLM, bare, decoder_of
from lvlm_utils.pruning.budget import check_drop
from lvlm_utils.pruning.tokens import Plan, Tokens

if TYPE_CHECKING:
    from lvlm_utils.token_groups import TokenGroups

READINGS = ("received", "received_mean", "last")
POOLING = ("max", "mean")
GROUPS = ("system", "context", "question")


def score(attention: Tensor, pooling: str = "max") -> Tensor:
    """Eq. 4: attention that every token gets, (batch, heads, tokens) -> (batch, tokens), pooled over the heads."""
    return attention.amax(1) if pooling == "max" else attention.mean(1)


def select(scores: Tensor, droppable: Tensor, drop: float) -> Tensor:
    """Which tokens stay, bool (batch, tokens): all but the lowest share `drop` (rounded down) of the `droppable`."""
    check_drop(drop)
    leave = (droppable.sum(1, keepdim=True).double() * drop).long()
    order = scores.masked_fill(~droppable, torch.inf).argsort(dim=1, stable=True)
    rank = torch.zeros_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return ~droppable | (rank >= leave)


def plan(
    lvlm_or_model: LVLM | PreTrainedModel,
    drop: float = 0.3,
    layers: Iterable[int] = range(10),
    reading: str = "received",
    pooling: str = "max",
    protect: Sequence[str] = ("system", "question"),
    groups: "TokenGroups | None" = None,
    positions: str = "original",
) -> Plan:
    """Every layer of `layers` ranks the text by its own attention and drops the share `drop` of what is left behind it.

    Visual tokens and the last prompt token always stay, and so do the groups named in `protect`. Groups are known where
    `lv.generate` asks; a bare call of the model needs `groups=prompt.groups`, or protect=(). ValueError for unknown
    names, and for the last layer, behind which nothing is left to save.
    """
    check_drop(drop)
    if reading not in READINGS:
        raise ValueError(f"reading={reading!r} is not one of {', '.join(READINGS)}.")
    if pooling not in POOLING:
        raise ValueError(f"pooling={pooling!r} is not one of {', '.join(POOLING)}.")
    if unknown := set(protect) - set(GROUPS):
        raise ValueError(f"protect names {', '.join(sorted(unknown))}: only {', '.join(GROUPS)} can be protected.")
    chosen, behind = sorted(set(layers)), len(decoder_of(bare(lvlm_or_model)).layers) - 1
    if odd := [layer for layer in chosen if not 0 <= layer < behind]:
        raise ValueError(
            f"Layer {odd[0]} is out of range: of the model's {behind + 1} layers, 0 to {behind - 1} have one behind."
        )
    if drop == 0:
        return Plan({}, positions)

    def choose(layer: int, tokens: Tokens) -> Tensor:
        scores = score(tokens.attention(reading, layer), pooling)
        return select(scores, _droppable(tokens, protect, groups), drop)

    return Plan(
        {layer + 1: partial(choose, layer) for layer in chosen}, positions, needs=dict.fromkeys(chosen, (reading,))
    )


def _droppable(tokens: Tokens, protect: Sequence[str], groups: "TokenGroups | None") -> Tensor:
    """Text that may go, bool (batch, slots)."""
    groups = groups or tokens.groups
    text = tokens.alive & ~tokens.visual & ~tokens.last
    if protect and groups is None:
        raise ValueError(
            f"Which tokens are {' and '.join(protect)} is not known here: ask with lv.generate, or pass "
            "groups=prompt.groups, or protect=()."
        )
    for name in protect:
        text = text & ~tokens.here(getattr(groups, name))
    return text
