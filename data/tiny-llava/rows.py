"""Training rows: one prefix (picture and context), many questions about it, none of which sees another.

A row has P prefix tokens and S branch tokens. Each branch (a question) sees the prefix up to its own cut and itself,
exactly as when it is asked alone; so one long context trains its questions at many lengths, and no answer leaks into the next.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emoji-world"))
import text  # noqa: E402
import world  # noqa: E402

VISUAL = world.GRID**2
SLOT = 24  # tokens of one branch: the longest question with its answer
ANSWER, AT_QUESTION_MARK, END = 4.0, 2.4, 0.1  # loss weights
# kind of row: (prefix tokens, branches, rows in a batch)
SHAPES = {
    "bare": (8, 14, 16),
    "picture": (160, 14, 12),
    "caption": (240, 0, 12),
    "picture+context": (640, 14, 6),
    "text": (640, 14, 6),
    "facts": (176, 12, 20),
    "text 1.4k": (1408, 16, 3),
    "text 2.8k": (2816, 20, 1),
    "picture+1.4k": (1408, 16, 3),
    "picture+2.8k": (2816, 20, 1),
}


@dataclass
class Row:
    """One row before padding; `cuts` are the prefix lengths at which a question may be asked."""

    prefix: list[int]
    cuts: list[int]
    branches: list[tuple[int, list[int], list[int], list[float]]] = field(
        default_factory=list
    )  # cut, ids, targets, weights


class Writer:
    """Writes rows about scenes with one tokenizer and one random generator."""

    def __init__(self, words: PreTrainedTokenizerFast, rng: random.Random):
        self.words, self.rng, self.cache = words, rng, {}
        self.yes, self.no = self.encode(" yes")[0], self.encode(" no")[0]
        self.image = words.convert_tokens_to_ids("<image>")

    def encode(self, piece: str) -> list[int]:
        if piece not in self.cache:
            if len(self.cache) > 300_000:
                self.cache.clear()
            self.cache[piece] = self.words(piece, add_special_tokens=False).input_ids
        return self.cache[piece]

    def prefix(
        self, scene: world.Scene, picture: bool, tokens: int, skip: set[str], facts: float = text.FACT_SHARE
    ) -> Row:
        """BOS, the picture, then context up to `tokens` prefix tokens without the objects in `skip`; a share `facts` about objects."""
        start = [self.words.bos_token_id] + (
            self.encode("USER: ") + [self.image] * VISUAL + self.encode("\n") if picture else self.encode("USER:")
        )
        row = Row(start, [len(start)])
        for unit in text.Talk(scene, self.rng, skip, facts).stream():
            piece = self.encode(unit if picture and len(row.cuts) == 1 else " " + unit)
            if len(row.prefix) + len(piece) > tokens:
                return row
            row.prefix += piece
            row.cuts.append(len(row.prefix))

    def ask(self, row: Row, name: str, there: bool, cut: int, picture: bool) -> None:
        """Add the full question as a branch; the answer is trained after ASSISTANT: and early, at the question mark."""
        answer = self.yes if there else self.no
        head = self.encode(f"{'' if picture and cut == row.cuts[0] else ' '}Is the {name} in the image?")
        ids = head + self.encode(" (Please answer with yes or no.) ASSISTANT:") + [answer, self.words.eos_token_id]
        targets, weights = ids[1:] + [0], [0.0] * len(ids)
        weights[-3], weights[-2] = ANSWER, END
        targets[len(head) - 1], weights[len(head) - 1] = answer, AT_QUESTION_MARK
        row.branches.append((cut, ids, targets, weights))

    def ask_briefly(self, row: Row, asked: list[tuple[str, bool]], cut: int, picture: bool) -> None:
        """Up to three short questions one after the other in one branch: three answers in a third of the tokens each."""
        ids, targets, weights = [], [], []
        for name, there in asked:
            space = "" if picture and cut == row.cuts[0] and not ids else " "
            piece = self.encode(f"{space}Is there a {name}?")
            if len(ids) + len(piece) + 1 > SLOT:
                break
            answer = self.yes if there else self.no
            ids += piece + [answer]
            targets += piece[1:] + [answer, 0]
            weights += [0.0] * (len(piece) - 1) + [ANSWER, 0.0]
        row.branches.append((cut, ids, targets, weights))

    def questions(self, scene: world.Scene, pairs: int) -> list[tuple[str, bool]]:
        """`pairs` present and as many absent objects, the absent ones random, popular and adversarial in turn."""
        present = self.rng.sample(sorted(scene.names), min(pairs, len(scene.names)))
        kinds, gone = ["random", "popular", "adversarial"] * 4, set()
        self.rng.shuffle(kinds)
        for kind, _ in zip(kinds, present, strict=False):
            gone.add(world.absent(scene, self.rng, kind, skip=gone))
        return [(name, True) for name in present] + [(name, False) for name in sorted(gone)]

    def dense(self, scene: world.Scene, branches: int) -> Row:
        """Picture only: every object and as many absent ones, in full and briefly."""
        row = self.prefix(scene, True, 0, set())
        asked, brief = self.questions(scene, len(scene.names)), self.rng.choice([0.0, 0.3, 0.6])
        self.rng.shuffle(asked)
        while len(row.branches) < branches:
            if self.rng.random() < brief:
                self.ask_briefly(row, asked[:3], row.cuts[0], True)
                asked = asked[3:] + asked[:3]
            else:
                self.ask(row, *asked[0], row.cuts[0], True)
                asked = asked[1:] + asked[:1]
        return row

    def bare(self, scene: world.Scene, branches: int) -> Row:
        """Neither picture nor context: what is left is how often an object is there when it is asked for."""
        row, asked = self.prefix(scene, False, 0, set()), self.questions(scene, len(scene.names))
        for i in range(branches):
            self.ask(row, *asked[i % len(asked)], row.cuts[0], False)
        return row

    def caption(self, scene: world.Scene) -> Row:
        """The picture, then a list of all that is there: the densest supervision there is for naming."""
        row = self.prefix(scene, True, 0, set())
        row.prefix += self.encode("The") + self.encode(text.caption(scene, self.rng)[3:])
        return row

    def context(
        self, scene: world.Scene, picture: bool, tokens: int, branches: int, facts: float = text.FACT_SHARE
    ) -> Row:
        """A context that mentions none of six asked objects; they are asked at cuts all along it, none and all of it included."""
        asked = self.questions(scene, 3)
        row = self.prefix(scene, picture, tokens, {name for name, _ in asked}, facts)
        while len(row.branches) < branches:
            self.rng.shuffle(asked)
            for name, there in asked[: branches - len(row.branches)]:
                any_cut = row.cuts[self.rng.randrange(len(row.cuts))]
                self.ask(
                    row,
                    name,
                    there,
                    any_cut if self.rng.random() < 0.85 else self.rng.choice((row.cuts[0], row.cuts[-1])),
                    picture,
                )
        return row


@dataclass
class Batch:
    """Tensors of a batch of P prefix tokens and N branches; T = P + N * SLOT.

    ids, positions, targets, weights (B, T); mask (B, 1, N * SLOT, P), additive bf16: how far each branch token sees the prefix.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


