"""What methods see of pictures: tokens and patches belong together in every family, and what is kept goes on."""

import numpy as np
import pytest
import torch
from families import CASES, REGISTERS, TOWERS, build, inputs
from PIL import Image
from processors import lvlm as opened
from recomputation import Chooses

import lvlm_utils as lv
from lvlm_utils.attention.towers import has_cls

CLASS = {"llava", "vipllava", "llava_next", "llava_next_video", "video_llava", "internvl", *TOWERS}  # towers with [CLS]
PATCHES = {*CLASS, "llava_onevision", "deepseek_vl"} - {"internvl"}  # a token is a patch
MERGED = {"internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm"}  # it is four


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def repainted(image, seed):
    """The picture with noise in one place."""
    out, rng = np.array(image), np.random.default_rng(seed)
    top, left = rng.integers(out.shape[0] - 10), rng.integers(out.shape[1] - 10)
    out[top : top + 10, left : left + 10] = rng.integers(0, 256, (10, 10, 3))
    return Image.fromarray(out)


def correlation(x, y):
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def looking(model, sees, found):
    """A plan that keeps everything and hands over the pictures."""

    def choose(tokens):
        found.extend(tokens.pictures)
        return tokens.by_picture(lambda pictures: torch.ones_like(pictures.slots, dtype=torch.bool))

    return Chooses((0,), choose, seen=sees)


def look(lvlm, images, sees, **how):
    found = []
    prompt = lv.prompt(lvlm, images, question=["Is the couch in the image?", "What do you see?"][: len(images)])
    with torch.no_grad(), lv.prune(lvlm, looking(lvlm, sees, found)):
        lv.generate(lvlm, prompt, max_new_tokens=1, **how)
    return found, prompt


@pytest.mark.parametrize("family", CASES)
def test_tokens_are_the_patches_that_the_tower_saw(family):
    """Where a picture changes, the same token changes most in the tower and in the language model."""
    lvlm, agree, shifted = opened(family), [], []
    for seed in range(4):
        images = [picture(60, 44), picture(40, 90, seed=1)]
        before, _ = look(lvlm, images, {"hidden": 0})
        after, prompt = look(lvlm, [repainted(image, seed) for image in images], {"hidden": 0})
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old.slots, new.slots) and torch.equal(old.rows, new.rows)
            for at, view in enumerate(old.views):
                change = (view.picture.seen["hidden"][0] - new.views[at].picture.seen["hidden"][0]).norm(dim=-1)
                change = change[len(change) - view.size :]  # without [CLS]
                change = old._of_tokens(change, view)
                moved = (old.projected[at] - new.projected[at]).norm(dim=-1)
                if moved.max() > 0:
                    agree.append(correlation(change, moved))
                    shifted += [correlation(change.roll(by), moved) for by in range(1, len(change))]
        slots = torch.zeros_like(prompt.groups.visual)
        for pictures in after:
            slots[pictures.rows[:, None], pictures.slots] = True
        assert torch.equal(slots, prompt.groups.visual & (prompt.groups.row >= 0))
    assert len(agree) >= 4 and np.mean(shifted) < 0.1
    assert np.mean(agree) > (0.4 if family == "deepseek_vl_hybrid" else 0.7)  # half of its tokens is another tower's


@pytest.mark.parametrize("family", CASES)
def test_features_are_what_is_projected(family):
    lvlm = opened(family)
    found, _ = look(lvlm, [picture(60, 44), picture(40, 90)], {"hidden": -1})
    for pictures in found:
        if family in PATCHES:
            torch.testing.assert_close(pictures.project(pictures.features), pictures.projected, rtol=1e-5, atol=1e-5)
            tokens = pictures.raw("hidden").shape[1]
            assert tokens == pictures.slots.shape[1] + (family in CLASS)
            continue
        assert pictures.features.shape[:2] == pictures.slots.shape
        with pytest.raises(ValueError, match="mixes patches"):
            pictures.project(pictures.features)
        if family in MERGED:
            with pytest.raises(ValueError, match="several patches"):
                pictures.raw("hidden")
        if family == "internvl":
            torch.testing.assert_close(lvlm.projector(pictures.features), pictures.projected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CASES)
