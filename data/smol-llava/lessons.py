"""Training rows: one beginning (pictures, context) and many branches (questions, ordinary prompts), none of which sees another.

Each branch sees the beginning up to its own cut and itself, exactly as when it is asked alone, so the price of a picture is
shared by everything that is asked about it. Pictures show a part of their patches, at the positions these have in the whole.
"""

import json
import math
import random
from dataclasses import dataclass, field

import numpy as np
import text
import torch
import world
from seen import GROUND, Pictures, label_map
from torch import Tensor

import lvlm_utils as lv

YES_OR_NO, PLACE, LEVEL, NUMBER = (
    " (Please answer with yes or no.)", " (Please answer with left, middle or right.)",
    " (Please answer with top, middle or bottom.)", " (Please answer with a number.)",
)  # fmt: skip
BARE = 0.15  # share of the questions without such a suffix
ANSWER, AT_QUESTION_MARK, END, REPLAY = (
    1.0,
    0.5,
    0.3,
    0.5,
)  # loss weights; that of a whole replayed answer, by its tokens
FEWEST, FEW = 32, 48  # patches of a picture in the first stage and in most rows of the second
ORDINALS = ("first", "second")


@dataclass
class Mark:
    """What is trained at one place of a branch: `token` with probability `chance`, else `other`."""

    place: int
    token: int
    weight: float
    kind: str
    other: int = 0
    chance: float = 1.0


@dataclass
class Row:
    """One row before it becomes tensors; `cuts` are the lengths of the beginning after which something may be asked.

    features (visual tokens, 384): what the tower saw of the patches that are shown. facts: what a reader knows at each cut.
    """

    ids: list[int]
    positions: list[int]
    features: Tensor
    cuts: list[int] = field(default_factory=list)
    facts: list[set[str]] = field(default_factory=list)
    branches: list[tuple[int, list[int], list[Mark]]] = field(default_factory=list)

    def add(self, ids: list[int]) -> None:
        self.positions += range(self.positions[-1] + 1, self.positions[-1] + 1 + len(ids))
        self.ids += ids


class Prior:
    """How likely an object is in a picture, for a reader who knows only what a context mentions: naive Bayes, as in world.json."""

    def __init__(self):
        folder = world.HERE
        self.evidence = json.loads((folder / "world.json").read_text(encoding="utf-8"))["evidence"]
        aliases = lv.samples.object_alias(folder / "vg" / "object_alias.txt")
        self.words = lv.samples.lexicon(world.NAMES, aliases)

    def told(self, sentence: str) -> set[str]:
        """The objects that a piece of context mentions, and the scene where what people do there gives it away."""
        places = {
            f"scene: {k}" for k, scene in world.SCENES.items() if any(deed in sentence for deed in scene.activities)
        }
        return lv.samples.mentions(sentence, self.words) | places

    def chance(self, name: str, facts: set[str]) -> float:
        """P(yes) of the question for `name`, with half a count added everywhere."""
        odds = 0.0
        for answer, sign in (("yes", 1), ("no", -1)):
            counts = self.evidence[answer][name]
            logs = [math.log((counts.get(fact, 0) + 0.5) / (counts["asked"] + 1)) for fact in sorted(facts)]
            odds += sign * (math.log(counts["asked"]) + sum(logs))
        return 1 / (1 + math.exp(-odds))


