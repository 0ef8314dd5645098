"""benchmarks/gpu.sh: every part runs through at tiny sizes, reports hold what they should, a failure stops nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lvlm_utils as lv

PARTS = ("tests", "observe", "saliency", "pruning", "larger")
VISUAL = [name for name, method in lv.methods.METHODS.items() if method.kind != "text"]


def run(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    ours |= {"PYTHON": sys.executable, **environment}
    return subprocess.run(["bash", lv.ROOT / "benchmarks" / "gpu.sh", *options, folder], env=ours, capture_output=True,
                          text=True, cwd=folder)  # fmt: skip


def read(folder: Path, part: str) -> dict:
    return json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))


def stub(folder: Path, *cases: str) -> str:
    """A python that notes what it is asked, and answers as the `cases` of a shell's case say."""
    path = folder / "python"
    lines = ["#!/bin/sh", f'echo "$*" >>"{folder}/asked"', 'case "$*" in', *(f"{case} ;;" for case in cases), "esac"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    done = run(folder, "--small")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return folder, done.stdout


def test_every_part_runs_through_and_says_with_what(small):
    folder, said = small
    assert {part: one["state"] for part, one in read(folder, "status").items()} == dict.fromkeys(PARTS, "done")
    for part in PARTS:
        report = read(folder, part)
        assert report["part"] == part and report["small"] and report["finished"] and report["seconds"] > 0
        assert {"torch", "transformers", "device"} <= report["machine"].keys()
        assert report["rows"] and not any("error" in row for row in report["rows"])
    assert "needed: " in said.split("== tests")[0]


def test_the_tests_are_reported_one_by_one(small):
    rows = read(small[0], "tests")["rows"]
    assert {row["outcome"] for row in rows} == {"passed"}
    of_methods = [row for row in rows if "test_methods_in_a_batch" in row["test"]]
    assert len(of_methods) == 3 * len(lv.methods.METHODS)
    assert all(0 <= one <= 1 for row in of_methods for one in row["figures"]["agreement"])


@pytest.mark.parametrize("part, ways", [("observe", "plain some all eager"), ("saliency", "plain streamed eager")])
def test_seconds_and_memory_of_every_way(small, part, ways):
    rows = read(small[0], part)["rows"]
    timed = [row for row in rows if row["way"] != "apart"]
    assert {row["way"] for row in timed} == set(ways.split()) and len({row["tokens"] for row in timed}) == 2
    assert all(row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"] for row in timed)
    assert all("extra_GB" in row for row in timed)
    [from_eager] = [row for row in rows if row["way"] == "apart"]
    assert 0 <= from_eager["largest"] < 1e-4


def test_every_method_stands_beside_the_papers(small):
    report = read(small[0], "pruning")
    plain, rows = report["rows"][0], report["rows"][1:]
    assert {row["method"] for row in rows} == set(VISUAL) and plain["method"] is None
    assert all(row["of_plain"] > 0 and row["tpot_ms"] > 0 for row in rows)
    assert all(row["visual_tokens_last_layer"] < plain["visual_tokens"] for row in rows if row["keep"] < 400)
    tables = {one["table"] for row in report["rows"] for one in row["paper"]}
    assert tables == {"VisPruner Tab. 6", "FoPru Tab. 2"}
    tables = {one["table"] for row in read(small[0], "larger")["rows"] for one in row["paper"]}
    assert {"VisPruner Tab. 7", "VisPruner Tab. 8", "FoPru Tab. 1", "FoPru Tab. 5"} == tables


def test_a_measurement_that_fails_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(lv.ROOT / "benchmarks"))
    import gpu

    monkeypatch.setattr(gpu, "PARTS", {"observe": broken})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "observe", "--small", "--out", str(tmp_path / "observe.json")])
    assert gpu.main() == 1
    first, second = read(tmp_path, "observe")["rows"]
    assert first == {"way": "first", "error": "ValueError: no"} and second == {"way": "second", "seconds": 1}


def broken(report):
    def fail():
        raise ValueError("no\nsecond line")

    report.row(fail, way="first")
    report.row(lambda: {"seconds": 1}, way="second")


def test_a_part_that_fails_stops_no_other(tmp_path):
    done = run(tmp_path, "--small", PYTHON=stub(tmp_path, "*gpu.py*saliency*) exit 1"))
    states = {part: one["state"] for part, one in read(tmp_path, "status").items()}
    assert states == {**dict.fromkeys(PARTS, "done"), "saliency": "failed"} and done.returncode == 1


@pytest.mark.parametrize("answer, says", [(3, "wheels"), (4, "There is no GPU")])
def test_what_is_missing_is_said_before_anything_runs(tmp_path, answer, says):
    done = run(tmp_path, PYTHON=stub(tmp_path, f"*versions.py*) exit {answer}"), WHEELS=str(tmp_path / "none"))
    assert done.returncode == 2 and says in done.stderr and "gpu.py" not in (tmp_path / "asked").read_text()


def test_wheels_that_were_brought_along_are_used(tmp_path):
    """They come before what is installed, for this run alone."""
    (tmp_path / "some.whl").touch()
    answers = ('*versions.py*) test -n "$PYTHONPATH" || exit 3', '*install*--no-index*some.whl*) exit 0',
               '*gpu.py*) test -n "$PYTHONPATH" || exit 1')  # fmt: skip
    done = run(tmp_path, "--small", PYTHON=stub(tmp_path, *answers), WHEELS=str(tmp_path), PYTHONPATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "install" in (tmp_path / "asked").read_text()
