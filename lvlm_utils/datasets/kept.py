"""Finished sample tables on disk, and what they depend on."""
import hashlib
import json
import os
from pathlib import Path

import pandas as pd


def key(root: Path, tokenizer, *settings) -> str:
    """Changes with the tokenizer, with any file of the data set (name, size, time) and with the settings."""
    files = sorted(file for folder in (root, root / "svit", root / "vg") for file in folder.glob("*.*"))
    words = _rules(tokenizer) if getattr(tokenizer, "is_fast", False) else str(id(tokenizer))
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((str(root.resolve()), words, stamps, settings)).encode()).hexdigest()[:24]


def _rules(tokenizer) -> str:
    """Vocabulary and rules of a fast tokenizer, without what its latest call left behind in it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({name: part for name, part in state.items() if name not in ("padding", "truncation")})


def read(file: Path) -> pd.DataFrame:
    """A table as `write` left it."""
    table = pd.read_parquet(file)
    table["relevance"] = [None if spans is None else [dict(span) for span in spans] for spans in table["relevance"]]
    return table


def write(table: pd.DataFrame, file: Path) -> None:
    """Write the whole table or, if killed, nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    table.to_parquet(part)
    os.replace(part, file)