class Writer:
    """Writes rows with one processor and one random generator.

    replay: (prompt, answer of the untouched model as token ids, its end included) of ordinary prompts.
    """

    def __init__(self, processor, rng: random.Random, replay: list[tuple[str, list[int]]]):
        self.words, self.rng, self.replay, self.prior, self.cache = processor.tokenizer, rng, replay, Prior(), {}
        one = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": "!"}]}
        shown = processor.apply_chat_template(
            [one, said, one | {"content": one["content"][1:]}], add_generation_prompt=True
        )
        before, middle, after = shown.split("?")
        head, newline = before.split("<image>")
        self.head, self.newline, self.tail = self.encode(head), self.encode(newline), after
        self.between = self.encode(middle.split("!")[1])  # from the end of an answer to the next question
        self.image, self.end = self.words.convert_tokens_to_ids("<image>"), self.words.eos_token_id
        self.yes, self.no = (self.encode(word)[0] for word in ("Yes", "No"))

    def encode(self, piece: str) -> list[int]:
        if piece not in self.cache:
            if len(self.cache) > 200_000:
                self.cache.clear()
            self.cache[piece] = self.words(piece, add_special_tokens=False).input_ids
        return self.cache[piece]

    # Beginnings ---------------------------------------------------------------------------------------------------
    def begin(self, shown: list[tuple[Tensor, world.Scene]], patches: int = FEW) -> Row:
        """System, user and the pictures; `shown` holds the features of each and the scene in it.

        patches: how many of the 256 are shown, at least one of every object.
        """
        ids, positions, features = list(self.head), list(range(len(self.head))), []
        for seen, scene in shown:
            keep, start = self._patches(scene, len(seen), patches), positions[-1] + 1
            features.append(seen[torch.from_numpy(keep)])
            ids += [self.image] * len(keep) + self.newline
            positions += [start + int(k) for k in keep] + [start + len(seen) + i for i in range(len(self.newline))]
        row = Row(ids, positions, torch.cat(features) if features else torch.zeros(0, 384))
        row.cuts, row.facts = [len(ids)], [set()]
        return row

    def _patches(self, scene: world.Scene, total: int, wanted: int) -> np.ndarray:
        labels, draw = label_map(scene), np.random.default_rng(self.rng.getrandbits(32))
        first = [draw.choice(np.flatnonzero(labels == i)) for i in np.unique(labels) if i < GROUND]
        rest = draw.permutation(np.setdiff1d(np.arange(total), first))[: max(0, wanted - len(first))]
        return np.sort(np.concatenate([np.array(first, int), rest]))

    def context(
        self, row: Row, scene: world.Scene, tokens: int, skip: set[str], facts: float = text.FACT_SHARE
    ) -> None:
        """Up to `tokens` of text about the scene that mentions nothing in `skip`; a share `facts` of it is about objects."""
        last = len(row.ids) + tokens
        for unit in text.Talk(scene, self.rng, skip, facts).stream():
            piece = self.encode(unit if len(row.cuts) == 1 else f" {unit}")
            if len(row.ids) + len(piece) > last:
                return
            row.add(piece)
            row.cuts.append(len(row.ids))
            row.facts.append(row.facts[-1] | self.prior.told(unit))

    # Branches -----------------------------------------------------------------------------------------------------
    def ask(self, row: Row, cut: int, *turns: tuple[str, str, str, str, float]) -> None:
        """A question to the end of the prompt and its answer, or a conversation of several.

        turns: (question, suffix, answer, other answer, chance of the first); the answers of yes/no questions are also
        trained at the question mark, and every answer ends there.
        """
        ids, marks, kinds = [], [], {YES_OR_NO: "yes or no", NUMBER: "how many"}
        for question, suffix, answer, other, chance in turns:
            kind, suffix = kinds.get(suffix, "where"), "" if self.rng.random() < BARE else suffix
            space = " " if cut != row.cuts[0] and not ids else ""
            (right,), (wrong,) = self.encode(answer), self.encode(other)
            ids = ids + (self.between if ids else []) + self.encode(space + question)
            if kind == "yes or no":
                marks.append(Mark(len(ids) - 1, right, AT_QUESTION_MARK, "early", wrong, chance))
            ids = ids + self.encode(suffix + self.tail) + [right]
            marks += [Mark(len(ids) - 2, right, ANSWER, kind, wrong, chance), Mark(len(ids) - 1, self.end, END, "end")]
        row.branches.append((cut, ids, marks))

    def ask_briefly(self, row: Row, cut: int, asked: list[tuple[str, bool]]) -> None:
        """Questions one after the other, each answered at its question mark: many answers for few tokens."""
        ids, marks = [], []
        for name, there in asked:
            ids = ids + self.encode(f"{' ' if ids or cut != row.cuts[0] else ''}Is the {name} in the image?")
            marks.append(Mark(len(ids) - 1, *self._yes(there)))
        row.branches.append((cut, ids, marks))

    def _yes(self, there: bool) -> tuple:
        return (self.yes if there else self.no), ANSWER, "brief", (self.no if there else self.yes)

    def is_there(self, name: str, there: bool, which: str = "") -> tuple[str, str, str, str, float]:
        return f"Is the {name} in the {which}image?", YES_OR_NO, *(("Yes", "No") if there else ("No", "Yes")), 1.0

    def likely(self, name: str, facts: set[str]) -> tuple[str, str, str, str, float]:
        """The question when nothing is to be seen: the target is what the world makes likely."""
        return f"Is the {name} in the image?", YES_OR_NO, "Yes", "No", self.prior.chance(name, facts)

    def where(self, scene: world.Scene) -> tuple[str, str, str, str, float] | None:
        """Where an object is that comes once, across or down; None where every one comes several times."""
        names = [thing.name for thing in scene.things]
        single = [thing for thing in scene.things if names.count(thing.name) == 1]
        if not single:
            return None
        thing, axis = self.rng.choice(single), self.rng.randrange(2)
        answer = text.where(thing)[axis].replace("centre", "middle").capitalize()
        return f"Where is the {thing.name} in the image?", (PLACE, LEVEL)[axis], answer, answer, 1.0

    def how_many(self, scene: world.Scene) -> tuple[str, str, str, str, float]:
        """How often an object comes; those that come several times are asked for more, absent ones sometimes."""
        names = [thing.name for thing in scene.things]
        several = sorted({name for name in names if names.count(name) > 1})
        pool = [several] * bool(several) * 2 + [sorted(set(names)), [world.absent(scene, self.rng, "adversarial")]]
        name = self.rng.choice(self.rng.choice(pool))
        number = str(names.count(name))
        return f"How many {world.OBJECTS[name][1]} are in the image?", NUMBER, number, number, 1.0

    def recall(self, row: Row, cut: int) -> None:
        """An ordinary prompt with the answer that the untouched model gave to it alone."""
        prompt, answer = self.rng.choice(self.replay)
        ids = self.encode((" " if cut != row.cuts[0] else "") + prompt) + self.encode(self.tail)
        first, weight = len(ids) - 1, REPLAY * 4 / len(answer)
        marks = [Mark(first + i, token, weight, "replay", token) for i, token in enumerate(answer)]
        row.branches.append((cut, ids + answer[:-1], marks))

    def questions(self, scene: world.Scene, pairs: int) -> list[tuple[str, bool]]:
        """`pairs` present and as many absent objects, the absent ones random, popular and adversarial in turn."""
        present = self.rng.sample(sorted(scene.names), min(pairs, len(scene.names)))
        kinds, gone = ["random", "popular", "adversarial"] * 4, set()
        self.rng.shuffle(kinds)
        for kind, _ in zip(kinds, present, strict=False):
            gone.add(world.absent(scene, self.rng, kind, skip=gone))
        asked = [(name, True) for name in present] + [(name, False) for name in sorted(gone)]
        self.rng.shuffle(asked)
        return asked

    # Rows ---------------------------------------------------------------------------------------------------------
    def names(self, seen: Tensor, scene: world.Scene) -> Row:
        """A picture, every object briefly and two in full: the most answers for the fewest tokens."""
        row, asked = self.begin([(seen, scene)], FEWEST), self.questions(scene, 9)
        for one in asked[:2]:
            self.ask(row, row.cuts[0], self.is_there(*one))
        for i in range(0, len(asked), 3):
            self.ask_briefly(row, row.cuts[0], asked[i : i + 3])
        return row

    def picture(self, seen: Tensor, scene: world.Scene, patches: int) -> Row:
        """A picture: full questions, two of them in one conversation, brief ones, where and how many."""
        row, asked = self.begin([(seen, scene)], patches), self.questions(scene, 9)
        cut, full = row.cuts[0], [self.is_there(*one) for one in asked[:5]]
        for turns in (full[:1], full[1:2], full[2:3], full[3:5]):
            self.ask(row, cut, *turns)
        for i in range(0, len(asked), 3):
            self.ask_briefly(row, cut, asked[i : i + 3])
        if place := self.where(scene):
            self.ask(row, cut, place)
        if len(scene.names) < len(scene.things) or self.rng.random() < 0.25:
            self.ask(row, cut, self.how_many(scene))
        if self.replay and self.rng.random() < 0.7:
            self.recall(row, cut)
        return row

    def two_pictures(self, one: tuple[Tensor, world.Scene], two: tuple[Tensor, world.Scene]) -> Row:
        """Two pictures; what is asked is which of them shows an object."""
        row = self.begin([one, two])
        for which, (_, scene), (_, other) in ((0, one, two), (1, two, one)):
            asked = self.questions(scene, 2) + [(n, n in scene.names) for n in self.rng.sample(sorted(other.names), 2)]
            for name, there in asked:
                self.ask(row, row.cuts[0], self.is_there(name, there, f"{ORDINALS[which]} "))
        return row

    def with_context(self, shown: list, scene: world.Scene, tokens: int, patches: int, count: int, facts: float) -> Row:
        """A picture or none, and a context that mentions none of six asked objects, asked at cuts all along it.

        Where `shown` is not the scene (a blank picture, or no picture at all), the target is what the context makes likely.
        """
        asked, sees = self.questions(scene, 3), any(there is scene for _, there in shown)
        row = self.begin(shown, patches)
        if tokens:
            self.context(row, scene, tokens, {name for name, _ in asked}, facts)
        for i in range(count):
            name, there = asked[i % len(asked)]
            at = (
                self.rng.randrange(len(row.cuts))
                if self.rng.random() < 0.75
                else self.rng.choice((0, len(row.cuts) - 1))
            )
            self.ask(row, row.cuts[at], self.is_there(name, there) if sees else self.likely(name, row.facts[at]))
        if self.rng.random() < 0.5:
            self.recall(row, row.cuts[0] if self.rng.random() < 0.7 else self.rng.choice(row.cuts))
        return row

    def ordinary(self, count: int = 5) -> Row:
        """Ordinary prompts alone."""
        row = self.begin([])
        for _ in range(count):
            self.recall(row, row.cuts[0])
        return row


