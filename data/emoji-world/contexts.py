"""What the embedded world adds to its sample table: which sentence is about what, and objects typical of a scene.

`lvlm_utils.samples.load` uses it for a folder that holds labels.json and world.json beside svit/ and vg/.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lvlm_utils.samples import lexicon, mentions, object_alias, sentences
from lvlm_utils.samples.builder import grow, token_counter
from lvlm_utils.samples.readers import Unit, opened, svit, visual_genome


class World:
    """world.json and labels.json of one folder, as written by build.py.

    typical: image id -> the absent objects to ask first: the world's "popular" ones, and "adversarial", typical of the scene.
    """

    def __init__(self, root: Path):
        self.root = root
        with opened(root / "world.json") as world, opened(root / "labels.json") as labels:
            self.world, self.labels = json.load(world), json.load(labels)
        pictures = visual_genome(root / "vg").values()
        self.groups = {p.image_id: self.world["scenes"][self.scene(set(p.objects))]["groups"] for p in pictures}
        self.typical = {
            image_id: {
                "popular": set(self.world.get("popular", ())),
                "adversarial": {name for group in groups for name in group},
            }
            for image_id, groups in self.groups.items()
        }

    def scene(self, objects: set[str]) -> str:
        """The scene whose groups hold most of a picture's objects (then, whose occasional ones do)."""

        def fit(scene: str) -> tuple[int, int]:
            entry = self.world["scenes"][scene]
            typical = sum(name in objects for group in entry["groups"] for name in group)
            return typical, sum(name in objects for name in entry.get("occasional", ()))

        return max(sorted(self.world["scenes"]), key=fit)

    def label(self, image_id: str, sentence: str) -> dict:
        """What a sentence about a picture is about: {"about": "object", "scene" or "filler", "objects": their names}."""
        if sentence not in self.labels.get(image_id, {}):
            raise ValueError(f"labels.json: image_id {image_id}: no label for the sentence {sentence!r}")
        return self.labels[image_id][sentence]

    def labelled(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table with its column `relevance`: what each sentence of a context is about, seen from the row's target."""
        relevance = []
        for image_id, target, context in table[["image_id", "target", "context"]].itertuples(index=False):
            near = {name for group in self.groups[image_id] if target in group for name in group}

            def about(sentence: str, image_id=image_id, near=near) -> str:
                label = self.label(image_id, sentence)
                if label["about"] != "object":
                    return label["about"]
                return "target_group" if near.intersection(label["objects"]) else "other_object"

            relevance.append(spans(context, about))
        return table.assign(relevance=relevance)

    def filler(self, table: pd.DataFrame, tokenizer, seed: int) -> pd.DataFrame:
        """The same questions at the same lengths, with contexts of filler sentences only: length without any evidence.

        A picture's own filler comes first, then filler from the text of other pictures, no sentence twice.
        Raises ValueError where all the filler of the data is too short.
        """
        count, lengths = token_counter(tokenizer), sorted(table["length"].unique().tolist())
        aliases = object_alias(self.root / "vg" / "object_alias.txt")
        texts = svit(self.root / "svit")
        units = {i: [unit for dialogue in texts[i] for unit in dialogue if self.is_filler(i, unit)] for i in sorted(texts)}
        contexts = {}
        for image_id, rows in table.groupby("image_id", sort=False):
            rng, own = random.Random(f"{seed}-{image_id}"), list(units.get(image_id, []))
            others = [unit for other in units if other != image_id for unit in units[other]]
            rng.shuffle(own)
            rng.shuffle(others)
            words, chosen, used = lexicon(rows["target"].unique(), aliases), [], set()
            for unit in own + others:
                if not used.intersection(unit) and not mentions(" ".join(unit), words):
                    chosen.append(unit)
                    used.update(unit)
            grown = grow(chosen, lengths, count)
            if grown is None:
                raise ValueError(
                    f"image_id {image_id}: {len(chosen)} distinct passages of filler do not reach {lengths[-1]} tokens; "
                    "ask for shorter lengths"
                )
            contexts |= {(image_id, length): " ".join(sentences) for length, sentences in grown.items()}
        text = [contexts[key] for key in zip(table["image_id"], table["length"], strict=True)]
        tokens = {context: count([context])[0] if context else 0 for context in set(text)}
        relevance = [spans(context, lambda _: "filler") for context in text]
        return table.assign(context=text, n_context_tokens=[tokens[context] for context in text], relevance=relevance)

    def is_filler(self, image_id: str, unit: Unit) -> bool:
        """Whether every sentence of the unit is about nothing in particular."""
        return all(self.label(image_id, sentence)["about"] == "filler" for sentence in unit)


def spans(context: str, about: Callable[[str], str]) -> list[dict]:
    """[{"start", "end", "about"}] for each sentence of a context."""
    return [{"start": a, "end": b, "about": about(context[a:b])} for a, b in sentences(context)]
