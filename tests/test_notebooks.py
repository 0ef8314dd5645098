"""Every committed notebook is executed, clean and small; the runner runs what it should and keeps what it must."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from types import ModuleType

import nbformat
import pytest

from lvlm_utils import ROOT
from lvlm_utils import notebooks as runner

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|work|tmp|Users|mnt|opt)/|[A-Z]:\\\\Users")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def outputs(path):
    return [output for cell in code_cells(path) for output in cell.outputs]


def test_the_folder_holds_what_readers_open():
    found = {path.suffix for path in (ROOT / "notebooks").iterdir() if path.is_file()}
    assert {".ipynb"} <= found <= {".ipynb", ".md"}


@each_notebook
def test_format_and_cell_ids(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))
    assert all(cell_id.startswith(path.stem[:2] + "-") for cell_id in ids)


@each_notebook
def test_one_parameters_cell_with_literals_only(path):
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    names = set()
    for statement in ast.parse(tagged[0].source).body:
        assert isinstance(statement, ast.Assign), f"not an assignment: {ast.unparse(statement)}"
        ast.literal_eval(statement.value)
        names |= {target.id for target in statement.targets}
    assert {"MODEL", "FIGURES"} <= names


@each_notebook
def test_executed_without_errors_and_shows_something(path):
    kinds = {output.output_type for output in outputs(path)}
    assert "display_data" in kinds and "error" not in kinds
    assert not re.search(r"<[\w.]+ object at 0x", path.read_text(encoding="utf-8"))


@each_notebook
def test_cleaning_again_changes_nothing(path):
    assert nbformat.writes(runner.clean(read(path)), version=4) + "\n" == path.read_text(encoding="utf-8")


@each_notebook
def test_no_machine_paths(path):
    notebook = read(path)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
    found = MACHINE_PATH.search(json.dumps(notebook))
    assert found is None, found


@each_notebook
def test_small_file(path):
    assert path.stat().st_size <= runner.LIMIT


def names_of_ours(source):
    """Every dotted name in `source` that begins with `lv` or with what is imported from lvlm_utils, as text."""
    tree, known = ast.parse(source), {"lv": "lvlm_utils"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lvlm_utils"):
            known |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            first, _, rest = ast.unparse(node).partition(".")
            if first in known and rest.replace(".", "a").isidentifier() | (not rest):
                yield f"{known[first]}.{rest}".rstrip(".")


def resolved(name):
    """What a dotted name means; AttributeError where a module or a class has no such name."""
    found = import_module("lvlm_utils")
    for part in name.split(".")[1:]:
        if not isinstance(found, type | ModuleType):
            return found  # what an object has is known when it is there
        with suppress(ModuleNotFoundError):
            import_module(f"{getattr(found, '__name__', '')}.{part}")
        found = getattr(found, part)
    return found


@each_notebook
def test_names_of_the_package_are_there(path):
    """A notebook is not executed by the tests, but a name that the package has no more is seen."""
    names = {name for cell in code_cells(path) for name in names_of_ours(cell.source)}
    assert names
    for name in sorted(names):
        resolved(name)


def test_names_that_are_gone_are_seen():
    names = set(names_of_ours("import lvlm_utils as lv\nlv.pruning.Plan(1).x\nfrom lvlm_utils.session import joined"))
    assert names == {"lvlm_utils", "lvlm_utils.pruning", "lvlm_utils.pruning.Plan"}
    with pytest.raises(AttributeError, match="Plan"):
        resolved("lvlm_utils.pruning.Plan")


@each_notebook
def test_a_notebook_waits_for_those_whose_results_it_reads(path):
    """A file of another notebook's number, such as 01_prior.parquet, is read only after that notebook has run."""
    code = "\n".join(cell.source for cell in code_cells(path))
    others = set(re.findall(r"[\"'](\d\d)_\w+\.(?:parquet|npz|csv)", code)) - {path.stem[:2]}
    assert others <= runner.AFTER.get(path.stem[:2], set())


def test_those_that_others_wait_for_are_there():
    numbers = {path.stem[:2] for path in NOTEBOOKS}
    assert {*runner.AFTER, *set().union(*runner.AFTER.values())} <= numbers