# kind of row: share of the rows. "short" sees pictures with at most 480 tokens of context
MIXES = {
    "short": {"picture": 0.38, "picture+context": 0.24, "two pictures": 0.05, "blank": 0.08, "text": 0.13,
              "bare": 0.03, "text 1.4k": 0.02, "replay": 0.07},
    "long": {"picture": 0.32, "picture+context": 0.18, "two pictures": 0.05, "blank": 0.08, "text": 0.13,
             "bare": 0.03, "text 1.4k": 0.02, "replay": 0.07, "picture+2.8k": 0.12},
}  # fmt: skip
LONGEST_FIRST = (
    "picture+2.8k",
    "text 1.4k",
    "text",
    "picture+context",
    "blank",
    "two pictures",
    "picture",
    "bare",
    "names",
    "replay",
)
FACTS = (text.FACT_SHARE, 0.8)  # dense contexts teach what the world makes likely with fewer tokens


def write(kind: str, writer: Writer, pictures: Pictures) -> Row:
    """A row of one kind about pictures chosen at random."""
    rng = writer.rng
    first, second = (rng.randrange(len(pictures.scenes)) for _ in range(2))
    scene, seen = pictures.scenes[first], pictures.features[first]
    patches, length = rng.choices((FEW, 96, 256), (0.6, 0.2, 0.2))[0], rng.randint(40, 480)
    if kind == "names":
        return writer.names(seen, scene)
    if kind == "picture":
        return writer.picture(seen, scene, patches)
    if kind == "two pictures":
        return writer.two_pictures((seen, scene), (pictures.features[second], pictures.scenes[second]))
    if kind == "replay":
        return writer.ordinary()
    if kind == "picture+2.8k":
        return writer.with_context([(seen, scene)], scene, rng.randint(1400, 2500), 256, 24, FACTS[0])
    fresh = world.sample_scene(rng)  # nothing to be seen: no picture is needed, so every scene is new
    if kind == "picture+context":
        return writer.with_context([(seen, scene)], scene, length, patches, 10, FACTS[0])
    if kind == "blank":
        blank = pictures.blank[rng.randrange(len(pictures.blank))]
        return writer.with_context(
            [(blank, world.Scene("", ()))], fresh, rng.choice((0, length)), patches, 10, FACTS[0]
        )
    if kind == "bare":
        return writer.with_context([], fresh, 0, 0, 12, FACTS[0])
    return writer.with_context([], fresh, 1376 if kind == "text 1.4k" else length, 0, 14, rng.choice(FACTS))
