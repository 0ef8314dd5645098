"""Readers: SVIT's text, Visual Genome's pictures and objects, POPE's questions, a folder of your own pictures.

Every file may be packed with gzip, and no byte order mark hides the word after it. A malformed record raises one
ValueError that names the file, the record and the field. What the real files are known to contain and nobody can use
(malformed boxes in the text, refusals, boxes outside the picture) is dropped and counted.
"""
import csv
import gzip
import io
import json
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import pandas as pd

CHUNK = 1 << 20  # characters read at a time
LONGEST_RECORD = 1 << 24  # real records are some kB; more than this means broken JSON
BETWEEN = re.compile(r"[\s\ufeff,\[\]]*")  # what comes between two records, a stray byte order mark included
OLDER = {"id": "image_id", "width": "w", "height": "h"}  # names of fields in older releases
NUMBER = (int, float)
SVIT = {"image_id": str, "conversations": [{"content": [{"from": str, "value": str}]}]}
IMAGES = {"image_id": str, "url": str, "width": int, "height": int}
OBJECTS = {"image_id": str, "objects": [{"names": [str], "x": NUMBER, "y": NUMBER, "w": NUMBER, "h": NUMBER}]}
POPE = {"question_id": str, "image": str, "text": str, "label": str}
OWN = ("image", "question", "label", "context")  # columns of questions.csv that are read; the first two must be there
COLUMNS = ("sample", "image_id", "image", "group", "length", "context", "question", "label", "target", "kind", "size",
           "n_context_tokens", "relevance", "n_objects")
KINDS = ("conversation", "complex_reasoning", "detail_description", "referring_qa")
SPEAKERS = {"user": 0, "human": 0, "gpt": 1, "assistant": 1}
TAGGED = re.compile(r"<st>(.*?)<ed>((?:\s*,?\s*\[[^\[\]]*\])+)")  # <st>man<ed> [x1, y1, x2, y2], [..]
SHARE = re.compile(r"\d+\.?\d*|\.\d+")
REFUSAL = re.compile(r"message is empty|message appears to be empty", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[.?!])\s+")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
csv.field_size_limit(1 << 30)  # a context may be long

Unit = tuple[str, ...]  # the sentences of one question-answer pair, or one sentence of a description


def found(path: str | Path) -> Path | None:
    """The file or, packed, `path` + ".gz"; None where neither exists. Raises ValueError where both do."""
    files = [file for file in (Path(path), Path(f"{path}.gz")) if file.is_file()]
    if len(files) > 1:
        raise ValueError(f"{files[0]} and {files[1].name} both exist: keep one of them")
    return files[0] if files else None


@contextmanager
def opened(path: str | Path) -> Iterator[io.TextIOWrapper]:
    """The text of a file, packed or not (its first bytes tell), line ends as they are, without a byte order mark.

    Raises FileNotFoundError, and ValueError for what is not UTF-8 text or not a whole packed file.
    """
    if not (file := found(path)):
        raise FileNotFoundError(f"{path} is missing")
    with file.open("rb") as raw:
        content = gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
        try:
            yield io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text ({error.reason}): save it as UTF-8") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{file}: the packed file is damaged ({error}): is the download complete?") from None


def inside(folder: str | Path, name: str, where: str) -> Path:
    """folder / name. Raises ValueError where `name` leads out of the folder, on this system or another."""
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts:
        raise ValueError(f"{where}: {name!r} leads out of {folder}: give a path inside of it")
    return Path(folder, name)


# ---------------------------------------------------------------- JSON

def records(path: str | Path, shape: dict) -> Iterator[tuple[str, dict]]:
    """(where it is, for errors; record) of a JSON list of objects or of JSON Lines: memory holds some, not 500 MB.

    shape: what each record must hold: {field: shape}, [shape of the items], a type, or some types.
    Raises FileNotFoundError, and ValueError for anything else; a list that is cut short is noticed.
    """
    decoder, text, at, index, brackets = json.JSONDecoder(object_pairs_hook=_object), "", 0, 0, ""
    with opened(path) as file:
        while True:
            gap, where = BETWEEN.match(text, at), f"{path}: record {index}"
            brackets, at = brackets + re.sub(r"[^\[\]]", "", gap[0]), gap.end()
            try:
                record, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:  # most often the record goes on in the next piece
                more = file.read(CHUNK) if len(text) - at < LONGEST_RECORD else ""
                text, at = text[at:] + more, 0
                if more:
                    continue
                if not text and brackets in ("", "[]") and (index or brackets):
                    return
                why = error.msg if text else "the file is empty, ends inside the list, or holds several lists"
                raise ValueError(f"{where}: not valid JSON, {why}; is the download complete?") from None
            if isinstance(record, dict) and "image_id" in record:
                where += f" (image_id {record['image_id']})"
            _check(record, shape, where)
            yield where, record
            index += 1


