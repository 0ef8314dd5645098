"""Every method in every family, inside generate(): it drops what it should, in a batch as alone, or says why not."""

import functools
import inspect

import numpy as np
import pytest
import torch
from families import FAMILY_NAMES
from PIL import Image
from processors import lvlm

import lvlm_utils as lv

METHODS = lv.pruning.METHODS
OPTIONS = {
    "context": {"drop": 0.3, "layers": range(2)}, "spatten": {"drop": 0.5}, "ltp": {"theta": 2.0},
    "random": {"keep": 0.5}, "fastv": {"keep": 0.5}, "sparsevlm": {"keep": 0.4}, "pyramiddrop": {}, "prumerge": {},
    "prumerge_plus": {}, "tome": {"keep": 0.5}, "downsample": {"keep": 0.25},
}  # fmt: skip
GRID = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}  # positions on a grid cannot be numbered anew
opened = functools.cache(lvlm)


def picture(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def options(name, family):
    chosen = dict(OPTIONS.get(name, {"keep": 0.5}))
    if family in GRID and "positions" in inspect.signature(METHODS[name].plan).parameters:
        chosen["positions"] = "original"
    return chosen


def prompts(family):
    """Two prompts of unequal pictures and text, together and one by one."""
    images = [picture(60, 44, 0), picture(40, 90, 1)]
    context = ["The room is quiet and the light falls on the floor.", "Two books lie on the table. The chair is red."]
    question = ["Is the couch in the image? (Please answer with yes or no.)", "What do you see on the left side?"]
    model = opened(family)
    alone = [lv.prompt(model, *one) for one in zip(images, context, question, strict=True)]
    return lv.prompt(model, images, context, question), alone


def run(family, name, prompt):
    with lv.prune(opened(family), name, **options(name, family)) as trace, torch.no_grad():
        text = lv.generate(opened(family), prompt, max_new_tokens=3)
    real = prompt.inputs["attention_mask"].bool()
    kept = trace.kept
    return text, [kept[:, row, here].clone() for row, here in enumerate(real)], prompt.groups


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_every_family(name, family):
    together, alone = prompts(family)
    try:
        text, kept, groups = run(family, name, together)
    except ValueError as reason:
        assert family not in ("llava", "video_llava"), reason  # all methods work in these
        assert any(other in str(reason) for other in METHODS), reason  # it names one that can be taken instead
        return
    text_method = METHODS[name].KIND == "text"
    for row, one in enumerate(alone):
        own_text, (own,), own_groups = run(family, name, one)
        assert torch.equal(own, kept[row]) and own_text == text[row]  # the same in a batch as alone
        visual, spared = own_groups.visual[0], own_groups.question[0] | own_groups.system[0]
        assert own[:, -1].all() and own[:, spared].all()
        dropped = own_groups.context[0] if text_method else visual
        assert own[:, ~dropped].all()
        left, whole = int(own[-1][dropped].sum()), int(dropped.sum())
        assert (name != "ltp") <= left < whole + (name == "prumerge_plus")  # both adapt: all may go, or all stay


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name):
    method = METHODS[name]
    assert method.KIND in ("text", "visual, before the LLM", "visual, inside the LLM")
    assert isinstance(method.NEEDS_CLS, bool)
    assert all(isinstance(text, str) and text for text in (method.OFFICIAL, method.DEVIATIONS))
    assert "positions" in inspect.signature(method.plan).parameters
    if method.NEEDS_CLS:
        with pytest.raises(ValueError, match=r"\[CLS\]") as refused:
            method.plan(opened("deepseek_vl"), **OPTIONS.get(name, {"keep": 0.5}))
        assert any(other in str(refused.value) for other in METHODS if other != name)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].KIND != "text"])
def test_every_visual_method_prunes_the_frames_of_a_video(name):
    """Video-LLaVA: frames have a [CLS] token of their own, which methods before the language model leave out."""
    model = opened("video_llava")
    prompt = lv.prompt(model, question="Is the couch in the image?", video=tuple(picture(40, 40, i) for i in range(3)))
    with lv.prune(model, name, **options(name, "video_llava")) as trace:
        lv.generate(model, prompt, max_new_tokens=2)
    visual, patches = (prompt.groups.visual[0], prompt.groups.visual[0] & (prompt.groups.row[0] >= 0))
    left = int(trace.kept[-1, 0, visual].sum())
    assert int(visual.sum()) == 51 and int(patches.sum()) == 48
    assert 0 < left <= 48 and (left < 48 or name == "prumerge_plus")