def notebook_in(folder, name, *sources):
    """Write a notebook of code cells; the first, tagged `parameters`, is "MODEL = 'tiny-llava'" and `sources[0]`."""
    sources = ["MODEL = 'tiny-llava'\n" + sources[0], *sources[1:]]
    cells = [nbformat.v4.new_code_cell(source, id=f"{name[:2]}-{number:02}") for number, source in enumerate(sources)]
    cells[0].metadata["tags"] = ["parameters"]
    path = folder / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=runner.METADATA), path)
    return path


def test_the_same_bytes_again_without_what_is_written_to_stderr(tmp_path):
    shown = "\n".join([
        "import sys",
        "print('kept', SAMPLES, flush=True)",
        "print('dropped', file=sys.stderr, flush=True)",
        "print('too')",
    ])  # fmt: skip
    path = notebook_in(tmp_path, "99_small", "SAMPLES = 3", shown)
    assert runner.run(root=tmp_path) == [path]
    first = path.read_bytes()
    (output,) = outputs(path)
    assert output.text == "kept 3\ntoo\n"
    runner.run(root=tmp_path, force=True)
    assert path.read_bytes() == first


def test_a_long_cell_shows_its_progress_when_its_notebook_runs_alone(tmp_path, capfd):
    notebook_in(tmp_path, "99_small", "", "import sys\nprint('half of it', file=sys.stderr)")
    runner.run(root=tmp_path)
    assert "half of it" in capfd.readouterr().err


def test_cleaning_drops_what_changes_from_run_to_run():
    stream = [nbformat.v4.new_output("stream", name=name, text=text)
              for name, text in (("stdout", "a"), ("stderr", "50%"), ("stdout", "b"))]  # fmt: skip
    data = {"text/plain": "3", "application/vnd.jupyter.widget-view+json": {}}
    result = nbformat.v4.new_output("execute_result", data, execution_count=7, metadata={"when": "now"})
    widget = nbformat.v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}})
    cell = nbformat.v4.new_code_cell("3", execution_count=7, outputs=[*stream, widget, result], metadata={"took": 2})
    found = runner.clean(nbformat.v4.new_notebook(cells=[cell], metadata={"version": 5}))
    assert found.metadata == runner.METADATA and found.cells[0].metadata == {} and found.cells[0].execution_count == 1
    printed, result = found.cells[0].outputs
    assert (printed.name, printed.text) == ("stdout", "ab")
    assert (result.data, result.metadata, result.execution_count) == ({"text/plain": "3"}, {}, 1)


def test_what_is_up_to_date_is_left_out(tmp_path):
    """A notebook runs again when its code, what it reads or what it wrote changed, and so does one that reads it."""
    count = "import pathlib\nwith pathlib.Path(f'../{ME}.txt').open('a') as ran:\n    print('.', end='', file=ran)"
    for number in ("00", "02", "03"):
        path = notebook_in(tmp_path, f"{number}_small", f"ME = '{number}'", count, "print('shown')")
    path = path.with_name("02_small.ipynb")
    figure, data = tmp_path / "figures" / "tiny-llava" / "00_figure.csv", tmp_path / "data" / "world.json"
    for file in (figure, data):
        file.parent.mkdir(parents=True)
        file.write_text("1")

    def ran():
        return [len((tmp_path / f"{number}.txt").read_text()) for number in ("00", "02", "03")]

    def change(old, new):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        runner.run(root=tmp_path)

    assert len(runner.run(root=tmp_path)) == 3 and ran() == [1, 1, 1]
    assert runner.run(root=tmp_path) == [] and ran() == [1, 1, 1]
    figure.unlink()
    runner.run(root=tmp_path)
    assert ran() == [2, 1, 1]
    change("import pathlib", "import pathlib ")
    assert ran() == [2, 2, 2]  # 03 reads what 02 leaves
    change("shown\\n", "made up\\n")
    assert ran() == [2, 3, 2] and "made up" not in path.read_text()
    notebook = read(path)
    notebook.cells.append(nbformat.v4.new_markdown_cell("In other words.", id="02-99"))
    nbformat.write(notebook, path)
    runner.run(root=tmp_path)
    assert ran() == [2, 3, 2]
    data.write_text("2")
    runner.run(root=tmp_path)
    assert ran() == [3, 4, 3]
    runner.run(root=tmp_path, only="00")
    assert ran() == [4, 4, 3]
    runner.run(root=tmp_path, force=True)
    assert ran() == [5, 5, 4]


