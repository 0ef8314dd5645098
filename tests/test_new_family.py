"""Adding a family is adding a record: one registered here, at run time, is opened, observed, grouped and pruned."""

from dataclasses import replace

import processors
import pytest
import torch
from conftest import text_of
from families import build
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

import lvlm_utils as lv
from lvlm_utils import efficiency
from lvlm_utils.families import FAMILIES, Family, find_family


class OwnConfig(LlavaConfig):
    model_type = "own_llava"


class OwnLlava(LlavaForConditionalGeneration):
    config_class = OwnConfig


@pytest.fixture
def own(monkeypatch):
    """(an OwnLlava of which nobody knows yet, a LLaVA with the same weights)."""
    llava = build("llava", window=2048)
    config = OwnConfig(**{key: value for key, value in llava.config.to_dict().items() if key != "model_type"})
    model = OwnLlava(config).eval()
    model.load_state_dict(llava.state_dict())
    with pytest.raises(ValueError, match="Unknown architecture own_llava.*Known: deepseek_vl, "):
        lv.load(model, processors.processor("llava"))
    monkeypatch.setitem(FAMILIES, "own_llava", FAMILIES["llava"])
    return model, llava


def test_it_is_opened_grouped_observed_and_pruned_like_the_family_whose_record_it_has(own):
    image, found = Image.effect_noise((60, 40), 90), []
    for model in own:
        lvlm = lv.load(model, processors.processor("llava"))
        prompt = lv.prompt(lvlm, [image, None], text_of(20), "Is it?")
        with lv.observe(lvlm, prompt.groups) as seen:
            lv.generate(lvlm, prompt, 1)
        kept = {}
        for method in ("fastv", "vispruner", "divprune", "random"):
            one = lv.prompt(lvlm, image, text_of(20), "Is it?")
            with lv.prune(lvlm, method, keep=5) as trace:
                kept[method] = lv.generate(lvlm, one, 3), trace.kept
        found.append((lvlm.family, vars(prompt.groups), seen, kept, efficiency.tower_flops(model.config)))
    (family, groups, seen, kept, flops), wanted = found
    assert family is wanted[0] and flops == wanted[4]
    assert all(torch.equal(groups[name], wanted[1][name]) for name in groups) and (groups["row"] >= 0).any()
    assert torch.equal(seen.received, wanted[2].received) and torch.equal(seen.vision.cls, wanted[2].vision.cls)
    for method, (text, trace) in kept.items():
        assert text == wanted[3][method][0] and torch.equal(trace, wanted[3][method][1]) and not trace.all()


def test_it_is_read_from_a_folder(own, tmp_path, monkeypatch):
    model, llava = own
    for auto, known in ((AutoConfig, OwnConfig), (AutoModelForImageTextToText, OwnLlava)):
        names = ("own_llava", known) if auto is AutoConfig else (OwnConfig, known)
        auto.register(*names, exist_ok=True)
    model.save_pretrained(tmp_path)
    processors.processor("llava").save_pretrained(tmp_path)
    lvlm = lv.load(tmp_path, device="cpu")
    assert type(lvlm.model) is OwnLlava and lvlm.tower is lvlm.model.model.vision_tower


def test_what_a_record_says_is_what_happens(own, monkeypatch):
    """A record with another layout and without one-by-one patches: places and FLOPs follow it alone."""
    model, _ = own
    nowhere = replace(FAMILIES["llava"], layout={}, patches=None)
    monkeypatch.setitem(FAMILIES, "own_llava", nowhere)
    lvlm = lv.load(model, processors.processor("llava"))
    groups = lv.prompt(lvlm, Image.new("RGB", (40, 40)), "", "Is it?").groups
    assert groups.visual.sum() == 16 and (groups.image[groups.visual] == 0).all() and (groups.row == -1).all()
    with pytest.raises(ValueError, match="'own_llava' has windows"):
        efficiency.tower_flops(model.config)
    assert find_family("own_llava", []) is nowhere and isinstance(nowhere, Family)


def test_an_unverified_one_is_opened_with_a_warning(own, monkeypatch):
    model, _ = own
    monkeypatch.setitem(FAMILIES, "own_llava", replace(FAMILIES["llava"], verified=False))
    with pytest.warns(UserWarning, match="own_llava is unverified"):
        lvlm = lv.load(model, processors.processor("llava"))
    assert lv.generate(lvlm, lv.prompt(lvlm, Image.new("RGB", (40, 40)), "", "Is it?"), 2) is not None
