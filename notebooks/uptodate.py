"""Which notebooks need no run: nothing that they read has changed since they were last executed here.

As `make` does, but by content, not by date. What was read and what was written is noted in results/<model>/, which git
does not keep: a fresh clone has no notes and runs everything.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path

# beside the notebook itself: code and data that any of them may read
READ = ("lvlm_utils/**/*.py", "notebooks/*.py", "data/**/*", "benchmarks/*.json", "tests/golden/README.md")


class Notes:
    """What each notebook of a folder read and wrote when it was last executed in place.

    `after` names, by number, the notebooks whose results another one reads. Make this before notebooks run: what they
    read is looked up here, so that a file changed meanwhile counts as changed.
    """

    def __init__(self, folder: Path, model: str, after: Mapping[str, set[str]]):
        self.root, self.model = folder.parent, model
        self.file = self.root / "results" / model / "notebooks.json"
        cells = {source.name[:2]: _cells(source) for source in sorted(folder.glob("*.ipynb"))}
        around = self._surroundings()
        self.read = {
            number: _digest([around, own, [cells.get(other) for other in sorted(after.get(number, ()))]])
            for number, own in cells.items()
        }

    def fresh(self, sources: Iterable[Path]) -> list[Path]:
        """Those of `sources` whose inputs and outputs are what they were behind their last run."""
        known = self._known()
        return [one for one in sources if known.get(one.stem) == self._state(one)]

    def keep(self, sources: Iterable[Path], write: Callable[[Path, str], None]) -> None:
        """Note the state of notebooks that have just been executed."""
        known = self._known() | {one.stem: self._state(one) for one in sources}
        write(self.file, json.dumps(known, indent=1, sort_keys=True) + "\n")

    def _known(self) -> dict[str, dict[str, str]]:
        return json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}

    def _state(self, source: Path) -> dict[str, str]:
        number = source.name[:2]
        written = [source, *sorted((self.root / "figures" / self.model).glob(f"{number}_*"))]
        return {"read": self.read[number], "written": _digest([[one.name, _bytes(one)] for one in written])}

    def _surroundings(self) -> str:
        """Code, data, Python and the packages installed."""
        files = sorted({file for pattern in READ for file in self.root.glob(pattern) if _counts(file)})
        packages = sorted(f"{one.name} {one.version}" for one in distributions())
        contents = [[file.relative_to(self.root).as_posix(), _bytes(file)] for file in files]
        return _digest([contents, packages, platform.python_version()])


def _cells(source: Path) -> list:
    """Source of the cells, without outputs."""
    cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
    return [[cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])] for cell in cells]


def _counts(file: Path) -> bool:
    return file.is_file() and "__pycache__" not in file.parts


def _bytes(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
