"""The long-context data set of "Rethinking Visual Dependency in Long-Context Reasoning", Sec. 3.1, step by step.

The paper's words are comments above the lines that follow them. We differ in one thing: the same questions are asked at
every length, and a longer context begins with the shorter, so that length is not confounded with difficulty.
"""
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path

import pandas as pd

from .leaks import lexicon, mentions
from .readers import COLUMNS, Picture, Unit, object_alias, picture_file, svit, visual_genome

QUESTION = "Is the {name} in the image? (Please answer with yes or no.)"
LENGTHS = (0, 500, 1000, 1500, 2000, 2500)  # "groups of 0.5k, 1k, 1.5k, 2k, and 2.5k based on text length", and none
TOLERANCE = 0.03  # of a length
NEGATIVES = ("random", "popular", "adversarial")  # absent objects are drawn as in POPE (Li et al. 2023)
POOL = 10  # a popular (adversarial) one is one of the 10 most frequent (co-occurring) absent objects
RARE = 0.001  # names in fewer pictures than this are not asked: typing errors and one-offs of Visual Genome
SMALL, MEDIUM = 0.04, 0.10  # size groups by a box's share of the picture; the paper names the groups, not the limits
DRAWS = 8  # sets of questions tried for a picture whose other text would not reach the longest context
BATCH = 1000  # pictures whose text is in memory at a time


