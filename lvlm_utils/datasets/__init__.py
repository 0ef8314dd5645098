"""The sample table and the long-context builder of the paper's Sec. 3.1 (readers.py and questions.py read the files).

One row per question x length: sample, image_id, image, group, length, context, question, label, target, kind, size,
n_context_tokens, relevance, n_objects (missing values are NaN or None). The same questions stand at every length and
contexts are nested, so that length is not confounded with difficulty. All questions about one picture share one
context, which mentions none of their objects. Tokens are counted on the context string alone, without special tokens.
"""
import json
import random
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from lvlm_utils import ROOT

from . import kept
from .asking import NEGATIVES, Asker, size_group
from .contexts import grow, token_counter
from .leaks import audit, lexicon, mentions, sentences
from .questions import folder, pope
from .readers import Dialogue, Picture, Unit, object_alias, picture_file, plain_boxes, svit, visual_genome

__all__ = ["audit", "filler_only", "folder", "lexicon", "load", "long_context", "mentions", "pope", "sentences",
           "size_group"]

QUESTION = "Is the {name} in the image? (Please answer with yes or no.)"
LENGTHS = (0, 500, 1000, 1500, 2000, 2500)
DRAWS = 8  # sets of questions tried for a picture whose other text would not reach the longest context
BATCH = 1000  # pictures whose text is held in memory at a time


