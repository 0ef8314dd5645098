"""How a prompt gets from one stage to the next: which slots go on, at which positions, and what goes with them."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lvlm_utils.families import visual_ids
from lvlm_utils.pruning.tokens import Prefill, Stage

if TYPE_CHECKING:
    from lvlm_utils.pruning.vision import Sight
    from lvlm_utils.token_groups import TokenGroups


def begin(
    model: PreTrainedModel,
    sight: "Sight",
    x: Tensor,
    ids: Tensor | None,
    kwargs: dict[str, Any],
    groups: "TokenGroups | None",
) -> Prefill:
    """The whole prompt, from what the decoder is called with: x (batch, tokens, ...) and its `kwargs`."""
    batch, tokens = x.shape[:2]
    mask, position = kwargs.get("attention_mask"), kwargs.get("position_ids")
    place = torch.arange(tokens, device=x.device).expand(batch, -1)
    alive = torch.ones_like(place, dtype=torch.bool) if mask is None else mask.to(x.device).bool()
    position = place if position is None else position
    last = position.amax(-1, keepdim=True)  # on a grid one for each axis, all the same behind the text that ends it
    ids = ids if ids is not None and ids.shape == place.shape else None
    known = torch.tensor(visual_ids(model), device=x.device)
    visual = None if ids is None else torch.isin(ids.to(x.device), known)
    stage = Stage(place, alive, padded=not bool(alive.all()))
    return Prefill(model, sight, [stage], tokens, tokens, last, ids, visual, groups, positions=position)


def narrowed(
    before: Stage,
    keep: Tensor,
    last: Tensor,
    hidden: Tensor,
    positions: str,
    rotary: tuple[Tensor, Tensor],
    embedding: nn.Module,
) -> tuple[Stage, Tensor] | None:
    """The stage of the slots that `keep` (batch, slots), and its hidden states; None if all go on.

    `last` (batch, slots) are the tokens that have to: ValueError if one is dropped. `rotary` belongs to the slots of
    `before`; `embedding` makes it anew for contiguous positions.
    """  # fmt: skip
    alive, counts = before.alive.to(hidden.device), keep.sum(1)
    same, ends, least, most = torch.stack(
        [(keep == alive).all(), (keep | ~alive | ~last).all(), counts.min(), counts.max()]
    ).tolist()  # one wait for the device
    if same:
        return None
    if not ends:
        raise ValueError("The last token of a prompt was dropped: its prediction is the answer, so it has to stay.")
    order = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, -most:]  # empty slots to the left
    place, alive = before.place.to(hidden.device).gather(1, order), keep.gather(1, order)
    hidden = _gather(hidden, order)
    stage = Stage(place, alive, padded=least < most, next=before.next)
    if positions == "contiguous":
        stage.next = alive.sum(1, keepdim=True)
        stage.rotary = embedding(hidden, position_ids=(alive.cumsum(1) - 1).clamp(min=0))
    else:
        stage.rotary = tuple(_gather(part.to(order.device), order) for part in before.rotary or rotary)
    return stage, hidden


def deepstack(stage: Stage, visual: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """`visual` (batch, tokens) of the whole prompt and the features of its visual tokens -> those still there."""
    place, visual = stage.place.to(features.device), visual.to(features.device)
    left = visual.gather(1, place) & stage.alive.to(features.device)
    rank = (visual.flatten().cumsum(0) - 1).view_as(visual)
    return left, features[rank.gather(1, place)[left]]


def of_layer(cache: DynamicCache | None, number: int) -> DynamicCache | None:
    """A cache that holds this layer alone: masks are made for the length of the first one, and ours differ."""
    if cache is None or number >= len(cache.layers):  # layers come into a new cache one by one
        return None
    alone = DynamicCache()
    alone.layers = [cache.layers[number]]
    return alone


def plain(prefill: Prefill, made: Iterable[dict[str, Any]]) -> bool:
    """Whether every layer can take the mask and the positions that the decoder makes for the first; `made` are ours."""
    stages = [prefill.stages[number] for number in set(prefill.at)]
    masked = any(stage.padded for stage in stages) or any(layer["attention_mask"] is not None for layer in made)
    return prefill.rest is None and not masked and (len(stages) == 1 or all(s.next is None for s in stages))


def _gather(x: Tensor, slots: Tensor) -> Tensor:
    """x (batch or 1, tokens, width) at slots (batch, kept)."""
    return x.expand(len(slots), -1, -1).gather(1, slots[..., None].expand(-1, -1, x.shape[-1]))
