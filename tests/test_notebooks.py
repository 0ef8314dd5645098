"""Every committed notebook is executed, clean, small and readable; the first one runs from end to end."""

import ast
import importlib.util
import json
import re

import nbformat
import pytest

from lvlm_utils import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXPECTED = [
    "00_start_here", "01_long_context_dataset", "02_context_length", "03_language_priors", "04_object_size",
    "05_attention_by_layer", "06_attention_shift", "07_attention_dispersion", "08_context_pruning",
    "09_context_pruning_ablations", "10_visual_token_pruning", "11_information_flow", "12_efficiency",
]  # fmt: skip
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|work|tmp|Users|mnt|opt)/|[A-Z]:\\\\Users")

specification = importlib.util.spec_from_file_location("notebook_runner", ROOT / "notebooks" / "run.py")
runner = importlib.util.module_from_spec(specification)
specification.loader.exec_module(runner)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def outputs(path):
    return [output for cell in code_cells(path) for output in cell.outputs]


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_all_notebooks_are_there():
    assert set(EXPECTED) <= {path.stem for path in NOTEBOOKS}


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
    for statement in ast.parse(tagged[0].source).body:
        assert isinstance(statement, ast.Assign), f"not an assignment: {ast.unparse(statement)}"
        ast.literal_eval(statement.value)
    assert "MODEL" in runner.parameter_names(read(path))


@each_notebook
def test_executed_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    assert any(output.output_type == "display_data" for output in outputs(path)), "no figure or text was shown"


@each_notebook
def test_outputs_are_clean(path):
    for output in outputs(path):
        assert output.output_type != "error", output.get("evalue")
        assert output.get("name") != "stderr", output.get("text")
    text = path.read_text(encoding="utf-8")
    assert "application/vnd.jupyter.widget" not in text
    assert '"papermill"' not in text
    assert not re.search(r"<[\w.]+ object at 0x", text)


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


@each_notebook
def test_short_cells_and_functions(path):
    for cell in code_cells(path):
        assert len(cell.source.splitlines()) <= 25, f"cell {cell.id}"
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 10, f"function {node.name} in cell {cell.id}"


@each_notebook
def test_more_text_than_code(path):
    cells = read(path).cells
    assert sum(cell.cell_type == "markdown" for cell in cells) >= 1.5 * sum(cell.cell_type == "code" for cell in cells)


def small_notebook(folder, *sources):
    """Write a notebook of code cells, the first tagged `parameters`."""
    cells = [nbformat.v4.new_code_cell(source, id=f"99-{number:02}") for number, source in enumerate(sources)]
    cells[0].metadata["tags"] = ["parameters"]
    path = folder / "99_small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=runner.PLAIN_METADATA), path)
    return path


