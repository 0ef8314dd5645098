"""The readers on real formats, the leak audit on planted leaks, and the builder on a small synthetic world."""
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lvlm_utils import samples
from lvlm_utils.samples import readers
from lvlm_utils.samples.builder import LENGTHS, grow

FIXTURES = Path(__file__).parent / "fixtures"

GROUPS = {"kitchen": [["oven", "kettle", "spoon", "knife"], ["apple", "bread", "cherry", "cheese"]],
          "harbour": [["ship", "anchor", "fish", "crab"], ["lighthouse", "gull", "bucket", "rope"]],
          "street": [["taxi", "bus", "bicycle", "traffic light"], ["bench", "lamp", "mailbox", "dog"]]}
NAMES = [name for groups in GROUPS.values() for group in groups for name in group]
WORLD = {"objects": {name: {"plural": name + "s", "aliases": ["hound"] if name == "dog" else []} for name in NAMES},
         "scenes": {scene: {"groups": groups, "occasional": []} for scene, groups in GROUPS.items()}}
ADVERBS = "quietly slowly gently softly warmly calmly gladly kindly neatly openly".split()
NOUNS = "morning evening season colour mood light shade breeze sound story".split()


def words_of(rng: random.Random, number: int) -> str:
    return " ".join(rng.choice(ADVERBS if i % 2 else NOUNS) for i in range(number))