def test_another_model_is_written_aside(tmp_path):
    path = notebook_in(tmp_path, "99_small", "SAMPLES = 3", "print(MODEL, SAMPLES)")
    before = path.read_bytes()
    (written,) = runner.run(model="llava-hf/some-model", samples=2, root=tmp_path)
    assert written == tmp_path / "results" / "some-model" / "notebooks" / path.name
    assert outputs(written)[0].text == "llava-hf/some-model 2\n"
    assert path.read_bytes() == before


def test_fewer_samples_of_the_embedded_model_touch_nothing_committed(tmp_path):
    path = notebook_in(tmp_path, "99_small", "SAMPLES = 3\nFIGURES = None", "print(MODEL, SAMPLES, FIGURES)")
    before = path.read_bytes()
    (written,) = runner.run(samples=2, root=tmp_path)
    assert written == tmp_path / "results" / "tiny-llava" / "notebooks" / path.name
    assert outputs(written)[0].text == f"tiny-llava 2 {tmp_path / 'results' / 'tiny-llava'}\n"
    assert path.read_bytes() == before
    assert len(runner.run(root=tmp_path)) == 1, "a copy with fewer samples counted as a run in place"


def test_a_folder_means_the_same_in_the_kernel(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    notebook_in(tmp_path, "99_small", "", "import os\nprint(os.path.isdir(MODEL), os.path.basename(MODEL))")
    (written,) = runner.run(model="models/mine", root=tmp_path)
    assert written.parents[1].name == "mine" and outputs(written)[0].text == "True mine\n"


def test_a_failing_notebook_is_shown_and_the_others_go_on(tmp_path, capsys):
    """01 fails, so 03, which reads what 01 leaves, is not run; 00 and 04 are."""
    paths = {number: notebook_in(tmp_path, f"{number}_small", "", "print('fine')") for number in ("00", "03", "04")}
    paths["01"] = notebook_in(tmp_path, "01_bad", "", "print('first')", "1 / 0")
    before = {number: path.read_bytes() for number, path in paths.items()}
    with pytest.raises(runner.NotebookError, match="2 of 4 notebooks failed: 01_bad, 03_small"):
        runner.run(root=tmp_path)
    message = capsys.readouterr().err
    assert "01_bad: cell 3 failed" in message and "ZeroDivisionError" in message
    assert "03_small: not run" in message
    assert {number for number, path in paths.items() if path.read_bytes() != before[number]} == {"00", "04"}
    with pytest.raises(runner.NotebookError, match="2 of 2"):  # what succeeded is up to date
        runner.run(root=tmp_path)


def test_a_failure_is_the_exit_status(tmp_path, monkeypatch):
    def fails(**options):
        assert options == {"model": None, "samples": 5, "only": "02", "force": False}
        raise runner.NotebookError("02_bad failed")

    monkeypatch.setattr(runner, "run", fails)
    with pytest.raises(SystemExit, match="02_bad failed"):
        runner.main(["--samples", "5", "--only", "02"])


def test_unknown_notebook_is_one_clear_error():
    called = [sys.executable, "-m", "lvlm_utils.notebooks", "--only", "77"]
    ended = subprocess.run(called, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (1, "No notebook in notebooks/ starts with '77'.\n")


def test_several_run_at_once_but_none_before_what_it_reads(tmp_path, monkeypatch):
    """03 waits for 02, which runs beside 00; both see that they are not alone."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    meet = "\n".join([
        "import os, pathlib, time",
        "pathlib.Path(f'../{ME}').touch()",
        "end = time.time() + 60",
        "while not pathlib.Path(f'../{OTHER}').exists() and time.time() < end:",
        "    time.sleep(0.05)",
        "print(os.environ['OMP_NUM_THREADS'], sorted(path.name for path in pathlib.Path('..').glob('run-*')))",
        "pathlib.Path(f'../{ME}-done').touch()",
    ])  # fmt: skip
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for number, other in (("00", "02"), ("02", "00"), ("03", "02-done")):
        notebook_in(tmp_path, f"{number}_small", f"ME = 'run-{number}'\nOTHER = 'run-{other}'", meet)
    shown = {path.name[:2]: outputs(path)[0].text for path in runner.run(root=tmp_path)}
    assert list(shown) == ["00", "02", "03"] and all(text.startswith("1 ") for text in shown.values())
    assert "run-02" in shown["00"] and "run-00" in shown["02"]
    assert "run-02-done" in shown["03"] and "run-03" not in shown["02"]


def test_kernels_import_this_package_and_draw_inline(tmp_path, monkeypatch):
    """Whatever the home folder and the environment say."""
    kernel = tmp_path / "home" / ".local" / "share" / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    startup = tmp_path / "home" / ".ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "mine.py").write_text("print('mine')")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    look = "import matplotlib.pyplot as plt, lvlm_utils, sys\nprint(lvlm_utils.ROOT, sys.executable, plt.get_backend())"
    draw = "figure, axis = plt.subplots(figsize=(2, 1))\naxis.plot([1, 2]);"
    path = notebook_in(tmp_path, "99_small", "", look, draw)
    runner.run(root=tmp_path)
    printed, picture = outputs(path)
    assert printed.text.split()[:2] == [str(ROOT), sys.executable] and "inline" in printed.text
    assert list(picture.data) == ["image/png"]


def test_a_dead_kernel_is_one_clear_error(tmp_path, capsys):
    path = notebook_in(tmp_path, "99_small", "", "import os\nos._exit(3)")
    before = path.read_bytes()
    with pytest.raises(runner.NotebookError, match="1 of 1"):
        runner.run(root=tmp_path)
    assert "99_small: the kernel died" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_large_result_is_refused(tmp_path, capsys):
    path = notebook_in(tmp_path, "99_small", "", "print('x' * 400_000)")
    before = path.read_bytes()
    with pytest.raises(runner.NotebookError):
        runner.run(root=tmp_path)
    assert "more than 300 kB" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_an_edit_made_while_a_notebook_runs_is_not_lost(tmp_path, capsys):
    edit = "import pathlib\nme = pathlib.Path('99_small.ipynb')\nme.write_text(me.read_text().replace('tiny', 'my'))"
    path = notebook_in(tmp_path, "99_small", "", edit)
    with pytest.raises(runner.NotebookError):
        runner.run(root=tmp_path)
    assert "changed the file while it ran" in capsys.readouterr().err
    assert "my-llava" in path.read_text()


def test_an_interrupt_stops_the_kernels(tmp_path):
    """One SIGINT, as Ctrl-C sends, ends the run and the kernel, and leaves the notebook as it was."""
    wait = "import os, pathlib, time\npathlib.Path('../pid').write_text(str(os.getpid()))\ntime.sleep(600)"
    path = notebook_in(tmp_path, "99_small", "", wait)
    before = path.read_bytes()
    code = f"import pathlib, lvlm_utils.notebooks as n; n.run(root=pathlib.Path({str(tmp_path)!r}))"

    def kernel():
        return (tmp_path / "pid").read_text() if (tmp_path / "pid").exists() else ""

    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not kernel():
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(kernel()), 0)
    assert path.read_bytes() == before


@pytest.mark.skipif(not (ROOT / "data/tiny-llava/model.safetensors").exists(), reason="tiny-llava has no weights")
def test_first_notebook_runs(tmp_path):
    """Two pictures, everything it writes into a folder of the test."""
    (tmp_path / "notebooks").mkdir()
    shutil.copy(NOTEBOOKS[0], tmp_path / "notebooks")
    (written,) = runner.run(root=tmp_path, PICTURES=2, LENGTH=500, FIGURES=str(tmp_path))
    first, *others = outputs(written)
    assert first.data["text/markdown"].startswith("**Answer** (tiny-llava)")
    assert others and "error" not in {output.output_type for output in others}
    assert (tmp_path / "figures" / "tiny-llava" / "00_attention_map.svg").exists()
