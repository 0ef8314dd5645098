"""Results on disk: a parquet file that survives a kill at any time and knows which of its rows are still valid."""

import os
from pathlib import Path

import pandas as pd

# rows that agree in these answer the same question; if their `key` differs, the older one is stale
IDENTITY = ["sample", "group", "condition", "method", "keep", "options", "model", "dtype", "attention"]


class Store:
    """Rows by their content key. New rows go to small part files beside `path`, merged when the run ends.

    A part is written whole under another name and then renamed, so a kill loses at most the rows not yet saved.
    `path=None` keeps everything in memory.
    """

    def __init__(self, path: str | Path | None, rank: int = 0):
        self.path = None if path is None else Path(path)
        self.rank = rank
        self.changed = False  # against the file
        self.table = pd.DataFrame(columns=["key", "revision", *IDENTITY])
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files = [self.path] * self.path.is_file() + sorted(self._parts.glob("*.parquet"))
        self.changed = len(files) > self.path.is_file()
        if files:
            self.table = pd.concat([_read(f) for f in files], ignore_index=True)
            self.table = self.table.drop_duplicates("key", keep="last", ignore_index=True)

    @property
    def _parts(self) -> Path:
        return self.path.with_name(self.path.name + ".parts")

    def drop_stale(self, wanted: pd.DataFrame) -> int:
        """Forget rows that `wanted` (key, revision and IDENTITY columns) contradicts; returns how many.

        Stale is a row with the same identity and another key, or one of the same model at another revision.
        """
        old = self.table
        answered = set(wanted[IDENTITY].itertuples(index=False, name=None))
        same = [identity in answered for identity in old[IDENTITY].itertuples(index=False, name=None)]
        revisions = dict(zip(wanted["model"], wanted["revision"], strict=True))
        retrained = old["revision"] != old["model"].map(revisions).fillna(old["revision"])
        stale = (pd.Series(same, index=old.index, dtype=bool) | retrained) & ~old["key"].isin(wanted["key"])
        self.table = old[~stale].reset_index(drop=True)
        self.changed |= bool(stale.any())
        return int(stale.sum())

    def add(self, rows: list[dict]) -> None:
        """Remember `rows`, and save them at once as one more part."""
        self.merge(rows)
        if self.path is not None and rows:
            self._parts.mkdir(exist_ok=True)
            number = 1 + max((int(f.stem.split("-")[1]) for f in self._parts.glob("*.parquet")), default=-1)
            write(pd.DataFrame(rows), self._parts / f"{self.rank:03d}-{number:06d}.parquet")

    def merge(self, rows: list[dict]) -> None:
        """Remember `rows`, in memory only."""
        if not rows:
            return
        self.changed = True
        frame = pd.DataFrame(rows)
        self.table = frame if self.table.empty else pd.concat([self.table, frame], ignore_index=True)
        self.table = self.table.drop_duplicates("key", keep="last", ignore_index=True)

    def finish(self) -> None:
        """Write the whole table to `path` and remove the parts, unless nothing changed."""
        if self.path is None or not self.changed:
            return
        write(self.table, self.path)
        if self._parts.is_dir():
            for file in self._parts.iterdir():
                file.unlink()
            self._parts.rmdir()


def _read(path: Path) -> pd.DataFrame:
    """A file of results; ValueError if it is anything else."""
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{path} is not a readable parquet file: delete it, or give another out. {error}") from error
    if "options" not in frame.columns and "method" in frame.columns:  # written before answer() could prune
        frame["options"] = "{}"
    if not {"key", "revision", *IDENTITY} <= set(frame.columns):
        raise ValueError(f"{path} holds no results of answer(): give another out.")
    return frame


def write(frame: pd.DataFrame, path: Path) -> None:
    """Write parquet so that `path` holds either the old or the new content, never a part of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    frame.to_parquet(temporary, index=False)
    os.replace(temporary, path)
