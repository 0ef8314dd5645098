"""What people say about a scene: the four kinds of SVIT text, every sentence labelled with what it is about.

A template is written `{this|that}`: one of the choices is drawn. Slots in capitals are filled first. Sentences end in . ? or !
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from phrases import (
    ACTIVITY,
    DETAIL_ACTIVITY,
    DETAIL_FILLER,
    DETAIL_ONE,
    DETAIL_SETTING,
    DETAIL_TWO,
    FILLER,
    ONE,
    REASON_FILLER,
    REASON_ONE,
    REFER,
    SETTING,
    TOPIC,
    TWO,
)
from world import SCENES, SIDE, Scene, Thing

FACT_SHARE, SETTING_SHARE, ACTIVITY_SHARE, PAIR_SHARE = 0.24, 0.12, 0.03, 0.25
FADE = 0.65  # how fast interest falls from one object of a picture to the next: late text still brings new objects
_CHOICE = re.compile(r"\{([^{}]*)\}")
_ARTICLE = re.compile(r"\ba (?=[aeiou])")
_SPLIT = re.compile(r"(?<=[.?!])\s+")


@dataclass(frozen=True)
class Turn:
    """One question with its answer; `about` is object, scene or filler; `objects` are the names it mentions."""

    question: str
    answer: str
    about: str
    objects: tuple[str, ...]

    @property
    def text(self) -> str:
        return f"{self.question} {self.answer}".strip()


@functools.cache
def _parts(template: str) -> tuple[tuple[str, ...], ...]:
    """A template as alternatives in a row: ((fixed,), (choice, choice), ...)."""
    pieces = _CHOICE.split(template)
    return tuple(tuple(piece.split("|")) if i % 2 else (piece,) for i, piece in enumerate(pieces))


def spin(template: str, rng: random.Random, **slots: str) -> str:
    """Draw one wording of a template and fill its slots."""
    text = "".join(
        options[0] if len(options) == 1 else options[int(rng.random() * len(options))] for options in _parts(template)
    )
    for slot, value in slots.items():
        text = text.replace(slot, value)
    return _ARTICLE.sub("an ", text).replace("middle side", "middle").replace("on the middle", "in the middle")


def where(thing: Thing) -> tuple[str, str]:
    """("left" | "middle" | "right", "top" | "centre" | "bottom") of the box centre."""
    x, y = (thing.box[0] + thing.box[2]) / 2 / SIDE, (thing.box[1] + thing.box[3]) / 2 / SIDE
    return (
        "left" if x < 0.36 else "right" if x > 0.64 else "middle",
        "top" if y < 0.36 else "bottom" if y > 0.64 else "centre",
    )


def relation(a: Thing, b: Thing) -> str:
    """Where a is, seen from b, by the larger of the two distances."""
    dx, dy = (a.box[0] + a.box[2]) - (b.box[0] + b.box[2]), (a.box[1] + a.box[3]) - (b.box[1] + b.box[3])
    if abs(dx) > abs(dy):
        return "to the left of" if dx < 0 else "to the right of"
    return "above" if dy < 0 else "below"


def box(thing: Thing) -> str:
    """The box as SVIT writes it: shares of the picture's sides."""
    return "[" + ", ".join(f"{v / SIDE:.2f}" for v in thing.box) + "]"


def slots(thing: Thing) -> dict[str, str]:
    across, down = where(thing)
    return {
        "NAME": thing.name,
        "SIDE": across,
        "HEIGHT": down,
        "SIZE": thing.size,
        "BOX": f"<st>{thing.name}<ed> {box(thing)}",
    }


