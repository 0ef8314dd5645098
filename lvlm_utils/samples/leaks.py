"""Which words of a text name an object, and the audit: no context names what its question asks.

The paper (Sec. 3.1) filters "to ensure that the objects in the answers do not appear in the context provided for the
questions" and does not say how words are compared. Here whole words are, in all their forms: case, accents, plurals,
possessives, hyphens, names of several words, and the synonyms that the data set lists. In doubt a word counts as a
mention: "teddy bear" mentions "bear", because the reader of the context sees that word.
"""
import functools
import re
import unicodedata
from collections import defaultdict, namedtuple
from collections.abc import Iterable, Mapping

import pandas as pd

# An ending and what may take its place: plurals, then singulars. Some results are no words, which does no harm.
ENDINGS = [("$", "s"), ("(?<=[sxzo])$|(?<=[cs]h)$", "es"), ("(?<=[^aeiou])y$", "ies"), ("fe?$", "ves"),
           ("(?<=..[^sui])s$", ""), ("(?<=.)ies$", "y"), ("(?<=.)ves$", "f"), ("(?<=.)ves$", "fe"),
           ("(?<=.[sxzo])es$|(?<=[cs]h)es$", "")]
IRREGULAR = {"man": "men", "child": "children", "person": "people", "foot": "feet", "tooth": "teeth", "goose": "geese",
             "mouse": "mice", "^ox": "oxen", "^die": "dice", "cactus": "cacti"}
ENDINGS += [(f"{old}$", new.strip("^")) for pair in IRREGULAR.items() for old, new in (pair, pair[::-1])]
SIGNS = str.maketrans("’‘‛ʼʻʽʹˈ′`´՚ꞌ＇“”„‟«»″−⁃˗", "'" * 14 + '"' * 7 + "-" * 3)  # other dashes: Unicode's kind Pd
WORD = re.compile(r"[^\W_]+")
GAP = re.compile(r"(?:[\s_'\"*/&-]|\.(?!\s))+")  # between two words of one name: "traffic-light", "jack-o'-lantern"

Mention = namedtuple("Mention", "name form start end")  # the object, and text[start:end] == form


class Lexicon:
    """The word forms of each object name. forms: name -> every way to write it; plurals and singulars are added."""

    def __init__(self, forms: Mapping[str, Iterable[str]]):
        self.forms = {name: tuple(sorted({name, *forms[name]})) for name in sorted(forms)}
        self._words = {name: set().union(*map(_word_forms, own)) for name, own in self.forms.items()}
        self._starting = defaultdict(list)  # with a first word: (all words, name)
        for name, ways in self._words.items():
            for words in ways:
                self._starting[words[0]].append((words, name))

    def find(self, text: str) -> list[Mention]:
        """Every mention in reading order, the only matcher of the project. Overlapping ones ("bear") are all given."""
        folded, places = _fold(text)
        seen, mentions = [(word[0], *word.span()) for word in WORD.finditer(folded)], []
        for i, (first, begin, _) in enumerate(seen):
            for words, name in self._starting.get(first, ()):
                part = seen[i:i + len(words)]
                if tuple(word for word, _, _ in part) == words and all(
                        GAP.fullmatch(folded, left[2], right[1]) for left, right in zip(part, part[1:])):
                    start, end = places[begin], places[part[-1][2] - 1] + 1
                    mentions.append(Mention(name, text[start:end], start, end))
        return mentions

    def related(self, name: str, others: Iterable[str]) -> bool:
        """Whether a form of the name mentions one of the others or is mentioned by it: "bear" and "teddy bear"."""
        return any(hit.name == short for other in others for short, long in ((name, other), (other, name))
                   for words in self._words[long] for hit in self.find(" ".join(words)))


def lexicon(names: Iterable[str], aliases: Mapping[str, Iterable[str]] | None = None) -> Lexicon:
    """The forms of some names.

    names: the objects that can be found.
    aliases: name -> its synonyms, as `object_alias` reads them from a file of Visual Genome; none when None.
    """
    return Lexicon({name: (aliases or {}).get(name, ()) for name in names})


def mentions(text: str, names: Lexicon | Iterable[str]) -> set[str]:
    """The names which the text mentions. A plain list of names knows plurals, but no synonyms: see `lexicon`."""
    return {hit.name for hit in (names if isinstance(names, Lexicon) else lexicon(names)).find(text)}


def audit(samples: pd.DataFrame, lexicon: Lexicon) -> pd.DataFrame:
    """Every mention of a row's target in its own context: columns row, sample, target, form, start. Empty: no leak.

    samples: a table with the columns sample, target and context.
    lexicon: must know every target (ValueError otherwise: a check that cannot find anything is no check).
    """
    unknown = [target for target in samples["target"].unique() if target not in lexicon.forms]
    if unknown:
        raise ValueError(f"the lexicon does not know {unknown[:5]}: build it from the names of the same data set")
    leaks = []
    for context, rows in samples.groupby("context", sort=False):  # one context serves several questions
        hits = lexicon.find(context)
        for row, sample, target in zip(rows.index, rows["sample"], rows["target"]):
            leaks += [(row, sample, target, hit.form, hit.start) for hit in hits if hit.name == target]
    return pd.DataFrame(sorted(leaks), columns=["row", "sample", "target", "form", "start"])


def _word_forms(form):
    """The words of one form: the last one as written, plural and singular, and all closed up ("teddybear")."""
    *first, last = WORD.findall(_fold(form)[0]) or [""]
    return {way for word in _numbers(last) for way in ((*first, word), ("".join(first) + word,)) if last}


@functools.cache
def _numbers(word):
    """The word as it is, and what may be its plurals and singulars."""
    return {word, *(re.sub(ending, new, word) for ending, new in ENDINGS if re.search(ending, word))}


def _fold(text):
    """The text as it is compared, and for each of its characters the place in `text` that it comes from."""
    if text.isascii():
        return text.lower(), range(len(text))
    pairs = [(part, place) for place, char in enumerate(text) for part in _plain(char)]
    return "".join(part for part, _ in pairs), [place for _, place in pairs]


@functools.cache
def _plain(char):
    """One character as it is compared: small plain letters, no accents, nothing invisible, one dash, one apostrophe."""
    parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", char.translate(SIGNS)).casefold())
    kinds = [(part, unicodedata.category(part)) for part in parts]
    return "".join("-" if kind == "Pd" else part for part, kind in kinds if kind[0] != "M" and kind != "Cf")
