"""Methods of a user's own, one that drops and one that merges, in every family and in lv.answer."""

import functools
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from families import CASES
from PIL import Image
from processors import lvlm
from torch.nn.functional import normalize

import lvlm_utils as lv
from lvlm_utils.methods import Method, PictureMethod
from lvlm_utils.pruning.keep import top


@dataclass
class Loudest(Method):
    """Keep the visual tokens that the question and the last token look at most, before layer `layer`."""

    keep: float | int = 0.5
    layer: int = 2

    def needs(self):
        return {self.layer - 1: ("question", "last")}

    def choose(self, tokens):
        score = tokens.attention("question") + tokens.attention("last")
        return tokens.best(score.amax(1), self.keep)


@dataclass
class Nearest(PictureMethod):
    """Keep the longest tokens of every picture; each other one is averaged into the one that it is most like."""

    keep: float | int = 0.5

    def pick(self, pictures):
        x = pictures.projected.float()
        stay = top(x.norm(dim=2), self.keep)
        like = (normalize(x, dim=2) @ normalize(x, dim=2).mT).masked_fill(~stay[:, None], -torch.inf)
        into = like.argmax(2)[..., None].expand_as(x)
        return stay, torch.zeros_like(x).scatter_reduce(1, into, x, "mean", include_self=False)


opened = functools.cache(lvlm)
QUESTIONS = ["Is the couch in the image? (Please answer with yes or no.)", "What do you see on the left side?"]


def picture(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt(family, rows=(0, 1)):
    images = [picture(60, 44, 0), picture(40, 90, 1)]
    context = ["The room is quiet.", "Two books lie on the table. The chair is red."]
    return lv.prompt(opened(family), *([part[row] for row in rows] for part in (images, context, QUESTIONS)))


@pytest.mark.parametrize("method", [Loudest(), Loudest(keep=3, layer=1), Nearest(), Nearest(keep=2)], ids=str)
@pytest.mark.parametrize("family", CASES)
def test_a_method_of_your_own_runs_in_every_family(family, method):
    model, both = opened(family), prompt(family)
    with lv.prune(model, method) as trace:
        texts = lv.generate(model, both, max_new_tokens=3)
    kept, groups = trace.kept.clone(), both.groups
    assert kept[:, ~groups.visual & both.inputs["attention_mask"].bool()].all()
    layer = getattr(method, "layer", 0)
    assert kept[:layer, groups.visual].all()
    for row in range(2):
        mine = groups.visual[row]
        patches = mine & (groups.row[row] >= 0)
        left = int(kept[layer, row].sum() - (~mine & both.inputs["attention_mask"][row].bool()).sum())
        if isinstance(method, Loudest):
            assert left == (3 if method.keep == 3 else int(mine.sum()) // 2)
        else:  # for each tile or frame
            tiles = groups.tile[row, patches]
            sizes = [int((tiles == tile).sum()) for tile in tiles.unique()]
            assert left == sum(2 if method.keep == 2 else size // 2 for size in sizes)
        with lv.prune(model, method) as alone:
            [text] = lv.generate(model, prompt(family, [row]), max_new_tokens=3)
        real = both.inputs["attention_mask"][row].bool()
        assert torch.equal(alone.kept[:, 0], kept[:, row, real]) and text == texts[row]


def test_what_was_merged_is_what_the_language_model_gets():
    model, both, seen = opened("llava"), prompt("llava"), []
    layer = model.decoder.layers[0]
    with layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True):
        with torch.no_grad():
            model.model(**both.inputs)
    whole = seen.pop()
    with layer.input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        with lv.prune(model, Nearest(keep=3)) as trace:
            lv.generate(model, both, max_new_tokens=1)
    for row in range(2):
        visual = both.groups.visual[row]
        x = whole[row, visual]
        stay = trace.kept[0, row, visual]
        own = stay.nonzero()[:, 0].tolist()
        into = [max(own, key=lambda at, one=one: float(one @ x[at] / x[at].norm())) for one in x]
        wanted = torch.stack([x[[to == at for to in into]].mean(0) for at in own])
        real = trace.kept[0, row]
        found = seen[0][row, -int(real.sum()) :][visual[real]]
        assert torch.allclose(found, wanted, atol=1e-4) and not torch.allclose(found, x[stay], atol=1e-2)


def test_wrong_options_of_your_own_method_are_refused():
    for method, says in (
        (Loudest(keep=0), "keep=0 is neither"), (Nearest(keep=True), "keep=True is neither"),
        (Loudest(layer=9), "Layer 9 is out of range"), (Loudest(keep=17), "keep=17 is more than the 16 visual tokens"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says), lv.prune(opened("llava"), method):
            lv.generate(opened("llava"), prompt("llava"), max_new_tokens=1)


@pytest.mark.parametrize("method", [Loudest(), Nearest()], ids=str)
def test_a_method_of_your_own_answers(method):
    asked = ["Is the couch in the image?", "Is the chair in the image?"] * 2
    rows = [
        dict(sample=str(n), image=picture(60, 44, n // 2), context="The room is quiet.", question=one, label="yes")
        for n, one in enumerate(asked)
    ]
    model = opened("llava")
    plain = lv.answer(model, pd.DataFrame(rows), progress=False)
    found = lv.answer(model, pd.DataFrame(rows), prune=method, progress=False)
    assert found["error"].isna().all() and (found["margin"] - plain["margin"]).abs().max() > 1e-3
    for row, margin in zip(rows, found["margin"], strict=True):
        alone = lv.answer(model, pd.DataFrame([row]), prune=method, progress=False)["margin"][0]
        assert abs(alone - margin) < 1e-3
