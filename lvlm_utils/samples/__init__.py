"""The sample table, a row per question and length: the embedded world, SVIT + Visual Genome, POPE, your pictures."""
import runpy
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lvlm_utils import ROOT
from lvlm_utils.results import atomic, fingerprint

from .builder import LENGTHS, long_context, size_group
from .leaks import audit, lexicon, mentions
from .readers import folder, found, object_alias, pope, sentences

__all__ = ["audit", "folder", "lexicon", "load", "long_context", "mentions", "object_alias", "pope", "sentences",
           "size_group"]


def load(name_or_root: str | Path, lvlm_or_tokenizer, samples: int = 600, lengths: Sequence[int] = LENGTHS,
         questions: int = 6, seed: int = 0, context: str = "full", cache: str | Path | None = None) -> pd.DataFrame:
    """The sample table of "emoji-world", or of a folder that holds svit/ and vg/; its columns: see `long_context`.

    samples: questions at each length, so samples / questions pictures.
    lengths: tokens of context; 0: none.
    questions: about each picture, an even number.
    seed: which pictures and questions.
    context: "full", or "filler" for the control of the embedded world: the same questions, contexts about nothing.
    cache: a folder that keeps finished tables; one is read back only while data, tokenizer and settings are the same.
    Raises FileNotFoundError for an unknown name, and ValueError for a wrong argument or a malformed file.
    """
    root = ROOT / "data" / "emoji-world" if name_or_root == "emoji-world" else Path(name_or_root)
    if lacking := [part for part in ("svit", "vg") if not (root / part).is_dir()]:
        raise FileNotFoundError(f"no data set {str(name_or_root)!r}: {root / lacking[0]} is missing; "
                                "give 'emoji-world' or a folder with svit/ (SVIT's four files) and vg/ (Visual Genome)")
    if context not in ("full", "filler"):
        raise ValueError(f"context must be 'full' or 'filler', found {context!r}")
    if samples < questions or samples % questions:
        raise ValueError(f"samples ({samples}) must be a multiple of questions per picture ({questions})")
    tokenizer = getattr(lvlm_or_tokenizer, "processor", lvlm_or_tokenizer)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    file = None
    if cache is not None:
        files = sorted(file for folder in (root, root / "svit", root / "vg") for file in folder.glob("*.*"))
        shown = sorted(str(file.relative_to(root)) for file in (root / "vg").rglob("*"))  # pictures that are there
        settings = samples, tuple(lengths), questions, seed, context, shown
        key = fingerprint(str(root.resolve()), tokenizer, [[one.name, one] for one in files], settings, long_context)
        file = Path(cache) / "samples" / f"{key}.parquet"
        if file.is_file():
            table = pd.read_parquet(file)
            spans = table["relevance"]
            table["relevance"] = [None if some is None else [dict(span) for span in some] for some in spans]
            return table
    # what a made-up world knows beyond real data: labels.json, read by data/emoji-world/contexts.py
    world = None
    if found(root / "labels.json"):
        world = runpy.run_path(str(ROOT / "data" / "emoji-world" / "contexts.py"))["World"](root)
    elif context == "filler":
        raise ValueError("filler contexts need labels.json, which says what each sentence is about")
    table = long_context(root / "svit", root / "vg", tokenizer, lengths=lengths, pictures=samples // questions,
                         questions=questions, seed=seed, typical=world and world.typical)
    if world:
        table = world.filler(table, tokenizer, seed) if context == "filler" else world.labelled(table)
    if file is not None:
        with atomic(file) as part:
            table.to_parquet(part)
    return table
