"""Files and words as people leave them: encodings, packed files, invisible characters, ids, paths that climb."""
import gzip
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from test_samples import FIXTURES, make_tokenizer, synthetic

from lvlm_utils import samples
from lvlm_utils.samples import readers

BOM = "\ufeff"


def listed(path: Path) -> list[dict]:
    return [record for _, record in readers.records(path, {})]


def alias(tmp_path, data: bytes) -> Path:
    (tmp_path / "object_alias.txt").write_bytes(data)
    return tmp_path / "object_alias.txt"


# ---------------------------------------------------------------- encodings

@pytest.mark.parametrize("data", [
    b"\xef\xbb\xbfcat,kitty\ndog,puppy\n", b"cat,kitty\n\xef\xbb\xbfdog,puppy\n", b"cat,kitty\r\ndog,puppy\r\n",
    b"cat,kitty\rdog,puppy", b" cat , kitty ,,\n\n dog\xc2\xa0,\tpuppy, \n,\n", gzip.compress(b"cat,kitty\ndog,puppy"),
    "ｃａｔ,kit\u00adty\nd\u200dog,pup\u2060py".encode(),
], ids=["bom", "bom inside", "crlf", "cr", "spaces and commas", "packed", "full width and invisible"])
def test_aliases_are_the_same_however_the_file_was_saved(tmp_path, data):
    assert readers.object_alias(alias(tmp_path, data)) == {"cat": ["cat", "kitty"], "dog": ["dog", "puppy"]}


def test_a_byte_order_mark_hides_no_alias_from_the_questions(tmp_path):
    """Where a kitty stands, the cat is not absent."""
    shutil.copytree(FIXTURES / "vg", tmp_path / "vg")
    (tmp_path / "vg" / "object_alias.txt").write_bytes(b"\xef\xbb\xbfcanine,dog\n")
    assert set(readers.visual_genome(tmp_path / "vg")["3"].objects) == {"canine"}


def test_one_name_in_two_unicode_forms_is_one_name(tmp_path):
    shutil.copytree(FIXTURES / "vg", tmp_path / "vg")
    (tmp_path / "vg" / "object_alias.txt").write_text("pin\u0303ata,dog\n", encoding="utf-8")
    assert set(readers.visual_genome(tmp_path / "vg")["3"].objects) == {"pi\u00f1ata"}


@pytest.mark.parametrize("data", ["café,bar\n".encode("latin-1"), "cat,kitty\n".encode("utf-16"),
                                  gzip.compress(b"cat,kitty\n" * 99)[:-9]], ids=["latin-1", "utf-16", "cut short"])
def test_a_file_that_is_no_text_is_named(tmp_path, data):
    with pytest.raises(ValueError, match=r"object_alias.txt: (not UTF-8 text|the packed file is damaged)"):
        readers.object_alias(alias(tmp_path, data))


@pytest.mark.parametrize("name, data", [("list.json", "[{}]".encode("utf-16")), ("list.json", b'[{"a": "\xe9"}]'),
                                        ("list.json.gz", gzip.compress(b'[{"a": 1}]' * 99, mtime=0)[:-9])])
def test_a_list_that_is_no_text_is_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        listed(tmp_path / "list.json")


# ---------------------------------------------------------------- packed files

def test_packed_files_are_read_as_plain_ones(tmp_path):
    for file in FIXTURES.rglob("*.json"):
        packed = tmp_path / file.relative_to(FIXTURES).with_name(file.name + ".gz")
        packed.parent.mkdir(exist_ok=True)
        packed.write_bytes(gzip.compress(file.read_bytes()))
    shutil.copy(FIXTURES / "vg" / "object_alias.txt", tmp_path / "vg")
    assert readers.svit(tmp_path / "svit") == readers.svit(FIXTURES / "svit")
    assert readers.visual_genome(tmp_path / "vg") == readers.visual_genome(FIXTURES / "vg")
    (tmp_path / "COCO_val2014_000000310196.jpg").touch()
    assert len(samples.pope(tmp_path / "pope" / "coco_pope_adversarial.json", tmp_path)) == 2


def test_a_packed_list_is_streamed(tmp_path, monkeypatch):
    items = [{"number": i, "text": "é]},{[" * 9} for i in range(40)]
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(json.dumps(items, ensure_ascii=False).encode()))
    for chunk in (1, 64):
        monkeypatch.setattr(readers, "CHUNK", chunk)
        assert listed(tmp_path / "list.json") == items


def test_a_plain_and_a_packed_file_of_one_name_are_refused(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(b"[{}]"))
    with pytest.raises(ValueError, match="both exist"):
        listed(tmp_path / "list.json")


# ---------------------------------------------------------------- JSON

def test_a_list_and_json_lines_are_read_alike(tmp_path):
    items = [{"number": i} for i in range(3)]
    for number, text in enumerate((json.dumps(items), "\n".join(map(json.dumps, items)),
                                   BOM + "\r\n\r\n".join(json.dumps(item) for item in items) + "\r\n",
                                   ("\n" + BOM).join(map(json.dumps, items)))):
        (tmp_path / f"{number}.json").write_text(text, encoding="utf-8", newline="")
        assert listed(tmp_path / f"{number}.json") == items


