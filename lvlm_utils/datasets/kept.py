"""Finished sample tables on disk."""
from pathlib import Path

import pandas as pd

from lvlm_utils import results


def key(root: Path, tokenizer, *settings) -> str:
    """Changes with the tokenizer, the bytes of any file of the data set, its place, and the settings."""
    files = sorted(file for folder in (root, root / "svit", root / "vg") for file in folder.glob("*.*"))
    return results.fingerprint(str(root.resolve()), tokenizer, [[file.name, file] for file in files], settings)


def read(file: Path) -> pd.DataFrame:
    """A table as `write` left it."""
    table = pd.read_parquet(file)
    table["relevance"] = [None if spans is None else [dict(span) for span in spans] for spans in table["relevance"]]
    return table


def write(table: pd.DataFrame, file: Path) -> None:
    """Write the whole table or, if killed, nothing."""
    with results.atomic(file) as part:
        table.to_parquet(part)