@pytest.fixture
def notebooks_in(tmp_path, monkeypatch):
    """Point the runner at an empty folder of notebooks and a repository root of its own."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(runner, "FOLDER", folder)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    return folder


def test_runner_cleans_and_repeats_the_same_bytes(notebooks_in):
    shown = "\n".join([
        "import sys",
        "print('kept', SAMPLES, flush=True)",
        "print('dropped', file=sys.stderr, flush=True)",
        "print('too')",
    ])  # fmt: skip
    path = small_notebook(notebooks_in, "MODEL = 'tiny-llava'\nSAMPLES = 3", shown)
    assert runner.run() == [path]
    first = path.read_bytes()
    (output,) = outputs(path)
    assert output.text == "kept 3\ntoo\n"
    runner.run()
    assert path.read_bytes() == first


def test_runner_leaves_out_what_is_up_to_date(notebooks_in):
    """A notebook runs again when it, what it reads or what it wrote has changed, and so does one that reads it."""
    count = "import pathlib\nwith pathlib.Path(f'../{ME}.txt').open('a') as ran:\n    print('.', end='', file=ran)"
    for number in ("00", "02", "03"):
        path = small_notebook(notebooks_in, f"MODEL = 'tiny-llava'\nME = '{number}'", count)
        path.rename(path.with_name(f"{number}_small.ipynb"))
    root = notebooks_in.parent
    figure, data = root / "figures" / "tiny-llava" / "00_figure.csv", root / "data" / "world.json"
    for file in (figure, data):
        file.parent.mkdir(parents=True)
        file.write_text("1")

    def ran():
        return [len((root / f"{number}.txt").read_text()) for number in ("00", "02", "03")]

    assert len(runner.run()) == 3 and ran() == [1, 1, 1]
    assert runner.run() == [] and ran() == [1, 1, 1]
    figure.unlink()
    runner.run()
    assert ran() == [2, 1, 1]
    path = notebooks_in / "02_small.ipynb"
    path.write_text(path.read_text().replace("import pathlib", "import pathlib "))
    runner.run()
    assert ran() == [2, 2, 2]  # 03 reads what 02 asked
    data.write_text("2")
    runner.run()
    assert ran() == [3, 3, 3]
    runner.run(only="00")
    assert ran() == [4, 3, 3]
    runner.run(force=True)
    assert ran() == [5, 4, 4]


def test_runner_writes_other_models_aside(notebooks_in):
    path = small_notebook(notebooks_in, "MODEL = 'tiny-llava'\nSAMPLES = 3", "print(MODEL, SAMPLES)")
    before = path.read_bytes()
    (written,) = runner.run(model="llava-hf/some-model", samples=2)
    assert written == notebooks_in.parent / "results" / "some-model" / "notebooks" / path.name
    assert outputs(written)[0].text == "llava-hf/some-model 2\n"
    assert path.read_bytes() == before


def test_failing_notebook_overwrites_nothing(notebooks_in, capsys):
    path = small_notebook(notebooks_in, "MODEL = 'tiny-llava'", "print('first')", "1 / 0")
    before = path.read_bytes()
    assert runner.main([]) == 1
    message = capsys.readouterr().err
    assert "99_small.ipynb: cell 3 failed" in message and "ZeroDivisionError" in message
    assert path.read_bytes() == before


def test_runner_runs_several_at_once_but_none_before_what_it_reads(notebooks_in):
    """01 waits for 02, which runs beside 00; both see that they are not alone, so none is run one by one."""
    meet = "\n".join([
        "import pathlib, time",
        "pathlib.Path(f'../{ME}').touch()",
        "end = time.time() + 60",
        "while not pathlib.Path(f'../{OTHER}').exists() and time.time() < end:",
        "    time.sleep(0.05)",
        "print(sorted(path.name for path in pathlib.Path('..').glob('run-*')))",
        "pathlib.Path(f'../{ME}-done').touch()",
    ])  # fmt: skip
    for number, other in (("00", "02"), ("02", "00"), ("03", "02-done")):
        path = small_notebook(notebooks_in, f"MODEL = 'tiny-llava'\nME = 'run-{number}'\nOTHER = 'run-{other}'", meet)
        path.rename(path.with_name(f"{number}_small.ipynb"))
    written = runner.run(jobs=2)
    shown = {path.name[:2]: outputs(path)[0].text for path in written}
    assert list(shown) == ["00", "02", "03"]
    assert "run-02" in shown["00"] and "run-00" in shown["02"]
    assert "run-02-done" in shown["03"] and "run-03" not in shown["02"]


def test_one_failing_notebook_of_several_overwrites_nothing(notebooks_in, capsys):
    bad = small_notebook(notebooks_in, "MODEL = 'tiny-llava'", "1 / 0")
    bad = bad.rename(bad.with_name("98_bad.ipynb"))
    good = small_notebook(notebooks_in, "MODEL = 'tiny-llava'", "print('fine')")
    before = bad.read_bytes(), good.read_bytes()
    assert runner.main(["--jobs", "2"]) == 1
    assert "98_bad.ipynb: cell 2 failed" in capsys.readouterr().err
    assert (bad.read_bytes(), good.read_bytes()) == before


@pytest.mark.skipif(not runner.AVAILABLE, reason="kernels are forked only on Linux without a GPU")
def test_forked_kernels_have_the_packages_but_nothing_of_each_other(notebooks_in):
    look = "import os, sys\nprint([name in sys.modules for name in ('torch', 'pandas', 'matplotlib')], os.getcwd())"
    for number in ("00", "01"):
        cells = ["MODEL = 'tiny-llava'", look, "import torch\nprint('left' in vars(torch))\ntorch.left = 'behind'"]
        path = small_notebook(notebooks_in, *cells)
        path.rename(path.with_name(f"{number}_small.ipynb"))
    for path in runner.run(jobs=1):
        assert [one.text for one in outputs(path)] == [f"[True, False, False] {notebooks_in}\n", "False\n"]


def test_a_forked_kernel_shows_what_any_other_shows(notebooks_in, tmp_path):
    """How wide tables are and where figures go is settled when packages are imported."""
    shown = [
        "MODEL = 'tiny-llava'",
        "import lvlm_utils as lv\nimport matplotlib.pyplot as plt, numpy as np, pandas as pd\nlv.figures.style()",
        "pd.DataFrame(np.arange(60).reshape(2, 30) / 7, columns=[f'column {i}' for i in range(30)])",
        "figure, axis = plt.subplots(figsize=(2, 1))\naxis.plot([1, 2]);",
        "from tqdm.auto import tqdm\nprint(tqdm.__mro__, plt.get_backend(), pd.get_option('display.max_columns'))",
        "lv.load('tiny-llava').name",
    ]
    for number in ("00", "01"):
        path = small_notebook(notebooks_in, *shown)
        path.rename(path.with_name(f"{number}_small.ipynb"))
    forked = [outputs(path) for path in runner.run()]
    (own,) = runner.run(only="00", out=tmp_path)
    assert forked[0] == forked[1] == outputs(own)
    assert "..." in forked[0][0].data["text/plain"] and "image/png" in forked[0][1].data


@pytest.mark.parametrize("notebooks", [1, 2], ids=["own kernel", "forked"])
def test_a_dead_kernel_is_one_clear_error(notebooks_in, notebooks, capsys):
    paths = []
    for number in range(notebooks):
        path = small_notebook(notebooks_in, "MODEL = 'tiny-llava'", "import os\nos._exit(3)")
        paths.append(path.rename(path.with_name(f"9{number}_small.ipynb")))
    before = [path.read_bytes() for path in paths]
    assert runner.main(["--jobs", "1"]) == 1
    assert "the kernel died" in capsys.readouterr().err
    assert [path.read_bytes() for path in paths] == before


def test_runner_refuses_a_large_notebook(notebooks_in, capsys):
    path = small_notebook(notebooks_in, "MODEL = 'tiny-llava'", "print('x' * 400_000)")
    before = path.read_bytes()
    assert runner.main([]) == 1
    assert "more than 300 kB" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_unknown_notebook_is_one_clear_error(capsys):
    assert runner.main(["--only", "77"]) == 1
    assert "starts with '77'" in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / "data/tiny-llava/model.safetensors").exists(), reason="tiny-llava has no weights")
def test_first_notebook_runs(tmp_path):
    """Two pictures, everything it writes into a folder of the test."""
    (written,) = runner.run(only="00", out=tmp_path, PICTURES=2, LENGTH=500, FIGURES=str(tmp_path))
    first, *others = outputs(written)
    assert first.data["text/markdown"].startswith("**Answer** (tiny-llava)")
    assert others and "error" not in {output.output_type for output in others}
    assert (tmp_path / "figures" / "tiny-llava" / "00_attention_map.svg").exists()
