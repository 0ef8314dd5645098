"""Many calls on one file: rows of another question, model, revision or run are never lost, nor taken for one's own."""

import os
import subprocess
import sys
import threading

import pandas as pd
import pytest
import torch
from conftest import ask, build, picture, same, table
from PIL import Image

import lvlm_utils as lv


def stored(out) -> pd.DataFrame:
    return pd.read_parquet(out).sort_values(["path", "revision", "question", "condition"], ignore_index=True)


def test_other_questions_about_one_folder_stay(tiny, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number, colour in enumerate(("navy", "darkred", "green")):
        picture(colour).save(tmp_path / "pictures" / f"{number}.png")
    out, found = tmp_path / "out.parquet", []
    for question in ("Is the couch in it?", "Is the dog in it?"):
        samples = lv.samples.folder(tmp_path / "pictures", question)
        found.append(ask(tiny, samples, out=out))
    assert len(pd.read_parquet(out)) == 6 and set(pd.read_parquet(out)["question"]) == set(
        pd.concat(found)["question"]
    )
    again = ask(tiny, lv.samples.folder(tmp_path / "pictures", "Is the couch in it?"), out=out)
    assert again["seconds"].tolist() == found[0]["seconds"].tolist()


@pytest.mark.parametrize("changes", ["context", "picture", "options", "batch"])
def test_whatever_else_is_asked_stays(tiny, images, tmp_path, changes):
    """Samples of one name with another context, another picture or other options."""
    out, samples, options = tmp_path / "out.parquet", table(images[:1], (20,)), {}
    first = ask(tiny, samples, out=out)
    if changes == "context":
        samples = samples.assign(context="Quiet.")
    elif changes == "picture":
        samples = samples.assign(image=images[1])
    elif changes == "options":
        options = {"max_new_tokens": 2}
    else:
        options = {"batch_size": 1}
    ask(tiny, samples, out=out, **options)
    assert len(pd.read_parquet(out)) == len(samples) * (1 if changes == "batch" else 2)
    assert ask(tiny, table(images[:1], (20,)), out=out)["seconds"].tolist() == first["seconds"].tolist()


def saved(folder, factor=1.0):
    model, processor = build()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_models_of_one_name_stay(images, tmp_path):
    samples, out = table(images[:1], (20,)), tmp_path / "out.parquet"
    models = [lv.load(saved(tmp_path / name / "final", factor)) for name, factor in (("a", 1.0), ("b", 1.3))]
    first = [ask(lvlm, samples, out=out) for lvlm in models]
    again = [ask(lvlm, samples, out=out) for lvlm in models]
    for before, after in zip(first, again, strict=True):
        assert before["seconds"].tolist() == after["seconds"].tolist()
    assert len(pd.read_parquet(out)) == 2 * len(samples) and pd.read_parquet(out)["model"].nunique() == 1


def test_revisions_of_one_model_stay(images, tmp_path):
    samples, out, first = table(images[:1], (20,)), tmp_path / "out.parquet", []
    for factor in (1.0, 1.3):
        lvlm = lv.load(saved(tmp_path / "final", factor))
        first.append(ask(lvlm, samples, out=out))
    assert len(pd.read_parquet(out)) == 2 * len(samples)
    again = ask(lv.load(saved(tmp_path / "final", 1.0)), samples, out=out)
    assert again["seconds"].tolist() == first[0]["seconds"].tolist()


def test_measurements_of_models_of_one_name_stay(tmp_path):
    class Made:
        numbers = 0

    made = Made()  # an object counts by its type

    def measure(number):
        made.numbers = made.numbers * 10 + number
        return pd.DataFrame({"number": [number]})

    models = [lv.load(saved(tmp_path / name / "final", factor)) for name, factor in (("a", 1.0), ("b", 1.3))]
    for number in (1, 2):
        for lvlm in models * 2:
            assert lv.measured(lvlm, "a", measure, number, folder=tmp_path)["number"].tolist() == [number]
    for lvlm in models:
        lv.measured(lvlm, "a", measure, 1, folder=tmp_path)
    assert made.numbers == 1122


def test_rows_of_other_weights_stay(tiny, images, tmp_path, capsys):
    """A model that was trained on has rows of its own: those of its former weights are still true of them."""
    out, samples = tmp_path / "out.parquet", table(images[:2], (20,))
    lvlm = lv.load(*build())
    ask(lvlm, samples, out=out)
    ask(lvlm, samples.assign(question="Is it?"), out=out)
    lvlm.decoder.layers[0].mlp.up_proj.weight.data.mul_(1.1)
    capsys.readouterr()
    ask(lvlm, samples, out=out)
    assert not capsys.readouterr().err and len(pd.read_parquet(out)) == 3 * len(samples)
    assert pd.read_parquet(out)["revision"].nunique() == 2


def test_failures_are_asked_again(tiny, images, tmp_path):
    out, samples = tmp_path / "out.parquet", table(images[:2], (0,))
    os.rename(images[1], images[1] + ".away")
    with pytest.warns(UserWarning, match="3 of 6 rows failed"):
        first = ask(tiny, samples, out=out)
    os.rename(images[1] + ".away", images[1])
    after = ask(tiny, samples, out=out)
    assert after["error"].isna().all() and len(pd.read_parquet(out)) == 6
    assert after["seconds"][:3].tolist() == first["seconds"][:3].tolist()


def test_a_failure_of_the_moment_is_asked_again(tiny, images, tmp_path, monkeypatch):
    out, samples = tmp_path / "out.parquet", table(images[:1], (0,))
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="3 of 3"):
        def fails(*_, **__):
            raise torch.OutOfMemoryError("out of memory")

        patch.setattr(torch.nn.functional, "linear", fails)
        ask(tiny, samples, out=out)
    assert ask(tiny, samples, out=out)["error"].isna().all() and len(pd.read_parquet(out)) == 3


