"""The benchmarks run through at tiny sizes, and their reports have what notebooks and the README read."""

import json
import sys

import pytest

import lvlm_utils as lv


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script of benchmarks/ with these sizes, and read its report."""
    monkeypatch.syspath_prepend(str(lv.ROOT / "benchmarks"))

    def run(name: str, *options: str, **constants: object) -> dict:
        script = __import__(name)
        for constant, value in constants.items():
            monkeypatch.setattr(script, constant, value)
        sizes = ("--width", "64", "--heads", "4", "--layers", "4", "--repeats", "1", "--out", str(tmp_path / "report"))
        monkeypatch.setattr(sys, "argv", [name, *sizes, *options])
        script.main()
        return json.loads((tmp_path / "report").read_text(encoding="utf-8"))

    return run


def peak(script, options, way, tokens):
    """In place of a process for each way: what these print is seen below."""
    return {"plain": 1, "eager": 3}.get(way, 2) * 2**20


def test_attention(run):
    report = run("attention", "--tokens", "640", "--long", "0", alone=peak)
    assert set(report["tokens"]["640"]["ways"]) == {"plain", "some", "all", "eager"}
    assert report["tokens"]["640"]["extra_of_eagers_extra"] == {"some": 0.5, "all": 0.5}
    assert max(report["largest_difference_from_eager"].values()) < 1e-4


def test_saliency(run):
    [found] = run("saliency", "--tokens", "640", "--long", "0", alone=peak)["tokens"].values()
    assert set(found["ways"]) == {"plain", "streamed", "eager"} and found["largest_relative_difference"] < 1e-4


@pytest.mark.parametrize("name, way", [("attention", "some"), ("saliency", "streamed")])
def test_memory_of_one_way(monkeypatch, capsys, name, way):
    monkeypatch.syspath_prepend(str(lv.ROOT / "benchmarks"))
    sizes = ("--width", "64", "--heads", "4", "--layers", "2", "--alone", f"{way},640")
    monkeypatch.setattr(sys, "argv", [name, *sizes])
    __import__(name).main()
    assert float(capsys.readouterr().out) >= 0


def test_pruning(run):
    report = run("pruning", "--deep", "2", "--steps", "2")
    assert set(report["prefill"]) == {"plain", "idle", "half", "fastv"} and set(report["decode"]) == {"plain", "pruned"}
    assert report["prefill"]["half"]["ideal"] > 1


def test_selection(run):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "image_size": 336, "patch_size": 14}
    report = run("selection", CLIP_L=small, SIZES=((576, 1),))
    visual = {name for name, method in lv.methods.METHODS.items() if method.kind != "text"}
    for share in map(str, report["shares"]):
        found = report["prefill"][share]
        assert set(found) == visual and all("of_plain" in one or "cannot" in one for one in found.values())
    assert "cannot" in report["prefill"][str(report["shares"][-1])]["tome"]  # it halves at most, in each layer
