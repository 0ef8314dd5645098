"""Run the notebooks in reading order and keep their outputs clean enough for git.

    python notebooks/run.py                           the embedded model; executed in place
    python notebooks/run.py --model owner/checkpoint  copies in results/<model>/notebooks; committed ones untouched
    python notebooks/run.py --only 02 --samples 60    one notebook, fewer questions; also a copy
    python notebooks/run.py --force                   also those that are up to date

A plain run leaves out what is up to date (uptodate.py): no code, data or package that it reads has changed since.
With the embedded model several run at once, with one thread each: its small matrices gain little from a second thread
(1.2 to 1.35 times), and so the numbers do not hang on how many cores there are. Without a GPU their kernels are forks
of one process that has imported what all of them import (kernels.py). What a cell computes is left to the notebooks;
how figures are drawn and saved to lvlm_utils.figures.
"""

from __future__ import annotations

import argparse
import ast
import base64
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import nbformat
from PIL import Image
from tqdm.auto import tqdm

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER))
from kernels import AVAILABLE, ForkedKernelManager  # noqa: E402
from uptodate import Notes  # noqa: E402

ROOT = FOLDER.parent
EMBEDDED = "tiny-llava"
# reads what the others ask and keep
AFTER = {"03": {"01", "02"}, "04": {"02"}, "05": {"02"}, "08": {"02"}, "09": {"02"}}
JOBS = 4  # at most so many at once; each may need 2 GB
LIMIT = 300_000  # bytes of an executed notebook; git keeps every version
# Keeping freed memory makes the small embedded model several times faster on a CPU. Not for models that fill memory.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "30000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "2",
}
PLAIN_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
    },
}


class NotebookError(RuntimeError):
    """A notebook failed or its result must not be kept; the message says which cell and why."""


def main(arguments: list[str] | None = None) -> int:
    """Run the notebooks asked for. Returns the exit status: 0, or 1 with the reason on stderr."""
    options = _options().parse_args(arguments)
    try:
        run(options.model, options.samples, options.only, options.out, options.jobs, options.force)
    except NotebookError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


def run(
    model: str | None = None,
    samples: int | None = None,
    only: str = "",
    out: Path | None = None,
    jobs: int | None = None,
    force: bool = False,
    **parameters: object,
) -> list[Path]:
    """Execute notebooks whose name starts with `only`; write them when all have succeeded; return the paths written.

    `jobs` run at once: by default one for each core with the embedded model, else one. In place only for a plain run of
    the embedded model, which leaves out what is up to date unless it is named by `only` or `force` says so.
    `parameters` reach the notebooks that know them.
    Raises NotebookError when a cell fails or a result is too large.
    """
    sources = sorted(FOLDER.glob(f"{only}*.ipynb"))
    if not sources:
        raise NotebookError(f"no notebook in {FOLDER.name}/ starts with {only!r}")
    given = {"MODEL": model if model != EMBEDDED else None, "SAMPLES": samples, **parameters}
    given = {name: value for name, value in given.items() if value is not None}
    if given and name_of(model) == EMBEDDED:  # its committed figures are those of the plain run
        given.setdefault("FIGURES", str(ROOT / "results" / EMBEDDED))
    target = out or (ROOT / "results" / name_of(model) / "notebooks" if given else FOLDER)
    embedded = "MODEL" not in given
    notes = None if given or out else Notes(FOLDER, EMBEDDED, AFTER)
    if notes and not only and not force:
        ready = notes.fresh(sources)
        print(f"{len(ready)} of {len(sources)} notebooks are up to date (--force runs them too).", file=sys.stderr)
        sources = [source for source in sources if source not in ready]
        if not sources:
            return []
    jobs = min(len(sources), jobs or (min(JOBS, os.cpu_count() or 1) if embedded else 1))
    with tempfile.TemporaryDirectory() as scratch:
        _prepare_environment(Path(scratch), embedded)
        forked = embedded and AVAILABLE and len(sources) > 1
        options = {"parameters": given, "scratch": Path(scratch), "alone": jobs == 1, "forked": forked}
        texts = _run_all(sources, partial(execute, **options), jobs)
    finished = {target / source.name: texts[source] for source in sources}
    for path, text in finished.items():
        write(path, text)
    if notes:
        notes.keep(sources, write)
    return list(finished)


def _run_all(sources: list[Path], execute: Callable[[Path], str], jobs: int) -> dict[Path, str]:
    """The texts of all notebooks, `jobs` at once; first those that others wait for. The first failure ends it."""
    ahead = {one: {two for two in sources if two.name[:2] in AFTER.get(one.name[:2], ())} for one in sources}
    waiting = sorted(sources, key=lambda source: (source not in set().union(*ahead.values()), source))
    texts: dict[Path, str] = {}
    running: dict[Future, Path] = {}
    began = {}
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(sources), unit="notebook", disable=len(sources) < 2) as bar:
        while waiting or running:
            ready = [source for source in waiting if ahead[source] <= set(texts)]
            for source in ready[: jobs - len(running)]:
                waiting.remove(source)
                running[pool.submit(execute, source)] = source
                began[source] = time.monotonic()
            bar.set_postfix_str(", ".join(sorted(source.name[:2] for source in running.values())))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                source = running.pop(future)
                texts[source] = future.result()
                bar.write(f"{source.stem}: {time.monotonic() - began[source]:.0f} s", file=sys.stderr)
                bar.update()
    return texts


