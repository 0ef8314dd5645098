"""lv.answer with out=: resume after a kill, nothing stale, several processes on one file."""

import os
import subprocess
import sys
import types

import pandas as pd
import pytest
import torch
from conftest import ask, build, picture, same, table

import lvlm_utils as lv
from lvlm_utils import evaluate, results

ADD = results.Store.add


class Counted:
    """How many pictures were put to the model, and optionally an end after some of them.

    What answers run through decides whether they are read back, so nothing of it is replaced.
    """

    def __init__(self, monkeypatch, stop_after=None):
        self.pictures, self.stop_after = 0, stop_after
        monkeypatch.setattr(results.Store, "add", lambda store, rows: self(store, rows))

    def __call__(self, store, rows):
        if self.stop_after is not None and self.pictures >= self.stop_after:
            raise KeyboardInterrupt
        self.pictures += rows["image_id"].nunique()
        ADD(store, rows)


def test_a_second_run_asks_nothing_and_returns_the_same(tiny, images, tmp_path, monkeypatch):
    out, samples = tmp_path / "deep" / "results.parquet", table(images)
    first = ask(tiny, samples, out=out)
    content = out.read_bytes()
    counted = Counted(monkeypatch)
    pd.testing.assert_frame_equal(ask(tiny, samples, out=out), first)
    assert counted.pictures == 0 and out.read_bytes() == content
    half = ask(tiny, samples.iloc[::-2], out=out)  # fewer samples in another order: still no work, still in order
    pd.testing.assert_frame_equal(half, first.iloc[::-2])
    assert counted.pictures == 0


@pytest.fixture
def eight(images) -> pd.DataFrame:
    """Samples about eight pictures, which are four under two names."""
    for path in images:
        os.link(path, f"{path}.copy.png")
    return table(images + [f"{path}.copy.png" for path in images], (0, 20))


def test_an_interrupted_run_continues(tiny, eight, tmp_path, monkeypatch):
    out, samples = tmp_path / "results.parquet", eight
    plain = ask(tiny, samples)
    Counted(monkeypatch, stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        ask(tiny, samples, out=out, batch_size=4)
    assert not out.exists() and len(list(out.with_name("results.parquet.parts").iterdir())) == 1
    counted = Counted(monkeypatch)
    same(ask(tiny, samples, out=out, batch_size=4), plain)
    assert counted.pictures == 4
    assert [path.name for path in tmp_path.glob("results*")] == ["results.parquet"]
    assert len(pd.read_parquet(out)) == len(samples)


KILLED = """
import os, sys
sys.path[:0] = sys.argv[1:3]
import pandas as pd, pyarrow.parquet, lvlm_utils as lv
from conftest import build
import lvlm_utils.results as results
real = os.replace
def replace(old, new):
    if replace.calls:
        os._exit(9)          # as a kill in the middle of writing: the temporary file is there, the rename is not
    replace.calls += 1
    real(old, new)
replace.calls = 0
results.os.replace = replace
options = {"batch_size": 4, "progress": False, "max_new_tokens": 5}
lv.answer(lv.load(*build()), pd.read_pickle(sys.argv[3]), out=sys.argv[4], **options)
"""


RESUMED = """
import sys
sys.path[:0] = sys.argv[1:3]
import pandas as pd, lvlm_utils as lv
from conftest import build
import lvlm_utils.results as results
asked, add = [], results.Store.add
def counted(store, rows):
    asked.append(rows["image_id"].nunique())
    add(store, rows)
results.Store.add = counted
options = {"batch_size": 4, "progress": False, "max_new_tokens": 5}
lv.answer(lv.load(*build()), pd.read_pickle(sys.argv[3]), out=sys.argv[4], **options)
print(sum(asked))
"""


def test_a_killed_process_loses_only_its_chunk(tiny, eight, tmp_path):
    samples, out = eight, tmp_path / "results.parquet"
    samples.to_pickle(tmp_path / "samples.pkl")
    here = os.path.dirname(__file__)
    arguments = [str(lv.ROOT), here, str(tmp_path / "samples.pkl"), str(out)]
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False).returncode == 9
    resumed = subprocess.run([sys.executable, "-c", RESUMED, *arguments], check=True, capture_output=True, text=True)
    assert int(resumed.stdout.split()[-1]) == 4  # of eight
    same(ask(tiny, samples, out=out, batch_size=4), ask(tiny, samples, share=False))
    assert not out.with_name("results.parquet.parts").exists()


def test_a_run_that_ended_before_its_parts_were_merged(tiny, images, tmp_path, monkeypatch):
    out, samples = tmp_path / "results.parquet", table(images, (0, 20))
    with monkeypatch.context() as patch:
        patch.setattr(results.Store, "finish", lambda *_: None)
        first = ask(tiny, samples, out=out)
    counted = Counted(monkeypatch)
    pd.testing.assert_frame_equal(ask(tiny, samples, out=out), first)
    assert counted.pictures == 0 and len(pd.read_parquet(out)) == len(samples)


