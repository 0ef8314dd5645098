"""Context pruning (Zhou et al., 2024, arXiv:2410.19732, Sec. 4): drop the text that gets the least attention.

There is no official code, so this is our reading. Eq. 4 sums a softmax row, which is always 1 and cannot rank; read as
attention received it leaves open from whom. Column sums keep the beginning of a text, the opposite of what the paper
shows in Fig. 17 and 18. Of the readings tried in the notebook context_pruning_ablations the mean row of the question
fits the marks of Fig. 17 best and is the default; by Fig. 18 alone it would be the second. The others: all tokens, the
same per query that can see the token, the last token's row, and the column sum over the context alone, which no
question changes.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lvlm_utils.models import LVLM
from lvlm_utils.pruning.engine import Group, Method, Positions, Tokens
from lvlm_utils.pruning.keep import all_but_lowest as select
from lvlm_utils.pruning.keep import depth_of, dropped

THIRDS = ("shallow", "middle", "deep")
MOST = 0.95  # a fitted law may not drop more than it was fitted on


def score(attention: Tensor, pooling: str = "max") -> Tensor:
    """Eq. 4: attention that every token gets, (batch, heads, tokens) -> (batch, tokens), pooled over the heads."""
    return attention.amax(1) if pooling == "max" else attention.mean(1)


def select_sentences(scores: Tensor, droppable: Tensor, drop: float | Tensor, sentence: Tensor) -> Tensor:
    """`select` by whole sentences, ranked by the mean score of their tokens: bool (batch, tokens).

    sentence (batch, tokens): number of each token's sentence, from 0. The lowest sentences go, as many as bring the
    number of tokens that go nearest to that of `select`; where two are as near, the fewer.
    """
    sizes = torch.zeros(len(scores), int(sentence.max()) + 1, dtype=torch.long, device=scores.device)
    size = sizes.scatter_add(1, sentence, droppable.long())
    total = sizes.double().scatter_add(1, sentence, scores.double().masked_fill(~droppable, 0))
    order = (total / size).masked_fill(size == 0, torch.inf).argsort(dim=1, stable=True)
    gone = pad(size.gather(1, order).cumsum(1), (1, 0))  # tokens that go with the lowest 0, 1, 2, ... sentences
    number = (gone - dropped(drop, droppable)).abs().argmin(1, keepdim=True)
    return ~droppable | (order.argsort(1) >= number).gather(1, sentence)


@dataclass
class Context(Method):
    """Drop the text that gets the least attention, after each of some layers (context pruning).

    drop: share of the text that may go (Sec. 4: 30%), see `schedule`; or "auto": of each prompt a n^2 + b n + c, from 0
        to 0.95, with `law` and n thousand tokens of context.
    layers: whose attention ranks, and after which text goes: numbers; or a share of the depth, from the first on (the
        paper's 10 of 32 is 10 / 32); or a third of it, "shallow", "middle" or "deep" (Fig. 9).
    reading: attention received (Eq. 4) from all tokens ("received"), the same per token that sees it ("received_mean"),
        from the "last" token, from the "question" (mean), or from the "context" only, so that all questions share one
        choice.
    pooling: "max" (Eq. 4) or "mean" over the heads; or "random": ranks drawn by `seed` and the prompt's ids.
    schedule: "per_layer" drops the share of what is left after every layer, "once" after the first alone, and with
        "linear" the kept share falls evenly from layer to layer, to 1 - drop.
    protect: groups of text that stay in any case, as visual tokens and the last token do.
    unit: "token"; or "sentence": whole ones, by the mean of their tokens, as near to the same number as they come.
    positions: "original" is our reading.
    law: (a, b, c) of drop="auto", fitted to a model.
    seed: of pooling="random".
    """

    drop: float | Literal["auto"] = 0.3
    layers: Collection[int] | float | Literal["shallow", "middle", "deep"] = 10 / 32
    reading: Literal["received", "received_mean", "last", "question", "context"] = "question"
    pooling: Literal["max", "mean", "random"] = "max"
    schedule: Literal["per_layer", "once", "linear"] = "per_layer"
    protect: Collection[Group] = ("system", "question")
    unit: Literal["token", "sentence"] = "token"
    positions: Positions = "original"
    law: tuple[float, float, float] | None = None
    seed: int = 0

    kind = "text"
    tokenizer = None
    deviations = (
        "Our reading of Eq. 4: attention received from the question, where the sum as printed is 1 for every token. "
        "Template and question are protected, positions stay, and the share is of what is left at each layer."
    )

    @property
    def uses_question(self) -> bool:
        return self.pooling == "random" or self.reading != "context" or not {"system", "question"} <= set(self.protect)

    def fit(self, lvlm):
        _check(self.drop, self.law)
        if self.unit == "sentence" and not isinstance(lvlm, LVLM):
            raise ValueError('unit="sentence" needs the tokenizer: give what lv.load returns, not the bare model.')
        layers = _layers(self.layers, depth_of(lvlm))
        layers = layers[:1] if self.schedule == "once" else layers
        return self.filled(layers=layers, tokenizer=getattr(lvlm, "tokenizer", None))

    def before(self):
        return () if self.drop == 0 else tuple(layer + 1 for layer in self.layers)

    def needs(self):
        return {} if self.pooling == "random" else dict.fromkeys(self.layers, (self.reading,))

    def choose(self, tokens):
        layer, may, random = tokens.layer - 1, tokens.droppable(self.protect), self.pooling == "random"
        ranked = tokens.noise(self.seed) if random else score(tokens.attention(self.reading, layer), self.pooling)
        drop = self.drop if self.law is None else _by_length(self.law, tokens)
        if self.schedule == "linear":
            share = drop * ((self.layers.index(layer) + 1) / len(self.layers))
            drop = tokens.left_to_drop(share, self.protect)
        if self.unit == "sentence":
            return select_sentences(ranked, may, drop, sentences(self.tokenizer, tokens, self.protect))
        return select(ranked, may, drop)


def _check(drop: float | str, law: Collection[float] | None) -> None:
    if law is None and drop == "auto":
        raise ValueError('drop="auto" needs law=(a, b, c), fitted as in the notebook context_pruning_ablations.')
    if law is not None and drop != "auto":
        raise ValueError('law= says how much drop="auto" drops: give both, or neither.')
    if law is not None and (len(law) != 3 or not all(isinstance(x, Real) and isfinite(x) for x in law)):
        raise ValueError(f"law={law!r} is not (a, b, c), three numbers.")


def _by_length(law: tuple[float, float, float], tokens: Tokens) -> Tensor:
    """The share that a fitted law drops of every prompt, float64 (batch,)."""
    if tokens.groups is None:
        raise ValueError('drop="auto" goes by the length of the context: ask with lv.forward or lv.generate.')
    n, (a, b, c) = tokens.whole.here(tokens.groups.context).sum(1).double() / 1000, law
    return (a * n**2 + b * n + c).clamp(0, MOST)


def _layers(layers: Collection[int] | float | str, depth: int) -> tuple[int, ...]:
    """Numbers of the layers, ascending. ValueError for what the model does not have, or has nothing after."""
    last = depth - 1
    if isinstance(layers, str):
        third = THIRDS.index(layers)
        found = range(third * depth // 3, min((third + 1) * depth // 3, last))
        if not found:
            raise ValueError(f"layers={layers!r} names no layer of a model with {depth}.")
    elif isinstance(layers, Collection):
        found = sorted(set(layers))
    elif isinstance(layers, Real) and not isinstance(layers, Integral):
        if not 0 < layers <= 1:
            raise ValueError(f"layers={layers!r} is no share of the depth in (0, 1]: 10 / 32 is the first 10 of 32.")
        found = range(min(max(1, int(layers * depth + 0.5)), last))
    else:
        raise ValueError(f"layers={layers!r}: give numbers, as [{layers!r}], a share of the depth, or a third.")
    if odd := [layer for layer in found if not isinstance(layer, Integral) or not 0 <= layer < last]:
        raise ValueError(f"Layer {odd[0]} is out of range: of the model's {depth} layers, 0 to {last - 1} have a next.")
    return tuple(map(int, found))


@lru_cache(maxsize=4)
def _ending(tokenizer: object, device: torch.device) -> Tensor:
    """Which token ids end a sentence, bool (vocabulary,)."""
    texts = tokenizer.batch_decode([[number] for number in range(len(tokenizer))])
    return torch.tensor([text.rstrip("\"')]”’ ").endswith((".", "!", "?", "\n")) for text in texts], device=device)


def sentences(tokenizer: object, tokens: Tokens, protect: Collection[Group]) -> Tensor:
    """Number of every token's sentence, from 1, (batch, slots); 0 where no sentence has begun yet.

    A sentence ends with a token whose text ends with ".", "!", "?" or a newline, and where droppable text ends.
    """
    prompt = tokens.whole
    may, ids = prompt.droppable(protect), prompt.ids
    ends = _ending(tokenizer, ids.device)[ids] | ~may
    begins = may & pad(ends[:, :-1], (1, 0), value=True)
    return tokens.here(begins.cumsum(1))