def long_context(svit_dir: str | Path, vg_dir: str | Path, tokenizer, *, lengths: Sequence[int] = LENGTHS,
                 pictures: int = 100, questions: int = 6, seed: int = 0, typical: dict | None = None) -> pd.DataFrame:
    """Questions about pictures of Visual Genome with contexts of SVIT text: one row per question x length.

    Columns: sample, image_id, image, group, length, context, question, label, target, kind, size, n_context_tokens,
    relevance, n_objects (missing values are NaN or None). Tokens are those of the context alone, without special ones.

    svit_dir, vg_dir: folders with SVIT's four files; with image_data.json, objects.json, object_alias.txt and pictures.
    lengths: tokens of context, each met within 3%; 0: none.
    pictures: how many. Those which cannot reach the longest length are skipped; `.attrs["dropped"]` counts all reasons.
    questions: for each picture, even: half about present objects, half about absent ones of the three kinds in turn.
    seed: which pictures and questions.
    typical: image id -> {"popular": absent names to take first, "adversarial": ...}, where a data set knows them.
    Raises ValueError for a malformed record or argument, and when no picture is left.
    """
    if questions < 2 or questions % 2 or not len(lengths) or min(lengths) < 0:
        raise ValueError(f"questions must be even (found {questions}), lengths 0 or more (found {lengths})")
    builder = Builder(Path(vg_dir), tokenizer, sorted(lengths), questions // 2, seed, typical or {})
    parts = list(islice(builder.pictures(svit_dir), pictures))
    dropped = {reason: number for reason, number in sorted(builder.dropped.items()) if number}
    if not parts:
        raise ValueError(f"no picture has enough objects and text for {max(lengths)} tokens; dropped: {dropped}")
    if len(parts) < pictures:
        warnings.warn(f"{len(parts)} of {pictures} pictures could be built; dropped: {dropped}", stacklevel=2)
    table = pd.DataFrame([row for rows in parts for row in rows], columns=COLUMNS)
    table.attrs["dropped"] = dropped
    return table


class Unusable(Exception):
    """Why a picture is left out."""


class Builder:
    """The steps, and what they share: the objects of the whole split, and what was asked so far."""

    def __init__(self, vg_dir, tokenizer, lengths, pairs, seed, typical):
        self.vg_dir, self.lengths, self.pairs, self.seed, self.typical = vg_dir, lengths, pairs, seed, typical
        self.dropped, self.sizes, self.done, self.count = Counter(), Counter(), 0, token_counter(tokenizer)
        self.data = visual_genome(vg_dir, self.dropped)
        seen = Counter(name for picture in self.data.values() for name in picture.objects)
        often = [name for name in seen if seen[name] >= RARE * len(self.data)]
        self.names = sorted(often, key=lambda name: (-seen[name], name))  # an order that depends on the data only
        self.words = lexicon(seen, object_alias(vg_dir / "object_alias.txt"))
        self.together = {name: Counter() for name in self.names}  # how often two names share a picture
        for picture in self.data.values():
            for name in (here := picture.objects.keys() & self.together.keys()):
                self.together[name].update(here)

    def pictures(self, svit_dir: str | Path) -> Iterator[list[tuple]]:
        """The rows of each picture that can be used: "random sampling and filtering"."""
        order = sorted(self.data)
        random.Random(int(self.seed)).shuffle(order)
        for batch in (order[start:start + BATCH] for start in range(0, len(order), BATCH)):
            # "conversation, complex reasoning, referring QAs, and detail description"
            texts = svit(svit_dir, set(batch), self.dropped)
            for image_id in batch:
                try:
                    yield list(self.rows(self.data[image_id], texts.get(image_id, [])))
                    self.done += 1
                except Unusable as reason:
                    self.dropped[str(reason)] += 1

    def rows(self, picture: Picture, dialogues: list[list[Unit]]) -> Iterator[tuple]:
        """ "Each sample is processed in a question-answer format": one row for each question at each length."""
        file = picture_file(self.vg_dir, picture)
        if file is None:
            raise Unusable("pictures without a file")
        mentioned = {unit: mentions(" ".join(unit), self.words) for dialogue in dialogues for unit in dialogue}
        for draw in range(DRAWS):
            rng = random.Random(f"{self.seed}-{picture.image_id}-{draw}")  # of a string: the same in every process
            asked = self.ask(picture, set().union(*mentioned.values()), rng)
            names = {name for name, _, _ in asked}
            # "filtering to ensure that the objects in the answers do not appear in the context"
            clean = [[unit for unit in dialogue if not names & mentioned[unit]] for dialogue in dialogues]
            # "concatenated to form long text annotations": dialogues of all kinds mixed, the turns of one together
            rng.shuffle(clean)
            contexts = grow([unit for dialogue in clean for unit in dialogue], self.lengths, self.count)
            if contexts and not names & mentions(" ".join(contexts[self.lengths[-1]]), self.words):  # where units meet
                break
        else:
            raise Unusable("pictures without enough text that mentions no asked object")
        self.sizes.update(size for _, _, size in asked if size)
        for length, context in ((length, " ".join(sentences)) for length, sentences in contexts.items()):
            tokens = self.count([context])[0] if context else 0
            for k, (name, kind, size) in enumerate(asked):
                yield (f"{picture.image_id}-{k}", picture.image_id, str(file), f"{length / 1000:g}k" if length else "0",
                       length, context, QUESTION.format(name=name), "yes" if kind == "present" else "no", name, kind,
                       size, tokens, None, picture.n_objects)  # in the order of COLUMNS

    def ask(self, picture: Picture, mentioned: set[str], rng: random.Random) -> list[tuple[str, str, str | None]]:
        """Shuffled (name, kind, size): present objects spread over sizes, and as many absent ones (size None).

        What the text mentions is never taken for absent: annotations may be incomplete.
        """
        asked, used, present = {}, Counter(self.sizes), sorted(picture.objects.keys() & self.together.keys())
        rng.shuffle(present)
        for _ in range(self.pairs):
            free = {name: size_group(picture.objects[name]) for name in present if not self.words.related(name, asked)}
            if not free:
                raise Unusable("pictures with too few objects")
            name = min(free, key=lambda name: used[free[name]])  # the size asked least so far
            asked[name] = name, "present", free[name]
            used[free[name]] += 1
        for i in range(self.pairs):
            kind = NEGATIVES[(self.done * self.pairs + i) % len(NEGATIVES)]
            absent = self.absent(kind, picture, mentioned, rng)
            name = next((name for name in absent if not self.words.related(name, [*picture.objects, *asked])), None)
            if name is None:
                raise Unusable(f"pictures without a {kind} absent object")
            asked[name] = name, kind, None
        rng.shuffle(asked := list(asked.values()))
        return asked

    def absent(self, kind: str, picture: Picture, mentioned: set[str], rng: random.Random) -> list[str]:
        """Absent names in the order to try: a shuffled pool, then (popular, adversarial) the next best ones."""
        typical = self.typical.get(picture.image_id, {}).get(kind, ())
        absent = [name for name in self.names if name not in picture.objects and name not in mentioned]
        if kind == "adversarial":
            absent.sort(key=lambda name: -sum(self.together[name][here] for here in picture.objects))
        absent.sort(key=lambda name: name not in typical)
        known = sum(name in typical for name in absent)
        pool = absent[:len(absent) if kind == "random" else max(known, 1) if typical else POOL]
        rng.shuffle(pool)
        return pool + absent[len(pool):]


def size_group(share: float) -> str:
    """ "small" below 4% of the picture's area, "medium" below 10%, else "large" (Sec. 3.4). share: of a box, 0 to 1."""
    return "small" if share < SMALL else "medium" if share < MEDIUM else "large"


def token_counter(tokenizer) -> Callable[[list[str]], list[int]]:
    """A function that counts the tokens of each of several texts, special ones left out."""
    return lambda texts: [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def grow(units: Sequence[Unit], lengths: Sequence[int], count: Callable) -> dict[int, Unit] | None:
    """length -> the sentences of its context (joined by one space), within 3%; a longer one begins with the shorter.

    Units are taken in order. Near a length a unit may be cut between two sentences (it goes on right after the cut), or
    a later unit is taken first where only that comes within 3%. No context ends with a question that its unit answers.
    None when the units do not suffice. count: see `token_counter`.
    """
    units = [_pieces(unit) for unit in units if unit]
    every = list(dict.fromkeys(piece for unit in units for piece in unit))
    stop, *counted = count([".", *(". " + " ".join(piece) for piece in every)])
    size = {piece: tokens - stop for piece, tokens in zip(every, counted)}  # what a piece adds after a full stop

    def measured(unit):
        return unit, list(accumulate(size[piece] for piece in unit))

    queue, context, total, contexts = list(map(measured, units)), [], 0, {}
    for length in sorted(lengths):
        low, high = length * (1 - TOLERANCE), length * (1 + TOLERANCE)
        while length:
            place, n = _next([sums for _, sums in queue], low - total, length - total, high - total)
            if not n:
                break
            unit, sums = queue.pop(place)
            context += [sentence for piece in unit[:n] for sentence in piece]
            if unit[n:]:
                queue.insert(0, measured(unit[n:]))
            total += sums[n - 1]
            if total >= low:  # sums of sizes are near the truth only
                total = count([" ".join(context)])[0]
        if not low <= total <= high:
            return None
        contexts[length] = tuple(context)
    return contexts


def _pieces(unit):
    """The unit's sentences, a question joined to the sentence after it: where it may be cut."""
    starts = [i for i in range(len(unit)) if not i or not unit[i - 1].endswith("?")]
    return [unit[a:b] for a, b in zip(starts, [*starts[1:], len(unit)])]


def _next(queue, low, aim, high):
    """(place in the queue, number of pieces) to take on the way to a cut `aim` (low to high) tokens away; 0: none.

    queue: for each unit the tokens of its first piece, of its first two, ...
    """
    if not queue:
        return 0, 0
    if low <= 0:  # long enough: more of the next unit only where that comes nearer
        return 0, min(range(len(queue[0]) + 1), key=lambda n: abs(aim - [0, *queue[0]][n]))
    if queue[0][-1] <= aim:  # the usual case: the whole next unit fits
        return 0, len(queue[0])
    for place, sums in enumerate(queue):  # a cut inside the next unit, else inside the first later one with a good cut
        if within := [(abs(aim - tokens), n) for n, tokens in enumerate(sums, 1) if low <= tokens <= high]:
            return place, min(within)[1]
    for place, sums in enumerate(queue):  # none has: a later unit that fits whole, then look again
        if sums[-1] < low:
            return place, len(sums)
    return 0, int(queue[0][0] < low)  # or begin the next unit