def test_changed_data_or_model_is_asked_again(tiny, images, tmp_path, monkeypatch, capsys):
    out, samples = tmp_path / "results.parquet", table(images)
    before = ask(tiny, samples, out=out)
    counted = Counted(monkeypatch)

    changed = samples.copy()
    changed.loc[3, "context"] += " And more."
    after = ask(tiny, changed, out=out)
    assert counted.pictures == 1 and capsys.readouterr().err == ""  # another question: the first one's row stays
    assert after.loc[3, "margin"] != before.loc[3, "margin"] and len(pd.read_parquet(out)) == len(samples) + 1

    ask(tiny, samples, "white", out=out)  # another condition stands beside, nothing is dropped
    assert capsys.readouterr().err == "" and len(pd.read_parquet(out)) == 2 * len(samples) + 1

    picture("purple", 3).save(images[2])  # other bytes under the same name
    repainted = ask(tiny, changed, out=out)
    assert "9 stale rows dropped" in capsys.readouterr().err
    assert (repainted["margin"] != after["margin"]).tolist() == [row // 9 == 2 for row in range(len(samples))]

    model, processor = build()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.01)
    retrained = ask(lv.load(model, processor), changed, out=out)  # another revision stands beside
    assert capsys.readouterr().err == "" and (retrained["margin"] != repainted["margin"]).all()
    assert set(pd.read_parquet(out)["revision"]) == {*before["revision"], *retrained["revision"]}
    assert before["revision"].nunique() == retrained["revision"].nunique() == 1
    assert len(pd.read_parquet(out)) == 3 * len(samples) + 1


def test_labels_come_from_the_samples_not_from_the_file(tiny, images, tmp_path, monkeypatch):
    out, samples = tmp_path / "results.parquet", table(images[:1])
    monkeypatch.setattr(evaluate, "parse", lambda *_: "yes")
    first = ask(tiny, samples, out=out, stop=())
    flipped = ask(tiny, samples.assign(label=samples["label"].map({"yes": "no", "no": "yes"})), out=out, stop=())
    assert first["seconds"].tolist() == flipped["seconds"].tolist()
    assert (first["correct"] != flipped["correct"]).all()


def test_a_file_that_is_something_else_is_not_overwritten(tiny, images, tmp_path):
    out = tmp_path / "other.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(out)
    with pytest.raises(ValueError, match="other.parquet holds no results of answer"):
        ask(tiny, table(images[:1]), out=out)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="broken.parquet is not a readable parquet file"):
        ask(tiny, table(images[:1]), out=tmp_path / "broken.parquet")
    assert pd.read_parquet(out)["a"].tolist() == [1]


SHARDED = """
import sys
sys.path[:0] = sys.argv[1:3]
import pandas as pd, lvlm_utils as lv
from conftest import build
import os
found = lv.answer(lv.load(*build()), pd.read_pickle(sys.argv[3]), out=sys.argv[4], max_new_tokens=5, progress=False)
found.to_pickle(sys.argv[4] + os.environ["RANK"])
"""


def test_two_processes_share_the_pictures(tiny, images, tmp_path):
    samples, out = table(images, (0, 20)), tmp_path / "results.parquet"
    samples.to_pickle(tmp_path / "samples.pkl")
    arguments = [str(lv.ROOT), os.path.dirname(__file__), str(tmp_path / "samples.pkl"), str(out)]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, *arguments],
            env={**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    expected = ask(tiny, samples)
    for rank in ("0", "1"):
        same(pd.read_pickle(f"{out}{rank}"), expected)
    assert len(pd.read_parquet(out)) == len(samples)


def test_a_process_that_starts_late_leaves_no_picture_out(tiny, images, tmp_path, monkeypatch):
    """Each of two processes asks its own pictures, whatever rows of the other it finds on disk."""
    samples, asked = table(images, (0,)), []
    state = types.SimpleNamespace(process_index=0, num_processes=2, wait_for_everyone=lambda: None)
    monkeypatch.setattr(evaluate, "_processes", lambda lvlm: state)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda rows: asked.extend(rows) or list(asked))
    monkeypatch.setattr(evaluate.Store, "finish", lambda *_: None)  # rank 0 is not done while the other runs
    for rank in (0, 1):
        state.process_index = rank
        if rank == 0:
            with pytest.raises(RuntimeError, match="6 of 12 rows were not answered"):  # none of rank 1 has arrived
                evaluate.answer(tiny, samples, out=tmp_path / "results.parquet", progress=False)
        else:
            found = evaluate.answer(tiny, samples, out=tmp_path / "results.parquet", progress=False)
    assert len(asked) == len(samples) and found["raw"].notna().all()
