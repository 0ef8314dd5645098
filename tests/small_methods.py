"""Small pruning methods for tests of what answers do with them: one of each kind, as a user would write them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lvlm_utils.methods import Method


@dataclass
class Weak(Method):
    """Drops the picture's and the context's tokens with the smallest hidden states: no question can change that."""

    drop: float = 0.4
    layers: tuple[int, ...] = (1, 2)
    positions: str = "original"
    uses_question: bool = False

    def before(self):
        return tuple(self.layers)

    def choose(self, tokens):
        may = tokens.here(tokens.groups.visual | tokens.groups.context) & tokens.alive & ~tokens.last
        size = tokens.hidden.norm(dim=-1).masked_fill(~may, torch.inf)
        rank = size.argsort(dim=1, stable=True).argsort(dim=1)  # equal words are equally large
        return ~may | (rank >= (may.sum(1, keepdim=True) * self.drop).long())


@dataclass
class Scattered(Method):
    """Keeps visual tokens that are drawn before layer 0, without a look at anything."""

    keep: float | int = 0.5
    seed: int = 0
    uses_question = False

    def choose(self, tokens):
        return tokens.best((tokens.visual.cumsum(1) * (self.seed + 7919) % 101).float(), self.keep)


@dataclass
class LastRow(Method):
    """Keeps the visual tokens that the last token of the prompt attends to, as FastV does."""

    keep: float | int = 0.5
    layer: int = 2
    positions: str = "original"

    def fit(self, lvlm):
        if self.keep != 1.0 and not 0 < self.keep:
            raise ValueError(f"keep={self.keep} is neither a share nor a number.")
        return self

    def needs(self):
        return {self.layer - 1: ("last",)}

    def choose(self, tokens):
        return tokens.best(tokens.attention("last").mean(1), self.keep)


@dataclass
class Unasked(Method):
    """Drops the part of the context that the question attends to least."""

    drop: float = 0.5
    layer: int = 2

    def needs(self):
        return {self.layer - 1: ("question",)}

    def choose(self, tokens):
        context = tokens.here(tokens.groups.context) & tokens.alive
        score = tokens.attention("question").amax(1).masked_fill(~context, torch.inf)
        rank = score.argsort(dim=1, stable=True).argsort(dim=1)
        return ~context | (rank >= (context.sum(1, keepdim=True) * self.drop).long())


@dataclass
class Picky(Weak):
    """Refuses prompts without context."""

    def choose(self, tokens):
        if not tokens.groups.context.any(1).all():
            raise ValueError("A prompt has no context.")
        return super().choose(tokens)


@dataclass
class Scored(Method):
    """Keeps the visual tokens with the best score, which the user's own function gives."""

    score: Callable | None = None
    keep: float | int = 0.5

    def choose(self, tokens):
        return tokens.best(self.score(tokens), self.keep)