# At the same time ----------------------------------------------------------------------------------------------------
def test_a_run_inside_another_one(tiny, images, tmp_path, monkeypatch):
    """The second begins and ends while the first is asking; then a third, which both know nothing of, was killed."""
    out, samples, inner = tmp_path / "out.parquet", table(images[:1], (0,)), []
    other = samples.assign(question=samples["question"] + " Really?")
    real = Image.open

    def opened(*args, **kwargs):
        if not inner:
            inner.append(None)
            inner.append(ask(tiny, other, out=out))
        return real(*args, **kwargs)

    monkeypatch.setattr(Image, "open", opened)
    first = ask(tiny, samples, out=out)
    assert len(pd.read_parquet(out)) == 6
    for rows, found in ((samples, first), (other, inner[1])):
        assert ask(tiny, rows, out=out)["seconds"].tolist() == found["seconds"].tolist()
    assert not out.with_name("out.parquet.parts").exists()


def test_threads_on_one_file(images, tmp_path):
    out, samples, found = tmp_path / "out.parquet", table(images, (0, 20)), {}
    half = [samples[samples["length"] == length] for length in (0, 20)]
    models = [lv.load(*build()) for _ in half]

    def run(number):
        found[number] = ask(models[number], half[number], out=out, batch_size=1)

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pd.read_parquet(out)) == len(samples)
    again = ask(lv.load(*build()), samples, out=out)
    assert again["seconds"].tolist() == pd.concat([found[0], found[1]]).sort_index()["seconds"].tolist()


BESIDE = """
import sys
sys.path[:0] = sys.argv[1:3]
import pandas as pd, lvlm_utils as lv
from conftest import build
samples = pd.read_pickle(sys.argv[3])
samples = samples[samples["length"].isin(map(int, sys.argv[5].split()))]
lv.answer(lv.load(*build()), samples, out=sys.argv[4], max_new_tokens=5, progress=False, batch_size=1)
"""


def test_processes_that_know_nothing_of_each_other(tiny, images, tmp_path):
    samples, out = table(images, (0, 20)), tmp_path / "out.parquet"
    samples.to_pickle(tmp_path / "samples.pkl")
    arguments = [str(lv.ROOT), os.path.dirname(__file__), str(tmp_path / "samples.pkl"), str(out)]
    def start(lengths):
        return subprocess.Popen([sys.executable, "-c", BESIDE, *arguments, lengths])

    assert [run.wait(timeout=300) for run in [start("0"), start("20")]] == [0, 0]
    content, order = out.read_bytes(), ["sample", "length"]
    assert len(pd.read_parquet(out)) == len(samples)
    same(pd.read_parquet(out).sort_values(order), ask(tiny, samples, share=False).sort_values(order))
    # by a process of its own, as the other two are: earlier tests may have changed what a key depends on
    assert start("0 20").wait(timeout=300) == 0
    assert out.read_bytes() == content


# Older layouts -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["out.parquet", "out.parquet.parts/000-000000.parquet"])
def test_a_store_of_an_older_layout_is_refused_untouched(tiny, images, tmp_path, where):
    out, old = tmp_path / "out.parquet", tmp_path / where
    old.parent.mkdir(exist_ok=True)
    pd.DataFrame({"key": ["a"], "revision": ["r"], "sample": ["0"], "method": ["none"]}).to_parquet(old)
    content = old.read_bytes()
    with pytest.raises(ValueError, match="older layout") as error:
        ask(tiny, table(images[:1], (0,)), out=out)
    assert "\n" not in str(error.value) and old.read_bytes() == content
    assert sorted(path for path in tmp_path.rglob("*.parquet") if path.is_file()) == [old]
