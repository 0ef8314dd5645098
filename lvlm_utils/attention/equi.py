"""Attention with all visual keys at one position ("equi last attention", VisPruner Sec. 3.3): how keys must be turned.

The paper gives every visual token the same position embedding and does not say which. Its code (`equi_position_ids` in
`fastv_kvcache.py`) numbers the prompt as if there were a single visual token: the visual ones share the place of the
first, and the text behind them follows at once. The same here, for any number of pictures and for grid positions.
Rotary attention depends on distances only, so the last token may keep its place, and everything before it moves up.
"""

import torch
from torch import nn

from lvlm_utils.attention.intercept import Call
from lvlm_utils.attention.streaming import Turn
from lvlm_utils.attention.visibility import Visibility


def equi_positions(positions: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Positions (..., batch, tokens) of left-padded prompts with one common place for the visual tokens.

    Text positions count up by one, and visual (batch, tokens) may have several runs; prompts without a visual token
    keep theirs.
    """
    behind = (~visual).flip(-1).cumsum(-1).flip(-1) - (~visual).long()  # tokens of text behind each token
    common = torch.where(visual, behind, 0).amax(-1, keepdim=True)  # behind the first visual token
    before = visual.cumsum(-1) == 0
    distance = torch.where(visual, common, behind + before.long())
    return torch.where(visual.any(-1, keepdim=True), positions[..., -1:] - distance, positions)


class EquiPositions:
    """Watches a decoder's rotary embedding, and finds the angles from its positions to the common one.

    visual: bool (batch, tokens); None: found in the model's input_ids by the ids of its placeholders.
    """

    def __init__(self, visual: torch.Tensor | None, ids: tuple[int, ...]):
        self.given, self.ids = visual, ids
        self.input_ids = self.turns = None

    def read_ids(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the model."""
        self.input_ids = kwargs.get("input_ids", args[0] if args else None)

    def read_positions(self, rotary: nn.Module, args: tuple, kwargs: dict, output: Turn) -> None:
        """Forward hook of the rotary embedding, called with hidden states and positions."""
        self.rotary, self.hidden, self.now, self.turns = rotary, args[0][:, :1], output, {}
        self.positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

    def turn(self, call: Call, view: Visibility) -> Turn:
        """Cosine and sine (batch or 1, tokens, rotated width) of the rotation that moves the keys of `call`.

        ValueError without input_ids and groups, for right padding, and where tokens were dropped on the way.
        """
        device = call.query.device
        if device not in self.turns:
            self.turns[device] = self._angles(call, view)
        return self.turns[device]

    def _angles(self, call: Call, view: Visibility) -> Turn:
        visual = self.given
        if visual is None and self.input_ids is not None:
            visual = torch.isin(self.input_ids, torch.tensor(self.ids, device=self.input_ids.device))
        batch, _, tokens, _ = call.query.shape
        if visual is None or visual.shape != (batch, tokens) or self.positions.shape[-1] != tokens:
            raise ValueError(
                "equi needs to know the visual tokens of the whole prompt: give the groups of this very prompt, or "
                "call the model with input_ids; and observe outside of lv.prune."
            )
        if view.real is not None and not bool(view.real[:, -1].all()):
            raise ValueError("equi needs left padding: set padding_side='left'.")
        positions = self.positions.expand(*self.positions.shape[:-2], batch, tokens)
        moved = equi_positions(positions, visual.to(positions.device))
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        # The library's own function, without the hook: whatever the kind of rotary embedding and its scaling.
        (cos, sin), (new_cos, new_sin) = (
            [angle.to(call.query.device, dtype) for angle in pair]
            for pair in (self.now, self.rotary.forward(self.hidden, moved))
        )
        # (new_cos + i new_sin) / (cos + i sin): also right where both are scaled
        size = cos.square() + sin.square()
        return (new_cos * cos + new_sin * sin) / size, (new_sin * cos - new_cos * sin) / size
