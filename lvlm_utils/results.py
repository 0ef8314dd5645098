"""What was asked or measured once, and is read back as long as nothing that it depends on has changed.

`fingerprint` decides what is unchanged: for answers, for measurements, for sample tables. `Store` keeps rows,
`measured` keeps tables and arrays, `atomic` writes every file.
"""

import dis
import functools
import hashlib
import json
import linecache
import os
import shutil
import sys
import sysconfig
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from PIL import Image
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerBase

from lvlm_utils import ROOT
from lvlm_utils.models import LVLM

MEASURED = ("mean_tokens", "mean_visual", "mean_text", "final_visual", "final_text", "final_context")
COLUMNS = [  # of answers; evaluate.answer says what they mean
    "sample", "image_id", "group", "length", "n_context_tokens", "n_visual_tokens", "n_prefill_tokens",
    "n_computed_tokens", "condition", "question", "method", "keep", "options", "label", "target", "kind", "size",
    "answer", "raw", "parsed", "correct", "margin", "error", "model", "path", "revision", "dtype", "attention",
    "versions", "seconds", *MEASURED, "identity", "key",
]  # fmt: skip
LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
PLACES = ("name_or_path", "_name_or_path")  # where a model was read from does not count
ORIENTATION = 0x0112  # the EXIF tag
DIRECT = 2**20  # bytes of a tensor that are read one by one; of a larger one there are sums
WRAPPERS = functools.partial | functools.cached_property | type(functools.cache(len)) | MethodType | property
WRAPPED = ("__func__", "__self__", "__wrapped__", "func", "args", "keywords", "fget", "fset")

Measured = pd.DataFrame | dict[str, np.ndarray]


class Unreadable(ValueError):
    """The content of something cannot be read, so that nothing which depends on it can be known to be unchanged."""


# What is unchanged ---------------------------------------------------------------------------------------------------
def fingerprint(*values: object) -> str:
    """16 characters that change with the content of `values` and with all code that runs when they are used.

    values: numbers, text, lists, dicts, arrays, tensors, pictures; files (Path) and folders by their bytes, but by name
        where code names the repository (lv.ROOT), what holds it, or its folders of results and figures; tables, in
        whose column `image` text is the path of a file; models by all their weights, settings and hooks, their
        processors, and the versions of the libraries; functions and classes by their bytecode and, in turn, everything
        that they name, unless it belongs to an installed library, which counts by its name. Other objects that code
        names count by their type.

    Raises Unreadable for offloaded weights, code without source, and values of other types.
    """
    read = _Reader()
    content = [read(value) for value in values]
    content += [read.code(one) for one in read.code_met]  # grows: code names other code
    return digest(content)


def storable(value: object) -> str:
    """The text of a value as Unicode, which not every file name and not every text of the web is."""
    return str(value).encode(errors="backslashreplace").decode()


def digest(content: object) -> str:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return hashlib.sha256(data).hexdigest()[:16]


