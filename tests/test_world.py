"""The embedded world: the held-out split rebuilds to the same bytes and keeps the promises of its card."""

import gzip
import json
import random
import re
import sys
from collections import Counter

import numpy as np
import pytest

import lvlm_utils as lv

FOLDER = lv.ROOT / "data" / "emoji-world"
sys.path.insert(0, str(FOLDER))
import build  # noqa: E402
import text  # noqa: E402
import world  # noqa: E402

WRITTEN = ("svit/*", "vg/*", "vg/VG_100K/*", "*.json", "*.json.gz")


def unpacked(path) -> bytes:
    """Another version of zlib packs the same text into other bytes."""
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


@pytest.fixture(scope="module")
def boxes() -> list[dict]:
    return json.loads((FOLDER / "vg" / "objects.json").read_text(encoding="utf-8"))


def test_rebuilding_gives_the_same_bytes(tmp_path):
    build.main(tmp_path, 320)
    committed = {p.relative_to(FOLDER) for pattern in WRITTEN for p in FOLDER.glob(pattern) if p.is_file()}
    rebuilt = {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()}
    assert rebuilt == committed
    assert not [str(p) for p in rebuilt if unpacked(tmp_path / p) != unpacked(FOLDER / p)]


def test_packing_the_same_value_twice_gives_the_same_bytes(tmp_path, monkeypatch):
    value = {"about": "scene", "é": [1] * 99}
    for name, now in (("a.json.gz", 1e9), ("b.json.gz", 2e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        build.dump(value, tmp_path / name)
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    assert json.loads(unpacked(tmp_path / "a.json.gz")) == value


def test_held_out_split_is_small_and_large_enough(boxes):
    assert len(boxes) >= 300
    assert sum(p.stat().st_size for pattern in WRITTEN for p in FOLDER.glob(pattern) if p.is_file()) < 8e6


def test_pictures_hold_six_to_nine_objects_inside_the_frame(boxes):
    for record in boxes:
        assert world.FEWEST <= len(record["objects"]) <= world.MOST
        for thing in record["objects"]:
            assert thing["x"] >= 0 and thing["y"] >= 0 and thing["w"] > 0 and thing["h"] > 0
            assert thing["x"] + thing["w"] <= world.SIDE and thing["y"] + thing["h"] <= world.SIDE


def test_objects_of_a_group_come_together():
    """Given one member of a group, another is far more likely than in scenes of the kind without it."""
    rng, together, apart = random.Random(0), [], []
    for _ in range(2000):
        names = set(world.sample_names(rng, "farm"))
        (together if "cow" in names else apart).append("horse" in names)
    assert np.mean(together) - np.mean(apart) > 0.3


def test_negatives_are_absent_and_of_their_kind():
    rng = random.Random(1)
    for _ in range(300):
        scene = world.sample_scene(rng)
        typical = set(world.SCENES[scene.kind].typical)
        for kind in ("random", "popular", "adversarial"):
            name = world.absent(scene, rng, kind)
            assert name not in scene.names
            assert kind != "adversarial" or name in typical or typical <= scene.names
            assert kind != "popular" or name in world.popular()


def test_no_wording_names_an_object():
    build.check_phrases()


def test_a_wording_that_names_an_object_is_refused(monkeypatch):
    monkeypatch.setattr(build.phrases, "FILLER", (("Is it calm?", "As calm as a sleeping kitten."),))
    with pytest.raises(ValueError, match="names the object 'cat'"):
        build.check_phrases()


def test_talk_skips_objects_and_brings_new_ones_late():
    rng, early, late = random.Random(2), [], []
    for _ in range(40):
        scene = world.sample_scene(rng)
        skip = set(sorted(scene.names)[:3])
        units, seen = [], Counter()
        for unit in text.Talk(scene, rng, skip).stream():
            units.append(unit)
            seen.update(name for name in world.NAMES if re.search(rf"\b{name}\b", unit))
            if len(units) == 30:
                early.append(len(set(seen) & scene.names))
            if len(units) == 150:
                break
        assert not skip & set(seen)
        late.append(len(set(seen) & scene.names))
    assert np.mean(late) - np.mean(early) > 0.5


def test_every_sentence_has_one_label():
    labels = json.loads(unpacked(FOLDER / "labels.json.gz"))
    for kind in ("conversation", "complex_reasoning", "referring_qa", "detail_description"):
        for record in json.loads(unpacked(FOLDER / "svit" / f"{kind}.json.gz"))[:40]:
            known = labels[str(record["image_id"])]
            for item in record["conversations"]:
                for turn in item["content"]:
                    for sentence in text.split(text.plain(turn["value"])):
                        assert known[sentence]["about"] in ("object", "scene", "filler")


def test_pictures_look_like_their_scene(boxes):
    """Where a box is, the painted picture differs from the same scene painted without that object."""
    rng = random.Random(3)
    for _ in range(20):
        scene = world.sample_scene(rng)
        whole = world.paint(scene, random.Random(7)).astype(int)
        for thing in scene.things:
            x1, y1, x2, y2 = thing.box
            rest = world.Scene(scene.kind, tuple(t for t in scene.things if t is not thing))
            empty = world.paint(rest, random.Random(7)).astype(int)
            assert np.abs(whole - empty)[y1:y2, x1:x2].mean() > 8
        labels = world.label_map(scene)
        assert {world.NAMES[i] for i in set(labels.ravel()) - {len(world.NAMES)}} <= scene.names