class Talk:
    """An endless talker about one scene. Interest in its objects fades geometrically, so new objects keep turning up late."""

    def __init__(
        self, scene: Scene, rng: random.Random, skip: frozenset[str] | set[str] = frozenset(), facts: float = FACT_SHARE
    ):
        self.scene, self.rng, self.facts = scene, rng, facts
        things = [thing for thing in scene.things if thing.name not in skip]
        rng.shuffle(things)
        self.things, self.interest = things, [FADE**i for i in range(len(things))]
        self.decks: dict[int, list] = {}

    def _one(self) -> Thing:
        return self.rng.choices(self.things, self.interest)[0]

    def _two(self) -> tuple[Thing, Thing] | None:
        if len(self.things) < 2:
            return None
        first, second = self._one(), self._one()
        return (first, second) if first is not second else None

    def _fill(self, templates: tuple, about: str, objects: tuple[str, ...] = (), **values: str) -> Turn:
        question, answer = self._deal(templates)
        return Turn(spin(question, self.rng, **values), spin(answer, self.rng, **values), about, objects)

    def _deal(self, templates: tuple) -> tuple[str, str]:
        """A template not used since all others of its list were: long texts must not read like a loop."""
        deck = self.decks.setdefault(id(templates), [])
        if not deck:
            deck += templates
            self.rng.shuffle(deck)
        return deck.pop()

    def _fact(self, one: tuple, two: tuple) -> Turn:
        pair = self._two() if self.rng.random() < PAIR_SHARE else None
        if pair:
            a, b = pair
            return self._fill(two, "object", (a.name, b.name), FIRST=a.name, SECOND=b.name, RELATION=relation(a, b))
        thing = self._one()
        return self._fill(one, "object", (thing.name,), **slots(thing))

    def _turn(
        self, one: tuple, two: tuple, filler: tuple, activity: tuple = ACTIVITY, setting: tuple = SETTING
    ) -> Turn:
        draw = self.rng.random()
        if draw < self.facts and self.things:
            return self._fact(one, two)
        if draw < self.facts + ACTIVITY_SHARE:
            return self._fill(activity, "scene", DOING=self.rng.choice(SCENES[self.scene.kind].activities))
        if draw < self.facts + ACTIVITY_SHARE + SETTING_SHARE:
            return self._fill(setting, "scene")
        return self._fill(filler, "filler")

    def conversation(self) -> tuple[str, list[Turn]]:
        """(topic, five turns)."""
        return spin(self.rng.choice(TOPIC), self.rng), [self._turn(ONE, TWO, FILLER) for _ in range(5)]

    def reasoning(self) -> Turn:
        return self._turn(REASON_ONE, TWO, REASON_FILLER)

    def referring(self) -> Turn:
        thing = self._one()
        return self._fill(REFER, "object", (thing.name,), **slots(thing))

    def detail(self) -> Turn:
        """One sentence of a description (no question)."""
        return self._turn(DETAIL_ONE, DETAIL_TWO, DETAIL_FILLER, DETAIL_ACTIVITY, DETAIL_SETTING)

    def stream(self) -> Iterator[str]:
        """Text for training: the four kinds in the proportions of the written split, without end."""
        while True:
            draw = self.rng.random()
            if draw < 0.36:
                yield from (turn.text for turn in self.conversation()[1])
            elif draw < 0.66:
                for _ in range(3):
                    yield self.reasoning().text
            elif draw < 0.90:
                for _ in range(4):
                    yield self.detail().text
            elif self.things:
                yield plain(self.referring().text)


def plain(text: str) -> str:
    """SVIT's tagged boxes as running text: `<st>cup<ed> [0.10, ...]` -> `cup [0.10, ...]`."""
    return text.replace("<st>", "").replace("<ed>", "")


def split(text: str) -> list[str]:
    """Sentences: split after . ? or ! followed by white space."""
    return _SPLIT.split(text.strip())


def caption(scene: Scene, rng: random.Random) -> str:
    """A short list of everything: the densest supervision there is for naming."""
    things = list(scene.things)
    rng.shuffle(things)
    return (
        "The image shows " + ", ".join(f"a {t.size} {t.name} at the {where(t)[1]} {where(t)[0]}" for t in things) + "."
    )
