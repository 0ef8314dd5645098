"""The repository keeps its promises: README commands exist, versions are pinned, functions are documented."""

import ast
import inspect
import re
import subprocess
import tomllib

import pytest

import lvlm_utils as lv
from lvlm_utils import ROOT

MACHINE_PATH = re.compile(r"(?<![\w.<{$])/(home|root|work|Users|mnt)/\w")
TEXT = {".py", ".md", ".toml", ".yml", ".txt", ".cff", ".json", ""}


def tracked_files():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def make_targets():
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))


def test_readme_commands_exist_in_makefile():
    named = set(re.findall(r"make ([a-z]+)", readme()))
    assert {"figures", "test", "lab"} <= named <= make_targets()


def test_readme_shows_the_commands_first():
    first_block = re.search(r"```\w*\n(.*?)```", readme(), flags=re.S).group(1)
    assert "make figures" in first_block


def test_readme_links_lead_to_files():
    targets = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", readme())
    local = [a or b for a, b in targets if not (a or b).startswith("http")]
    assert local
    missing = [target for target in local if not (ROOT / target).exists()]
    assert not missing, missing


def numbers_in(files):
    """Every number in these csv files, to three digits."""
    cells = (cell for file in files for line in file.read_text().splitlines() for cell in line.split(","))
    return {f"{float(cell):.3f}" for cell in cells if re.fullmatch(r"-?\d*\.?\d+(e-?\d+)?", cell)}


def test_numbers_in_the_readme_are_those_of_the_figures():
    """Every three-digit share in the README stands in a figure's csv."""
    known = numbers_in((ROOT / "figures" / "tiny-llava").glob("0[1-4]*.csv"))
    shown = re.findall(r"(?<![\d.])0\.\d{3}(?!\d)", readme())
    assert len(shown) > 5
    assert not [number for number in shown if number not in known]


def test_numbers_in_the_card_are_those_of_its_table():
    """Every accuracy by length in the model card stands in the csv beside it."""
    folder = ROOT / "data" / "tiny-llava"
    known = numbers_in([folder / "accuracy.csv"])
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if re.match(r"\| (its own|white|black|none)", line)]
    shown = [number for row in rows for number in re.findall(r"(0\.\d{3}) /", row)]
    assert len(shown) > 50
    assert not [number for number in shown if number not in known]


def test_every_requirement_is_pinned():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 20
    unpinned = [line for line in pins if not re.fullmatch(r"[\w.\-]+==[\w.]+", line)]
    assert not unpinned, unpinned


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_of_the_package_is_among_the_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    pins = re.findall(r"^([\w.\-]+)==", (ROOT / "requirements.txt").read_text(encoding="utf-8"), flags=re.M)
    missing = {normal(re.match(r"[\w.\-]+", line).group()) for line in wanted} - {normal(pin) for pin in pins}
    assert not missing, missing


def test_conda_environment_gives_a_reason_per_line():
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    listed = [line for line in lines[lines.index("dependencies:") + 1 :] if line.startswith("  - ")]
    dependencies = [line for line in listed if line != "  - pip:"]
    assert len(dependencies) > 10
    assert all("# " in line for line in dependencies)
    assert lines[-2:] == ["  - pip:", "      - -e ."]


def test_no_paths_of_a_machine():
    this_file = "tests/test_repository.py"
    for path in tracked_files():
        if path.suffix in TEXT and path.stat().st_size < 2_000_000 and not path.as_posix().endswith(this_file):
            found = MACHINE_PATH.search(path.read_text(encoding="utf-8", errors="replace"))
            assert found is None, f"{path.relative_to(ROOT)}: {found}"


def test_no_large_files():
    large = [path.name for path in tracked_files() if path.stat().st_size > 42_000_000]
    assert not large, large


def public_functions():
    """What users call: the functions of `lv` itself and those that samples, stats and figures export."""
    found = [getattr(lv, name) for name in lv.__all__]
    for module in [each for each in found if inspect.ismodule(each)]:
        found += [getattr(module, name) for name in getattr(module, "__all__", vars(module)) if name[0] != "_"]
    functions = {f for f in found if inspect.isfunction(f) and f.__module__.startswith("lvlm_utils")}
    return sorted(functions, key=lambda f: (f.__module__, f.__name__))


@pytest.mark.parametrize("function", public_functions(), ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_public_functions_have_docstrings_and_type_hints(function):
    assert inspect.getdoc(function), f"{function.__name__} has no docstring"
    parameters = inspect.signature(function).parameters.values()
    bare = [p.name for p in parameters if p.annotation is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert set(bare) <= {"lvlm_or_tokenizer", "tokenizer"}, f"no type hint: {bare}"


@pytest.mark.parametrize("path", sorted((ROOT / "lvlm_utils").rglob("*.py")), ids=lambda path: path.stem)
def test_modules_say_their_job_and_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert len(text.splitlines()) <= 250
