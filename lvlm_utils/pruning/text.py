"""What the methods for text share: which tokens may go, which of them go, sentences, and noise of a prompt's own."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from lvlm_utils.models import LVLM
from lvlm_utils.pruning.budget import check_drop
from lvlm_utils.pruning.engine import told
from lvlm_utils.pruning.tokens import Tokens

if TYPE_CHECKING:
    from lvlm_utils.token_groups import TokenGroups

GROUPS = ("system", "context", "question")
PRIME = 2**31 - 1


def check_protect(protect: Sequence[str]) -> None:
    """ValueError for a group that does not exist."""
    if unknown := set(protect) - set(GROUPS):
        raise ValueError(f"protect names {', '.join(sorted(unknown))}: only {', '.join(GROUPS)} can be protected.")


def knowing(groups: "TokenGroups | None") -> Callable[[PreTrainedModel], AbstractContextManager] | None:
    """A plan's `within` that lets everything know the groups of the prompts, where a method was given them."""
    return None if groups is None else partial(told, groups=groups)


def droppable(tokens: Tokens, protect: Sequence[str]) -> Tensor:
    """Text that may go, bool (batch, slots): nothing visual, not the last token, and none of the groups in `protect`.

    ValueError where these are not known.
    """
    text = tokens.alive & ~tokens.visual & ~tokens.last
    if protect and tokens.groups is None:
        raise ValueError(
            f"Which tokens are {' and '.join(protect)} is not known here: ask with lv.generate, or pass "
            "groups=prompt.groups, or protect=()."
        )
    for name in protect:
        text = text & ~tokens.here(getattr(tokens.groups, name))
    return text


def whole(tokens: Tokens) -> Tokens:
    """The same prompt as it was before anything was dropped: its slots are the columns."""
    stage, device = tokens.prefill.stages[0], tokens.place.device
    return replace(tokens, place=stage.place.to(device), alive=stage.alive.to(device))


def select(scores: Tensor, droppable: Tensor, drop: float | Tensor) -> Tensor:
    """Which tokens stay, bool (batch, tokens): all but the lowest of the `droppable`, of equal ones the earlier.

    drop: the share (of the droppable, rounded down) that goes; or a tensor (batch,), of shares where it is floating,
    of numbers of tokens where it is whole.
    """
    order = scores.masked_fill(~droppable, torch.inf).argsort(dim=1, stable=True)
    return ~droppable | (_rank(order) >= _number(droppable, drop))


def select_sentences(scores: Tensor, droppable: Tensor, drop: float | Tensor, sentence: Tensor) -> Tensor:
    """The same by whole sentences, ranked by the mean score of their tokens: bool (batch, tokens).

    sentence (batch, tokens): number of each token's sentence, from 0. The lowest sentences go, as many as bring the
    number of tokens that go nearest to that of `select`; where two are as near, the fewer.
    """
    sizes = torch.zeros(len(scores), int(sentence.max()) + 1, dtype=torch.long, device=scores.device)
    size = sizes.scatter_add(1, sentence, droppable.long())
    total = sizes.double().scatter_add(1, sentence, scores.double().masked_fill(~droppable, 0))
    order = (total / size).masked_fill(size == 0, torch.inf).argsort(dim=1, stable=True)
    gone = pad(size.gather(1, order).cumsum(1), (1, 0))  # tokens that go with the lowest 0, 1, 2, ... sentences
    number = (gone - _number(droppable, drop)).abs().argmin(1, keepdim=True)
    return ~droppable | (_rank(order) >= number).gather(1, sentence)


def _number(droppable: Tensor, drop: float | Tensor) -> Tensor:
    """Tokens that go, (batch, 1)."""
    if not isinstance(drop, Tensor):
        check_drop(drop)
    elif not drop.is_floating_point():
        return drop[:, None]
    else:
        drop = drop[:, None]
    return (droppable.sum(1, keepdim=True).double() * drop).long()


def _rank(order: Tensor) -> Tensor:
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, places)


def noise(tokens: Tokens, seed: int) -> Tensor:
    """One pseudo-random number for every token, float64 (batch, slots), in [0, 1).

    It is a hash of `seed`, of all token ids of the prompt and of the token's place among its tokens. So a prompt has
    the same numbers in every batch, order, padding and on every device, and another question has others.
    """
    prompt = whole(tokens)
    place = prompt.alive.cumsum(1)
    key = (_mixed(_mixed(prompt.ids) + place) * prompt.alive).sum(1, keepdim=True)
    return tokens.here(_mixed(_mixed(key + seed % PRIME) + place)).double() / PRIME


def _mixed(x: Tensor) -> Tensor:
    """Whole numbers -> whole numbers in [0, PRIME) without a pattern; no product leaves 64 bits."""
    x = x % PRIME
    for factor in (0x2C1B3C6D, 0x297A2D39, 0x1B56C4E9):
        x = (x ^ (x >> 15)) * factor % PRIME
    return x ^ (x >> 13)


@lru_cache(maxsize=4)
def _ending(tokenizer: object, device: torch.device) -> Tensor:
    """Which token ids end a sentence, bool (vocabulary,)."""
    texts = tokenizer.batch_decode([[number] for number in range(len(tokenizer))])
    return torch.tensor([text.rstrip("\"')]”’ ").endswith((".", "!", "?", "\n")) for text in texts], device=device)


def sentences(lvlm: LVLM, tokens: Tokens, protect: Sequence[str]) -> Tensor:
    """Number of every token's sentence, from 1, (batch, slots); 0 where no sentence has begun yet.

    A sentence ends with a token whose text ends with ".", "!", "?" or a newline, and where droppable text ends.
    """
    prompt = whole(tokens)
    may, ids = droppable(prompt, protect), prompt.ids
    ends = _ending(lvlm.tokenizer, ids.device)[ids] | ~may
    begins = may & pad(ends[:, :-1], (1, 0), value=True)
    return tokens.here(begins.cumsum(1))
