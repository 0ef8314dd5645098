"""SpAtten (Wang et al., HPCA 2021) for the text of a prompt: cascade pruning by attention received so far.

Importance adds up over heads and layers, and a token that is dropped is gone for all later layers. The official code
for LLMs (mit-han-lab/spatten, a0f1388) prunes only the cache between turns of a chat, so that no prompt gets shorter:
during the prefill this is our reading. The schedule is that of the cascade in kssteven418/LTP (8ab31a6): the
first layers see everything, then the share kept falls evenly to the last layer.
"""

from collections.abc import Collection
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from lvlm_utils.pruning.engine import Group, Method, Positions
from lvlm_utils.pruning.keep import all_but_lowest as select
from lvlm_utils.pruning.keep import depth_of

EARLY = 0.15  # share of the depth that sees everything


def score(received: Tensor) -> Tensor:
    """Importance (batch, tokens): attention received, ([layers so far,] batch, heads, tokens), summed over layers.

    The mean over heads, which ranks as their sum does.
    """
    of_layers = received.mean(-2)
    return of_layers.sum(0) if received.dim() == 4 else of_layers


@dataclass
class SpAtten(Method):
    """Drop text layer by layer, by the attention that it has received so far (SpAtten's cascade).

    drop: share of the text that may go that the last layer does not see; before it the share falls evenly from layer to
        layer.
    first: at least so many layers, and 15% of them (LTP's code), see everything.
    protect: groups of text that stay in any case, as visual tokens and the last token do.
    positions: "original" is our reading.
    """

    drop: float = 0.5
    first: int = 3
    protect: Collection[Group] = ("system", "question")
    positions: Positions = "original"

    kind = "text"
    begin = depth = 0  # the first layer that sees less, and the number of layers
    deviations = (
        "mit-han-lab/spatten a0f1388 prunes only the cache between turns: cascade, accumulation and top-k follow the "
        "paper, the schedule kssteven418/LTP 8ab31a6. Mean over heads, rounded down; template and question stay."
    )

    def fit(self, lvlm):
        depth = depth_of(lvlm)
        begin = max(self.first, ceil(EARLY * depth))
        if self.first < 1 or begin >= depth:
            raise ValueError(f"first={self.first!r}: of {depth} layers, 1 to {depth - 1} can be the first to see less.")
        return self.filled(begin=begin, depth=depth)

    def before(self):
        return () if self.drop == 0 else tuple(range(self.begin, self.depth))

    def needs(self):
        return dict.fromkeys(range(self.depth - 1), ("received",))

    def choose(self, tokens):
        share = self.drop * ((tokens.layer - self.begin + 1) / (self.depth - self.begin))
        received = torch.stack([tokens.attention("received", before) for before in range(tokens.layer)])
        return select(score(received), tokens.droppable(self.protect), tokens.left_to_drop(share, self.protect))