def execute(
    source: Path, parameters: dict[str, object], scratch: Path, alone: bool = True, forked: bool = False
) -> str:
    """Run one notebook in a fresh kernel of this Python and return the cleaned result as text.

    Only one that runs `alone` shows the progress of its cells and what they write to stderr. `forked`: its kernel is a
    fork that has the heavy packages imported.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    notebook = nbformat.read(source, as_version=4)
    known = parameter_names(notebook)
    chosen = {name: value for name, value in parameters.items() if name in known}
    try:
        done = papermill.execute_notebook(
            notebook,
            str(scratch / source.name),
            parameters=chosen,
            kernel_name="python3",
            cwd=str(FOLDER),
            progress_bar={"desc": source.stem} if alone else False,
            stderr_file=sys.stderr if alone else None,  # progress bars of long cells; not in the file that is kept
            start_timeout=180,
            request_save_on_cell_execute=False,
            autosave_cell_every=0,
            **({"kernel_manager_class": ForkedKernelManager} if forked else {}),
        )
    except papermill.PapermillExecutionError as error:
        reason = f"cell {error.exec_count} failed, nothing was overwritten.\n{error}"
        raise NotebookError(f"{source.name}: {reason}") from error
    except DeadKernelError as error:
        reason = "the kernel died, most often of too little memory; nothing was overwritten."
        raise NotebookError(f"{source.name}: {reason}") from error
    text = nbformat.writes(clean(done), version=4) + "\n"
    size = len(text.encode())
    if size > LIMIT:
        raise NotebookError(
            f"{source.name}: {size / 1000:.0f} kB after running, more than {LIMIT // 1000} kB; "
            "nothing was overwritten. Show fewer or smaller figures."
        )
    return text


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop what changes from run to run: timings, versions, progress bars, widgets; join split prints."""
    notebook.metadata = nbformat.from_dict(PLAIN_METADATA)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = _join_prints([kept for kept in map(_clean_output, cell.outputs) if kept])
    number = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            number += 1
            cell.execution_count = number
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = number
    return notebook


def shrink(png: str) -> str:
    """The same picture in 128 colours: a fraction of the bytes, hardly a difference. Done once, then left alone."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        if picture.mode == "P":
            return png
        plain = Image.new("RGB", picture.size, "white")
        plain.paste(picture, mask=picture.getchannel("A") if picture.mode == "RGBA" else None)
    small = io.BytesIO()
    plain.quantize(128, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def parameter_names(notebook: nbformat.NotebookNode) -> set[str]:
    """Names assigned in the cell tagged `parameters`."""
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    trees = [ast.parse(cell.source) for cell in cells]
    nodes = [node for tree in trees for node in tree.body if isinstance(node, ast.Assign)]
    return {target.id for node in nodes for target in node.targets if isinstance(target, ast.Name)}


def name_of(model: str | None) -> str:
    """The folder name of a model: the last part of its path or hub id."""
    return Path(model or EMBEDDED).name


def write(path: Path, text: str) -> None:
    """Replace a file at once, and only when its text changed."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = path.with_name(path.name + ".part")
    waiting.write_text(text, encoding="utf-8")
    os.replace(waiting, path)


def _clean_output(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    if output.output_type in ("display_data", "execute_result"):
        output.metadata = nbformat.from_dict({})
        output.data = {kind: value for kind, value in output.data.items() if "widget" not in kind}
        if "image/png" in output.data:
            output.data = {"image/png": shrink(output.data["image/png"])}
        return output if output.data else None
    return output


def _join_prints(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The kernel cuts one print into pieces when it is busy: one stream output for neighbours."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == "stream" == joined[-1].output_type:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _prepare_environment(scratch: Path, embedded: bool) -> None:
    """Kernels inherit this: the running Python as `python3`, nothing read from or written to the home folder."""
    kernel = scratch / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "--log-level=ERROR", "-f"]
    specification = {"argv": [*command, "{connection_file}"], "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(specification))
    os.environ["JUPYTER_PATH"] = str(scratch / "jupyter")
    os.environ["JUPYTER_RUNTIME_DIR"] = str(scratch / "runtime")
    os.environ["IPYTHONDIR"] = str(scratch / "ipython")
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.pop("MPLBACKEND", None)  # the kernel draws inline
    if embedded:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        for name, value in {**MALLOC, "OMP_NUM_THREADS": "1"}.items():
            os.environ.setdefault(name, value)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", __doc__)[0])
    parser.add_argument("--model", help=f"{EMBEDDED} (default), a local folder, or a hub id")
    parser.add_argument("--samples", type=int, help="questions per context length (default: as in each notebook)")
    parser.add_argument("--only", default="", help="run only notebooks whose file name starts with this, e.g. 02")
    parser.add_argument("--jobs", type=int, help="notebooks at once (default: one a core with the embedded model)")
    parser.add_argument("--force", action="store_true", help="run also what is up to date")
    parser.add_argument("--out", type=Path, help="folder for the executed notebooks instead of the usual one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
