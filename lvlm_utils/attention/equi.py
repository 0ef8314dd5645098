"""The last token's attention, also with all visual keys at one position ("equi last attention", VisPruner Sec. 3.3).

The paper gives every visual token the same position embedding and does not say which. Its code (`equi_position_ids` in
`fastv_kvcache.py`) numbers the prompt as if there were a single visual token: the visual ones share the place of the
first, and the text after them follows at once. The same here, for any number of pictures and for grid positions.
Rotary attention depends on distances only, so the last token may keep its place, and everything before it moves up.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from lvlm_utils.attention.intercept import Call
from lvlm_utils.attention.streaming import Turn, attention_row
from lvlm_utils.attention.visibility import Visibility


def equi_positions(positions: Tensor, visual: Tensor) -> Tensor:
    """Positions (..., batch, tokens) of left-padded prompts with one common place for the visual tokens.

    Text positions count up by one, and visual (batch, tokens) may have several runs; prompts without a visual token
    keep theirs.
    """
    after = (~visual).flip(-1).cumsum(-1).flip(-1) - (~visual).long()  # tokens of text after each token
    common = torch.where(visual, after, 0).amax(-1, keepdim=True)  # after the first visual token
    before = visual.cumsum(-1) == 0
    distance = torch.where(visual, common, after + before.long())
    return torch.where(visual.any(-1, keepdim=True), positions[..., -1:] - distance, positions)


def positions_of(kwargs: dict, x: Tensor) -> Tensor:
    """Positions by which a decoder that reads `x` (batch, tokens, ...) turns its keys: (batch or 1, tokens), on a grid
    one for each axis."""
    given = kwargs.get("position_ids")
    if given is None:
        return torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    return given[-3:] if given.dim() == 3 else given  # a grid may have the text's own positions in front


def last_rows(
    call: Call, view: Visibility, wanted: Collection[str], rotary: nn.Module, positions: Tensor, angles: Turn,
    visual: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The row of every prompt's last token (batch, heads, tokens), as "last" and as "equi", if these are `wanted`.

    The arguments after `wanted` are those of `_turn`, and only "equi" needs them.
    """
    last, found = view.last(len(call.query)), {}
    if "last" in wanted:
        found["last"] = attention_row(call.query, call.key, call.scale, view, last)
    if "equi" in wanted:
        turn = _turn(call, view, rotary, positions, angles, visual)
        found["equi"] = attention_row(call.query, call.key, call.scale, view, last, turn)
    return found


def _turn(
    call: Call, view: Visibility, rotary: nn.Module, positions: Tensor, angles: Turn, visual: Tensor | None
) -> Turn:
    """Cosine and sine (batch, tokens, rotated width) of the rotation that moves the keys of `call` to equi positions.

    rotary: the decoder's rotary embedding; positions: as `positions_of` gives them; angles: cosine and sine of these;
    visual: bool (batch, tokens). ValueError where the visual tokens of the whole prompt are not known, for right
    padding, and where tokens were dropped on the way.
    """
    batch, _, tokens, _ = call.query.shape
    if visual is None or visual.shape != (batch, tokens) or positions.shape[-1] != tokens:
        raise ValueError(
            "equi needs to know the visual tokens of the whole prompt: give the groups of this very prompt, or call "
            "the model with input_ids; and no token may have been dropped before."
        )
    if view.real is not None and not bool(view.real[:, -1].all()):
        raise ValueError("equi needs left padding: set padding_side='left'.")
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    moved = equi_positions(positions.expand(*positions.shape[:-2], batch, tokens), visual.to(positions.device))
    # The library's own function: whatever the kind of rotary embedding and its scaling.
    new = rotary.forward(call.query.new_empty(batch, 1, 1, device=positions.device), moved)
    (cos, sin), (new_cos, new_sin) = ([angle.to(call.query.device, dtype) for angle in pair] for pair in (angles, new))
    # (new_cos + i new_sin) / (cos + i sin): also right where both are scaled
    size = cos.square() + sin.square()
    return (new_cos * cos + new_sin * sin) / size, (new_sin * cos - new_cos * sin) / size
