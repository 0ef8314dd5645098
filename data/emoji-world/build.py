"""Write the held-out split in the file formats of SVIT and Visual Genome.

    python data/emoji-world/build.py [--scenes 320] [--out FOLDER]

The same numbers give the same bytes. Training (data/tiny-llava/) draws its own scenes with other seeds and never reads this split.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path

import phrases
import world
from PIL import Image
from text import Talk, plain, split
from tqdm.auto import tqdm

SEED = 20261121
SPEAKERS = ("user", "gpt")
DIALOGUES, REASONINGS, SENTENCES, REFERRALS = 24, 58, 60, 8  # for one picture, about 4,000 tokens in all


def forms(name: str) -> set[str]:
    """Every way to say a name: singular, plural, other words for it and their plurals, lower case."""
    _, plural, others = world.OBJECTS[name]
    return {form.lower() for form in (name, plural, *others, *(other + "s" for other in others))}


def check_phrases() -> None:
    """No fixed wording may name an object: it would leak into contexts that must not mention it."""
    wordings = [w for value in vars(phrases).values() if isinstance(value, tuple) for w in _strings(value)]
    wordings += [doing for kind in world.SCENES.values() for doing in kind.activities]
    for name in world.NAMES:
        pattern = re.compile(r"\b(" + "|".join(map(re.escape, sorted(forms(name)))) + r")\b", re.IGNORECASE)
        for wording in wordings:
            if pattern.search(wording):
                raise ValueError(f"phrases.py names the object {name!r}: {wording!r}")


def _strings(value: tuple | str) -> list[str]:
    return [value] if isinstance(value, str) else [s for part in value for s in _strings(part)]


def talk(scene: world.Scene, rng: random.Random) -> tuple[dict[str, list], dict[str, dict]]:
    """The four kinds of text about one scene as SVIT conversations, and what each sentence is about."""
    talker, labels = Talk(scene, rng), {}

    def note(turn) -> None:
        for sentence in split(plain(turn.text)):
            named = sorted(name for name in turn.objects if re.search(rf"\b{name}\b", sentence))
            label = {"about": turn.about, "objects": named}
            if labels.setdefault(sentence, label) != label:
                raise ValueError(f"one sentence with two labels: {sentence!r}: {labels[sentence]} and {label}")

    def content(turns: list) -> list[dict]:
        for turn in turns:
            note(turn)
        return [
            {"from": who, "value": said}
            for turn in turns
            for who, said in zip(SPEAKERS, (turn.question, turn.answer), strict=True)
        ]

    texts: dict[str, list] = {"conversation": [], "complex_reasoning": [], "referring_qa": []}
    for _ in range(DIALOGUES):
        topic, turns = talker.conversation()
        texts["conversation"].append({"content": content(turns), "topic": topic})
    texts["complex_reasoning"] = [{"content": content([talker.reasoning()])} for _ in range(REASONINGS)]
    texts["referring_qa"] = [{"content": content([talker.referring()])} for _ in range(REFERRALS)]
    sentences = [talker.detail() for _ in range(SENTENCES)]
    for turn in sentences:
        note(turn)
    paragraphs = "\n\n".join(" ".join(t.answer for t in sentences[i : i + 6]) for i in range(0, SENTENCES, 6))
    ask = rng.choice(
        ("Describe the image in detail.", "Please tell me all you see.", "What does the image show, in every detail?")
    )
    labels.update({sentence: {"about": "filler", "objects": []} for sentence in split(ask)})
    texts["detail_description"] = [{"content": [{"from": "user", "value": ask}, {"from": "gpt", "value": paragraphs}]}]
    return texts, labels


def objects(scene: world.Scene, first: int) -> list[dict]:
    """Visual Genome's records of the objects of one image."""
    records = []
    for i, thing in enumerate(scene.things):
        x1, y1, x2, y2 = thing.box
        records.append(
            {
                "object_id": first + i,
                "x": x1,
                "y": y1,
                "w": x2 - x1,
                "h": y2 - y1,
                "names": [thing.name],
                "synsets": [],
                "merged_object_ids": [],
            }
        )
    return records


