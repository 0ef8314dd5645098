"""Context pruning (Zhou et al., 2024, arXiv:2410.19732, Sec. 4): drop the text that gets the least attention.

There is no official code, so this is our reading. Eq. 4 sums a softmax row, which is always 1 and cannot rank; read as
attention received it leaves open from whom. Column sums keep the beginning of a text, the opposite of what the paper
shows in Fig. 17 and 18. Of the readings tried in notebook 09 the mean row of the question fits the marks of Fig. 17
best and is the default; by Fig. 18 alone it would be the second. The others: all tokens, the same per query that can
see the token, the last token's row, and the column sum over the context alone, which no question changes.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel

from lvlm_utils.models import LVLM, bare, decoder_of
from lvlm_utils.pruning.budget import check_drop
from lvlm_utils.pruning.statistics import FROM
from lvlm_utils.pruning.text import check_protect, droppable, knowing, noise, select, select_sentences, sentences, whole
from lvlm_utils.pruning.tokens import Plan, Tokens

if TYPE_CHECKING:
    from lvlm_utils.token_groups import TokenGroups

KIND = "text"
NEEDS_CLS = False
OFFICIAL = "none public"
DEVIATIONS = (
    "Our reading of Eq. 4: attention received from the question, where the sum as printed is 1 for every token. "
    "Template and question are protected, positions stay, and the share is of what is left at each layer."
)

READINGS = ("received", "received_mean", "last")  # from all tokens, and those of one group:
READINGS_FROM = FROM
POOLING = ("max", "mean")  # over the heads; or "random" for no attention at all
SCHEDULES = ("per_layer", "once", "linear")
UNITS = ("token", "sentence")
THIRDS = ("shallow", "middle", "deep")
MOST = 0.95  # a fitted law may not drop more than it was fitted on


def score(attention: Tensor, pooling: str = "max") -> Tensor:
    """Eq. 4: attention that every token gets, (batch, heads, tokens) -> (batch, tokens), pooled over the heads."""
    return attention.amax(1) if pooling == "max" else attention.mean(1)


def plan(
    lvlm_or_model: LVLM | PreTrainedModel,
    drop: float | str = 0.3,
    layers: Iterable[int] | float | str = 10 / 32,
    reading: str = "question",
    pooling: str = "max",
    schedule: str = "per_layer",
    protect: Sequence[str] = ("system", "question"),
    unit: str = "token",
    groups: "TokenGroups | None" = None,
    positions: str = "original",
    law: Sequence[float] | None = None,
    seed: int = 0,
) -> Plan:
    """Layers of `layers` rank the text by its own attention, and the lowest is dropped behind them.

    drop, schedule: "per_layer" drops the share `drop` of what is left behind every layer, "once" behind the first
    alone, and with "linear" the kept share falls evenly from layer to layer, to 1 - drop. drop="auto" takes for each
    prompt a n^2 + b n + c, between 0 and 0.95, with `law` (a, b, c) and n thousand tokens of context.
    layers: numbers; or a share of the depth, from the first on (the paper's 10 of 32 is 10 / 32); or a third of it,
    "shallow", "middle" or "deep".
    reading: "received" from all tokens, "received_mean" the same per token that sees it, from the "last" token, from
    the "question" (mean) or from the "context" only, so that all questions share one choice.
    pooling: "max" or "mean" over the heads, or "random": ranks drawn by `seed` and the prompt's ids.
    unit: "token", or "sentence": whole ones, by the mean of their tokens, as near to the same number as they come.

    Visual tokens and the last prompt token always stay, and so do the groups named in `protect`. Groups are known where
    `lv.generate` asks; a bare call of the model needs `groups=prompt.groups`, or protect=(). ValueError for unknown
    names, and for the last layer, behind which nothing is left to save.
    """
    for name, value, known in (
        ("reading", reading, (*READINGS, *READINGS_FROM)), ("pooling", pooling, (*POOLING, "random")),
        ("schedule", schedule, SCHEDULES), ("unit", unit, UNITS),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}.")
    _check(drop, law)
    check_protect(protect)
    if unit == "sentence" and not isinstance(lvlm_or_model, LVLM):
        raise ValueError('unit="sentence" needs the tokenizer: give what lv.load returns, not the bare model.')
    chosen = _layers(layers, len(decoder_of(bare(lvlm_or_model)).layers))
    chosen = chosen[:1] if schedule == "once" else chosen
    if drop == 0:
        return Plan({}, positions, asks=False)

    def choose(layer: int, tokens: Tokens) -> Tensor:
        may = droppable(tokens, protect)
        ranked = noise(tokens, seed) if pooling == "random" else score(tokens.attention(reading, layer), pooling)
        number = drop if law is None else _by_length(law, tokens)
        if schedule == "linear":
            all_ = droppable(whole(tokens), protect).sum(1)
            gone = (all_.double() * (number * ((chosen.index(layer) + 1) / len(chosen)))).long()
            number = (gone - all_ + may.sum(1)).clamp(min=0)
        if unit == "sentence":
            return select_sentences(ranked, may, number, sentences(lvlm_or_model, tokens, protect))
        return select(ranked, may, number)

    return Plan(
        {layer + 1: partial(choose, layer) for layer in chosen},
        positions,
        needs={} if pooling == "random" else dict.fromkeys(chosen, (reading,)),
        within=knowing(groups),
        asks=pooling == "random" or reading != "context" or not {"system", "question"} <= set(protect),
    )


def _check(drop: float | str, law: Sequence[float] | None) -> None:
    if drop != "auto":
        check_drop(drop)
        if law is not None:
            raise ValueError('law= says how much drop="auto" drops: give both, or neither.')
    elif law is None:
        raise ValueError(
            'drop="auto" needs law=(a, b, c), fitted to your model: the share dropped is a n^2 + b n + c, with n '
            "thousand tokens of context (notebook 09 fits it)."
        )
    elif len(law) != 3 or not all(isinstance(x, int | float) and isfinite(x) for x in law):
        raise ValueError(f"law={law!r} is not (a, b, c), three numbers.")


def _by_length(law: Sequence[float], tokens: Tokens) -> Tensor:
    """The share that a fitted law drops of every prompt, float64 (batch,)."""
    if tokens.groups is None:
        raise ValueError('drop="auto" goes by the length of the context: ask with lv.generate, or give groups=.')
    n, (a, b, c) = whole(tokens).here(tokens.groups.context).sum(1).double() / 1000, law
    return (a * n**2 + b * n + c).clamp(0, MOST)


def _layers(layers: Iterable[int] | float | str, depth: int) -> list[int]:
    """Numbers of the layers, ascending. ValueError for what the model does not have, or has nothing behind."""
    behind = depth - 1
    if isinstance(layers, str):
        if layers not in THIRDS:
            raise ValueError(f"layers={layers!r} is not one of {', '.join(THIRDS)}.")
        third = THIRDS.index(layers)
        found = range(third * depth // 3, min((third + 1) * depth // 3, behind))
    elif isinstance(layers, float):
        if not 0 < layers <= 1:
            raise ValueError(f"layers={layers!r} is no share of the depth in (0, 1]: 10 / 32 is the first 10 of 32.")
        found = range(min(max(1, int(layers * depth + 0.5)), behind))
    elif isinstance(layers, Iterable):
        found = sorted(set(layers))
    else:
        raise ValueError(f"layers={layers!r}: give numbers, as [{layers!r}], a share of the depth, or a third.")
    if odd := [layer for layer in found if not 0 <= layer < behind]:
        raise ValueError(
            f"Layer {odd[0]} is out of range: of the model's {depth} layers, 0 to {behind - 1} have one behind."
        )
    if not found and layers in THIRDS:
        raise ValueError(f"layers={layers!r} names no layer of a model with {depth}.")
    return list(found)
