"""Measurements kept in results/<model>/, and read back while nothing they depend on has changed."""

import dis
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FunctionType

import numpy as np
import pandas as pd
from PIL import Image

from lvlm_utils import ROOT
from lvlm_utils.models import LVLM

PACKAGE = Path(__file__).parent
AFTERWARDS = ("figures.py", "stats.py")  # modules that only use what was measured

Measured = pd.DataFrame | dict[str, np.ndarray]


def kept(
    lvlm: LVLM, name: str, measure: Callable[..., Measured | Iterable[pd.DataFrame]], *asked: object,
    folder: str | Path | None = None,
) -> Measured:  # fmt: skip
    """What `measure(*asked)` gives: a table (several are put below each other) or a dict of arrays.

    Kept as `<name>-<state>.parquet` or `.npz` in `folder`, by default results/<model>/, and read from there as long as
    nothing changes that it depends on: the model's name, revision, dtype and attention implementation; the content of
    `asked` (numbers, text, lists, dicts, arrays, pictures and tables, in whose column `image` a path stands for its
    file); the source of `measure`, of the functions beside it that it uses, and the values these read; the code of this
    package. Random generators and other objects count by their type only: make them inside `measure`.

    A kill leaves the old file or the new one, never a part of one. An older state of the same name is removed. Raises
    TypeError for something in `asked` whose content cannot be compared.
    """
    folder = ROOT / "results" / lvlm.name if folder is None else Path(folder)
    state = _state(lvlm, measure, asked)
    table, arrays = (folder / f"{name}-{state}{suffix}" for suffix in (".parquet", ".npz"))
    if not table.is_file() and not arrays.is_file():
        _write(measure(*asked), table, arrays)
        for old in folder.glob(f"{name}-{'?' * len(state)}.*"):
            if old.suffix in (".parquet", ".npz") and old not in (table, arrays):
                old.unlink()
    if table.is_file():
        return pd.read_parquet(table)
    with np.load(arrays) as found:
        return dict(found)


def _write(found: Measured | Iterable[pd.DataFrame], table: Path, arrays: Path) -> None:
    if not isinstance(found, dict | pd.DataFrame):
        found = pd.concat(found, ignore_index=True)
    table.parent.mkdir(parents=True, exist_ok=True)
    part = table.with_name(f"{table.stem}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            if isinstance(found, dict):
                np.savez(file, **found)
            else:
                found.to_parquet(file)
        os.replace(part, arrays if isinstance(found, dict) else table)
    finally:
        part.unlink(missing_ok=True)


def _state(lvlm: LVLM, measure: Callable, asked: tuple) -> str:
    return _digest([_code(), _content(lvlm), _content(measure), _content(asked)])


def _content(value: object, seen: frozenset = frozenset()) -> object:
    """What makes a value itself, as JSON. `seen` are the functions that led here: one may call itself."""
    go = functools.partial(_content, seen=seen)
    match value:
        case None | bool() | int() | float() | str():
            return value
        case np.generic():
            return value.item()
        case list() | tuple() | range():
            return [go(one) for one in value]
        case dict():
            return [[go(key), go(one)] for key, one in value.items()]
        case Path():
            return _digest(value.read_bytes()) if value.is_file() else str(value)
        case np.ndarray():
            return [value.dtype.str, value.shape, _digest(np.ascontiguousarray(value).tobytes())]
        case Image.Image():
            return [value.mode, value.size, _digest(value.tobytes())]
        case pd.DataFrame():
            files = {"image": [Path(one) if isinstance(one, str) else one for one in value.get("image", ())]}
            return [[name, go(files.get(name, list(column)))] for name, column in value.items()]
        case LVLM():
            return [value.name, value.revision, str(value.dtype), value.attention]
        case functools.partial():
            return go([value.func, value.args, value.keywords])
        case FunctionType():
            return None if value in seen else _function(value, seen | {value})
    raise TypeError(f"{type(value).__name__} has no content to compare: give numbers, text, tables or pictures.")


def _function(function: FunctionType, seen: frozenset) -> list:
    """Source, defaults, and what is read from around it, in turn with the source of functions beside it."""
    around = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))
    around |= {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}
    parts = {"": function.__defaults__} | {
        name: value for name, value in sorted(around.items())
        if not isinstance(value, FunctionType) or value.__module__ == function.__module__
    }  # fmt: skip
    return [inspect.getsource(function), *([name, _or_type(value, seen)] for name, value in parts.items())]


def _or_type(value: object, seen: frozenset) -> object:
    """Modules, generators and the like, which a function may read, count by their type."""
    try:
        return _content(value, seen)
    except TypeError:
        return type(value).__qualname__


def _names(code: CodeType) -> set[str]:
    """Global names that a function reads, those of functions and comprehensions inside it too."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


@functools.cache
def _code() -> str:
    """Changes with every file of the package through which a measurement may pass."""
    files = sorted(file for file in PACKAGE.rglob("*.py") if file.name not in AFTERWARDS)
    return _digest([[file.relative_to(PACKAGE).as_posix(), _digest(file.read_bytes())] for file in files])


def _digest(content: object) -> str:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return hashlib.sha256(data).hexdigest()[:16]
