"""Where smol-llava is kept: the place, the lock, and whether what lies there is whole. Needs nothing but filelock.

A checkpoint of 157 M parameters is no matter for git: it is put together once, by build.py, and read from here.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).resolve().parent
PLACE, GIVEN = "LVLM_UTILS_CACHE", "SMOL_LLAVA_PARTS"  # environment variables: where to keep it, where wheels may lie
PROJECTOR, ADAPTERS = "projector.safetensors", "adapter_model.safetensors"  # what training writes, with peft's config
CODE = ("build.py", "parts.py", "wheels.py", "chat_template.jinja")  # what a checkpoint is made by
MADE = "made.json"  # file of the checkpoint -> bytes, time of writing, sha256


class Unavailable(OSError):
    """smol-llava cannot be had here; one line says why, and what would help."""


def place() -> Path:
    """$LVLM_UTILS_CACHE, else lvlm_utils in the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(PLACE) or user / "lvlm_utils").expanduser() / "smol-llava"


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def writing(megabytes: int) -> Iterator[Path]:
    """The place, made and locked: one process writes, the others wait.

    Unavailable where it cannot be written or has not so much space left.
    """
    folder = place()
    help_ = f"Set {PLACE} to a folder with {megabytes} MB of space."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock", is_singleton=True)  # whoever holds it may take it again
        lock.acquire()
    except OSError as error:
        raise Unavailable(f"smol-llava cannot be kept in {folder} ({error.strerror or error}). {help_}") from error
    try:
        free = shutil.disk_usage(folder).free // 10**6
        if free < megabytes:
            raise Unavailable(f"smol-llava cannot be kept in {folder} ({free} MB are free). {help_}")
        yield folder
    finally:
        lock.release()


def target(name: str) -> Path:
    """The folder of a checkpoint. It depends on the trained weights, and on the code and parts that go with them."""
    weights = HERE.parent / name
    trained = [weights / file for file in (PROJECTOR, ADAPTERS, "adapter_config.json")]
    if missing := [file.name for file in trained if not file.is_file()]:
        raise FileNotFoundError(f"The embedded model {name!r} is not built: data/{name} has no {missing[0]}.")
    key = hashlib.sha256("".join(map(sha256, [*(HERE / file for file in CODE), *trained])).encode())
    return place() / "checkpoints" / key.hexdigest()[:12] / name


def note(folder: Path) -> None:
    """Write down what a finished checkpoint consists of."""
    files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns, sha256(file)] for file in folder.iterdir()}
    (folder / MADE).write_text(json.dumps(files, indent=1), encoding="utf-8")


def whole(folder: Path) -> bool:
    """Whether every file is as it was written; one that seems untouched by size and time is not read again."""
    if not (folder / MADE).is_file():
        return False
    for name, (size, time, digest) in json.loads((folder / MADE).read_text(encoding="utf-8")).items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return False
        if file.stat().st_mtime_ns != time and sha256(file) != digest:
            return False
    return True


def checkpoint(name: str) -> Path:
    """The folder of "smol-llava" or "smol-llava-long", put together first where it is not there.

    That is done by a process of its own: it needs packages and memory that the model then does without. Raises
    FileNotFoundError where the model is not trained, Unavailable for whatever else is in the way.
    """
    folder = target(name)
    if not whole(folder):
        command = [sys.executable, str(HERE / "build.py"), name]
        quiet = {**os.environ, "TQDM_DISABLE": "1"}  # its steps are told in lines
        output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, env=quiet, text=True, **output) as process:
            line = ""
            for line in process.stderr:
                print(line, end="", file=sys.stderr, flush=True)
        if process.returncode:
            raise Unavailable(line.strip() or f"smol-llava: build.py ended with status {process.returncode}.")
    return folder
