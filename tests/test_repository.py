"""The repository keeps its promises: README and code agree, versions are pinned, imports point one way."""

import ast
import inspect
import re
import subprocess
import tomllib
from graphlib import CycleError, TopologicalSorter
from itertools import count

import pytest

import lvlm_utils as lv
from lvlm_utils import ROOT

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted((ROOT / "lvlm_utils").rglob("*.py"))
}
# Which part of the package may import which others. The parts of a line may import those of the lines above.
ORDER = (
    ("models", "families"),
    ("token_groups",),
    ("session",),
    ("prompts",),
    ("attention",),
    ("pruning", "saliency"),
    ("methods",),
    ("prefix",),
    ("evaluate", "efficiency"),
)
MAY_IMPORT = {part: {*sum(ORDER[: at + 1], ())} for at, line in enumerate(ORDER) for part in line}
MAY_IMPORT["results"] = MAY_IMPORT["models"] | {"?"}  # it reads code, and imports what that names
for later in ("prefix", "evaluate"):
    MAY_IMPORT[later] |= {"results"}
MAY_IMPORT |= {"samples": {"results"}, "claims": {"stats", "results"}, "stats": set(), "figures": set()}
MAY_IMPORT["notebooks"] = set()
FORWARDING = ("lvlm_utils", "lvlm_utils.pruning")  # their __getattr__ imports names when they are first used
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
    """What users call: the functions of `lv` itself and those that its modules export."""
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


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_modules_say_their_job(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "no docstring"


def test_the_tree_in_the_readme_is_what_is_there():
    """Every path that it names exists, and it names every notebook and every part of lvlm_utils."""
    tree = re.search(r"## The tree\n+```\n(.*?)```", readme(), flags=re.S).group(1)
    named, folder = set(), ""
    for line in tree.splitlines():
        names = re.match(r"[\w./-]+(?:, [\w./-]+)*", line.strip()).group().split(", ")
        folder = folder if line.startswith(" ") else names[0]
        named |= {f"{folder}{name}" if line.startswith(" ") else name for name in names}
    named = {name + ".ipynb" if re.match(r"notebooks/\d\d_\w+$", name) else name for name in named}
    assert not [name for name in named if not (ROOT / name).exists()]
    notebooks = {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    files = {f"lvlm_utils/{path.name}" for path in (ROOT / "lvlm_utils").glob("*.py") if path.stem != "__init__"}
    folders = {f"lvlm_utils/{path.parent.name}/" for path in (ROOT / "lvlm_utils").glob("*/__init__.py")}
    assert not (notebooks | files | folders) - named


class Imports(ast.NodeVisitor):
    """Modules of the package that a module imports, also inside functions and by `import_module`.

    Not those for type checkers alone, nor those of a `__getattr__` that forwards names when they are first used.
    `from lvlm_utils import observe` gives "lvlm_utils.observe", and a name made when the code runs "lvlm_utils.?".
    """

    def __init__(self, module, source, modules):
        self.package = module if f"{module}.__init__" in modules else module.rpartition(".")[0]
        self.forwards = module in FORWARDING
        self.modules, self.found = {name.removesuffix(".__init__") for name in modules}, set()
        self.visit(ast.parse(source))

    def add(self, name):
        if name.split(".")[0] == "lvlm_utils":
            self.found.add(name)

    def visit_Import(self, node):
        for alias in node.names:
            self.add(alias.name)

    def visit_ImportFrom(self, node):
        above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *filter(None, [node.module])])
        for alias in node.names:
            inside = f"{base}.{alias.name}"
            if inside != "lvlm_utils.ROOT":
                self.add(inside if inside in self.modules or base == "lvlm_utils" else base)

    def visit_Call(self, node):
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if called in ("import_module", "__import__") and node.args:
            literal = isinstance(node.args[0], ast.Constant)
            self.add(node.args[0].value if literal else "lvlm_utils.?")
        self.generic_visit(node)

    def visit_If(self, node):
        for_types = "TYPE_CHECKING" in ast.unparse(node.test)
        for child in [node.test, *([] if for_types else node.body), *node.orelse]:
            self.visit(child)

    def visit_FunctionDef(self, node):
        if not (self.forwards and node.name == "__getattr__" and node.col_offset == 0):
            self.generic_visit(node)


def imported(module, source=None, modules=None):
    source = MODULES[module].read_text(encoding="utf-8") if source is None else source
    return Imports(module.removesuffix(".__init__"), source, modules or MODULES).found


