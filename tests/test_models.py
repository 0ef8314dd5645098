"""Opening models: from memory, a folder, by name; and one clear error for what cannot be opened."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import build

import lvlm_utils as lv
from lvlm_utils import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    path = tmp_path_factory.mktemp("models") / "my-llava"
    tiny.model.save_pretrained(path)
    tiny.processor.save_pretrained(path)
    return path


def test_root_is_the_repository():
    assert (lv.ROOT / "lvlm_utils" / "models.py").is_file()


def test_a_folder_opens_as_the_model_saved_there(folder, tiny, image):
    lvlm = lv.load(str(folder), device="cpu", attention="eager")
    assert (lvlm.name, lvlm.window, lvlm.image_token_id) == ("my-llava", 4096, tiny.image_token_id)
    assert (lvlm.dtype, lvlm.attention, lvlm.device.type) == (torch.float32, "eager", "cpu")
    with torch.inference_mode():
        logits = [m.model(**lv.prompt(m, image, "", "Is it?").inputs).logits for m in (lvlm, tiny)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)


def test_revision_follows_the_weights(folder, tmp_path, tiny):
    first = lv.load(folder, device="cpu").revision
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert lv.load(copy, device="cpu").revision == first
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert lv.load(copy, device="cpu").revision != first

    model, processor = build()
    before = lv.load(model, processor).revision
    assert before == tiny.revision
    with torch.no_grad():
        model.get_output_embeddings().weight[5, 5] += 1
    assert lv.load((model, processor)).revision != before


def test_a_model_in_memory_keeps_its_dtype():
    model, processor = build()
    assert lv.load(model.bfloat16(), processor).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llava", "vipllava", "llava_next"])
def test_families_know_their_parts(family):
    lvlm = lv.load(*build(family=family))
    assert lvlm.tower is lvlm.model.model.vision_tower
    assert lvlm.projector is lvlm.model.model.multi_modal_projector
    assert len(lvlm.decoder.layers) == 4


@pytest.mark.parametrize("name", ["tiny-lava", "/no/such/folder", "a/b/c"])
def test_an_unknown_name_lists_what_is_accepted(name):
    with pytest.raises(ValueError, match=r"tiny-llava, tiny-llava-long; a local folder or a hub id"):
        lv.load(name)


def test_a_hub_id_that_cannot_be_opened_says_so(monkeypatch):
    def offline(*_, **__):
        raise OSError("no such repository\nand a long explanation")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", offline)
    with pytest.raises(ValueError, match="'some/model' is no model.*cannot be opened: no such repository$"):
        lv.load("some/model")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        lv.load(tmp_path)


def test_an_embedded_model_that_is_not_built(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="data/tiny-llava-long"):
        lv.load("tiny-llava-long")


def test_an_unknown_architecture_lists_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="Unknown architecture 'bert'. Known: llava, llava_next, vipllava"):
        lv.load(tmp_path)
    with pytest.raises(ValueError, match="'bert'"):
        models._known_family(SimpleNamespace(model_type="bert"))


def test_only_safetensors_are_read(folder, tmp_path, tiny):
    copy = shutil.copytree(folder, tmp_path / "pickled")
    (copy / "model.safetensors").unlink()
    torch.save(tiny.model.state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        lv.load(copy)


def test_a_model_in_memory_needs_a_processor(tiny):
    with pytest.raises(ValueError, match="load\\(model, processor\\)"):
        lv.load(tiny.model)
