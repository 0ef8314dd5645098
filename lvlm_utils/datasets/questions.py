"""Readers of question files: POPE, and a folder of your own pictures. Both give the sample table of datasets.py."""
import json
import re
from pathlib import Path

import pandas as pd

from .readers import PICTURE_SUFFIXES
from .records import get


def pope(file: Path, image_dir: Path) -> pd.DataFrame:
    """POPE's questions (JSON lines) as a sample table. Source: Li et al. 2023, `coco_pope_<kind>.json`.

    `kind` is the setting in the file's name for its yes and its no rows alike, as POPE reports them.
    """
    file, rows = Path(file), []
    kind = next((k for k in ("random", "popular", "adversarial") if k in file.stem), None)
    if kind is None:
        raise ValueError(f"{file}: the name must hold random, popular or adversarial, the kind of its negatives")
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}: line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON, {error.msg}") from None
        image, text = get(record, "image", str, where), get(record, "text", str, where)
        label = get(record, "label", str, where).strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"{where}: field 'label' must be yes or no, found '{label}'")
        target = re.search(r"\b(?:an?|the) (.+?) in the im", text)
        rows.append({"sample": f"{kind}-{get(record, 'question_id', (int, str), where)}", "image_id": image,
                     "image": str(_picture_at(Path(image_dir) / image, where)), "question": text, "label": label,
                     "target": target[1] if target else None, "kind": kind})
    return _short_table(rows)


def folder(path: Path, question: str | None = None) -> pd.DataFrame:
    """Your own pictures as a sample table: questions.csv (image, question, optional label and context), else one row
    for each picture with the `question` given. Lengths are unknown here (NA): no tokenizer is asked."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder")
    file, rows = path / "questions.csv", []
    if file.is_file():
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
        lacking = {"image", "question"} - set(table.columns)
        if lacking:
            raise ValueError(f"{file}: column {sorted(lacking)[0]!r} is missing (image,question[,label][,context])")
        for number, row in enumerate(table.to_dict("records")):
            where = f"{file}: row {number + 1}"
            asked = row["question"].strip() or question
            if not asked:
                raise ValueError(f"{where}: field 'question' is empty")
            rows.append({"sample": f"{Path(row['image']).stem}-{number}", "image_id": row["image"],
                         "image": str(_picture_at(path / row["image"], where)), "question": asked,
                         "label": row.get("label", "").strip().lower() or None,
                         "context": " ".join(row.get("context", "").split())})
    else:
        if not question:
            raise ValueError(f"{path} has no questions.csv: give a question to ask of every picture")
        pictures = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
        if not pictures:
            raise FileNotFoundError(f"{path} holds no pictures ({', '.join(PICTURE_SUFFIXES)})")
        rows = [{"sample": f"{p.stem}-{number}", "image_id": p.name, "image": str(p), "question": question}
                for number, p in enumerate(pictures)]
    return _short_table(rows)


def _picture_at(path: Path, where: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{where}: picture {path} is missing")
    return path


def _short_table(rows: list[dict]) -> pd.DataFrame:
    """Rows with the columns of the sample table; a context of the user's own has group "own" and no known length."""
    empty = {"context": "", "label": None, "target": None, "kind": None, "size": None, "relevance": None}
    table = pd.DataFrame([{**empty, **row} for row in rows])
    table["group"] = ["own" if context else "0" for context in table["context"]]
    for column in ("length", "n_context_tokens"):
        table[column] = pd.array([pd.NA if context else 0 for context in table["context"]], dtype="Int64")
    table["n_objects"] = pd.array([pd.NA] * len(table), dtype="Int64")
    return table