@pytest.mark.parametrize("text, message", [
    ('[{"a": 1, "b": {"c": 1, "c": 2}}]', "list.json: record 0: .*appears twice among .'c', 'c'."),
    ('[{"a": 1}]\n[{"a": 2}]', "list.json: record 2: .*several lists"), ("  \n", "list.json: .*empty"),
    ('{"a": 1}\n{"a": ', "list.json: record 1: not valid JSON"), ('[{"a": 1}', "ends inside the list"),
])
def test_json_that_would_be_half_read_is_refused(tmp_path, text, message):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        listed(tmp_path / "list.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_what_is_no_number_is_no_side_of_a_box(tmp_path, number):
    shutil.copytree(FIXTURES / "vg", tmp_path / "vg")
    file = tmp_path / "vg" / "objects.json"
    file.write_text(file.read_text().replace('"w": 60', f'"w": {number}'))
    with pytest.raises(ValueError, match=r"objects.json: record 0 .*field 'objects\[0\].w' must be"):
        readers.visual_genome(tmp_path / "vg")


# ---------------------------------------------------------------- ids

@pytest.mark.parametrize("written", ["2412112.0", '"2412112"', '" 2412112 "', '"2412112.0"'])
def test_one_id_is_one_picture_however_it_is_written(tmp_path, written):
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    for name in ("vg/objects.json", "svit/conversation.json"):
        file = tmp_path / name
        file.write_text(file.read_text().replace("2412112", written, 1))
    assert readers.visual_genome(tmp_path / "vg") == readers.visual_genome(FIXTURES / "vg")
    assert readers.svit(tmp_path / "svit") == readers.svit(FIXTURES / "svit")


def test_two_pictures_of_one_id_are_refused(tmp_path):
    shutil.copytree(FIXTURES / "vg", tmp_path / "vg")
    file = tmp_path / "vg" / "image_data.json"
    first = json.loads(file.read_text())[0]
    file.write_text(json.dumps([first, first | {"image_id": str(first["image_id"]), "width": 7}]))
    with pytest.raises(ValueError, match=r"image_data.json: record 1 \(image_id 2412112\): .*appears twice"):
        readers.visual_genome(tmp_path / "vg")


def test_two_pope_questions_of_one_id_are_refused(tmp_path):
    line = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"}
    (tmp_path / "a.jpg").touch()
    file = tmp_path / "coco_pope_random.json"
    file.write_text(json.dumps(line) + "\n" + json.dumps(line | {"question_id": "1", "label": "no"}))
    with pytest.raises(ValueError, match=r"two of one id: \['random-1'\]"):
        samples.pope(file, tmp_path)
    file.write_text(json.dumps([line, line | {"question_id": 2.0}]))  # a list does as well as lines
    assert samples.pope(file, tmp_path)["sample"].tolist() == ["random-1", "random-2"]
    file.write_text(json.dumps({name: value for name, value in line.items() if name != "label"}))
    with pytest.raises(ValueError, match="record 0: field 'label' must be str, found None"):
        samples.pope(file, tmp_path)


# ---------------------------------------------------------------- a folder of your own

@pytest.fixture
def own(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)

    def read(csv: str | bytes):
        (tmp_path / "questions.csv").write_bytes(csv if isinstance(csv, bytes) else csv.encode())
        return samples.folder(tmp_path)

    return read


@pytest.mark.parametrize("header", [BOM + "image,question,label", "Image, Question , LABEL\r", "image,question,label "])
def test_columns_are_known_however_their_names_are_written(own, header):
    assert own(header + "\na.jpg,Is it red?, YES \nb.jpg,Is it red?\n")["label"].dropna().tolist() == ["yes"]


def test_a_free_answer_keeps_its_capitals(own):
    assert own("image,question,label\na.jpg,Where?,Eiffel Tower\n")["label"].tolist() == ["Eiffel Tower"]


@pytest.mark.parametrize("csv, message", [
    ("image,question\na.jpg,Is it red, or blue?\n", "questions.csv: .*commas in quotes"),
    ("image,question\na.jpg,Why?\na.jpg,Is it red, or blue?\n", "questions.csv: .*commas in quotes"),
    ("image,question,question\na.jpg,Why?,\n", "questions.csv: column 'question' must be there once"),
    ("image,question\na.jpg,caf\xe9?\n".encode("latin-1"), "questions.csv: not UTF-8 text"), ("", "questions.csv: "),
    ("image,question\n../a.jpg,Why?\n", "questions.csv: row 0: .*leads out of"),
    ("image,question\nsub/../../a.jpg,Why?\n", "leads out of"), ("image,question\n..\\a.jpg,Why?\n", "leads out of"),
    ("image,question\n/etc/a.jpg,Why?\n", "leads out of"), ("image,question\nC:\\a.jpg,Why?\n", "leads out of"),
])
def test_a_table_that_would_be_misread_is_refused(own, csv, message):
    with pytest.raises(ValueError, match=message):
        own(csv)


def test_one_picture_is_one_image_id_however_its_path_is_written(own):
    assert own("image,question\na.jpg,Why?\n./a.jpg,How?\n a.jpg ,When?\n")["image_id"].tolist() == ["a.jpg"] * 3


def test_hidden_files_and_folders_are_no_pictures(own, tmp_path):
    (tmp_path / "._a.jpg").write_bytes(b"left by another system")
    (tmp_path / "c.jpg").mkdir()
    assert samples.folder(tmp_path, "Why?")["image_id"].tolist() == ["a.jpg", "b.jpg"]


def test_a_long_context_of_your_own_is_read_whole(own):
    context = "a b " * 100_000
    assert own(f"image,question,context\na.jpg,Why?,{context}\n")["context"][0] == context.strip()


# ---------------------------------------------------------------- pictures that climb

@pytest.mark.parametrize("url, image_id", [("https://x.org/../7.jpg", "7"), ("https://x.org/VG_100K/", "../../7"),
                                           ("https://x.org/VG_100K/", "..\\7"), ("https://x.org/a/..\\..\\7.jpg", "7")])
def test_a_picture_outside_of_its_folder_is_refused(tmp_path, url, image_id):
    (tmp_path / "vg" / "VG_100K").mkdir(parents=True)
    (tmp_path / "7.jpg").touch()
    with pytest.raises(ValueError, match="leads out of"):
        readers.picture_file(tmp_path / "vg", readers.Picture(image_id, url, 1, 1))


def test_a_pope_picture_outside_of_its_folder_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "a.jpg").touch()
    file = tmp_path / "coco_pope_random.json"
    file.write_text('{"question_id": 1, "image": "../a.jpg", "text": "Is there a dog in the image?", "label": "yes"}')
    with pytest.raises(ValueError, match="record 0: '../a.jpg' leads out of"):
        samples.pope(file, tmp_path / "images")