def _object(pairs):
    """One object of JSON under the newer names of its fields; an id is text, and 7, "7", "7.0" and 7.0 are one id."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise json.JSONDecodeError(f"a field appears twice among {[name for name, _ in pairs]}", "", 0)
    record |= {new: record[old] for old, new in OLDER.items() if old in record and new not in record}
    return record | {name: re.sub(r"^(\d+)\.0+$", r"\1", str(record[name]).strip())
                     for name in ("image_id", "question_id") if type(record.get(name)) in (str, *NUMBER)}


def _check(value, shape, where, name=""):
    if isinstance(shape, dict) and isinstance(value, dict):
        for key, inner in shape.items():
            _check(value.get(key), inner, where, f"{name}.{key}".lstrip("."))
    elif isinstance(shape, list) and isinstance(value, list):
        for i, item in enumerate(value):
            _check(item, shape[0], where, f"{name}[{i}]")
    else:
        kinds = shape if isinstance(shape, tuple) else (shape if isinstance(shape, type) else type(shape),)
        if not isinstance(value, kinds) or isinstance(value, bool) or kinds == NUMBER and not math.isfinite(value):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{where}: {f'field {name!r}' if name else 'it'} must be {wanted}, found {value!r:.60}")


# ---------------------------------------------------------------- SVIT

def svit(folder: str | Path, wanted: Collection[str] | None = None, dropped: Counter | None = None) -> dict[str, list]:
    """Text about each picture from SVIT's four files: image_id -> dialogues, lists of units, in the order of the files.

    White space is made single spaces, and what is said about a picture in the very same words is taken once.
    wanted: image ids to keep, all when None. dropped: counts of what is left out are added here.
    """
    dropped, texts = Counter() if dropped is None else dropped, {}
    for kind in KINDS:
        for where, record in records(Path(folder) / f"{kind}.json", SVIT):
            if wanted is None or record["image_id"] in wanted:
                seen = {unit for dialogue in texts.get(record["image_id"], ()) for unit in dialogue}
                for talk in record["conversations"]:
                    units = list(_units(talk["content"], kind, where, dropped))
                    fresh = [unit for unit in dict.fromkeys(units) if unit not in seen]
                    dropped["repeated text units"] += len(units) - len(fresh)
                    seen.update(fresh)
                    if fresh:
                        texts.setdefault(record["image_id"], []).append(fresh)
    return texts


def _units(turns, kind, where, dropped):
    if [SPEAKERS.get(turn["from"]) for turn in turns] != [0, 1] * (len(turns) // 2):
        raise ValueError(f"{where}: user and gpt must take turns, found {[turn['from'] for turn in turns]}")
    said = [plain_boxes(" ".join(turn["value"].split())) for turn in turns]
    for question, answer in zip(said[::2], said[1::2]):
        if question is None or answer is None:
            dropped["text units with a malformed box"] += 1
        elif not answer or kind == "detail_description" and REFUSAL.search(answer):
            dropped["refusals" if answer else "empty answers"] += 1
        elif kind == "detail_description":  # each sentence of a description is a unit of its own
            yield from ((answer[a:b],) for a, b in sentences(answer))
        else:
            yield tuple(turn[a:b] for turn in (question, answer) for a, b in sentences(turn))


def sentences(text: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence: the text is split after . ? or ! followed by white space, which is left out."""
    cuts = [(0, len(text) - len(text.lstrip())), *(gap.span() for gap in SENTENCE_END.finditer(text))]
    ends = [start for start, _ in cuts[1:]] + [len(text.rstrip())]
    return [(start, end) for (_, start), end in zip(cuts, ends) if end > start]


