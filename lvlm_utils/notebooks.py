"""Run the notebooks in reading order and keep their outputs clean enough for git.

    python -m lvlm_utils.notebooks                           the embedded model; executed in place
    python -m lvlm_utils.notebooks --model owner/checkpoint  copies in results/<model>/notebooks; committed ones stay
    python -m lvlm_utils.notebooks --only 02 --samples 60    one notebook, fewer questions; also a copy
    python -m lvlm_utils.notebooks --force                   also those that are up to date

A plain run leaves out the notebooks that are up to date: their code, what they read and what they wrote is what it was
after their last run here. A notebook that fails is shown with its error and stays as it was, and the others go on. What
a cell computes is left to the notebooks; how figures are drawn and saved, to lvlm_utils.figures.
"""

import argparse
import asyncio
import base64
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

import nbclient
import nbformat
from jupyter_client import AsyncKernelManager, kernelspec
from nbformat import NotebookNode
from PIL import Image
from tqdm import tqdm

from lvlm_utils import ROOT

EMBEDDED = "tiny-llava"
# Notebooks, by number, that read what others leave in results/: they wait for them.
AFTER = {"03": {"01", "02"}, "04": {"02"}, "05": {"02"}, "08": {"02"}, "09": {"02"}}
# Besides the notebooks: code and data that any of them may read.
READ = ("lvlm_utils/**/*.py", "data/**/*", "benchmarks/*.json", "tests/golden/README.md")
LIMIT = 300_000  # bytes of an executed notebook; git keeps every version
JOBS = 4  # notebooks at once, however many cores there are: each may need 2 GB
# The embedded model's matrices are small: two notebooks with one thread each are faster than one with two, and with one
# thread the numbers do not depend on how many cores there are. Keeping freed memory makes it several times faster.
FOR_THE_EMBEDDED = {
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": "268435456", "MALLOC_TRIM_THRESHOLD_": "30000000000"}  # fmt: skip
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python",
                      "nbconvert_exporter": "python", "pygments_lexer": "ipython3"}}  # fmt: skip


class NotebookError(Exception):
    """A notebook failed or its result must not be kept; the message says which one and why."""


def main(arguments: list[str] | None = None) -> None:
    """Run the notebooks asked for. Exits with status 1 and the reasons on stderr when one failed."""
    parser = argparse.ArgumentParser(prog="python -m lvlm_utils.notebooks", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help=f"{EMBEDDED} (default), a local folder, or a hub id")
    parser.add_argument("--samples", type=int, help="questions per context length (default: as in each notebook)")
    parser.add_argument("--only", default="", help="run only notebooks whose file name starts with this, e.g. 02")
    parser.add_argument("--force", action="store_true", help="run also what is up to date")
    try:
        run(**vars(parser.parse_args(arguments)))
    except (NotebookError, KeyboardInterrupt) as error:
        sys.exit(str(error) or "Stopped. What had finished is kept.")


def run(model: str | None = None, samples: int | None = None, only: str = "", force: bool = False,
        root: Path = ROOT, **parameters: object) -> list[Path]:  # fmt: skip
    """Execute the notebooks of root/notebooks and write each when it has succeeded; returns the paths written.

    model: the embedded one (default), a folder or a hub id. With it, or with anything else that changes what a notebook
        computes, all are run and the executed notebooks go to root/results/<model>/notebooks.
    samples: questions per context length.
    only: how the file names begin. Runs also what is up to date, as `force` does.
    parameters: values for names assigned in the cell tagged `parameters`; a notebook without the name ignores it.

    Raises NotebookError, after the others have run, when a notebook failed; each failure is shown when it happens.
    """
    sources = sorted((root / "notebooks").glob(f"{only}*.ipynb"))
    if not sources:
        raise NotebookError(f"No notebook in notebooks/ starts with {only!r}.")
    if model and not (ROOT / "data" / model).is_dir() and Path(model).expanduser().is_dir():
        model = str(Path(model).expanduser().resolve())  # kernels run in another folder
    given = {"MODEL": model if model != EMBEDDED else None, "SAMPLES": samples, **parameters}
    given = {name: value for name, value in given.items() if value is not None}
    label = Path(model or EMBEDDED).name
    if given and label == EMBEDDED:  # its committed figures are those of the plain run
        given.setdefault("FIGURES", str(root / "results" / EMBEDDED))
    target = root / "results" / label / "notebooks" if given else root / "notebooks"
    notes = root / "results" / EMBEDDED / "notebooks.json"
    noted = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {}
    read = _read(root)  # before any runs: what changes meanwhile counts as changed
    if not (given or only or force):
        stale = [source for source in sources if noted.get(source.stem) != [read[source.stem], _written(source)]]
        _say(f"{len(sources) - len(stale)} of {len(sources)} notebooks are up to date (--force runs them too).")
        sources = stale

    def keep(source: Path, text: str) -> None:
        _write(target / source.name, text)
        if not given:
            noted[source.stem] = [read[source.stem], _written(source)]
            _write(notes, json.dumps(noted, indent=1, sort_keys=True) + "\n")

    if failed := asyncio.run(_run_all(sources, given, keep)):
        raise NotebookError(f"{len(failed)} of {len(sources)} notebooks failed: {', '.join(failed)}.")
    return [target / source.name for source in sources]