def evidence(scenes: int = 40_000) -> dict:
    """Counts for a naive-Bayes reader: how often each thing is present, and each scene the case, when a question's answer is yes or no.

    Questions are drawn as in the data set: three present objects, and one random, one popular, one adversarial absent one.
    """
    rng = random.Random(SEED + 1)
    asked = {"yes": Counter(), "no": Counter()}
    seen: dict[str, dict[str, Counter]] = {a: {name: Counter() for name in world.NAMES} for a in asked}
    kinds = list(world.SCENES)
    for i in range(scenes):
        names = world.sample_names(rng, kinds[i % len(kinds)])
        scene = world.Scene(kinds[i % len(kinds)], tuple(world.Thing(n, (0, 0, 1, 1), False) for n in names))
        chosen = [("yes", name) for name in rng.sample(names, 3)]
        chosen += [("no", world.absent(scene, rng, kind)) for kind in ("random", "popular", "adversarial")]
        out = {name for _, name in chosen}
        for answer, name in chosen:
            asked[answer][name] += 1
            seen[answer][name].update([n for n in names if n not in out] + [f"scene: {scene.kind}"])
    return {
        a: {name: {"asked": asked[a][name]} | dict(sorted(seen[a][name].items())) for name in world.NAMES}
        for a in asked
    }


def describe_world() -> dict:
    """world.json: what is known of the world that the pictures show; real data has no such file."""
    return {
        "objects": {
            name: {"plural": plural, "aliases": list(others), "emoji": chr(code)}
            for name, (code, plural, others) in world.OBJECTS.items()
        },
        "scenes": {
            kind: {
                "groups": [list(g) for g in s.groups],
                "occasional": list(s.occasional),
                "activities": list(s.activities),
            }
            for kind, s in world.SCENES.items()
        },
        "presence": world.presence(),
        "popular": list(world.popular()),
        "evidence": evidence(),
        "size_groups": {"small_below": world.SMALL_BELOW, "large_from": world.LARGE_FROM},
    }


def dump(value, file: Path) -> None:
    """Write JSON, packed where the name ends in .gz; no time and no name inside, so the same value gives the same bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = (json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
    with file.open("wb") as raw:
        if file.suffix == ".gz":
            with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
                packed.write(data)
        else:
            raw.write(data)


def main(out: Path, scenes: int) -> None:
    check_phrases()
    rng, kinds = random.Random(SEED), list(world.SCENES)
    images, boxes, labels = [], [], {}
    texts: dict[str, list] = {
        kind: [] for kind in ("conversation", "complex_reasoning", "detail_description", "referring_qa")
    }
    (out / "vg" / "VG_100K").mkdir(parents=True, exist_ok=True)
    for image_id in tqdm(range(1, scenes + 1), desc="emoji-world"):
        scene = world.sample_scene(rng, kinds[image_id % len(kinds)])
        Image.fromarray(world.paint(scene, rng)).save(out / "vg" / "VG_100K" / f"{image_id}.webp", quality=90, method=6)
        images.append(
            {
                "image_id": image_id,
                "url": f"emoji-world/VG_100K/{image_id}.webp",
                "width": world.SIDE,
                "height": world.SIDE,
                "coco_id": None,
                "flickr_id": None,
            }
        )
        boxes.append({"image_id": image_id, "objects": objects(scene, image_id * 100)})
        said, labels[str(image_id)] = talk(scene, rng)
        for kind, conversations in said.items():
            texts[kind].append({"image_id": image_id, "conversations": conversations})
    dump(images, out / "vg" / "image_data.json")
    dump(boxes, out / "vg" / "objects.json")
    lines = [",".join((name, plural, *others)) for name, (_, plural, others) in world.OBJECTS.items()]
    (out / "vg" / "object_alias.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for kind, records in texts.items():
        dump(records, out / "svit" / f"{kind}.json.gz")
    dump(labels, out / "labels.json.gz")
    dump(describe_world(), out / "world.json")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=320)
    parser.add_argument("--out", type=Path, default=world.HERE)
    arguments = parser.parse_args()
    main(arguments.out, arguments.scenes)