def load(name_or_root: str | Path, lvlm_or_tokenizer, samples: int = 600, lengths: Sequence[int] = LENGTHS,
         questions: int = 6, seed: int = 0, context: str = "full", cache: str | Path | None = None) -> pd.DataFrame:
    """The sample table of "emoji-world", or of a folder that holds svit/ and vg/ (and, if any, world and labels.json).

    samples: questions at each length, so samples / questions pictures. context: "full", or "filler" for the control
    whose contexts hold filler sentences only. cache: a folder that keeps finished tables; one is read back only while
    the data, the tokenizer and all settings are the same. Raises FileNotFoundError for an unknown name.
    """
    root = ROOT / "data" / "emoji-world" if name_or_root == "emoji-world" else Path(name_or_root)
    lacking = [part for part in ("svit", "vg") if not (root / part).is_dir()]
    if lacking:
        raise FileNotFoundError(f"no data set {str(name_or_root)!r}: {root / lacking[0]} is missing; "
                                "give 'emoji-world' or a folder with svit/ (SVIT's four files) and vg/ (Visual Genome)")
    if context not in ("full", "filler"):
        raise ValueError(f"context must be 'full' or 'filler', found {context!r}")
    if samples < questions or samples % questions:
        raise ValueError(f"samples ({samples}) must be a multiple of questions per picture ({questions})")
    tokenizer = _tokenizer(lvlm_or_tokenizer)
    key = kept.key(root, tokenizer, samples, tuple(lengths), questions, seed, context)
    file = None if cache is None else Path(cache) / "samples" / f"{key}.parquet"
    if key not in _built and file is not None and file.is_file():
        _built[key] = kept.read(file)
    if key not in _built:
        world, labels = (json.loads(part.read_text(encoding="utf-8")) if part.is_file() else None
                         for part in (root / "world.json", root / "labels.json"))
        if context == "full":
            _built[key] = long_context(root / "svit", root / "vg", tokenizer, lengths=lengths, seed=seed, world=world,
                                       pictures=samples // questions, questions=questions, labels=labels)
        else:
            full = load(root, tokenizer, samples, lengths, questions, seed, cache=cache)
            _built[key] = filler_only(full, root / "svit", root / "vg", tokenizer, labels=labels, world=world,
                                      seed=seed)
        if file is not None:
            kept.write(_built[key], file)
    return _built[key].copy()


_built: dict[str, pd.DataFrame] = {}  # tables of this process: variants of a model often share one tokenizer


def _tokenizer(lvlm_or_tokenizer):
    processor = getattr(lvlm_or_tokenizer, "processor", lvlm_or_tokenizer)
    return getattr(processor, "tokenizer", processor)


def long_context(svit_dir: str | Path, vg_dir: str | Path, tokenizer, *, lengths: Sequence[int] = LENGTHS,
                 pictures: int = 100, questions: int = 6, negatives: Sequence[str] = NEGATIVES, seed: int = 0,
                 world: Mapping | None = None, labels: Mapping | None = None) -> pd.DataFrame:
    """Questions about pictures of Visual Genome with contexts of SVIT text, each within 3% of its length in tokens.

    Per picture questions / 2 present objects, spread over sizes, and as many absent ones in equal shares of the kinds
    in `negatives`: "random" any name of the data; "popular" and "adversarial" as in POPE, from the frequencies and
    co-occurrences of the whole split (adversarial in a `world`: absent members of the scene's groups). Without a
    `world` annotations are taken to be incomplete, and an object that the picture's own text mentions is never absent.
    Pictures which cannot reach the longest length are skipped; `.attrs["dropped"]` counts all reasons.
    Raises ValueError for a malformed record, and when no picture is left.
    """
    lengths = sorted(lengths)
    unknown = set(negatives) - set(NEGATIVES)
    if questions < 2 or questions % 2 or unknown or not negatives or lengths[0] < 0:
        raise ValueError(f"questions must be even (found {questions}), negatives among {NEGATIVES} (found "
                         f"{tuple(negatives)}), lengths 0 or more (found {lengths})")
    dropped: Counter = Counter()
    data = visual_genome(Path(vg_dir), dropped)
    asker = Asker(data, object_alias(Path(vg_dir) / "object_alias.txt"), world)
    order = sorted(data)
    random.Random(seed).shuffle(order)
    count, rows, done = token_counter(tokenizer), [], 0
    sizes: Counter = Counter()
    for start in range(0, len(order), BATCH):
        batch = order[start:start + BATCH] if done < pictures else []
        texts = svit(Path(svit_dir), set(batch), dropped) if batch else {}
        for image_id in batch:
            if done == pictures:
                break
            picture, dialogues = data[image_id], texts.get(image_id, [])
            file = picture_file(Path(vg_dir), picture)
            if file is None:
                dropped["pictures without a file"] += 1
                continue
            kinds = [negatives[(done * questions // 2 + i) % len(negatives)] for i in range(questions // 2)]
            found = _ask(asker, picture, dialogues, kinds, sizes, lengths, count, f"{seed}-{image_id}")
            if isinstance(found, str):
                dropped[found] += 1
                continue
            asked, contexts = found
            sizes.update(size for _, _, size in asked if size)
            rows += _rows(picture, file, asked, contexts, count, asker, labels)
            done += 1
    if not rows:
        raise ValueError(f"no picture of {vg_dir} has enough objects and text for {lengths[-1]} tokens; "
                         f"dropped: {dict(dropped)}")
    if done < pictures:
        warnings.warn(f"{done} of {pictures} pictures could be built; dropped: {dict(dropped)}", stacklevel=2)
    table = pd.DataFrame(rows)
    table.attrs["dropped"] = {reason: number for reason, number in sorted(dropped.items()) if number}
    return table


def _ask(asker: Asker, picture: Picture, dialogues: list[Dialogue], kinds: list[str], sizes: Counter,
         lengths: Sequence[int], count: Callable[[str], int], seed: str) -> str | tuple:
    """(asked, contexts), or the reason why the picture cannot be used."""
    reason = ""
    for draw in range(DRAWS):
        rng = random.Random(f"{seed}-{draw}")  # seeded by a string: the same in every process
        asked = asker.ask(picture, dialogues, kinds, sizes, rng)
        if isinstance(asked, str):
            return reason or asked
        words = asker.words.only(name for name, _, _ in asked)
        clean = [[unit for unit in dialogue if not words.find(" ".join(unit))] for dialogue in dialogues]
        rng.shuffle(clean)  # dialogues of all kinds mixed; the turns of one stay together
        contexts = grow([unit for dialogue in clean for unit in dialogue], lengths, count)
        if contexts is not None:
            return asked, contexts
        reason = "pictures without enough text that mentions no asked object"
    return reason


def _rows(picture: Picture, file: Path, asked: list[tuple], contexts: Mapping[int, Unit], count: Callable[[str], int],
          asker: Asker, labels: Mapping | None) -> list[dict]:
    rows = []
    labels = None if labels is None else _labels_of(labels, picture.image_id)
    groups = [] if asker.world is None or labels is None else asker.world["scenes"][asker.scene(picture)]["groups"]
    for length, parts in contexts.items():
        context = " ".join(parts)
        n_context_tokens = count([context])[0] if context else 0
        for k, (name, kind, size) in enumerate(asked):
            near = {other for group in groups if name in group for other in group}
            rows.append({
                "sample": f"{picture.image_id}-{k}", "image_id": picture.image_id, "image": str(file),
                "group": f"{length / 1000:g}k" if length else "0", "length": length, "context": context,
                "question": QUESTION.format(name=name), "label": "yes" if kind == "present" else "no", "target": name,
                "kind": kind, "size": size, "n_context_tokens": n_context_tokens,
                "relevance": None if labels is None else _relevance(parts, labels, near, picture.image_id),
                "n_objects": picture.n_objects})
    return rows


def _labels_of(labels: Mapping, image_id: str) -> dict[str, dict]:
    """Labels of one picture by sentence as the context writes it (boxes in plain form, single spaces)."""
    found = ((plain_boxes(" ".join(text.split())), label) for text, label in labels.get(image_id, {}).items())
    return {text: label for text, label in found if text is not None}


def _relevance(parts: Sequence[str], labels: Mapping[str, Mapping], near: set[str], image_id: str) -> list[dict]:
    """What each sentence is about, seen from one target: its group, the scene, another object, or nothing (filler)."""
    spans, start = [], 0
    for text in parts:
        if text not in labels:
            raise ValueError(f"labels.json: image_id {image_id}: no label for the sentence {text!r}")
        about = labels[text]["about"]
        if near & set(labels[text].get("objects", ())):
            about = "target_group"
        spans.append({"start": start, "end": start + len(text), "about": {"object": "other_object"}.get(about, about)})
        start += len(text) + 1
    return spans


def filler_only(samples: pd.DataFrame, svit_dir: str | Path, vg_dir: str | Path, tokenizer, *, labels: Mapping | None,
                world: Mapping | None = None, seed: int = 0) -> pd.DataFrame:
    """The same questions at the same lengths, with contexts of filler sentences only: length without any evidence.

    A picture's own filler comes first, then filler from the text of other pictures, no sentence twice.
    Raises ValueError without labels, or when all the filler of the data is too short.
    """
    if labels is None:
        raise ValueError("filler contexts need labels.json, which says what each sentence is about")
    texts, count = svit(Path(svit_dir)), token_counter(tokenizer)
    words = lexicon(set(samples["target"]), object_alias(Path(vg_dir) / "object_alias.txt"), world)
    filler = {image_id: _filler(texts[image_id], _labels_of(labels, image_id)) for image_id in sorted(texts)}
    lengths, parts = sorted(samples["length"].unique().tolist()), []
    for image_id, rows in samples.groupby("image_id", sort=False):
        rng, own = random.Random(f"{seed}-{image_id}"), list(filler.get(image_id, []))
        others = [unit for other in filler if other != image_id for unit in filler[other]]
        rng.shuffle(own)
        rng.shuffle(others)
        asked, used, units = words.only(set(rows["target"])), set(), []
        for unit in own + others:
            if not used.intersection(unit) and not asked.find(" ".join(unit)):
                units.append(unit)
                used.update(unit)
        contexts = grow(units, lengths, count)
        if contexts is None:
            raise ValueError(f"image_id {image_id}: {len(units)} distinct filler passages do not reach {lengths[-1]} "
                             "tokens; ask for shorter lengths")
        for length, part in rows.groupby("length", sort=False):
            text = contexts[length]
            spans = _relevance(text, dict.fromkeys(text, {"about": "filler"}), set(), str(image_id))
            context = " ".join(text)
            parts.append(part.assign(context=context, n_context_tokens=count([context])[0] if context else 0,
                                     relevance=[[dict(span) for span in spans] for _ in range(len(part))]))
    table = pd.concat(parts).loc[samples.index]
    table.attrs.update(samples.attrs)
    return table


def _filler(dialogues: Sequence[Dialogue], labels: Mapping[str, Mapping]) -> list[Unit]:
    """Runs of filler sentences inside one unit, without a question left hanging at the end."""
    runs = []
    for unit in (unit for dialogue in dialogues for unit in dialogue):
        run: list[str] = []
        for text in (*unit, None):
            if text is not None and labels.get(text, {}).get("about") == "filler":
                run.append(text)
                continue
            while run and run[-1].endswith("?"):
                run.pop()
            if run:
                runs.append(tuple(run))
            run = []
    return runs
