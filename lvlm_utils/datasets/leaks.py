"""Which words of a text name an object, and the audit which shows that no context names what its question asks.

Matching is whole-word and on word forms: case, accents, plurals, possessives, hyphens, multi-word names and listed
synonyms. It is conservative: "teddy bear" mentions "bear", because the reader of the context sees that word.
"""
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import pandas as pd

# Plurals that no rule gives. A world may list more ("plural" of an object in world.json).
IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "foot": "feet", "tooth": "teeth",
    "goose": "geese", "mouse": "mice", "ox": "oxen", "die": "dice", "cactus": "cacti", "policeman": "policemen",
    "fireman": "firemen", "snowman": "snowmen",
}
SINGULAR = {plural: singular for singular, plural in IRREGULAR.items()}
WORD = re.compile(r"[^\W_]+")
GAP = re.compile(r"[\s_\-\u2010-\u2015]+")  # what may stand between the words of one name: "traffic-light"
SENTENCE_END = re.compile(r"(?<=[.?!])\s+")


def sentences(text: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence: the text is split after . ? or ! followed by white space, which is left out."""
    spans, start = [], len(text) - len(text.lstrip())
    for gap in SENTENCE_END.finditer(text):
        if gap.start() > start:
            spans.append((start, gap.start()))
        start = gap.end()
    end = len(text.rstrip())
    return spans + [(start, end)] if end > start else spans


class Mention(NamedTuple):
    """One place where a text names an object: text[start:end] == form."""

    name: str  # the object
    form: str  # as the text writes it
    start: int
    end: int


class Lexicon:
    """The word forms of each object name; `find` is the only matcher of the project.

    forms: name -> every way to write it, singular or plural (regular plurals and singulars are added here).
    """

    def __init__(self, forms: Mapping[str, Iterable[str]]):
        self.forms = {name: tuple(sorted(set(forms[name]) | {name})) for name in sorted(forms)}
        self._words = {name: _word_forms(self.forms[name]) for name in self.forms}
        self._by_first: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        for name, all_words in self._words.items():
            for words in sorted(all_words):
                self._by_first.setdefault(words[0], []).append((words, name))

    def __contains__(self, name: str) -> bool:
        return name in self.forms

    def only(self, names: Iterable[str]) -> "Lexicon":
        """The same forms for some of the names. Raises ValueError when a name is unknown."""
        names = list(names)
        unknown = [name for name in names if name not in self.forms]
        if unknown:
            raise ValueError(f"the lexicon does not know {unknown[:5]}: build it from the names of the same data set")
        part = Lexicon({})
        part.forms = {name: self.forms[name] for name in sorted(names)}
        for name in part.forms:
            for words in sorted(self._words[name]):
                part._by_first.setdefault(words[0], []).append((words, name))
        part._words = {name: self._words[name] for name in part.forms}
        return part

    def find(self, text: str) -> list[Mention]:
        """Every mention in reading order; overlapping ones are all given ("teddy bear" and "bear")."""
        spans = [(_plain(found[0]), found.start(), found.end()) for found in WORD.finditer(text)]
        mentions = []
        for i, (first, start, _) in enumerate(spans):
            for words, name in self._by_first.get(first, ()):
                part = spans[i:i + len(words)]
                if len(part) == len(words) and all(word == seen[0] for word, seen in zip(words, part)):
                    gaps = (text[left[2]:right[1]] for left, right in zip(part, part[1:]))
                    if all(GAP.fullmatch(gap) for gap in gaps):
                        mentions.append(Mention(name, text[start:part[-1][2]], start, part[-1][2]))
        return mentions

    def related(self, one: str, other: str) -> bool:
        """Whether a form of one name mentions the other name ("tree" and "trees", "bear" and "teddy bear")."""
        return any(self._inside(a, b) or self._inside(b, a) for a in self._words[one] for b in self._words[other])

    @staticmethod
    def _inside(short: tuple[str, ...], long: tuple[str, ...]) -> bool:
        return any(long[i:i + len(short)] == short for i in range(len(long) - len(short) + 1))


def lexicon(names: Iterable[str], aliases: Mapping[str, Iterable[str]] | None = None,
            world: Mapping | None = None) -> Lexicon:
    """Forms of the names from synonyms (`readers.object_alias`) and from world.json's "plural" and "aliases"."""
    forms: dict[str, set[str]] = {}
    objects = (world or {}).get("objects", {})
    for name in names:
        forms[name] = {name, *(aliases or {}).get(name, ())}
        if name in objects:
            forms[name].update(objects[name].get("aliases", ()))
            forms[name].update(filter(None, [objects[name].get("plural")]))
    return Lexicon(forms)


def mentions(text: str, names: Lexicon | Iterable[str]) -> set[str]:
    """The names which the text mentions. A plain list of names knows plurals, but no synonyms: see `lexicon`."""
    return {found.name for found in (names if isinstance(names, Lexicon) else lexicon(names)).find(text)}


def audit(samples: pd.DataFrame, lexicon: Lexicon) -> pd.DataFrame:
    """Every mention of a row's target in its own context: columns row, sample, target, form, start. Empty = no leak.

    Raises ValueError when the lexicon lacks a target: a check that cannot find anything is no check.
    """
    leaks = []
    for context, rows in samples.groupby("context", sort=False):  # one context serves several questions
        found = lexicon.only(set(rows["target"])).find(context)
        for row, sample, target in zip(rows.index, rows["sample"], rows["target"]):
            leaks += [(row, sample, target, hit.form, hit.start) for hit in found if hit.name == target]
    return pd.DataFrame(sorted(leaks), columns=["row", "sample", "target", "form", "start"])


def _plain(word: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", word.casefold()) if not unicodedata.combining(c))


def _word_forms(forms: Iterable[str]) -> set[tuple[str, ...]]:
    """Word tuples of all forms: each with its last word as written, plural and singular, and closed ("teddybear")."""
    result = set()
    for form in forms:
        words = [_plain(word) for word in WORD.findall(form)]
        if not words:
            continue
        for last in {words[-1], *_plurals(words[-1]), *_singulars(words[-1])}:
            result.add((*words[:-1], last))
            result.add(("".join(words[:-1]) + last,))
    return result


def _plurals(word: str) -> set[str]:
    plurals = {word + "s"}
    if word.endswith(("s", "x", "z", "ch", "sh", "o")):
        plurals.add(word + "es")
    if re.search(r"[^aeiou]y$", word):
        plurals.add(word[:-1] + "ies")
    if word.endswith("f"):
        plurals.add(word[:-1] + "ves")
    if word.endswith("fe"):
        plurals.add(word[:-2] + "ves")
    if word in IRREGULAR:
        plurals.add(IRREGULAR[word])
    return plurals


def _singulars(word: str) -> set[str]:
    """Possible singulars of a name that is itself a plural ("trees" in Visual Genome); some are no words, harmless."""
    singulars = {SINGULAR[word]} if word in SINGULAR else set()
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        singulars.add(word[:-1])
        if word.endswith("ies"):
            singulars.add(word[:-3] + "y")
        elif word.endswith("ves"):
            singulars |= {word[:-3] + "f", word[:-3] + "fe"}
        elif word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
            singulars.add(word[:-2])
    return singulars
