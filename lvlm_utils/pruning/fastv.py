"""FastV (Chen et al., ECCV 2024): drop the visual tokens that the last prompt token attends to least.

Matches the official inference code (pkunlp-icler/FastV, d165972): the score is the last query's row of layer K - 1,
mean over heads, and positions stay. Its paper speaks of attention from all tokens. K = 2 as in the paper. Where the
code looks at sample 0 and at fixed places, every sample here has its own choice among its own visual tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lvlm_utils.attention.equi import EquiPositions
from lvlm_utils.attention.intercept import Call
from lvlm_utils.attention.streaming import attention_row
from lvlm_utils.attention.visibility import Visibility
from lvlm_utils.families import decoder_of
from lvlm_utils.models import LVLM
from lvlm_utils.pruning.budget import check_keep, kept
from lvlm_utils.pruning.measure import Measure
from lvlm_utils.pruning.ranking import numbers, ranks, top
from lvlm_utils.pruning.tokens import Plan, Prefill, Tokens

KIND = "visual, inside the LLM"
NEEDS_CLS = False
OFFICIAL = "pkunlp-icler/FastV d165972"
DEVIATIONS = (
    "Same indices and the same output; K counts as in the paper (2, where scripts say 3), every sample of a batch "
    "chooses for itself, and visual tokens are found by their ids."
)


def select(last_attention: Tensor, keep: float | int) -> Tensor:
    """Which visual tokens stay, bool (batch, visual), from the last query's attention (batch, heads, visual)."""
    score = last_attention.mean(1)
    return top(score, kept(keep, score.shape[1]))


def plan(
    lvlm_or_model: LVLM | PreTrainedModel,
    keep: float | int = 0.5,
    layer: int = 2,
    attention: str = "last",
    positions: str = "original",
) -> Plan:
    """Layers below `layer` (the paper's K) see everything; `keep` is a share or number of a prompt's visual tokens.

    attention="equi" scores as if all visual tokens stood at one place (VisPruner, Sec. 3.3), which takes out the
    advantage of those near the text; nothing may have been dropped before. ValueError for layer 0, which has no
    attention before it, and for a `keep` outside its range.
    """
    check_keep(keep)
    if attention not in ("last", "equi"):
        raise ValueError(f"attention={attention!r} is not one of last, equi.")
    if layer == 0:
        raise ValueError("FastV scores by the attention of the layer before, so that layer must be at least 1.")
    if keep == 1.0 and isinstance(keep, float):
        return Plan({}, positions)

    def choose(tokens: Tokens) -> Tensor:
        score, visual = tokens.attention(attention, layer - 1).mean(1), tokens.visual
        return ~visual | (ranks(score, visual) < numbers(keep, visual.sum(1))[:, None])

    if attention == "last":
        return Plan({layer: choose}, positions, needs={layer - 1: ("last",)})
    equi = _Equi(layer - 1)
    return Plan({0: equi.begin, layer: choose}, positions, within=equi.within)


class _Equi:
    """The last row at equi positions, as a statistic of one layer."""

    def __init__(self, layer: int):
        self.measure = Measure("equi", [layer], self.value)

    def begin(self, tokens: Tokens) -> Tensor:
        self.measure.begin(tokens)
        self.positions = EquiPositions(tokens.prefill.visual, ())
        self.positions.read_positions(*self.angles)
        return tokens.alive

    def value(self, call: Call, view: Visibility, prefill: Prefill, place: Tensor) -> Tensor:
        turn = self.positions.turn(call, view)
        return attention_row(call.query, call.key, call.scale, view, view.last(len(call.query)), turn)

    @contextmanager
    def within(self, model: PreTrainedModel) -> Iterator[None]:
        def read(*seen: Any) -> None:
            self.angles = seen

        hook = decoder_of(model).rotary_emb.register_forward_hook(read, with_kwargs=True)
        try:
            with self.measure.within(model):
                yield
        finally:
            hook.remove()