class _Reader:
    """Values -> JSON. Code is only met here, and read afterwards, once each: functions may name each other."""

    def __init__(self):
        self.in_model = False
        self.code_met: list[FunctionType | type] = []
        self.numbers: dict[int, int] = {}

    def __call__(self, value: object, strict: bool = True) -> object:
        go, name = functools.partial(self, strict=strict), f"{type(value).__module__}.{type(value).__qualname__}"
        match value:
            case Enum() | torch.dtype() | torch.device():
                return str(value)
            case None | bool() | int() | float() | str():
                return value
            case bytes():
                return digest(value)
            case np.generic():
                return go(value.item())
            case list() | tuple() | range() | pd.Series() | pd.Index():
                return [go(one) for one in value]
            case set() | frozenset():
                return sorted(json.dumps(go(one)) for one in value)
            case dict():
                return [[go(key), go(one)] for key, one in value.items()]
            case Path() if not strict and _is_written_to(value):
                return os.path.relpath(value, ROOT)
            case Path():
                inside = sorted(one for one in value.rglob("*") if one.is_file()) if value.is_dir() else ()
                whole = digest(value.read_bytes()) if value.is_file() else str(value)
                return [[str(file.relative_to(value)), digest(file.read_bytes())] for file in inside] or whole
            case np.ndarray():
                whole = value.tolist() if value.dtype.hasobject else digest(np.ascontiguousarray(value).tobytes())
                return [value.dtype.str, value.shape, go(whole)]
            case torch.Tensor() | torch.nn.Module() if self.in_model:
                return name
            case torch.Tensor():
                return _tensor(value)
            case Image.Image():
                shown = value.getpalette(), str(value.info.get("transparency")), value.getexif().get(ORIENTATION)
                return [value.mode, value.size, digest(value.tobytes()), *shown]
            case pd.DataFrame():
                files = {"image": [Path(one) if isinstance(one, str) else one for one in value.get("image", ())]}
                return [[key, go(files.get(key, list(column)))] for key, column in value.items()]
            case LVLM():
                return self._lvlm(value)
            case torch.nn.Module():
                return self._model(value)
            case PreTrainedTokenizerBase():
                return _tokenizer(value)
            case FunctionType():
                return self._met(value)
            case type():
                return self._met(value) if _ours(value.__module__) else f"{value.__module__}.{value.__qualname__}"
            case ModuleType() | BuiltinFunctionType():
                return value.__name__
            case _ if isinstance(value, WRAPPERS | staticmethod | classmethod):
                return go([getattr(value, part, None) for part in WRAPPED])
            case _ if is_dataclass(value):
                return go([type(value), *(getattr(value, field.name, None) for field in fields(value))])
            case _ if hasattr(value, "to_dict") and not self.in_model:  # processors and their parts
                own = sorted((key, one) for key, one in vars(value).items() if key[0] != "_")
                return [go(type(value)), [[key, self(one, strict=False)] for key, one in own]]
            case _ if strict and value is not pd.NA:
                raise Unreadable(f"{type(value).__qualname__} has no content to compare")
        return name

    def _lvlm(self, lvlm: LVLM) -> list:
        model, device = lvlm.model, lvlm.device.type
        configs = [json.loads(config.to_json_string(use_diff=False), object_hook=_placeless)
                   for config in (model.config, model.generation_config)]  # fmt: skip
        registered = [kind().get(lvlm.attention) for kind in (AttentionInterface, AttentionMaskInterface)]
        registered = [getattr(one, "function", one) for one in registered]  # `observe` shows what runs
        return [
            self(LVLM), self(model), self(lvlm.processor), configs, lvlm.window, str(lvlm.dtype), lvlm.attention,
            torch.get_float32_matmul_precision(), self(registered, strict=False),
            torch.is_autocast_enabled(device) and str(torch.get_autocast_dtype(device)),
            *map(version, ("torch", "transformers", "tokenizers", "pillow")),
        ]  # fmt: skip

    def _model(self, model: torch.nn.Module) -> list:
        """Weights, and what else of a module decides what it does: settings, adapters, hooks and code of the user's."""
        tensors = [*model.named_parameters(), *model.named_buffers()]
        content, classes = [[name, _tensor(tensor)] for name, tensor in tensors], {}
        self.in_model = True
        for name, module in model.named_modules():
            own = {key: one for key, one in _placeless(vars(module)).items() if key[0] != "_" or "adapter" in key}
            hooks = {**module._forward_hooks, **module._forward_pre_hooks}
            if odd := [one for one in hooks.values() if _holds_more(one)]:
                kind = type(odd[0]).__qualname__
                raise Unreadable(f"A hook of {name or 'the model'} is more than a function ({kind})")
            own |= hooks
            content += [[name, key if isinstance(key, str) else "", self(one, strict=False)] for key, one in own.items()
                        if one is not None and not isinstance(one, torch.Tensor) and _counts(one)]  # fmt: skip
            classes[type(module)] = None
        self.in_model = False
        return content + [self(one if _ours(one.__module__) else one.forward) for one in classes]

    def _met(self, code: FunctionType | type) -> list:
        if id(code) not in self.numbers:
            self.numbers[id(code)] = len(self.numbers)
            self.code_met.append(code)
        return ["code", self.numbers[id(code)]]

    def code(self, code: FunctionType | type) -> list:
        """A function: its bytecode, its defaults and all that it names. A class: what its body holds."""
        loosely = functools.partial(self, strict=False)
        if isinstance(code, type):
            own = [(name, one) for name, one in sorted(vars(code).items()) if name[:2] != "__" or _written(one)]
            return [code.__qualname__, loosely(code.__bases__), [[name, loosely(one)] for name, one in own]]
        cells = zip(code.__code__.co_freevars, code.__closure__ or ())
        named = {name: cell.cell_contents for name, cell in cells if cell != CellType()}
        made = code.__qualname__.startswith("__create_fn__")  # by a dataclass, from its fields
        if made or not _ours(code.__globals__.get("__name__", "")):
            return [code.__module__, code.__qualname__, loosely(named)]
        if not _written(code):
            raise Unreadable(f"{code.__qualname__} has no source to read")
        parts = _nested(code.__code__)
        names = sorted({name for part in parts for name in part.co_names if not name.endswith("__")})
        spaces = [SimpleNamespace(**code.__globals__), *(one for one in named.values() if isinstance(one, ModuleType))]
        for step in (step for part in parts for step in dis.get_instructions(part)):
            if step.opname == "IMPORT_NAME":
                with suppress(ImportError, ValueError):  # one that is not there does not run
                    spaces.append(import_module(step.argval))
        for space in spaces:  # grows: a module that is named has names too
            for name in names if _ours(space.__name__) else ():
                place, value = f"{space.__name__}.{name}", getattr(space, name, None)
                if value is not None and place not in named:
                    named[place] = value
                    spaces += [value] if isinstance(value, ModuleType) else []
        return [_bytecode(code.__code__), loosely([code.__defaults__, code.__kwdefaults__]),
                [[name, loosely(value)] for name, value in sorted(named.items())]]  # fmt: skip