async def _run_all(sources: list[Path], given: dict, keep: Callable[[Path, str], None]) -> list[str]:
    """Names of those that failed. Several run at once, first those that others wait for; `keep` takes their texts."""
    jobs = 1 if "MODEL" in given else max(1, min(len(sources), JOBS, os.cpu_count() or 1))
    slots, awaited, tasks = asyncio.Semaphore(jobs), set().union(*AFTER.values()), {}

    async def one(source: Path) -> bool:
        before = [tasks[other] for other in sources if other.name[:2] in AFTER.get(source.name[:2], ())]
        if not all([await task for task in before]):
            _say(f"{source.stem}: not run, because a notebook whose results it reads failed.")
            return False
        async with slots:
            began = time.monotonic()
            try:
                keep(source, await _execute(source, given, alone=jobs == 1))
            except NotebookError as error:
                _say(f"{source.stem}: {error}\n{source.name} was not overwritten.")
                return False
        _say(f"{source.stem}: {time.monotonic() - began:.0f} s")
        return True

    for source in sorted(sources, key=lambda source: (source.name[:2] not in awaited, source)):
        tasks[source] = asyncio.create_task(one(source))
    return [source.stem for source in sources if not await tasks[source]]


async def _execute(source: Path, given: dict, alone: bool) -> str:
    """The text of a notebook after a run in a fresh kernel of this Python.

    Only one that runs alone shows the progress of its cells and what they write to stderr.
    """
    text = source.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    cells = [(index, cell) for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    for cell in (cell for _, cell in cells if "parameters" in cell.metadata.get("tags", ())):
        known = {line.partition("=")[0].strip() for line in cell.source.splitlines()}
        cell.source += "".join(f"\n{name} = {value!r}" for name, value in given.items() if name in known)
    with tempfile.TemporaryDirectory() as scratch:
        # Kernels are of this Python, import this very package, and have nothing to do with the home folder.
        environment = {
            **(FOR_THE_EMBEDDED if "MODEL" not in given else {}), "TOKENIZERS_PARALLELISM": "false", **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "IPYTHONDIR": scratch,
            "JUPYTER_RUNTIME_DIR": scratch, "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        }  # fmt: skip
        kernels = kernelspec.KernelSpecManager(kernel_dirs=[])
        manager = AsyncKernelManager(kernel_spec_manager=kernels, connection_file=f"{scratch}/kernel.json")
        settings = {"startup_timeout": 180, "extra_arguments": ["--log-level=ERROR"]}
        client = (_Shown if alone else nbclient.NotebookClient)(notebook, manager, **settings)
        try:
            await client.async_start_new_kernel(env=environment, cwd=str(source.parent))
            await client.async_start_new_kernel_client()
            for index, cell in tqdm(cells, source.stem, unit="cell", disable=not alone):
                await client.async_execute_cell(cell, index)
        except nbclient.exceptions.CellExecutionError as error:
            raise NotebookError(f"cell {client.code_cells_executed} failed.\n{error}") from error
        except RuntimeError as error:
            if asyncio.current_task().cancelling():  # nbclient takes a cancelled run for a dead kernel
                raise asyncio.CancelledError from error
            raise NotebookError(f"the kernel died, most often of too little memory. ({error})") from error
        finally:
            if client.kc:
                client.kc.stop_channels()
            await manager.shutdown_kernel(now=True)
    if source.read_text(encoding="utf-8") != text:
        raise NotebookError("somebody changed the file while it ran: run it again.")
    result = nbformat.writes(clean(notebook), version=4) + "\n"
    if (size := len(result.encode())) > LIMIT:
        raise NotebookError(f"{size / 1000:.0f} kB, more than {LIMIT // 1000} kB: show fewer or smaller figures.")
    return result


class _Shown(nbclient.NotebookClient):
    """Passes on what cells write to stderr, such as the progress of a long cell, while they run."""

    def process_message(self, msg: dict, cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        if msg["msg_type"] == "stream" and msg["content"]["name"] == "stderr":
            _say(msg["content"]["text"], end="")
        return super().process_message(msg, cell, cell_index)


def clean(notebook: NotebookNode) -> NotebookNode:
    """Drop what changes from run to run: timings, versions, progress bars, widgets; join split prints."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": tags} if (tags := cell.metadata.get("tags")) else {})
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.execution_count = number
        kept: list[NotebookNode] = []
        for output in filter(_clean_output, cell.outputs):
            if output.output_type == "execute_result":
                output.execution_count = number
            if kept and output.output_type == "stream" == kept[-1].output_type:
                kept[-1].text += output.text  # the kernel cuts one print into pieces when it is busy
            else:
                kept.append(output)
        cell.outputs = kept
    return notebook


def _clean_output(output: NotebookNode) -> bool:
    """Whether an output stays. Its metadata and widgets go, and its picture becomes small."""
    if output.output_type not in ("display_data", "execute_result"):
        return output.get("name") != "stderr"
    output.metadata = nbformat.from_dict({})
    output.data = {kind: value for kind, value in output.data.items() if "widget" not in kind}
    if "image/png" in output.data:
        output.data = {"image/png": _small(output.data["image/png"])}
    return bool(output.data)


def _small(png: str) -> str:
    """The same picture in 128 colours: a fraction of the bytes, hardly a difference. Done once, then left alone."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        if picture.mode == "P":
            return png
        plain = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert("RGB")
    small = io.BytesIO()
    plain.quantize(128, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def _read(root: Path) -> dict[str, str]:
    """What each notebook is computed from: code and data, packages, its own code and that of those it comes after."""
    files = sorted(file for pattern in READ for file in root.glob(pattern) if file.is_file() and file.suffix != ".pyc")
    packages = sorted(f"{package.name} {package.version}" for package in distributions())
    around = _digest([[(str(file.relative_to(root)), file) for file in files], packages, sys.version])
    code = {source.stem: _cells(source, "source") for source in sorted((root / "notebooks").glob("*.ipynb"))}
    ahead = {stem: [one for one in code if one[:2] in AFTER.get(stem[:2], ())] for stem in code}
    return {stem: _digest([around, code[stem], [code[one] for one in ahead[stem]]]) for stem in code}


def _written(source: Path) -> str:
    """What a notebook left when it was last run in place: its outputs and its figures."""
    figures = sorted((source.parents[1] / "figures" / EMBEDDED).glob(f"{source.name[:2]}_*"))
    return _digest([_cells(source, "outputs"), [(file.name, file) for file in figures]])


def _cells(source: Path, part: str) -> list:
    """`source` or `outputs` of the code cells. Text cells may change without a run."""
    return [cell[part] for cell in nbformat.read(source, as_version=4).cells if cell.cell_type == "code"]


def _digest(content: object) -> str:
    """Of anything that JSON holds; a path counts by its file's bytes."""
    text = json.dumps(content, default=lambda file: hashlib.sha256(file.read_bytes()).hexdigest())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _say(message: object, end: str = "\n") -> None:
    print(message, end=end, file=sys.stderr, flush=True)


def _write(path: Path, text: str) -> None:
    """Replace a file at once: a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    main()