def synthetic(root: Path, pictures: int = 12, turns: int = 60, seed: int = 0) -> Path:
    """A data set in the real formats: three scenes, five to seven objects a picture, labelled sentences."""
    rng = random.Random(seed)
    files = {kind: [] for kind in readers.KINDS}
    image_data, objects, labels = [], [], {}
    (root / "vg" / "VG_100K").mkdir(parents=True)
    (root / "svit").mkdir()
    for number in range(pictures):
        image_id = 100 + number
        scene = sorted(GROUPS)[number % 3]
        present = rng.sample([name for group in GROUPS[scene] for name in group], rng.randint(5, 7))
        sides = [10 + 15 * (i % 3) for i in range(len(present))]  # shares of 1%, 6% and 16%
        Image.new("RGB", (100, 100), (number, 0, 0)).save(root / "vg" / "VG_100K" / f"{image_id}.webp", lossless=True)
        image_data.append({"image_id": image_id, "url": f"https://x.org/VG_100K/{image_id}.webp", "width": 100,
                           "height": 100, "coco_id": None, "flickr_id": None})
        objects.append({"image_id": image_id, "objects": [
            {"object_id": i, "x": 0, "y": 0, "w": side, "h": side, "names": [name], "synsets": []}
            for i, (name, side) in enumerate(zip(present, sides))]})
        told = labels.setdefault(str(image_id), {})

        def say(about, rng=rng, present=present, told=told):
            name = rng.choice(present)
            sentence = {"object": f"There is a {name} in the {words_of(rng, 3)}.",
                        "scene": f"It looks like a place of {words_of(rng, 5)}.",
                        "filler": f"The {words_of(rng, rng.randint(6, 14))} passes by."}[about]
            told[sentence] = {"about": about, "objects": [name] if about == "object" else []}
            return sentence

        def ask(rng=rng, told=told):
            question = f"What about the {words_of(rng, 3)}?"
            told[question] = {"about": "filler", "objects": []}
            return question

        kinds = ["object", "scene", "filler", "filler"]
        dialogues = {"conversation": [5] * (turns // 10), "complex_reasoning": [1] * (turns // 4),
                     "referring_qa": [1] * (turns // 4)}
        for kind, sizes in dialogues.items():
            items = [{"content": [turn for _ in range(size) for turn in (
                {"from": "user", "value": ask()},
                {"from": "gpt", "value": " ".join(say(rng.choice(kinds)) for _ in range(rng.randint(1, 3)))})]}
                for size in sizes]
            files[kind].append({"image_id": image_id, "conversations": items})
        files["detail_description"].append({"image_id": image_id, "conversations": [{"content": [
            {"from": "user", "value": "Describe it."},
            {"from": "gpt", "value": " ".join(say(rng.choice(kinds)) for _ in range(15))}]}]})
        told["Describe it."] = {"about": "filler", "objects": []}
    for kind, value in files.items():
        (root / "svit" / f"{kind}.json").write_text(json.dumps(value))
    for name, value in {"vg/image_data": image_data, "vg/objects": objects, "world": WORLD, "labels": labels}.items():
        (root / f"{name}.json").write_text(json.dumps(value))
    (root / "vg" / "object_alias.txt").write_text("dog,hound\n")
    return root


def make_tokenizer() -> PreTrainedTokenizerFast:
    rng = random.Random(1)
    text = [f"The {words_of(rng, 10)} passes by. There is a {name} in the {words_of(rng, 3)}." for name in NAMES * 3]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(text, trainers.BpeTrainer(vocab_size=500, show_progress=False, special_tokens=["<s>"],
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return synthetic(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="module")
def table(root, tokenizer):
    return samples.load(root, tokenizer, samples=54, seed=3)


# ---------------------------------------------------------------- words

def test_sentences_split_after_a_stop_and_white_space():
    text = "One 0.5 is half.  Two? Three! [0.1, 0.2]\nFour"
    assert [text[a:b] for a, b in samples.sentences(text)] == ["One 0.5 is half.", "Two?", "Three!",
                                                                "[0.1, 0.2]\nFour"]
    assert samples.sentences("  ") == []


@pytest.mark.parametrize("text, names, found", [
    ("A category of cats", ["cat"], {"cat"}), ("The category", ["cat"], set()), ("concatenate", ["cat"], set()),
    ("teddy bears", ["bear", "teddy bear"], {"bear", "teddy bear"}), ("BUSES", ["bus"], {"bus"}),
    ("two cherries", ["cherry"], {"cherry"}), ("sharp knives", ["knife"], {"knife"}), ("men", ["man"], {"man"}),
    ("mangoes", ["mango", "man"], {"mango"}), ("a tree", ["trees"], {"trees"}), ("Traffic\nlights", ["traffic light"],
    {"traffic light"}), ("traffic. Light", ["traffic light"], set()), ("the café", ["cafe"], {"cafe"}),
    ("dog's", ["dog"], {"dog"}), ("dogs' bowls", ["dog"], {"dog"}), ("dog-like", ["dog"], {"dog"}),
    ("", ["dog"], set()),
])
def test_mentions(text, names, found):
    assert samples.mentions(text, names) == found


def test_mentions_know_the_plurals_and_aliases_of_the_data():
    words = samples.lexicon(["cactus", "couch"], {"couch": ["couch", "sofa"], "cactus": ["cactuses", "prickly pear"]})
    assert samples.mentions("Sofas and Prickly-Pears", words) == {"cactus", "couch"}
    assert samples.mentions("cactuses", words) == {"cactus"} == samples.mentions("cacti", words)


LEAKS = {"plain": "a dog here", "plural": "two dogs here", "synonym": "one hound here", "synonym plural": "hounds",
         "capitalised": "A Dog here", "upper case": "DOG", "sentence start": "Dog and bone.",
         "punctuation": "here, dog.", "quoted": "the “dog”", "hyphenated": "a dog-friendly place",
         "possessive": "the dog’s bowl", "plural possessive": "the dogs' bowl", "underscore": "a dog_house",
         "multi-word": "the traffic  light", "multi-word hyphen": "a traffic-light",
         "multi-word plural": "traffic lights", "closed": "trafficlights"}


@pytest.mark.parametrize("kind", LEAKS)
def test_audit_finds_each_planted_leak_and_only_it(table, kind):
    target = "traffic light" if kind.startswith(("multi", "closed")) else "dog"
    words = samples.lexicon(NAMES, {"dog": ["hound"]})
    assert samples.audit(table, words).empty
    planted = table.copy()
    rows = planted.index[planted["length"] == 500][:5]
    planted.loc[rows[2], ["target", "context"]] = [target, "It is calm. " + LEAKS[kind] + " It is calm."]
    leaks = samples.audit(planted, words)
    assert leaks["row"].tolist() == [rows[2]] and leaks["target"].tolist() == [target]
    assert LEAKS[kind][leaks["start"][0] - 12:].startswith(leaks["form"][0])


def test_audit_refuses_a_lexicon_that_cannot_find_the_target(table):
    with pytest.raises(ValueError, match="lexicon does not know"):
        samples.audit(table, samples.lexicon(["submarine"]))


# ---------------------------------------------------------------- readers

def test_svit_reader_on_the_real_format():
    dropped = Counter()
    texts = readers.svit(FIXTURES / "svit", dropped=dropped)
    assert +dropped == {"text units with a malformed box": 2, "refusals": 1}
    assert texts["3"] == [[("Is there a dog?", "Yes, the dog sleeps.")]]
    talk, weather, reason, description, referring = texts["2412112"]
    assert talk[1] == ("What is behind him?", "Behind him the sea is calm.")
    assert weather == [("How is the weather?", "It is a bright day.")]
    assert reason == [("Why might he be here?", "He may be waiting for a wave!",
                       "The water is quiet, so it can take a while.")]
    assert description == [("A man stands on a beach.",), ("The sand is wet.",), ("A bird flies by.",)]
    assert referring == [("Where is the man [0.12, 0.2, 0.46, 1.00]?",
                          "He stands near birds [0.5, 0.1, 0.55, 0.2], [0.7, 0.1, 0.8, 0.2].")]


@pytest.mark.parametrize("box", ["[]", "[0.1, 0.2]", "[0.5, 0.1, 0.4, 0.2]", "[0.1, 0.1, 1.4, 0.2]", "[a, b, c, d]",
                                 "[0.1, 0.2, 0.3, 0.4, 0.5]", "[-0.1, 0, 1, 1]", "[1_0, 0, 1, 1]",
                                 "", "[0.1, 0.2, 0.3, 0.4", "[nan, 0, 1, 1]"])
def test_malformed_boxes_are_recognised(box):
    assert readers.plain_boxes(f"A <st>man<ed> {box} stands.") is None


def test_visual_genome_reader_on_the_real_format():
    dropped = Counter()
    pictures = readers.visual_genome(FIXTURES / "vg", dropped)
    picture = pictures["2412112"]
    # the man's box is clipped to 50 x 50 of 100 x 50 and is the larger of "Man " and its alias "guy"
    assert picture.objects == {"man": 0.5, "sand": 0.2} and picture.n_objects == 3
    assert pictures["3"].objects == {"dog": 0.04}  # files that say id, width, height
    assert dropped == {"boxes outside the picture or empty": 1}


def test_picture_file_comes_from_the_url_with_fallbacks(tmp_path):
    picture = readers.Picture("7", "https://x.org/VG_100K/99.jpg?x=1", 1, 1)
    assert readers.picture_file(tmp_path, picture) is None
    for file in ("VG_100K_2/7.jpg", "VG_100K/7.jpg", "VG_100K_2/99.png", "VG_100K_2/99.jpg", "VG_100K/99.jpg"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
        if file != "VG_100K_2/99.png":  # a suffix other than the url's comes after VG's own names
            assert readers.picture_file(tmp_path, picture) == tmp_path / file


def edited(tmp_path: Path, file: str, old: str, new: str) -> Path:
    copy = shutil.copytree(FIXTURES, tmp_path / "fixtures") / file
    text = copy.read_text()
    assert old in text
    copy.write_text(text.replace(old, new, 1))
    return copy


@pytest.mark.parametrize("file, old, new, message", [
    ("svit/conversation.json", '"from": "gpt"', '"from": "user"', r"conversation.json: record 0 \(image_id 2412112\): "
     r"user and gpt must take turns, found \['user', 'user'"),
    ("svit/conversation.json", '"id": 3', '"number": 3', r"conversation.json: record 1: field 'image_id' .* None"),
    ("svit/conversation.json", '"How is the weather?"', '7', r"content\[0\].value' must be str, found 7"),
    ("svit/conversation.json", '"conversations"', '"talk"', r"record 0 \(image_id 2412112\): field 'conversations'"),
    ("svit/complex_reasoning.json", '"from": "gpt", "value"', '"from": "gpt", value', r"ing.json: record 0: not valid"),
    ("svit/referring_qa.json", "]}]}]", "]}]}", r"referring_qa.json: record 1: .*ends inside the list"),
    ("svit/detail_description.json", "[", '[4, ', r"detail_description.json: record 0: it must be dict, found 4"),
])
def test_malformed_svit_record_gives_one_clear_error(tmp_path, file, old, new, message):
    copy = edited(tmp_path, file, old, new)
    with pytest.raises(ValueError, match=message):
        readers.svit(copy.parent)


@pytest.mark.parametrize("file, old, new, message", [
    ("vg/image_data.json", '"width": 100', '"width": "100"', r"image_data.json: record 0 .*2412112.: field 'width'"),
    ("vg/image_data.json", '"width": 100', '"width": 0', r"record 0 .*must be positive"),
    ("vg/objects.json", '"names": ["guy"]', '"names": "guy"', r"objects.json: .*'objects\[1\].names' must be list"),
    ("vg/objects.json", '"y": 40, ', "", r"field 'objects\[2\].y' must be int or float, found None"),
    ("vg/objects.json", '["sand"]', "[4]", r"field 'objects\[2\].names\[0\]' must be str, found 4"),
])
def test_malformed_visual_genome_record_gives_one_clear_error(tmp_path, file, old, new, message):
    copy = edited(tmp_path, file, old, new)
    with pytest.raises(ValueError, match=message):
        readers.visual_genome(copy.parent)


def test_records_are_streamed_across_pieces(tmp_path, monkeypatch):
    items = [{"number": i, "text": "é]},{[" * 9} for i in range(40)]
    (tmp_path / "list.json").write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")
    for chunk in (1, 7, 64):
        monkeypatch.setattr(readers, "CHUNK", chunk)
        assert [record for _, record in readers.records(tmp_path / "list.json", {})] == items
    for text, message in {'[{"a": 1}': "ends inside", "": "empty", "[{}, 4]": "must be dict, found 4",
                          '[{"a": ': "not valid JSON"}.items():
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            list(readers.records(tmp_path / "bad.json", {}))
    with pytest.raises(FileNotFoundError, match="none.json is missing"):
        list(readers.records(tmp_path / "none.json", {}))


def test_memory_holds_a_piece_of_a_long_list(tmp_path):
    """A list of 40 MB, packed, is read within 8 MB."""
    with gzip.open(tmp_path / "list.json.gz", "wt", compresslevel=1) as file:
        file.write("[" + ",".join(json.dumps({"number": i, "text": "word " * 800}) for i in range(10_000)) + "]")
    tracemalloc.start()
    assert sum(1 for _ in readers.records(tmp_path / "list.json", {"text": str})) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def test_pope_reader(tmp_path):
    file = FIXTURES / "pope" / "coco_pope_adversarial.json"
    with pytest.raises(FileNotFoundError, match="record 0: picture .*310196.jpg is missing"):
        samples.pope(file, tmp_path)
    (tmp_path / "COCO_val2014_000000310196.jpg").touch()
    table = samples.pope(file, tmp_path)
    assert table["label"].tolist() == ["yes", "no"] and table["target"].tolist() == ["snowboard", "dining table"]
    assert set(table["kind"]) == {"adversarial"} and table["sample"].is_unique and table["image_id"].nunique() == 1
    bad = tmp_path / "coco_pope_random.json"
    bad.write_text(file.read_text().replace('"no"', '"maybe"'))
    with pytest.raises(ValueError, match="record 1: field 'label' must be yes or no"):
        samples.pope(bad, tmp_path)
    with pytest.raises(ValueError, match="must hold random, popular"):
        samples.pope(tmp_path / "other.json", tmp_path)


def test_folder_of_own_pictures(tmp_path, table):
    for name in ("b.png", "a.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    with pytest.raises(ValueError, match="give a question"):
        samples.folder(tmp_path)
    plain = samples.folder(tmp_path, "What is this?")
    assert [Path(p).name for p in plain["image"]] == ["a.jpg", "b.png"]
    assert set(plain["question"]) == {"What is this?"}
    csv = 'image,question,label,context\na.jpg,Is it red?,Yes,"Long, ago."\nb.png,Why?,,\n'
    (tmp_path / "questions.csv").write_text(csv)
    own = samples.folder(tmp_path)
    assert own["label"].tolist() [:1] == ["yes"] and own["label"].isna().tolist() == [False, True]
    assert own["group"].tolist() == ["own", "0"]
    assert own["context"].tolist() == ["Long, ago.", ""] and set(own.columns) == set(table.columns)
    (tmp_path / "questions.csv").write_text("image,question\nc.png,Why?\n")
    with pytest.raises(FileNotFoundError, match="questions.csv: row 0: picture .*c.png is missing"):
        samples.folder(tmp_path)
    (tmp_path / "questions.csv").write_text("picture,question\nc.png,Why?\n")
    with pytest.raises(ValueError, match="column 'image' must be there once"):
        samples.folder(tmp_path)


# ---------------------------------------------------------------- the builder

def test_table_has_the_columns_and_cells_of_the_contract(table):
    assert list(table.columns) == ["sample", "image_id", "image", "group", "length", "context", "question", "label",
                                   "target", "kind", "size", "n_context_tokens", "relevance", "n_objects"]
    assert table.groupby("length").size().to_dict() == dict.fromkeys(LENGTHS, 54)
    assert table.drop_duplicates("length")["group"].tolist() == ["0", "0.5k", "1k", "1.5k", "2k", "2.5k"]
    assert (table.loc[table["length"] == 0, "context"] == "").all()
    assert all(Path(image).is_file() for image in table["image"])
    assert table["question"][0] == f"Is the {table['target'][0]} in the image? (Please answer with yes or no.)"


def test_the_same_questions_at_every_length(table):
    for _, part in table.groupby("sample"):
        assert len(part) == len(LENGTHS)
        assert part[["question", "label", "kind", "image"]].nunique().eq(1).all()


def test_contexts_are_nested_and_shared_by_the_questions_of_a_picture(table):
    for _, part in table.groupby("image_id"):
        contexts = part.groupby("length")["context"].unique()
        assert contexts.map(len).eq(1).all()
        texts = [text[0] for text in contexts]
        assert all(longer.startswith(shorter) and len(longer) > len(shorter)
                   for shorter, longer in zip(texts, texts[1:]))


def test_contexts_are_within_three_percent_in_tokens(table, tokenizer):
    for context, length, tokens in table[["context", "length", "n_context_tokens"]].drop_duplicates().to_numpy():
        assert tokens == len(tokenizer(context, add_special_tokens=False)["input_ids"])
        assert abs(tokens - length) <= 0.03 * length


def test_labels_and_kinds_are_balanced_and_true(root, table):
    pictures = readers.visual_genome(root / "vg")
    for _, cell in table.groupby(["length", "image_id"]):
        assert (cell["label"] == "yes").sum() == 3
        assert Counter(cell["kind"]) == {"present": 3, "random": 1, "popular": 1, "adversarial": 1}
    assert all((row.target in pictures[row.image_id].objects) == (row.label == "yes") for row in table.itertuples())
    assert (table["size"].notna() == (table["label"] == "yes")).all()
    sizes = table[table["length"] == 0]["size"].value_counts()
    assert sizes.max() - sizes.min() <= 2 and len(sizes) == 3
    for row in table[table["kind"] == "adversarial"].itertuples():
        scene = max(GROUPS, key=lambda s: sum(n in pictures[row.image_id].objects for g in GROUPS[s] for n in g))
        assert row.target in {name for group in GROUPS[scene] for name in group}


def test_relevance_labels_cover_the_context(root, table):
    labels = json.loads((root / "labels.json").read_text())
    for row in table[table["length"] == 1000].itertuples():
        for span in row.relevance:
            sentence = labels[row.image_id][row.context[span["start"]:span["end"]]]
            group = next(g for groups in GROUPS.values() for g in groups if row.target in g)
            near = set(sentence["objects"]) & set(group)
            expected = {"object": "target_group" if near else "other_object"}.get(sentence["about"], sentence["about"])
            assert span["about"] == expected
        covered = sum(span["end"] - span["start"] for span in row.relevance) + len(row.relevance) - 1
        assert covered == len(row.context)
    abouts = {span["about"] for spans in table["relevance"] for span in spans}
    assert abouts == {"target_group", "scene", "other_object", "filler"}


def test_no_context_ends_with_an_unanswered_question(table):
    assert not table["context"].str.endswith("?").any()


def test_the_table_depends_on_the_seed_only(root, tokenizer, table):
    again = samples.load(root, tokenizer, np.int64(54), np.array(LENGTHS), seed=np.int64(3))
    pd.testing.assert_frame_equal(table, again)
    other = samples.load(root, tokenizer, samples=54, seed=4)
    assert other["question"].tolist() != table["question"].tolist()


def test_the_table_is_the_same_in_another_process_with_another_hash_seed(root, table):
    code = ("import sys; sys.path.insert(0, 'tests'); import test_samples as t, hashlib, pandas as pd;"
            f"d = t.samples.load({str(root)!r}, t.make_tokenizer(), samples=54, seed=3);"
            "print(hashlib.sha256(d.drop(columns='relevance').to_csv().encode()).hexdigest())")
    here = Path(__file__).parents[1]
    digests = {subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(here)}).stdout
               for seed in ("1", "2")}
    assert len(digests) == 1


def test_filler_only_asks_the_same_with_filler_of_the_same_length(root, tokenizer, table):
    filler = samples.load(root, tokenizer, samples=54, seed=3, context="filler")
    same = ["sample", "image", "length", "question", "label", "kind"]
    pd.testing.assert_frame_equal(filler[same], table[same])
    assert {span["about"] for spans in filler["relevance"] for span in spans} == {"filler"}
    assert samples.audit(filler, samples.lexicon(NAMES, {"dog": ["hound"]})).empty
    words = samples.lexicon(NAMES, {"dog": ["hound"]})
    for _, part in filler.groupby("image_id"):
        texts = part.drop_duplicates("length").sort_values("length")
        assert all(b.startswith(a) for a, b in zip(texts["context"], texts["context"][1:]))
        assert (texts["n_context_tokens"] - texts["length"]).abs().le(0.03 * texts["length"]).all()
        assert not words.find(texts["context"].iloc[-1])
    (root / "labels.json").rename(root / "put_aside.json")
    with pytest.raises(ValueError, match="need labels.json"):
        samples.load(root, tokenizer, samples=54, context="filler")
    (root / "put_aside.json").rename(root / "labels.json")


def test_without_a_world_negatives_follow_the_data(root, tokenizer):
    table = samples.long_context(root / "svit", root / "vg", tokenizer, lengths=(0, 200), pictures=6, seed=1)
    texts, pictures = readers.svit(root / "svit"), readers.visual_genome(root / "vg")
    assert table["relevance"].isna().all()
    for row in table[table["label"] == "no"].itertuples():
        assert row.target not in pictures[row.image_id].objects
        told = " ".join(" ".join(unit) for dialogue in texts[row.image_id] for unit in dialogue)
        assert not samples.mentions(told, [row.target])  # annotations may be incomplete: text counts as evidence
    seen = Counter(name for picture in pictures.values() for name in picture.objects)
    popular = table[table["kind"] == "popular"]["target"].map(seen).mean()
    assert popular >= table[table["kind"] == "random"]["target"].map(seen).mean()


def test_pictures_without_text_or_file_are_skipped_and_counted(tmp_path, tokenizer):
    root = synthetic(tmp_path / "toy", pictures=6)
    (root / "vg" / "VG_100K" / "101.webp").unlink()
    file = root / "svit" / "conversation.json"
    talks = json.loads(file.read_text())
    del talks[3]["conversations"][1:]
    file.write_text(json.dumps(talks))
    with pytest.warns(UserWarning, match="4 of 6 pictures"):
        table = samples.load(root, tokenizer, samples=36, lengths=(0, 2000))
    assert table.attrs["dropped"] == {"pictures without a file": 1,
                                      "pictures without enough text that mentions no asked object": 1}
    assert set(table["image_id"]) == {"100", "102", "104", "105"}
    with pytest.raises(ValueError, match="no picture .* 90000 tokens; dropped"):
        samples.load(root, tokenizer, samples=36, lengths=(90000,))


def test_bad_arguments(root, tokenizer):
    with pytest.raises(FileNotFoundError, match="no data set 'nowhere'"):
        samples.load("nowhere", tokenizer)
    with pytest.raises(ValueError, match="multiple of questions"):
        samples.load(root, tokenizer, samples=20)
    with pytest.raises(ValueError, match="'full' or 'filler'"):
        samples.load(root, tokenizer, context="half")
    with pytest.raises(ValueError, match="questions must be even"):
        samples.long_context(root / "svit", root / "vg", tokenizer, questions=3)


def test_a_sentence_without_a_label_is_an_error(tmp_path, tokenizer):
    root = synthetic(tmp_path / "toy", pictures=3)
    (root / "labels.json").write_text("{}")
    with pytest.raises(ValueError, match="labels.json: image_id .* no label for the sentence"):
        samples.load(root, tokenizer, samples=6)


def count_words(texts):
    return [len(text.replace(".", " .").replace("?", " ?").split()) for text in texts]


def test_a_table_is_made_anew_when_a_file_changed_and_never_shared(tmp_path, tokenizer):
    root = synthetic(tmp_path / "toy", pictures=3)
    first = samples.load(root, tokenizer, samples=6)
    first["question"] = "changed"
    assert (samples.load(root, tokenizer, samples=6)["question"] != "changed").all()
    aliases = root / "vg" / "image_data.json"
    aliases.write_text(aliases.read_text().replace('"width"', '"breadth"'))
    with pytest.raises(ValueError, match="width"):
        samples.load(root, tokenizer, samples=6)


def test_a_kept_table_is_read_back_as_it_was(tmp_path, tokenizer, monkeypatch):
    root = synthetic(tmp_path / "toy", pictures=3)
    made = samples.load(root, tokenizer, samples=6, cache=tmp_path)
    monkeypatch.setattr(pd.DataFrame, "to_parquet", lambda *args, **options: pytest.fail("made again"))
    tokenizer(["a b c"], truncation=True, max_length=2)  # leaves its settings in the tokenizer
    read = samples.load(root, tokenizer, samples=6, cache=tmp_path)
    pd.testing.assert_frame_equal(read, made)
    assert read.attrs == made.attrs and read["relevance"].tolist() == made["relevance"].tolist()


def test_grow_skips_what_does_not_fit_and_keeps_the_rest_in_order():
    units = [("a " * 70 + ".",), ("b " * 20 + ".",), ("Q?", "c " * 37 + ".", "d " * 30 + ".")]
    contexts = grow(units, [0, 60, 162], count_words)
    assert contexts[0] == () and contexts[60] == (units[1][0], "Q?", units[2][1])
    assert contexts[162] == (*contexts[60], units[2][2], *units[0])  # the cut unit goes on first
    assert grow([("x.",)], [10], count_words) is None
