"""Random pruning, the control for every method: visual tokens or text, drawn without looking at what they say.

The choice is fresh for every prompt and always the same for one prompt: the draw is a hash of the ids of all its tokens
and of `seed` (`text.noise`). Batch, order, padding and device do not change it, nor does the picture.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lvlm_utils.families import family_of
from lvlm_utils.models import LVLM, bare
from lvlm_utils.pruning.budget import check_drop, check_keep, kept
from lvlm_utils.pruning.text import check_protect, droppable, knowing, noise
from lvlm_utils.pruning.text import select as lowest_go
from lvlm_utils.pruning.tokens import Plan, Tokens

if TYPE_CHECKING:
    from lvlm_utils.token_groups import TokenGroups

KIND = "visual, before the LLM"
NEEDS_CLS = False
OFFICIAL = "none public"
DEVIATIONS = "A control, so nothing to match; with drop= it takes text instead of visual tokens."


def select(noise: Tensor, keep: float | int) -> Tensor:
    """Which visual tokens stay, bool (pictures, visual): those with the highest `noise`."""
    best = noise.topk(kept(keep, noise.shape[1])).indices
    return torch.zeros_like(noise, dtype=torch.bool).scatter(1, best, True)


def plan(
    lvlm_or_model: LVLM | PreTrainedModel,
    keep: float | int | None = None,
    drop: float | None = None,
    layer: int = 0,
    seed: int = 0,
    protect: Sequence[str] = ("system", "question"),
    groups: "TokenGroups | None" = None,
    positions: str | None = None,
) -> Plan:
    """Before `layer`, either `keep` visual tokens of every picture, a share or a number, or `drop` that share of text.

    Pictures are counted as the vision tower sees them, tile by tile. Text that stays in any case is as in context
    pruning. Groups are known where `lv.generate` asks; a bare call of the model needs `groups=prompt.groups`.
    positions: by default "contiguous" for visual tokens before layer 0, as in the methods that this is the control of,
    where the model can number them anew, else "original".
    ValueError unless exactly one of keep and drop is given.
    """
    if (keep is None) == (drop is None):
        raise ValueError("Give exactly one: keep= for visual tokens, or drop= for text.")
    check_protect(protect)
    if positions is None:
        anew = keep is not None and layer == 0 and not family_of(bare(lvlm_or_model)).grid_positions
        positions = "contiguous" if anew else "original"

    def choose_visual(tokens: Tokens) -> Tensor:
        drawn = noise(tokens, seed)
        for pictures in tokens.pictures:
            pictures.keep(select(drawn[pictures.rows[:, None], pictures.slots], keep))
        return tokens.chosen()

    def choose_text(tokens: Tokens) -> Tensor:
        return lowest_go(noise(tokens, seed), droppable(tokens, protect), drop)

    if keep is None:
        check_drop(drop)
        choose, nothing = choose_text, drop == 0
    else:
        check_keep(keep)
        choose, nothing = choose_visual, keep == 1.0 and isinstance(keep, float)
    return Plan({} if nothing else {layer: choose}, positions, within=knowing(groups), asks=not nothing)