def plain_boxes(text: str) -> str | None:
    """SVIT's "<st>man<ed> [x1, y1, x2, y2]" as "man [x1, y1, x2, y2]"; None when a box is malformed.

    Corners are shares of the picture's sides. Those of more than two decimals are rounded to two.
    """
    text = TAGGED.sub(_plain_box, text)
    return None if "<st>" in text or "<ed>" in text else text


def _plain_box(tagged):
    """The rewritten tag, or the tag as it was when a box is malformed."""
    boxes = []
    for numbers in (inner.split(",") for inner in re.findall(r"\[([^\[\]]*)\]", tagged[2])):
        for four in ([n.strip() for n in numbers[i:i + 4]] for i in range(0, len(numbers), 4)):
            x1, y1, x2, y2 = [float(n) for n in four] if all(map(SHARE.fullmatch, four)) and len(four) == 4 else [0] * 4
            if not (x1 < x2 <= 1 and y1 < y2 <= 1):
                return tagged[0]
            boxes.append(", ".join(f"{float(n):.2f}" if len(n.partition(".")[2]) > 2 else n for n in four))
    return f"{tagged[1].strip()} {', '.join(f'[{box}]' for box in boxes)}"


# ---------------------------------------------------------------- Visual Genome

@dataclass
class Picture:
    """One image of Visual Genome. objects: canonical name -> share of the picture's area that its largest box takes."""

    image_id: str
    url: str
    width: int
    height: int
    objects: dict[str, float] = field(default_factory=dict)
    n_objects: int = 0


def visual_genome(folder: str | Path, dropped: Counter | None = None) -> dict[str, Picture]:
    """Pictures and their objects from image_data.json, objects.json and object_alias.txt, joined by image_id.

    Boxes are clipped to the picture before their share of its area is taken; boxes left empty are counted in `dropped`.
    """
    folder, dropped, pictures = Path(folder), Counter() if dropped is None else dropped, {}
    groups = object_alias(folder / "object_alias.txt")
    canonical = {name: first for first in reversed(groups) for name in groups[first]}
    for where, record in records(folder / "image_data.json", IMAGES):
        picture = Picture(*(record[name] for name in IMAGES))
        if picture.width <= 0 or picture.height <= 0 or picture.image_id in pictures:
            wrong = "this image_id appears twice" if picture.image_id in pictures else "width, height must be positive"
            raise ValueError(f"{where}: {wrong}")
        pictures[picture.image_id] = picture
    for _, record in records(folder / "objects.json", OBJECTS):
        picture = pictures.get(record["image_id"])
        if picture is None:
            dropped["object lists without a picture in image_data.json"] += 1
        for item in record["objects"] if picture else ():
            wide = min(item["x"] + item["w"], picture.width) - max(item["x"], 0)
            high = min(item["y"] + item["h"], picture.height) - max(item["y"], 0)
            if wide <= 0 or high <= 0:
                dropped["boxes outside the picture or empty"] += 1
                continue
            picture.n_objects += 1
            for name in filter(None, map(_name, item["names"])):
                name, share = canonical.get(name, name), wide * high / (picture.width * picture.height)
                picture.objects[name] = max(share, picture.objects.get(name, 0.0))
    return pictures


def object_alias(path: str | Path) -> dict[str, list[str]]:
    """Visual Genome's object_alias.txt: canonical name -> all names of its line. No file: no aliases."""
    groups: dict[str, list[str]] = {}
    if found(path):
        with opened(path) as file:
            for line in file.read().splitlines():
                if names := list(filter(None, map(_name, line.split(",")))):
                    groups.setdefault(names[0], []).extend(names)
    return groups


def _name(text):
    """One spelling of an object's name: small composed letters, single spaces, nothing invisible."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    return " ".join(text.lower().split())


def picture_file(folder: str | Path, picture: Picture) -> Path | None:
    """The picture's file: named by its url (not by its id), in VG_100K or VG_100K_2, any suffix; None when absent."""
    name = PurePosixPath(picture.url.partition("?")[0])
    names = [name.name, f"{picture.image_id}.jpg"]
    names += [stem + suffix for stem in (name.stem, picture.image_id) for suffix in PICTURES]
    files = (inside(folder, f"{parent}/{file}", f"image_id {picture.image_id}") for file in names if file
             for parent in (name.parent.name, "VG_100K", "VG_100K_2") if parent)
    return next((file for file in files if file.is_file()), None)