def _tensor(tensor: torch.Tensor) -> list:
    """All bytes; for a large tensor sums over rows and columns of 1,024 integers: a changed bit changes both."""
    if tensor.is_meta:
        raise Unreadable("Some weights are offloaded and cannot be read")
    try:
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        flat = flat.clone() if flat.storage_offset() % 8 else flat
        words = flat[: len(flat) // 8 * 8 * (len(flat) > DIRECT)].view(torch.int64)
        rows = words[: len(words) // 1024 * 1024].view(-1, 1024)
        parts = [rows.sum(0), rows.sum(1), words[rows.numel() :], flat[8 * len(words) :]]
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise Unreadable(f"A tensor of type {type(tensor).__qualname__} cannot be read") from error
    return [str(tensor.dtype), list(tensor.shape), digest(b"".join(part.cpu().numpy().tobytes() for part in parts))]


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> list:
    """Vocabulary and rules, without the padding and truncation that the latest call left."""
    if not tokenizer.is_fast:
        raise Unreadable("The rules of a slow tokenizer cannot be read")
    rules = tokenizer.backend_tokenizer.to_str()
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return [digest(rules[rules.index('"added_tokens"') :].encode()), special, tokenizer.chat_template]


def _placeless(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name not in PLACES}


def _holds_more(hook: object) -> bool:
    """Whether a user's hook is an object, a method of one, or is given more than numbers and text."""
    if isinstance(hook, functools.partial):
        plain = all(isinstance(one, str | int | float) for one in (*hook.args, *hook.keywords.values()))
        return _holds_more(hook.func) or (_counts(hook) and not plain)
    return _users(type(getattr(hook, "__self__", hook)).__module__)  # that of a function is `builtins`


def _is_written_to(path: Path) -> bool:
    """Whether it is the repository or holds it, or is where results go: measuring itself changes what is in there."""
    path, outputs = path.absolute(), {ROOT / "results", ROOT / "figures"}
    return not path.is_file() and bool({path} & {ROOT, *ROOT.parents} or outputs & {path, *path.parents})


def _counts(part: object) -> bool:
    """Whether part of a module is a setting, or code of the user: code of this package only observes, and code of a
    library comes with the model."""
    while isinstance(part, functools.partial | MethodType):
        part = part.func if isinstance(part, functools.partial) else part.__func__
    where = getattr(part, "__globals__", {}).get("__name__", "lvlm_utils")
    return not callable(part) or _users(where)


def _ours(module: str) -> bool:
    """Whether a module is of this package or of the user's, not of an installed library."""
    return module.partition(".")[0] == "lvlm_utils" or _users(module)


def _users(module: str) -> bool:
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    installed = {"site-packages", "dist-packages"} & set(Path(file).parts) or file.startswith(LIBRARIES)
    return not (installed or module in sys.builtin_module_names or module.partition(".")[0] == "lvlm_utils")


def _written(code: object) -> bool:
    """Whether it is a function with source; what dataclasses make has none."""
    return isinstance(code, FunctionType) and bool(linecache.getlines(code.__code__.co_filename))


def _nested(code: CodeType) -> list[CodeType]:
    """The code of a function, and of the functions and comprehensions inside it."""
    return [code, *(each for inner in code.co_consts if isinstance(inner, CodeType) for each in _nested(inner))]


def _bytecode(code: object) -> object:
    """Of a function, or a constant in it."""
    if not isinstance(code, CodeType):
        return sorted(map(repr, code)) if isinstance(code, frozenset) else repr(code)
    return [code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, [*map(_bytecode, code.co_consts)]]


# Files ---------------------------------------------------------------------------------------------------------------
@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to. It becomes `path` when the block ends well: a kill leaves the old file, or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def path_of(lvlm: LVLM) -> str:
    """Where a model comes from: its folder or hub id, or "in-memory". Two models may have one name."""
    return lvlm.model.config.name_or_path or "in-memory"


def revision_of(lvlm: LVLM) -> str:
    """Which weights a model has: 12 characters that change with them, or "" where they cannot be read."""
    try:
        return fingerprint(lvlm.model)[:12]
    except Unreadable:
        return ""


def measured(
    lvlm: LVLM, name: str, measure: Callable[..., Measured | Iterable[pd.DataFrame]], *asked: object,
    folder: str | Path | None = None,
) -> Measured:  # fmt: skip
    """What `measure(*asked)` gives, kept in a file: measured anew when model, code or arguments have changed.

    lvlm: the model that is measured; other models that `measure` uses are noticed too (see `fingerprint`).
    name: of the file, `<name>-<whose>-<state>.parquet` or `.npz`. `whose` is a hash of the model's path and revision
        and of `asked`, `state` a hash of all that the result depends on; files of the same `whose` and an older `state`
        are deleted.
    measure: gives a table, several of them (which are put below each other), or a dict of arrays. Objects that
        `fingerprint` cannot read, such as random generators, are noticed by their type alone: create them inside.
    folder: by default results/<model>/.

    What cannot be read is measured every time, with a warning.
    """
    folder = ROOT / "results" / lvlm.name if folder is None else Path(folder)
    try:
        whose, state = fingerprint(path_of(lvlm), revision_of(lvlm), asked)[:8], fingerprint(lvlm, measure)
    except Unreadable as reason:
        warnings.warn(f"{reason}: {name} is not reused.", stacklevel=2)
        whose, state = digest([path_of(lvlm), revision_of(lvlm)])[:8], "unreadable"
    table, arrays = (folder / f"{name}-{whose}-{state}{suffix}" for suffix in (".parquet", ".npz"))
    if state == "unreadable" or not (table.is_file() or arrays.is_file()):
        found = measure(*asked)
        found = found if isinstance(found, dict | pd.DataFrame) else pd.concat(found, ignore_index=True)
        written = arrays if isinstance(found, dict) else table
        with atomic(written) as part, part.open("wb") as file:
            np.savez(file, **found) if isinstance(found, dict) else found.to_parquet(file)
        for old in {*folder.glob(f"{name}-{whose}-*.parquet"), *folder.glob(f"{name}-{whose}-*.npz")} - {written}:
            old.unlink(missing_ok=True)
    if table.is_file():
        return pd.read_parquet(table)
    with np.load(arrays) as found:
        return dict(found)


class Store:
    """Rows of answers in a parquet file, which several runs may use at the same time, and kills do not harm.

    `rows` are those that were there. New ones go to parts of their own name beside the file; `finish` merges all parts
    that there are, of whatever run, and one run at a time does so. `path=None` keeps nothing.
    """

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else Path(path)
        self.rows = pd.DataFrame(columns=COLUMNS)
        if self.path is not None:
            if self.path.is_dir():
                raise ValueError(f"{self.path} is a folder: out= is a file.")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.parts = self.path.with_name(f"{self.path.name}.parts")
            self.alone = FileLock(self.path.with_name(f".{self.path.name}.lock"))
            with self.alone:
                self.rows = self._read()

    def add(self, rows: pd.DataFrame) -> None:
        """Save `rows` at once."""
        if self.path is not None:
            with self.alone:
                _write(rows, self.parts / f"{uuid.uuid4().hex}.parquet")

    def stale(self, wanted: pd.DataFrame) -> pd.Series:
        """Which rows have the identity of a wanted one, but not its key: something changed since."""
        return self.rows["identity"].isin(wanted["identity"]) & ~self.rows["key"].isin(wanted["key"])

    def finish(self, wanted: pd.DataFrame) -> None:
        """Put everything in one file, without the rows that are stale now."""
        if self.path is None:
            return
        with self.alone:
            self.rows = self._read()
            if (stale := self.stale(wanted)).any() or self.parts.is_dir():
                _write(self.rows[~stale], self.path)
                shutil.rmtree(self.parts, ignore_errors=True)
                for dead in self.path.parent.glob(f".{self.path.name}.*.tmp"):  # of runs that were killed
                    dead.unlink()

    def _read(self) -> pd.DataFrame:
        parts = sorted(self.parts.glob("*.parquet"), key=lambda part: part.stat().st_mtime_ns)
        files = [_rows_of(file) for file in [self.path] * self.path.is_file() + parts]
        rows = pd.concat(files, ignore_index=True) if files else self.rows.iloc[:0]
        answered_last = rows["error"].isna().sort_values(kind="stable").index
        return rows.loc[answered_last].drop_duplicates("key", keep="last").sort_index()


def _rows_of(file: Path) -> pd.DataFrame:
    """ValueError for a file of anything else."""
    try:
        rows = pd.read_parquet(file)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{file} is not a readable parquet file: delete it, or give another out. {error}") from error
    if missing := set(COLUMNS) - set(rows.columns):
        what = "answers in an older layout" if "key" in rows else "no results of answer()"
        raise ValueError(f"{file} holds {what} (no column {min(missing)}): delete it, or give another out.")
    return rows


def _write(rows: pd.DataFrame, path: Path) -> None:
    """Cells of mixed types as text, which is all that a column of parquet can hold."""

    def text(cell: object) -> str | None:
        return None if pd.api.types.is_scalar(cell) and pd.isna(cell) else storable(cell)

    mixed = {name: [text(cell) for cell in rows[name]] for name in rows if rows[name].dtype == object}
    with atomic(path) as part:
        rows.assign(**mixed).to_parquet(part, index=False)