def test_statistics_of_tokens_are_those_that_observe_gives(family):
    lvlm = opened(family)
    assert has_cls(lvlm) == (family in CLASS)
    sees = {"received": -1, "given": -1} | ({"cls": -2} if family in CLASS else {})
    images = [picture(60, 44), picture(40, 90)]
    with lv.observe(lvlm, statistics=("received",)) as seen:
        found, prompt = look(lvlm, images, sees)
    tower = seen.vision
    for pictures in found:
        assert all(pictures.seen(name).shape[2] == pictures.slots.shape[1] for name in sees)
        assert (pictures.seen("given").sum(-1) <= 1 + 1e-6).all()
    if family in ("llava", "vipllava", "video_llava", "dinov2"):
        (pictures,) = found
        torch.testing.assert_close(pictures.seen("cls"), tower.cls[-2, :, :, 1:])
        without = (tower.received[-1] - tower.cls[-1])[..., 1:] / pictures.slots.shape[1]
        torch.testing.assert_close(pictures.seen("received"), without)
    if family == "dinov2_with_registers":
        (pictures,) = found
        torch.testing.assert_close(pictures.seen("cls"), tower.cls[-2, :, :, 1 + REGISTERS :])
    if family in ("deepseek_vl", "qwen2_vl", "qwen3_vl"):
        every = [*tower.received.unbind(1)] if isinstance(tower.received, torch.Tensor) else tower.received
        for pictures in found:
            for row, view, got in zip(pictures.rows, pictures.views, pictures.seen("received"), strict=True):
                whole = every[row][-1]
                merge = whole.shape[-1] // len(view.slots)
                blocks = whole.unflatten(-1, (-1, merge)).mean(-1) / whole.shape[-1]
                torch.testing.assert_close(got, blocks)


def test_merged_tokens_go_on_and_dropped_ones_do_not():
    lvlm = opened("llava")
    prompt = lv.prompt(lvlm, [picture(60, 44), picture(40, 90)], question=["Is the couch in the image?", "What?"])
    new = torch.randn(2, 16, lvlm.decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def choose(tokens):
        kept = torch.zeros(2, 16, dtype=torch.bool)
        kept[0, [1, 5, 6]] = kept[1, [0, 15]] = True
        return tokens.by_picture(lambda pictures: (kept, new))

    with lv.prune(lvlm, Chooses((0,), choose, "contiguous", seen={"keys": -1})) as trace, torch.no_grad():
        logits = lvlm.model(**prompt.inputs).logits[:, -1]
    visual = prompt.groups.visual
    assert (trace.kept[0] & visual).sum(1).tolist() == [3, 2]
    embed = lvlm.decoder.embed_tokens(prompt.inputs["input_ids"])
    for row, places in enumerate(([1, 5, 6], [0, 15])):
        here, mine = prompt.inputs["attention_mask"][row].bool(), visual[row]
        own = embed[row].clone()
        own[mine] = new[row]
        stay = here & ~mine
        stay[mine.nonzero()[places, 0]] = True
        with torch.no_grad():
            wanted = lvlm.model(inputs_embeds=own[stay][None]).logits[0, -1]
        torch.testing.assert_close(logits[row], wanted, rtol=1e-4, atol=1e-4)


def test_bare_models_know_their_square_pictures_and_others_say_what_they_need():
    found = []
    model = build("llava")
    batch = inputs(model, images=2)
    with torch.no_grad(), lv.prune(model, looking(model, {"cls": -2}, found)):
        model(**batch)
    (pictures,) = found
    assert pictures.slots.shape == (6, 16) and pictures.rows.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(pictures.project(pictures.features), pictures.projected, rtol=1e-5, atol=1e-5)
    model = build("llava_next")
    with torch.no_grad(), lv.prune(model, looking(model, {"cls": -2}, [])):
        with pytest.raises(ValueError, match="lv.generate"):
            model(**inputs(model))


def test_what_a_plan_cannot_see_is_refused():
    lvlm = opened("deepseek_vl")
    refused = (({"cls": -2}, r"no \[CLS\]"), ({"keys": 9}, "has 3 layers"), ({"values": 0}, "there are only"))
    for sees, reason in refused:
        with pytest.raises(ValueError, match=reason), lv.prune(lvlm, looking(lvlm, sees, [])):
            pass
    with pytest.raises(ValueError, match="No visual tokens"):
        with lv.prune(lvlm, looking(lvlm, {"keys": -1}, [])):
            lv.generate(lvlm, lv.prompt(lvlm, question="Is it?"), max_new_tokens=1)


def test_two_plans_see_one_tower_and_beams_stay_together():
    lvlm, found, again = opened("llava"), [], []
    prompt = lv.prompt(lvlm, [picture(60, 44), picture(40, 90)], question=["Is the couch in the image?", "What?"])
    first, second = looking(lvlm, {"cls": -2}, found), looking(lvlm, {"cls": -1, "keys": -1}, again)
    with lv.prune(lvlm, first), lv.prune(lvlm, second):
        lv.generate(lvlm, prompt, max_new_tokens=2, num_beams=2)
    assert found[0].slots.shape == again[0].slots.shape == (4, 16)
    assert not torch.equal(found[0].seen("cls"), again[0].seen("cls"))
    assert torch.equal(found[0].seen("cls")[0], found[0].seen("cls")[1])
    assert not torch.equal(found[0].seen("cls")[0], found[0].seen("cls")[2])