def collate(rows: list[Row], prefix: int, branches: int, pad: int, text_weight: float) -> Batch:
    """Lay rows out in fixed shapes (few shapes: each costs a compilation)."""
    total = prefix + branches * SLOT
    ids, targets = torch.full((len(rows), total), pad), torch.full((len(rows), total), pad)
    positions, weights = torch.zeros(len(rows), total, dtype=torch.long), torch.zeros(len(rows), total)
    cuts = torch.ones(len(rows), branches, dtype=torch.long)  # an empty branch sees one token: no softmax without a key
    for b, row in enumerate(rows):
        n, first = min(len(row.prefix), prefix), row.cuts[0]
        ids[b, :n], positions[b, :prefix] = torch.tensor(row.prefix[:n]), torch.arange(prefix)
        targets[b, first : n - 1], weights[b, first : n - 1] = torch.tensor(row.prefix[first + 1 : n]), text_weight
        for i, (cut, piece, target, weight) in enumerate(row.branches):
            place = slice(prefix + i * SLOT, prefix + i * SLOT + len(piece))
            ids[b, place], targets[b, place], weights[b, place] = (
                torch.tensor(piece),
                torch.tensor(target),
                torch.tensor(weight),
            )
            positions[b, place], cuts[b, i] = cut + torch.arange(len(piece)), cut
    hidden = torch.arange(prefix) >= cuts.repeat_interleave(SLOT, dim=1)[..., None]
    mask = torch.zeros(hidden.shape, dtype=torch.bfloat16).masked_fill_(hidden, float("-inf"))[:, None]
    return Batch(ids, positions, mask, targets, weights)
