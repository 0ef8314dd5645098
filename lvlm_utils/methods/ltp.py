"""LTP (Kim et al., KDD 2022) for text, without training: drop what gets less attention than a threshold.

The official code (kssteven418/LTP, 8ab31a6) learns one threshold a layer for a BERT and hides tokens under a mask. Here
nothing is learned: thresholds rise with depth to a fixed one, or come from percentiles on calibration prompts. They are
relative to uniform attention, 1 / tokens, because a score is the smaller the longer the prompt. How much is kept
depends on the prompt and is no option: read it from the trace (`trace.mean_text`).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from lvlm_utils.models import LVLM
from lvlm_utils.prompts import Prompt, forward
from lvlm_utils.pruning.engine import Group, Method, Positions, Tokens, pruning
from lvlm_utils.pruning.keep import check_drop, depth_of


def score(received: Tensor, queries: Tensor | None = None) -> Tensor:
    """Mean over heads and queries of the attention on every token: received (batch, heads, tokens) -> (batch, tokens).

    queries (batch, 1): how many there are, if not as many as tokens. The scores of a prompt then sum to 1.
    """
    return received.mean(1) / (received.shape[2] if queries is None else queries)


def select(scores: Tensor, droppable: Tensor, threshold: float | Tensor) -> Tensor:
    """Which tokens stay, bool (batch, tokens): those from `threshold` (a number, or (batch, 1)) on, and all others."""
    return ~droppable | (scores >= threshold)


@dataclass
class LTP(Method):
    """Drop text that gets less attention than a threshold (LTP, without training).

    theta: after layer l of L, text that gets less than theta (l + 1) / L times uniform attention goes, with 1 / n for
        the n tokens that the layer sees (the linear rise of the code's thresholds).
    thresholds: one for every layer but the last, in the same unit and in place of theta (l + 1) / L, as `calibrate`
        gives them.
    protect: groups of text that stay in any case, as visual tokens and the last token do.
    positions: "original" is our reading.
    """

    theta: float = 0.5
    thresholds: tuple[float, ...] | None = None
    protect: Collection[Group] = ("system", "question")
    positions: Positions = "original"

    kind = "text"
    deviations = (
        "kssteven418/LTP 8ab31a6 is for RoBERTa, learns its thresholds and only masks: score and linear rise of the "
        "threshold are its own. Thresholds are relative to uniform attention, not learned, and tokens really go."
    )

    def fit(self, lvlm):
        depth, thresholds = depth_of(lvlm), self.thresholds
        if thresholds is None:
            thresholds = [self.theta * (layer + 1) / depth for layer in range(depth - 1)]
        if len(thresholds) != depth - 1:
            raise ValueError(f"{len(thresholds)} thresholds for {depth} layers: give {depth - 1}, none for the last.")
        if not all(0 <= threshold < inf for threshold in thresholds):
            raise ValueError("A threshold is a number from 0 on, in units of uniform attention: 1.0 is the mean.")
        return self.filled(thresholds=tuple(thresholds))

    def before(self):
        return tuple(layer + 1 for layer, threshold in enumerate(self.thresholds) if threshold > 0)

    def needs(self):
        return {layer - 1: ("received",) for layer in self.before()}

    def choose(self, tokens):
        scores, uniform = _scores(tokens)
        return select(scores, tokens.droppable(self.protect), self.thresholds[tokens.layer - 1] * uniform)


def _scores(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """(batch, slots), and what each would be if attention were uniform, (batch, 1)."""
    queries = tokens.alive.sum(1, keepdim=True)
    return score(tokens.attention("received", tokens.layer - 1), queries), 1 / queries


class _Scores(Method):
    """Drops nothing, and notes the scores of all text that may go, in units of uniform attention."""

    def __init__(self, layer: int, protect: Collection[Group]):
        self.layer, self.protect, self.found = layer, protect, []

    def needs(self):
        return {self.layer - 1: ("received",)}

    def choose(self, tokens):
        scores, uniform = _scores(tokens)
        self.found.append((scores / uniform)[tokens.droppable(self.protect)])
        return tokens.alive


def calibrate(
    lvlm: LVLM, prompts: Iterable[Prompt], drop: float = 0.5, protect: Collection[Group] = ("system", "question")
) -> tuple[float, ...]:
    """Thresholds for LTP under which these prompts, taken together, lose the share `drop` of the text that may go.

    The share lost rises evenly over the layers: each threshold is the percentile, over all prompts, of the scores that
    are left at its layer under those before it, so the prompts are read once for every layer. ValueError without any
    text that may go.
    """
    check_drop(drop)
    everything = 0
    prompts, last, thresholds = list(prompts), depth_of(lvlm) - 1, []
    for layer in range(last):
        so_far = LTP(thresholds=(*thresholds, *[0.0] * (last - layer)), protect=protect).fit(lvlm)
        left = _Scores(layer + 1, protect)
        with pruning(lvlm.model, so_far), pruning(lvlm.model, left):
            for prompt in prompts:
                forward(lvlm, prompt, use_cache=False, logits_to_keep=1)
        scores = torch.cat(left.found).sort().values
        everything = everything or len(scores)
        if not everything:
            raise ValueError("No text to calibrate on: give prompts with a context, or protect less.")
        more = int(everything * (drop * ((layer + 1) / last))) - (everything - len(scores))
        thresholds.append(scores[more].item() if more > 0 else 0.0)
    return tuple(thresholds)
