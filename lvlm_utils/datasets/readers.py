"""Readers of the real files of SVIT and Visual Genome (questions.py reads POPE and a folder of your own pictures).

A malformed record raises one ValueError that names the file, the record and the field. What the real files are known
to contain and nobody can use (malformed boxes in the text, refusals, boxes outside the picture) is dropped and counted.
"""
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from .leaks import sentences
from .records import get, records

KINDS = ("conversation", "complex_reasoning", "detail_description", "referring_qa")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TAGGED = re.compile(r"<st>(.*?)<ed>((?:\s*,?\s*\[[^\[\]]*\])+)")  # <st>man<ed> [x1, y1, x2, y2], [..]
LONG_NUMBER = re.compile(r"^\d*\.\d{3,}$")
REFUSAL = re.compile(r"message is empty|message appears to be empty", re.IGNORECASE)

Unit = tuple[str, ...]  # the sentences of one question-answer pair, or one sentence of a description
Dialogue = list[Unit]


@dataclass
class Picture:
    """One image of Visual Genome: names are canonical, `objects` maps a name to its largest box's share of the area."""

    image_id: str
    url: str
    width: int
    height: int
    objects: dict[str, float] = field(default_factory=dict)
    n_objects: int = 0


def _image_id(record: dict, where: str) -> str:
    """Some files say `id` where others say `image_id`."""
    name = "image_id" if "image_id" in record or "id" not in record else "id"
    return str(get(record, name, (int, str), where))


def _is_box(corners: list[float]) -> bool:
    return len(corners) == 4 and 0 <= corners[0] < corners[2] <= 1 and 0 <= corners[1] < corners[3] <= 1


def plain_boxes(text: str) -> str | None:
    """SVIT's "<st>man<ed> [x1, y1, x2, y2]" as "man [x1, y1, x2, y2]"; None when a box is malformed.

    Numbers of more than two decimals are rounded to two, others stay as they are written.
    """
    ok = True

    def rewrite(tagged: re.Match) -> str:
        nonlocal ok
        boxes = []
        for inside in re.findall(r"\[([^\[\]]*)\]", tagged[2]):
            try:
                numbers = [float(number) for number in inside.split(",")]
            except ValueError:
                numbers = []
            corners = [numbers[i:i + 4] for i in range(0, len(numbers), 4)]
            ok &= bool(corners) and all(map(_is_box, corners))
            written = [LONG_NUMBER.sub(lambda n: f"{float(n[0]):.2f}", number.strip()) for number in inside.split(",")]
            boxes += ["[" + ", ".join(written[i:i + 4]) + "]" for i in range(0, len(written), 4)]
        return f"{tagged[1].strip()} {', '.join(boxes)}"

    text = TAGGED.sub(rewrite, text)
    return None if not ok or "<st>" in text or "<ed>" in text else text


def svit(folder: Path, wanted: Collection[str] | None = None, dropped: Counter | None = None
         ) -> dict[str, list[Dialogue]]:
    """Text about each picture from SVIT's four files: image_id -> dialogues of units, in the order of the files.

    wanted: image ids to keep (all when None); dropped: counts are added here. White space is made single spaces, and
    what is said about a picture in the very same words stands once.
    """
    dropped = Counter() if dropped is None else dropped
    seen: set[tuple[str, Unit]] = set()
    texts: dict[str, list[Dialogue]] = {}
    for kind in KINDS:
        path = Path(folder) / f"{kind}.json"
        for index, record in records(path):
            where = f"{path}: record {index}"
            image_id = _image_id(record, where)
            if wanted is not None and image_id not in wanted:
                continue
            where += f" (image_id {image_id})"
            for number, item in enumerate(get(record, "conversations", list, where)):
                here = f"{where}: conversations[{number}]"
                dialogue = _dialogue(get(item, "content", list, here), kind, here, dropped)
                fresh = [unit for unit in dict.fromkeys(dialogue) if (image_id, unit) not in seen]
                dropped["repeated text units"] += len(dialogue) - len(fresh)
                seen.update((image_id, unit) for unit in fresh)
                if fresh:
                    texts.setdefault(image_id, []).append(fresh)
    return texts


