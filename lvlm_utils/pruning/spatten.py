"""SpAtten (Wang et al., HPCA 2021) for the text of a prompt: cascade pruning by attention received so far.

Importance adds up over heads and layers, and a token that is dropped is gone for all layers behind. The official code
for LLMs (mit-han-lab/spatten, a0f1388) prunes only the cache between turns of a chat, so that no prompt gets shorter:
during the prefill this is our reading. The schedule is that of the cascade in kssteven418/LTP (8ab31a6): the
first layers see everything, then the share kept falls evenly to the last layer.
"""

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lvlm_utils.models import LVLM, bare, decoder_of
from lvlm_utils.pruning.budget import check_drop
from lvlm_utils.pruning.text import check_protect, droppable, knowing, select, whole
from lvlm_utils.pruning.tokens import Plan, Tokens

if TYPE_CHECKING:
    from lvlm_utils.token_groups import TokenGroups

KIND = "text"
NEEDS_CLS = False
OFFICIAL = "none public"
DEVIATIONS = (
    "mit-han-lab/spatten a0f1388 prunes only the cache between turns: cascade, accumulation and top-k follow the "
    "paper, the schedule kssteven418/LTP 8ab31a6. Mean over heads, numbers rounded down, template and question stay."
)
EARLY = 0.15  # share of the depth that sees everything


def score(received: Tensor) -> Tensor:
    """Importance (batch, tokens): attention received, ([layers so far,] batch, heads, tokens), summed over layers.

    The mean over heads, which ranks as their sum does.
    """
    of_layers = received.mean(-2)
    return of_layers.sum(0) if received.dim() == 4 else of_layers


def plan(
    lvlm_or_model: LVLM | PreTrainedModel,
    drop: float = 0.5,
    first: int = 3,
    protect: Sequence[str] = ("system", "question"),
    groups: "TokenGroups | None" = None,
    positions: str = "original",
) -> Plan:
    """The last layer sees the share 1 - drop of the text that may go; before it the share falls evenly from layer to
    layer, and at least `first` layers, and 15% of them, see everything.

    Who stays in any case is as in context pruning. ValueError for a model with no more than `first` layers.
    """
    check_drop(drop)
    check_protect(protect)
    depth = len(decoder_of(bare(lvlm_or_model)).layers)
    begin = max(first, ceil(EARLY * depth))
    if not 1 <= begin < depth or first < 1:
        raise ValueError(f"first={first!r}: of {depth} layers, 1 to {depth - 1} can be the first that sees less.")
    if drop == 0:
        return Plan({}, positions, asks=False)

    def choose(layer: int, tokens: Tokens) -> Tensor:
        may, everything = droppable(tokens, protect), droppable(whole(tokens), protect).sum(1)
        gone = (everything.double() * (drop * ((layer - begin + 1) / (depth - begin)))).long()
        received = torch.stack([tokens.attention("received", before) for before in range(layer)])
        return select(score(received), may, (gone - everything + may.sum(1)).clamp(min=0))

    needs = dict.fromkeys(range(depth - 1), ("received",))
    return Plan({layer: partial(choose, layer) for layer in range(begin, depth)}, positions, needs,
                within=knowing(groups))  # fmt: skip