# ---------------------------------------------------------------- questions that exist already

def pope(file: str | Path, image_dir: str | Path) -> pd.DataFrame:
    """POPE's questions (JSON Lines) as a sample table. Source: Li et al. 2023, `coco_pope_<kind>.json`.

    `kind` is the setting in the file's name for its yes and its no rows alike, as POPE reports them.
    image_dir: the folder that holds the pictures. Raises FileNotFoundError and ValueError, naming the record.
    """
    kind, rows = re.search("random|popular|adversarial", Path(file).name), []
    if kind is None:
        raise ValueError(f"{file}: the name must hold random, popular or adversarial, the kind of its negatives")
    for where, record in records(file, POPE):
        target, label = re.search(r"\b(?:an?|the) (.+?) in the im", record["text"]), _label(record["label"])
        if label not in ("yes", "no"):
            raise ValueError(f"{where}: field 'label' must be yes or no, found '{label}'")
        rows.append({"sample": f"{kind[0]}-{record['question_id']}", "image": record["image"], "label": label,
                     "question": record["text"], "target": target and target[1], "kind": kind[0]})
    return _table(rows, image_dir, f"{file}: record")


def folder(path: str | Path, question: str | None = None) -> pd.DataFrame:
    """Your own pictures as a sample table: one row for each row of questions.csv, or for each picture.

    path: the folder; its questions.csv has the columns image and question, and may have label and context.
    question: what is asked of every picture, or in rows of questions.csv that ask nothing.
    Lengths are unknown here (NA): no tokenizer is asked. Raises FileNotFoundError and ValueError, naming the row.
    """
    file, where = Path(path, "questions.csv"), f"{Path(path, 'questions.csv')}: row"
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path} is no folder")
    rows = _own(file) if found(file) else [{"image": p.name} for p in sorted(Path(path).iterdir()) if p.is_file()
                                           and p.suffix.lower() in PICTURES and not p.name.startswith(".")]
    for number, row in enumerate(rows):
        row["question"] = row.get("question") or question
        if not row["question"]:
            raise ValueError(f"{where} {number}: give a question, there or to ask of every picture")
        row |= {"sample": f"{Path(row['image']).stem}-{number}", "label": _label(row.get("label"))}
    return _table(rows, path, where)


def _own(file):
    """The columns of questions.csv that are read, white space made single spaces."""
    with opened(file) as text:
        head, *cells = [row for row in csv.reader(text) if row] or [[]]
    names = [name.strip().lower() for name in head]
    for name in OWN:
        if names.count(name) > 1 or name not in (*names, *OWN[2:]):
            raise ValueError(f"{file}: column {name!r} must be there once (image,question[,label][,context])")
    if longer := [number for number, row in enumerate(cells) if len(row) > len(names)]:
        raise ValueError(f"{file}: row {longer[0]}: more cells than columns; put text with commas in quotes")
    return [{name: " ".join(cell.split()) for name, cell in zip(names, row) if name in OWN} for row in cells]


def _label(text):
    """yes and no in small letters; a free answer as it is; None for none."""
    text = (text or "").strip()
    return text.lower() if text.lower() in ("yes", "no") else text or None


def _table(rows, pictures, where):
    """Rows with the columns of the sample table; a context of the user's own has group "own" and no known length."""
    for number, row in enumerate(rows):
        file = inside(pictures, row["image"], f"{where} {number}")
        if not file.is_file():
            raise FileNotFoundError(f"{where} {number}: picture {file} is missing")
        own = bool(row.setdefault("context", ""))
        row |= {"image_id": Path(row["image"]).as_posix(), "image": str(file), "group": "own" if own else "0"}
        row |= dict.fromkeys(("length", "n_context_tokens"), pd.NA if own else 0)
    table = pd.DataFrame([dict.fromkeys(COLUMNS) | row for row in rows])
    if table.empty or table["sample"].duplicated().any():
        raise ValueError(f"{where}: no questions, or two of one id: {[*table[table['sample'].duplicated()]['sample']]}")
    return table.astype(dict.fromkeys(("length", "n_context_tokens", "n_objects"), "Int64"))