# ---------------------------------------------------------------- words

@pytest.mark.parametrize("text, name", [
    ("a pin\u0303ata hangs", "pi\u00f1ata"), ("a pi\u00f1ata hangs", "pin\u0303ata"), ("a PIN\u0303ATA", "pi\u00f1ata"),
    ("a pinata", "pi\u00f1ata"), ("do\u00adg", "dog"), ("d\u200dog", "dog"), ("dog\u200b", "dog"), (BOM + "dog", "dog"),
    ("d\u2060og", "dog"), ("ｄｏｇｓ", "dog"), ("F\u0130SH", "fish"), ("of\ufb01ce", "office"), ("dog\u02bcs", "dog"),
    ("dog\u2032s", "dog"), ("dog\uff07s", "dog"), ("traffic\u00a0light", "traffic light"),
    ("traffic\u202flights", "traffic light"), ("traffic\u2011light", "traffic light"),
    ("traffic\u2212light", "traffic light"), ("traffic\ufe63light", "traffic light"), ("traffic\uff0dlight",
    "traffic light"), ("traffic\u00adlight", "traffic light"), ("traffic \u201clight\u201d", "traffic light"),
    ("a jack-o\u2019-lantern", "jack-o'-lantern"), ("a jack-o'-lantern", "jack-o'-lantern"),
    ("two men\u2019s shoes", "men's shoe"), ("an old T.V. set", "t.v."), ("salt & pepper", "salt & pepper"),
    ("two policewomen", "policewoman"), ("grandchildren", "grandchild"),
    ("\u0939\u093e\u0925\u0940", "\u0939\u093e\u0925\u0940"),
])
def test_a_mention_is_found_however_it_is_written(text, name):
    found, = samples.lexicon([name]).find(text)
    assert found.name == name and text[found.start:found.end] == found.form != ""


@pytest.mark.parametrize("text, name", [("the end. Ships", "endship"), ("traffic. Light", "traffic light"),
                                        ("traffic, light", "traffic light"), ("a hot dogma", "hot dog")])
def test_what_no_reader_sees_is_no_mention(text, name):
    assert not samples.mentions(text, [name])


def test_two_passages_make_no_leak_where_they_meet(tmp_path):
    """ "... slow traffic" and "Light falls ..." name the traffic light when one follows the other."""
    root = synthetic(tmp_path / "toy")
    file = root / "svit" / "conversation.json"
    texts = json.loads(file.read_text())
    for number, dialogue in enumerate(d for record in texts for d in record["conversations"]):
        said = ("What flows?", f"In the {number}th hour, slow traffic", f"Light falls on the {number}th hour?", "Yes.")
        dialogue["content"] += [{"from": who, "value": value} for who, value in zip(("user", "gpt") * 2, said)]
    file.write_text(json.dumps(texts))
    table = samples.long_context(root / "svit", root / "vg", make_tokenizer(), lengths=(0, 2000), pictures=12, seed=1)
    assert table["context"].str.contains("traffic Light").any()
    assert samples.audit(table, samples.lexicon(set(table["target"]))).empty
