"""Records of large JSON lists, read in pieces, and their fields: a malformed one gives one clear error."""
import json
import re
from collections.abc import Iterator
from pathlib import Path

CHUNK = 1 << 20  # characters read at a time
LONGEST_RECORD = 1 << 24  # real records are some kB; more than this means broken JSON


def records(path: Path) -> Iterator[tuple[int, dict]]:
    """(index, record) of a JSON list, read in pieces: a file of 500 MB never stands in memory.

    Raises FileNotFoundError, and ValueError for what is not a JSON list of objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    with path.open(encoding="utf-8-sig") as file:
        text, at, index, expect = file.read(CHUNK), 0, 0, "["

        def broken(why: str) -> ValueError:
            return ValueError(f"{path}: record {index}: not valid JSON, {why}; is the download complete?")

        while True:
            at = space.match(text, at).end()
            if at == len(text):
                more = file.read(CHUNK)
                if not more:
                    raise broken("the file ends inside the list")
                text, at = more, 0
                continue
            if expect == "item or ]" and text[at] == "]" or expect == ", or ]" and text[at] == "]":
                return
            if expect == "[" or expect == ", or ]":
                if text[at] != expect[0]:
                    raise broken(f"expected {expect}")
                at, expect = at + 1, "item or ]" if expect == "[" else "item"
                continue
            try:
                item, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:  # most often the record goes on in the next piece
                more = file.read(CHUNK) if len(text) - at < LONGEST_RECORD else ""
                if not more:
                    raise broken(error.msg) from None
                text, at = text[at:] + more, 0
                continue
            if not isinstance(item, dict):
                raise ValueError(f"{path}: record {index}: expected an object, found {type(item).__name__}")
            yield index, item
            index, expect = index + 1, ", or ]"


def get(record: dict, name: str, kind: type | tuple, where: str):
    """record[name] of the right type, or the one clear error."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with field '{name}', found {type(record).__name__}")
    value = record.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        found = "nothing" if name not in record else repr(value)[:60]
        raise ValueError(f"{where}: field '{name}' must be {wanted}, found {found}")
    return value
