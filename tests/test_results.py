"""lv.measured: measurements are read back as long as nothing they depend on has changed, and never otherwise."""

import dataclasses
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import lvlm_utils as lv
from lvlm_utils import results

FACTOR = 2
calls = SimpleNamespace(made=[])  # not a list: that would count as a value the functions read


def scaled(values):
    """Beside `measure`: its source counts too."""
    return [FACTOR * value for value in values]


def measure(values, offset=0.5):
    calls.made.append("table")
    for value in scaled(values):
        yield pd.DataFrame({"value": [value + offset], "name": [str(value)], "small": np.float32([value / 3])})


def arrays(values):
    calls.made.append("arrays")
    return {"in order, [CLS]": np.float32(values) / 3, "which": np.array(values) > 1, "names": np.array(["a", "bc"])}


def looked(rows):
    calls.made.append("rows")
    return rows[["question"]].reset_index(drop=True)


def countdown(n):
    calls.made.append("countdown")
    return {"n": np.array(n)} if n == 0 else countdown(n - 1)


@pytest.fixture
def measured(tiny, tmp_path):
    calls.made.clear()
    return partial(lv.measured, tiny, folder=tmp_path / "deep" / "tiny")


def test_a_table_is_measured_once_and_both_runs_get_the_same(measured, tmp_path):
    first, second = measured("05_units", measure, [1, 2]), measured("05_units", measure, [1, 2])
    assert calls.made == ["table"]
    pd.testing.assert_frame_equal(first, second)
    pd.testing.assert_frame_equal(second, pd.concat(measure([1, 2]), ignore_index=True))
    assert [file.suffix for file in (tmp_path / "deep" / "tiny").iterdir()] == [".parquet"]


def test_arrays_keep_dtype_shape_and_every_bit(measured):
    first, second = measured("a", arrays, (1, 2)), measured("a", arrays, (1, 2))
    assert calls.made == ["arrays"]
    for name, value in arrays((1, 2)).items():
        for found in (first[name], second[name]):
            np.testing.assert_array_equal(found, value)
            assert found.dtype == value.dtype and found.shape == value.shape


def changed_value(monkeypatch, tiny):
    monkeypatch.setitem(globals(), "FACTOR", 3)


def changed_helper(monkeypatch, tiny):
    def scaled(values):
        return [2 * value for value in values]

    monkeypatch.setitem(globals(), "scaled", scaled)


def changed_default(monkeypatch, tiny):
    monkeypatch.setattr(measure, "__defaults__", (0.25,))


def changed_dtype(monkeypatch, tiny):
    monkeypatch.setattr(type(tiny), "dtype", torch.float16)


CHANGES = [changed_value, changed_helper, changed_default, changed_dtype]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_measurement_depends_on_is_noticed(measured, tiny, monkeypatch, change):
    measured("a", measure, [1])
    change(monkeypatch, tiny)
    measured("a", measure, [1])
    assert calls.made == ["table", "table"]


def test_rows_count_by_content_and_pictures_by_their_bytes(measured, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    rows = pd.DataFrame({"image": [str(tmp_path / "a.png")], "question": ["Is it red?"], "relevance": [[{"from": 1}]]})
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    measured("a", looked, rows)
    measured("a", looked, rows.assign(image=str(tmp_path / "b.png")))  # the same picture elsewhere
    assert calls.made == ["rows"]
    for other in (rows.assign(question="Is it blue?"), rows.assign(relevance=[[{"from": 2}]]), pd.concat([rows, rows]),
                  rows.assign(image=[Image.new("RGB", (8, 8), "red")])):  # fmt: skip
        measured("a", looked, rows)
        calls.made.clear()
        measured("a", looked, other)
        assert calls.made == ["rows"]
    measured("a", looked, rows)
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "a.png")
    calls.made.clear()
    measured("a", looked, rows)
    assert calls.made == ["rows"]


def test_names_and_questions_stand_side_by_side_and_an_older_state_is_removed(measured, tmp_path, monkeypatch):
    for name, values in (("a", [1]), ("a-b", [1]), ("a", [2])):
        measured(name, measure, values)
    for name, values in (("a", [1]), ("a-b", [1]), ("a", [2])):
        measured(name, measure, values)
    files = sorted(file.name.rsplit("-", 2)[0] for file in (tmp_path / "deep" / "tiny").iterdir())
    assert files == ["a", "a", "a-b"] and len(calls.made) == 3
    monkeypatch.setitem(globals(), "FACTOR", 3)
    measured("a", measure, [2])
    assert len(list((tmp_path / "deep" / "tiny").iterdir())) == 3 and len(calls.made) == 4


@pytest.mark.parametrize("broken", ["to_parquet", "replace"])
def test_a_kill_leaves_the_old_file_and_no_part(measured, tmp_path, monkeypatch, broken):
    def kill(*_):
        raise KeyboardInterrupt

    measured("a", measure, [1])
    before = {file: file.read_bytes() for file in (tmp_path / "deep" / "tiny").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame if broken == "to_parquet" else os, broken, kill)
        patch.setitem(globals(), "FACTOR", 5)
        with pytest.raises(KeyboardInterrupt):
            measured("a", measure, [1])
    assert {file: file.read_bytes() for file in (tmp_path / "deep" / "tiny").iterdir()} == before


def test_code_may_name_the_repository_and_where_results_go(tmp_path, monkeypatch):
    """These change with every run, and hold thousands of files; any other folder counts by the bytes in it."""
    root = tmp_path / "home" / "repository"
    (root / "results").mkdir(parents=True)
    (root / "data" / "inner").mkdir(parents=True)
    monkeypatch.setattr(lv, "ROOT", root)
    monkeypatch.setattr(results, "ROOT", root)
    home, cache, data = root.parent, root / "results" / "mine", root / "data"

    def measure():
        return lv.ROOT, home, cache

    def read():
        return data

    before = [results.fingerprint(one) for one in (measure, read)]
    for place in (root, home, cache):
        place.mkdir(exist_ok=True)
        (place / "more").write_text("one more")
    assert results.fingerprint(measure) == before[0]
    assert results.fingerprint(read) == before[1]
    (data / "inner" / "table.csv").write_text("changed")
    assert results.fingerprint(read) != before[1]


def test_a_function_may_call_itself(measured):
    assert measured("a", countdown, 2)["n"] == 0
    measured("a", countdown, 2)
    assert len(calls.made) == 3


def test_default_folder_is_that_of_the_model(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    lv.measured(dataclasses.replace(tiny, name="some-model"), "a", measure, [1])
    assert len(list((tmp_path / "results" / "some-model").glob("a-*.parquet"))) == 1
