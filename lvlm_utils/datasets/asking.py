"""Which objects are asked about a picture: present ones spread over sizes, absent ones as in POPE (Li et al. 2023)."""
import random
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import sparse

from .leaks import lexicon, mentions
from .readers import Dialogue, Picture

NEGATIVES = ("random", "popular", "adversarial")
SMALL, MEDIUM = 0.04, 0.10  # size groups by a box's share of the picture; the paper names the groups, not the limits
POOL = 10  # a popular (adversarial) negative is one of the 10 most frequent (co-occurring) absent objects
RARE = 0.001  # names in fewer pictures than this are not asked: typing errors and one-offs of Visual Genome


def size_group(share: float) -> str:
    """small < 4% of the picture's area, medium < 10%, else large."""
    return "small" if share < SMALL else "medium" if share < MEDIUM else "large"


class Asker:
    """Chooses the objects asked about a picture, knowing the objects of the whole split."""

    def __init__(self, data: Mapping[str, Picture], aliases: Mapping[str, list[str]], world: Mapping | None):
        self.world = world
        seen = Counter(name for picture in data.values() for name in picture.objects)
        least = RARE * len(data)
        # most frequent first, then by name: an order that depends on the data only
        self.names = sorted((name for name in seen if seen[name] >= least), key=lambda name: (-seen[name], name))
        self.words = lexicon(seen, aliases, world)
        self._column = {name: i for i, name in enumerate(self.names)}
        cells = [(row, self._column[name]) for row, image_id in enumerate(sorted(data))
                 for name in data[image_id].objects if name in self._column]
        where = np.array(cells, dtype=np.int64).reshape(-1, 2).T
        self._presence = sparse.csr_array((np.ones(len(cells)), (where[0], where[1])),
                                          shape=(len(data), len(self.names)))

    def ask(self, picture: Picture, dialogues: list[Dialogue], kinds: Sequence[str], sizes: Counter,
            rng: random.Random) -> str | list[tuple[str, str, str | None]]:
        """Shuffled (name, kind, size), or the reason why there are too few names."""
        asked: list[tuple[str, str, str | None]] = []
        present = sorted(name for name in picture.objects if name in self._column)
        rng.shuffle(present)
        used = Counter(sizes)
        for _ in kinds:
            free = [name for name in present if not any(self.words.related(name, other) for other, _, _ in asked)]
            if not free:
                return "pictures with too few objects"
            name = min(free, key=lambda name: used[size_group(picture.objects[name])])  # the size least asked so far
            size = size_group(picture.objects[name])
            used[size] += 1
            asked.append((name, "present", size))
        text = "" if self.world else "\n".join(" ".join(unit) for dialogue in dialogues for unit in dialogue)
        told = mentions(text, self.words) if text else set()
        blocked = set(picture.objects) | told
        for kind in kinds:
            for name in self._candidates(kind, picture, blocked, rng):
                if not any(self.words.related(name, other) for other in [*picture.objects, *(a[0] for a in asked)]):
                    asked.append((name, kind, None))
                    break
            else:
                return f"pictures without a {kind} absent object"
        rng.shuffle(asked)
        return asked

    def _candidates(self, kind: str, picture: Picture, blocked: set[str], rng: random.Random) -> list[str]:
        """Absent names in the order to try: a shuffled pool, then (popular, adversarial) the next best ones."""
        absent = [name for name in self.names if name not in blocked]
        pool = len(absent) if kind == "random" else POOL
        if kind == "adversarial":
            together = self._together(picture)
            absent.sort(key=lambda name: -together[self._column[name]])  # stable: ties stay in order of frequency
        members = self._members(kind, picture)
        if members:
            absent.sort(key=lambda name: name not in members)
            pool = max(1, sum(name in members for name in absent))
        first = absent[:pool]
        rng.shuffle(first)
        return first + absent[pool:]

    def _members(self, kind: str, picture: Picture) -> set[str]:
        """What the world itself calls popular, or typical of the picture's scene; nothing without a world."""
        if not self.world or kind == "random":
            return set()
        if kind == "popular":
            return set(self.world.get("popular", ()))
        return {name for group in self.world["scenes"][self.scene(picture)]["groups"] for name in group}

    def _together(self, picture: Picture) -> np.ndarray:
        """How often each name shares a picture with the present ones, summed over them."""
        present = [self._column[name] for name in picture.objects if name in self._column]
        return self._presence.T @ self._presence[:, present].sum(axis=1)

    def scene(self, picture: Picture) -> str:
        """The world's scene whose groups hold most of the picture's objects (then, whose occasional ones do)."""
        def fit(scene: str) -> tuple[int, int]:
            entry = self.world["scenes"][scene]
            return (sum(name in picture.objects for group in entry["groups"] for name in group),
                    sum(name in picture.objects for name in entry.get("occasional", ())))
        return max(sorted(self.world["scenes"]), key=fit)
