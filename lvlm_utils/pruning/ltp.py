"""LTP (Kim et al., KDD 2022) for text, without training: drop what gets less attention than a threshold.

The official code (kssteven418/LTP, 8ab31a6) learns one threshold a layer for a BERT and hides tokens under a mask. Here
nothing is learned: thresholds rise with depth to a fixed one, or come from percentiles on calibration prompts. They are
relative to uniform attention, 1 / tokens, because a score is the smaller the longer the prompt. How much is kept
depends on the prompt and is no option: read it from the trace (`trace.mean_text`).
"""

from collections.abc import Iterable, Sequence
from functools import partial
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lvlm_utils.models import LVLM, bare, decoder_of
from lvlm_utils.pruning.budget import check_drop
from lvlm_utils.pruning.engine import pruning, told
from lvlm_utils.pruning.text import check_protect, droppable, knowing
from lvlm_utils.pruning.tokens import Plan, Tokens

if TYPE_CHECKING:
    from lvlm_utils.prompts import Prompt
    from lvlm_utils.token_groups import TokenGroups

KIND = "text"
NEEDS_CLS = False
OFFICIAL = "none public"
DEVIATIONS = (
    "kssteven418/LTP 8ab31a6 is for RoBERTa, learns its thresholds and only masks: score and linear rise of the "
    "threshold are its own. Thresholds are relative to uniform attention, not learned, and tokens really go."
)


def score(received: Tensor, queries: Tensor | None = None) -> Tensor:
    """Mean over heads and queries of the attention on every token: received (batch, heads, tokens) -> (batch, tokens).

    queries (batch, 1): how many there are, if not as many as tokens. The scores of a prompt then sum to 1.
    """
    return received.mean(1) / (received.shape[2] if queries is None else queries)


def select(scores: Tensor, droppable: Tensor, threshold: float | Tensor) -> Tensor:
    """Which tokens stay, bool (batch, tokens): those from `threshold` (a number, or (batch, 1)) on, and all others."""
    return ~droppable | (scores >= threshold)


def plan(
    lvlm_or_model: LVLM | PreTrainedModel,
    theta: float = 0.5,
    thresholds: Sequence[float] | None = None,
    protect: Sequence[str] = ("system", "question"),
    groups: "TokenGroups | None" = None,
    positions: str = "original",
) -> Plan:
    """Behind layer l of L, text that gets less than theta (l + 1) / L times uniform attention goes.

    Uniform is 1 / n for the n tokens that the layer sees. thresholds: one for every layer but the last, in the same
    unit and in place of theta (l + 1) / L, as `calibrate` gives them. Who stays in any case is as in context pruning.
    ValueError for thresholds below 0 or of another number.
    """
    check_protect(protect)
    depth = len(decoder_of(bare(lvlm_or_model)).layers)
    if thresholds is None:
        thresholds = [theta * (layer + 1) / depth for layer in range(depth - 1)]
    if len(thresholds) != depth - 1:
        raise ValueError(f"{len(thresholds)} thresholds for {depth} layers: give {depth - 1}, none for the last layer.")
    if not all(0 <= threshold < inf for threshold in thresholds):
        raise ValueError("A threshold is a number from 0 on, in units of uniform attention: 1.0 is the mean of all.")

    def choose(layer: int, tokens: Tokens) -> Tensor:
        scores, uniform = _scores(layer, tokens)
        return select(scores, droppable(tokens, protect), thresholds[layer] * uniform)

    used = [layer for layer, threshold in enumerate(thresholds) if threshold > 0]
    needs = dict.fromkeys(used, ("received",))
    choices = {layer + 1: partial(choose, layer) for layer in used}
    return Plan(choices, positions, needs, within=knowing(groups), asks=bool(used))


def calibrate(
    lvlm: LVLM, prompts: "Iterable[Prompt]", drop: float = 0.5, protect: Sequence[str] = ("system", "question")
) -> tuple[float, ...]:
    """Thresholds for `plan` under which these prompts, taken together, lose the share `drop` of the text that may go.

    The share lost rises evenly over the layers: each threshold is the percentile, over all prompts, of the scores that
    are left at its layer under those before it, so the prompts are read once for every layer. ValueError without any
    text that may go.
    """
    check_drop(drop)
    check_protect(protect)
    everything = 0
    prompts, last, thresholds = list(prompts), len(lvlm.decoder.layers) - 1, []
    for layer in range(last):
        so_far = plan(lvlm, thresholds=thresholds + [0.0] * (last - layer), protect=protect)
        scores = _left(lvlm, prompts, so_far, layer, protect).sort().values
        everything = everything or len(scores)
        if not everything:
            raise ValueError("No text to calibrate on: give prompts with a context, or protect less.")
        more = int(everything * (drop * ((layer + 1) / last))) - (everything - len(scores))
        thresholds.append(scores[more].item() if more > 0 else 0.0)
    return tuple(thresholds)


@torch.inference_mode()
def _left(lvlm: LVLM, prompts: "Sequence[Prompt]", so_far: Plan, layer: int, protect: Sequence[str]) -> Tensor:
    """Scores at `layer`, in units of uniform attention, of all text that may go and is left, of all prompts."""
    found = []

    def collect(tokens: Tokens) -> Tensor:
        scores, uniform = _scores(layer, tokens)
        found.append((scores / uniform)[droppable(tokens, protect)])
        return tokens.alive

    with pruning(lvlm.model, so_far), pruning(lvlm.model, Plan({layer + 1: collect}, needs={layer: ("received",)})):
        for prompt in prompts:
            with told(lvlm.model, prompt.groups):
                lvlm.model(**prompt.inputs, use_cache=False, logits_to_keep=1)
    return torch.cat(found)


def _scores(layer: int, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """(batch, slots), and what each would be if attention were uniform, (batch, 1)."""
    queries = tokens.alive.sum(1, keepdim=True)
    return score(tokens.attention("received", layer), queries), 1 / queries