def _dialogue(turns: list, kind: str, where: str, dropped: Counter) -> Dialogue:
    values = []
    for number, turn in enumerate(turns):
        here = f"{where}.content[{number}]"
        wanted = ("gpt", "assistant") if number % 2 else ("user", "human")
        if get(turn, "from", str, here) not in wanted:
            raise ValueError(f"{here}: field 'from' must be '{wanted[0]}' (turns alternate), found '{turn['from']}'")
        values.append(" ".join(get(turn, "value", str, here).split()))
    if len(values) % 2:
        raise ValueError(f"{where}: field 'content' ends with a question without an answer")
    dialogue: Dialogue = []
    for question, answer in zip(values[::2], values[1::2]):
        question, answer = plain_boxes(question), plain_boxes(answer)
        if question is None or answer is None:
            dropped["text units with a malformed box"] += 1
        elif kind == "detail_description" and REFUSAL.search(answer):
            dropped["refusals"] += 1
        elif not answer:
            dropped["empty answers"] += 1
        elif kind == "detail_description":  # each sentence of a description stands alone
            dialogue += [(answer[start:end],) for start, end in sentences(answer)]
        else:
            dialogue.append(tuple(turn[a:b] for turn in (question, answer) for a, b in sentences(turn)))
    return dialogue


def object_alias(path: Path) -> dict[str, list[str]]:
    """Visual Genome's object_alias.txt: canonical name -> all names of its line. No file: no aliases."""
    groups: dict[str, list[str]] = {}
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            names = [" ".join(name.lower().split()) for name in line.split(",") if name.strip()]
            if names:
                groups.setdefault(names[0], []).extend(names)
    return groups


def visual_genome(folder: Path, dropped: Counter | None = None) -> dict[str, Picture]:
    """Pictures and their objects from image_data.json, objects.json and object_alias.txt, joined by image_id.

    Boxes are clipped to the picture before their share of its area is taken; boxes left empty are counted.
    """
    folder, dropped = Path(folder), Counter() if dropped is None else dropped
    canonical: dict[str, str] = {}
    for first, names in object_alias(folder / "object_alias.txt").items():
        for name in names:
            canonical.setdefault(name, first)
    pictures = {}
    for index, record in records(folder / "image_data.json"):
        where = f"{folder / 'image_data.json'}: record {index}"
        image_id = _image_id(record, where)
        where += f" (image_id {image_id})"
        width, height = (get(record, side, int, where) for side in ("width", "height"))
        if width <= 0 or height <= 0:
            raise ValueError(f"{where}: fields 'width' and 'height' must be positive, found {width} x {height}")
        pictures[image_id] = Picture(image_id, get(record, "url", str, where), width, height)
    for index, record in records(folder / "objects.json"):
        where = f"{folder / 'objects.json'}: record {index}"
        image_id = _image_id(record, where)
        where += f" (image_id {image_id})"
        items = get(record, "objects", list, where)
        if image_id not in pictures:
            dropped["object lists without a picture in image_data.json"] += 1
            continue
        for number, item in enumerate(items):
            _add_object(pictures[image_id], item, canonical, f"{where}: objects[{number}]", dropped)
    return pictures


def _add_object(picture: Picture, item: dict, canonical: dict[str, str], where: str, dropped: Counter) -> None:
    names = get(item, "names", list, where)
    x, y = (get(item, side, (int, float), where) for side in ("x", "y"))
    sides = ("w", "h") if "w" in item or "width" not in item else ("width", "height")
    w, h = (get(item, side, (int, float), where) for side in sides)
    inside_w = min(x + w, picture.width) - max(x, 0)
    inside_h = min(y + h, picture.height) - max(y, 0)
    if inside_w <= 0 or inside_h <= 0:
        dropped["boxes outside the picture or empty"] += 1
        return
    picture.n_objects += 1
    share = inside_w * inside_h / (picture.width * picture.height)
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{where}: field 'names' must hold strings, found {name!r}")
        name = " ".join(name.lower().split())
        name = canonical.get(name, name)
        if name:
            picture.objects[name] = max(share, picture.objects.get(name, 0.0))


def picture_file(folder: Path, picture: Picture) -> Path | None:
    """The picture's file: named by its url (not by its id), in VG_100K or VG_100K_2, any suffix; None when absent."""
    folder, name = Path(folder), PurePosixPath(urlsplit(picture.url).path)
    folders = [name.parent.name, "VG_100K", "VG_100K_2"]
    names = [name.name, f"{picture.image_id}.jpg"]
    names += [stem + suffix for stem in (name.stem, picture.image_id) for suffix in PICTURE_SUFFIXES]
    return next((folder / d / n for n in names for d in folders if d and n and (folder / d / n).is_file()), None)
