"""FastV (Chen et al., ECCV 2024): drop the visual tokens that the last prompt token attends to least.

Matches the official inference code (pkunlp-icler/FastV, d165972): the score is the last query's row of layer K - 1,
mean over heads, and positions stay. Its paper speaks of attention from all tokens. K = 2 as in the paper. Where the
code looks at sample 0 and at fixed places, every sample here has its own choice among its own visual tokens.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lvlm_utils.pruning.engine import Method, Positions
from lvlm_utils.pruning.keep import everything, top


def select(last_attention: Tensor, keep: float | int) -> Tensor:
    """Which visual tokens stay, bool (batch, visual), from the last query's attention (batch, heads, visual).

    Columns with -inf are no visual tokens; so the prompts of a batch may have unequal numbers of visual tokens.
    """
    return top(last_attention.mean(1), keep)


@dataclass
class FastV(Method):
    """Drop the visual tokens that the last prompt token attends to least (FastV).

    keep: share or number of a prompt's visual tokens (the code's `ratio`).
    layer: tokens are dropped before this layer, counted from 0, by the attention of the layer before it. At least 1. It
        is the paper's K.
    attention: "last", the last token's row; or "equi", that row as if all visual tokens stood at one place (VisPruner,
        Sec. 3.3), which takes out the advantage of those near the text; no other method may then drop tokens before.
    positions: "original" as in the code.
    """

    keep: float | int = 0.5
    layer: int = 2
    attention: Literal["last", "equi"] = "last"
    positions: Positions = "original"

    official = "pkunlp-icler/FastV d165972"
    deviations = (
        "Same indices and the same output; K counts as in the paper (2, where scripts say 3), every sample of a batch "
        "chooses for itself, and visual tokens are found by their ids."
    )

    def fit(self, lvlm):
        if self.layer == 0:
            raise ValueError("FastV scores by the attention of the layer before, so that layer must be at least 1.")
        return self

    def before(self):
        return () if everything(self.keep) else (self.layer,)

    def needs(self):
        return {self.layer - 1: (self.attention,)}

    def choose(self, tokens):
        attention = tokens.attention(self.attention, self.layer - 1)
        return ~tokens.visual | select(tokens.only_visual(attention), self.keep)