def test_all_ways_to_import_are_seen():
    modules = {"lvlm_utils.__init__", "lvlm_utils.one", "lvlm_utils.pruning.__init__", "lvlm_utils.pruning.engine"}
    source = """
from typing import TYPE_CHECKING
from lvlm_utils import ROOT, observe, one
from . import engine
from ..one import f
if TYPE_CHECKING:
    from lvlm_utils.types_only import T
def g():
    from lvlm_utils.pruning.engine import E
    import lvlm_utils.pruning
    return import_module("lvlm_utils.late"), importlib.import_module(f"lvlm_utils.{name}"), import_module("torch")
def __getattr__(name):
    from lvlm_utils.methods import METHODS
"""
    seen = {"observe", "one", "pruning.engine", "pruning", "late", "?"}
    assert imported("lvlm_utils.pruning.__init__", source, modules) == {f"lvlm_utils.{name}" for name in seen}
    assert imported("lvlm_utils.pruning.engine", source, modules) == {
        f"lvlm_utils.{name}" for name in {*seen, "methods"}
    }


def test_no_circle_of_imports():
    """A package that is imported from outside is run first, so that its imports count too."""
    graph = {}
    for module in MODULES:
        own = module.removesuffix(".__init__")
        names = imported(module)
        packages = {name.rpartition(".")[0] for name in names}
        packages = {name for name in packages if name != "lvlm_utils" and not f"{own}.".startswith(f"{name}.")}
        graph[own] = (names | packages) - {own, "lvlm_utils"}
    found = []
    while True:  # one arrow of each circle that is found is taken away, so that all are listed
        try:
            TopologicalSorter(graph).prepare()
            break
        except CycleError as error:
            circle = error.args[1]  # each is imported by the next
            found.append(" <- ".join(circle))
            graph[circle[1]] = graph[circle[1]] - {circle[0]}
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "lvlm_utils.__init__"])
def test_imports_point_one_way(module):
    part = module.split(".")[1]
    assert part in MAY_IMPORT, f"{part} has no place in the order of the parts"
    wrong = {name for name in imported(module) if (*name.split("."), "")[1] not in MAY_IMPORT[part] | {part}}
    assert not wrong, wrong


def lines_without_imports(path):
    """(line number, code) without blank lines, comments and imports, however it is indented."""
    source = path.read_text(encoding="utf-8")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    left_out = {number for node in imports for number in range(node.lineno, node.end_lineno + 1)}
    lines = [(number, " ".join(line.split())) for number, line in enumerate(source.splitlines(), 1)]
    return [(number, line) for number, line in lines if line and line[0] != "#" and number not in left_out]


def twice(paths, size):
    """Blocks of at least `size` lines that appear twice: "file:first-last = file:first-last"."""
    seen, found = {}, []
    for path in paths:
        lines = lines_without_imports(path)
        blocks = [tuple(line for _, line in lines[at : at + size]) for at in range(len(lines) - size + 1)]
        for at, block in enumerate(blocks):
            first, there = seen.setdefault(block, (path, at))
            if first != path or there + size <= at:
                found.append((first, there, path, at))
    starts = [pair for pair in found if (pair[0], pair[1] - 1, pair[2], pair[3] - 1) not in found]
    return [block_names(found, pair, size) for pair in starts]


def block_names(found, pair, size):
    first, there, path, at = pair
    more = next(n for n in count() if (first, there + n + 1, path, at + n + 1) not in found)
    names = []
    for file, start in ((first, there), (path, at)):
        lines = lines_without_imports(file)
        names.append(f"{file.parent.name}/{file.name}:{lines[start][0]}-{lines[start + size - 1 + more][0]}")
    return " = ".join(names)


def test_blocks_that_appear_twice_are_seen(tmp_path):
    block = [f"a{number} = {number}" for number in range(12)]
    (tmp_path / "one.py").write_text("\n".join(["x = 1", *block, "y = 2"]))
    (tmp_path / "two.py").write_text("\n".join(["def f():", *(f"    {line}\n\n    # why" for line in block)]))
    paths = sorted(tmp_path.iterdir())
    assert twice(paths, 11) == [f"{tmp_path.name}/one.py:2-13 = {tmp_path.name}/two.py:2-35"]
    assert twice(paths, 13) == []
    imports = "from a import (\n" + "".join(f"    name{number},\n" for number in range(12)) + ")\n"
    for path in paths:
        path.write_text(imports + f"x = {path.name!r}")
    assert twice(paths, 11) == []


def test_no_block_of_more_than_ten_lines_appears_twice():
    folders = ("lvlm_utils", "tests", "benchmarks", "data")
    found = twice(sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")), 11)
    assert not found, "\n".join(found)
