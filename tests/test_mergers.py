"""PruMerge, PruMerge+, VisionZip, ToMe, downsample: official numbers, plain loops, and the whole path done by hand."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from processors import lvlm as opened
from torch.nn.functional import cosine_similarity, interpolate

import lvlm_utils as lv
from lvlm_utils import ROOT
from lvlm_utils.methods import (
    Downsample,
    PruMerge,
    PruMergePlus,
    ToMe,
    VisionZip,
    downsample,
    prumerge,
    prune,
    tome,
    visionzip,
)
from lvlm_utils.models import EMBEDDED
from lvlm_utils.session import with_groups

GOLDEN = ROOT / "tests" / "golden"
QUESTIONS = ["Is the couch in the image? (Please answer with yes or no.)", "What do you see?", "Is the sun there?"]
OPTIONS = {
    PruMerge: {}, PruMergePlus: {}, VisionZip: {"keep": 0.45}, ToMe: {"keep": 0.4}, Downsample: {"keep": 0.55}
}  # fmt: skip
METHODS = tuple(OPTIONS)
NAMES = [method.__name__ for method in METHODS]


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def randoms(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


# Official numbers -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["base", "plus"])
def test_prumerge_gives_the_official_tokens(kind):
    data = golden("prumerge")
    weights = torch.zeros(*data[f"{kind}_shape"])
    weights[tuple(data[f"{kind}_weights"])] = data[f"{kind}_values"]
    patches = torch.eye(weights.shape[1] - 1)[None]  # tokens are then the weights themselves
    tokens, kept = prumerge.reduce(patches, data["query"], data["keys"], plus=kind == "plus")
    assert torch.allclose(tokens[0], weights[:, 1:], atol=1e-5)
    assert torch.equal(kept[0], (weights[:-1, 1:] == 1).nonzero()[:, 1])
    assert len(kept[0]) == {"base": 7, "plus": 28}[kind]


def test_visionzip_gives_the_official_tokens():
    data = golden("visionzip")
    tokens, kept = visionzip.reduce(data["hidden"].float(), data["cls_attention"], data["keys"], 54, 10)
    assert torch.allclose(tokens, data["tokens"], atol=1e-5)
    assert torch.equal(kept, data["kept"].long().sort().values)


def test_tome_gives_the_official_tokens():
    data = golden("tome")
    tokens, size, source = tome.reduce(data["metric"], data["tokens"], 100, class_token=True)
    assert torch.allclose(tokens, data["merged"], atol=1e-5)
    assert torch.equal(size, data["size"].float()) and torch.equal(source, data["source"].long())


# Plain loops ----------------------------------------------------------------------------------------------------------
def plain_prumerge(features, query, keys, plus):
    attention = (keys @ query / keys.shape[1] ** 0.5).softmax(0)[1:].numpy()
    patches = len(attention)
    low, high = np.percentile(attention, [25, 75])
    count = max(1, int((attention > high + 1.5 * (high - low)).sum()))
    kept = list(np.argsort(-attention)[:count])
    if plus:
        stride = max(1, int(1 / (count / patches)) // 3)
        kept += [at for at in range(0, patches - 1, stride) if at not in kept]
    tokens = []
    for at in kept:
        like = cosine_similarity(keys[1 + at : 2 + at], keys[1:]).numpy()
        near = [other for other in np.argsort(-like) if other != at][:32]
        tokens.append(features[at] + torch.from_numpy(attention[near]) @ features[near])
    rest = [at for at in range(patches) if at not in kept]
    return torch.stack([*tokens, torch.from_numpy(attention[rest]) @ features[rest]]), kept


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("patches", [16, 49, 144, 257])
def test_prumerge_is_the_plain_loop_whatever_the_rows_of_the_batch(patches, plus):
    features, query, keys = randoms((4, patches, 8), (4, 32), (4, patches + 1, 32))
    query *= torch.tensor([1.0, 4.0, 2.0, 0.0])[:, None]  # the last one has no outliers at all
    tokens, kept = prumerge.reduce(features, query, keys, plus)
    for row in range(4):
        wanted, chosen = plain_prumerge(features[row], query[row], keys[row], plus)
        if row == 3:  # which patch is the most attended does not matter here, but there has to be one
            assert len(kept[row]) in (len(chosen) - 1, len(chosen), len(chosen) + 1) and tokens[row].isfinite().all()
        else:
            assert kept[row].tolist() == chosen
            assert torch.allclose(tokens[row], wanted, atol=1e-5) and tokens[row].shape == wanted.shape
        alone = prumerge.reduce(features[row : row + 1], query[row : row + 1], keys[row : row + 1], plus)
        assert torch.equal(alone[1][0], kept[row]) and torch.allclose(alone[0][0], tokens[row], atol=1e-6)
    if patches > 100:
        assert len({len(row) for row in kept}) > 2


def test_prumerge_with_a_given_number_and_with_everything_kept():
    for plus in (False, True):
        for keep in (1, 5, 40, 99, 100):
            order, counts = prumerge.rank(torch.rand(3, 100), plus, keep)
            assert order.shape == (3, keep) and (counts == keep).all()
            assert all(len(set(row)) == keep for row in order.tolist())
    sampled = prumerge.rank(torch.arange(100.0)[None] / 1e4, True, 20)[0][0]
    assert sampled[:5].tolist() == [99, 98, 97, 96, 95] and (sampled[5:].diff() - 95 / 15).abs().max() < 1
    features, query, keys = randoms((1, 4, 8), (1, 4), (1, 5, 4))
    for number in (1, 4):
        [tokens], [own] = prumerge.reduce(features, query, keys, keep=number)
        assert tokens.shape == (number + 1, 8) and len(own) == number
    assert not tokens[-1].any()  # nothing was dropped
    many = torch.zeros(1, 8)
    many[:, 0] = 1
    keys = torch.zeros(1, 41, 8)
    keys[:, 1:10, 0] = 60  # 9 of 40 stand out: the stride is 1, so that all patches but perhaps the last stay
    tokens, kept = prumerge.reduce(torch.rand(1, 40, 3), many, keys, plus=True)
    assert sorted(kept[0].tolist()) == list(range(39)) and tokens[0].isfinite().all()


def plain_visionzip(hidden, attention, keys, dominant, contextual):
    score = attention.sum(0)[1:]
    kept = [0, *sorted((score.argsort(descending=True)[: dominant - 1] + 1).tolist())]
    rest = [at for at in range(len(hidden)) if at not in kept]
    contextual = min(contextual, len(rest))
    targets = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else []
    given = {target: [] for target in targets}
    for at in rest:
        if at not in given and targets:
            best = max(targets, key=lambda target: float(cosine_similarity(keys[at], keys[target], dim=0)))
            given[best].append(hidden[at])
    merged = [hidden[target] + sum(own) / max(len(own), 1) for target, own in given.items()]
    return torch.stack([hidden[at] for at in kept] + merged), kept


@pytest.mark.parametrize(("dominant", "contextual"), [(54, 10), (1, 5), (1, 0), (20, 0), (60, 30), (98, 9), (101, 3)])
def test_visionzip_is_the_plain_loop(dominant, contextual):
    hidden, attention, keys = randoms((3, 101, 8), (3, 4, 101), (3, 101, 8))
    attention = attention.softmax(-1)
    tokens, kept = visionzip.reduce(hidden, attention, keys, dominant, contextual)
    assert tokens.shape == (3, min(dominant + contextual, 101), 8)
    for row in range(3):
        wanted, chosen = plain_visionzip(hidden[row], attention[row], keys[row], dominant, contextual)
        assert torch.allclose(tokens[row], wanted, atol=1e-5) and kept[row].tolist() == chosen
        one = slice(row, row + 1)
        alone = visionzip.reduce(hidden[one], attention[one], keys[one], dominant, contextual)
        assert torch.equal(alone[1][0], kept[row]) and torch.allclose(alone[0][0], tokens[row], atol=1e-6)
    for wrong in ((0, 1), (102, 0), (5, -1)):
        with pytest.raises(ValueError, match="cannot be had"):
            visionzip.reduce(hidden, attention, keys, *wrong)


def test_visionzip_splits_as_its_presets():
    assert [visionzip.split(keep) for keep in (64, 128, 192, 1)] == [(54, 10), (108, 20), (162, 30), (1, 0)]


def plain_tome(metric, tokens, r, class_token):
    size, unit = len(metric), metric / metric.norm(dim=1, keepdim=True)
    r = min(r, (size - class_token) // 2)
    pairs = []
    for at in range(0, size, 2):
        if size > 1 and not (class_token and at == 0):
            like, best = (unit[1::2] @ unit[at]).max(0)
            pairs.append((float(like), at, 1 + 2 * int(best)))
    groups = {at: {at} for at in range(size)}
    for _, at, best in sorted(pairs, reverse=True)[: max(r, 0)]:
        groups[best] |= groups.pop(at)
    return {frozenset(group): tokens[list(group)].mean(0) for group in groups.values()}


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize(
    ("size", "r"), [(17, 4), (17, 8), (17, 30), (16, 8), (16, 100), (2, 1), (1, 1), (9, 0), (9, -2)]
)
def test_tome_is_the_plain_loop(size, r, class_token):
    metric, tokens = randoms((3, size, 8), (3, size, 5))
    merged, sizes, source = tome.reduce(metric, tokens, r, class_token)
    left = size - max(0, min(r, (size - class_token) // 2))
    assert merged.shape == (3, left, 5) and sizes.shape == (3, left, 1) and source.shape == (3, size)
    for row in range(3):
        wanted = plain_tome(metric[row], tokens[row], r, class_token)
        found = {frozenset((source[row] == at).nonzero()[:, 0].tolist()): merged[row, at] for at in range(left)}
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[group], wanted[group], atol=1e-5) for group in wanted)
        assert torch.equal(sizes[row, :, 0], source[row].bincount(minlength=left).float())
    assert not class_token or (source[:, 0] == 0).all() and (source[:, 1:] > 0).all()


def test_tome_again_is_weighted_by_what_was_merged_before():
    metric, tokens = randoms((2, 40, 8), (2, 40, 5))
    once, size, source = tome.reduce(metric, tokens, 15)
    twice, sizes, again = tome.reduce(tome.reduce(metric, metric, 15)[0], once, 9, size=size)
    for row in range(2):
        for at in range(16):
            assert torch.allclose(twice[row, at], tokens[row, again[row][source[row]] == at].mean(0), atol=1e-5)
    assert (sizes.sum(1) == 40).all() and sizes.max() > 2


def test_tome_spreads_its_merges():
    assert tome.schedule(576, 23, 576) == [0] * 23 and tome.schedule(576, 23, 64)[:2] == [23, 23]
    for patches, layers, keep in ((576, 23, 64), (144, 5, 14), (144, 5, 5), (16, 2, 4), (729, 26, 1), (9, 3, 2)):
        left = patches
        for step in tome.schedule(patches, layers, keep):
            assert 0 <= step <= left // 2
            left -= step
        assert left == keep
    with pytest.raises(ValueError, match="halves 144 patches"):
        tome.schedule(144, 5, 4)


def test_downsample_covers_the_picture():
    assert [downsample.small_grid((24, 24), keep) for keep in (1, 64, 128, 576)] == [(1, 1), (8, 8), (11, 11), (24, 24)]
    assert downsample.small_grid((12, 24), 32) == (4, 8)
    cells = downsample.cells((24, 12), (7, 5)).view(24, 12)
    assert (cells.diff(dim=1) >= 0).all() and set(cells.flatten().tolist()) == set(range(35))
    assert torch.equal(downsample.cells((3, 4), (3, 4)), torch.arange(12))


def test_merging_is_that_of_float32_under_autocast():
    features, query, keys, hidden, keys_of = randoms((2, 40, 8), (2, 32), (2, 41, 32), (2, 41, 8), (2, 41, 8))
    attention = randoms((2, 4, 41), seed=1)[0].softmax(-1)

    def merged():
        zipped = visionzip.reduce(hidden, attention, keys_of, 7, 3)
        return *prumerge.reduce(features, query, keys)[0], *zipped, *tome.reduce(keys_of, hidden, 9, True)

    wanted = merged()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = merged()
    assert all(map(torch.equal, found, wanted)) and all(one.dtype == two.dtype for one, two in zip(found, wanted))


# The whole path by hand -----------------------------------------------------------------------------------------------
def noise(seed, width=None, height=190):
    """A picture without two like patches."""
    size = (height, width or 200 + 70 * seed, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


@functools.cache
def example(name="tiny-llava"):
    """(lvlm, prompt of three pictures with unequal texts)."""
    lvlm = lv.load(name) if name in EMBEDDED else opened(name)
    images = [noise(row) for row in range(3)]
    return lvlm, lv.prompt(lvlm, images, question=QUESTIONS)


def logits(lvlm, prompt, steps=3):
    with torch.no_grad():
        out = lvlm.model.generate(
            **prompt.inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    return out.sequences[:, prompt.inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def pruned(method, name="tiny-llava", options=None, steps=3):
    lvlm, prompt = example(name)
    options = OPTIONS[method] if options is None else options
    with prune(lvlm, method(**options)) as trace, with_groups(lvlm.model, prompt.groups):
        return *logits(lvlm, prompt, steps), trace.kept[0].clone()


def tower(model, pixels, **how):
    """What LLaVA's tower gives, and queries and keys of its last two layers: (-2, "q_proj") and so on."""
    found, layers = {}, model.model.vision_tower.encoder.layers

    def record(key, module, args, out):
        found[key] = out

    hooks = [
        getattr(layers[number].self_attn, name).register_forward_hook(functools.partial(record, (number, name)))
        for number in (-2, -1)
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        out = model.model.vision_tower(pixels, output_hidden_states=True, return_dict=True, **how)
    for hook in hooks:
        hook.remove()
    return out, found


def heads(x, number):
    return x.view(*x.shape[:2], number, -1).transpose(1, 2)


def features_by_hand(method, model, pixels):
    """Tokens of one picture, (kept, C), in the order in which the method gives them."""
    number = model.config.vision_config.num_attention_heads
    patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    with torch.no_grad():
        if method in (PruMerge, PruMergePlus):
            out, parts = tower(model, pixels)
            query, keys = parts[-1, "q_proj"][0, 0], parts[-1, "k_proj"][0]
            return plain_prumerge(out.hidden_states[-2][0, 1:], query, keys, method is PruMergePlus)[0]
        if method is VisionZip:
            out, parts = tower(model, pixels)
            query, keys = heads(parts[-2, "q_proj"], number), heads(parts[-2, "k_proj"], number)
            scores = (query[:, :, :1] @ keys.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)[0, :, 0]
            contextual = round(int(patches * 0.45) * 10 / 64)
            split = int(patches * 0.45) - contextual, contextual
            return plain_visionzip(out.hidden_states[-2][0], scores, keys[0].mean(0), *split)[0]
        vision = model.model.vision_tower
        if method is Downsample:
            side = round(int(patches * 0.55) ** 0.5) * vision.config.patch_size
            small = interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
            return tower(model, small, interpolate_pos_encoding=True)[0].hidden_states[-2][0, 1:]
        x, size = vision.pre_layrnorm(vision.embeddings(pixels)), torch.ones(1, patches + 1, 1)
        owner = torch.arange(patches + 1)
        steps = tome.schedule(patches, len(vision.encoder.layers) - 1, int(patches * 0.4))
        for layer, step in zip(vision.encoder.layers, steps, strict=False):
            keys = heads(layer.self_attn.k_proj(layer.layer_norm1(x)), number).mean(1)
            x = layer(x, size.log().transpose(1, 2)[:, None])
            source = tome.reduce(keys, x, step, class_token=True)[2]
            total = torch.zeros(1, int(source.max()) + 1, 1).index_add(1, source[0], size)
            x = torch.zeros(1, total.shape[1], x.shape[2]).index_add(1, source[0], x * size) / total
            size, owner = total, source[0][owner]
        first = [at for at in range(1, patches + 1) if owner[at] not in owner[1:at]]
        return x[0, owner[first]]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_generating_from_merged_tokens_is_the_path_by_hand(method):
    """Features merged, projected, put in the place of the placeholders, and nothing else: the same logits."""
    lvlm, prompt = example()
    model, inputs = lvlm.model, prompt.inputs
    new, found, kept = pruned(method)
    plain = logits(lvlm, prompt)[1]
    for row in range(3):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        features = features_by_hand(method, model, inputs["pixel_values"][row : row + 1])
        with torch.no_grad():
            visual = model.model.multi_modal_projector(features[None])[0]
            text = model.get_input_embeddings()(ids)
            at = (ids == lvlm.image_token_id).nonzero()[:, 0]
            answer = model.get_input_embeddings()(new[row, :-1])
            prompt_row = torch.cat([text[: at[0]], visual, text[at[-1] + 1 :], answer])
            wanted = model(inputs_embeds=prompt_row[None]).logits[0, -len(new[row]) :]
        assert (found[row] - wanted).abs().max() < 1e-4
        assert int((kept[row] & (inputs["input_ids"][row] == lvlm.image_token_id)).sum()) == len(features)
    assert (found[:, 0] - plain[:, 0]).abs().max() > 0.05


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("name", ["llava", "vipllava", "llava_next", "llava_onevision", "video_llava", "deepseek_vl"])
def test_a_batch_is_its_rows(method, name):
    lvlm, prompt = example(name)
    if method.needs_cls and name in ("llava_onevision", "deepseek_vl"):
        with pytest.raises(ValueError, match=r"\[CLS\].*vispruner or divprune"):
            pruned(method, name)
        return
    if method is VisionZip and name == "vipllava":
        with pytest.raises(ValueError, match="prumerge"):
            pruned(method, name)
        return
    _, together, kept = pruned(method, name)
    plain = logits(lvlm, prompt)[1]
    assert together.isfinite().all() and (together[:, 0] - plain[:, 0]).abs().max() > 1e-2
    for row in range(3):
        alone = lv.prompt(lvlm, noise(row), question=QUESTIONS[row])
        with prune(lvlm, method(**OPTIONS[method])) as trace:
            with with_groups(lvlm.model, alone.groups):
                _, found = logits(lvlm, alone)
        assert (found[0, 0] - together[row, 0]).abs().max() < 1e-3
        everything = prompt.inputs["attention_mask"][row].sum()
        assert trace.kept[0].sum() == kept[row].sum() < everything + (method is PruMergePlus)  # of 16 it may keep all
    assert torch.equal(logits(lvlm, prompt)[1], plain)  # nothing stays behind


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize(
    "name", ["internvl", "qwen2_vl", "qwen3_vl", "idefics3", "video_llama_3", "deepseek_vl_hybrid"]
)
def test_models_whose_tokens_are_no_patches_are_refused(method, name):
    with pytest.raises(ValueError, match="vispruner|divprune"):
        pruned(method, name)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_original_positions_stay_with_their_patches(method):
    lvlm, prompt = example()
    _, contiguous, kept = pruned(method)
    _, original, same = pruned(method, options={**OPTIONS[method], "positions": "original"})
    assert torch.equal(kept, same) and (contiguous - original).abs().max() > 1e-3


def test_merged_tokens_stand_at_their_own_patch_where_positions_are_original():
    """The hidden states that layer 0 gets, against those made by hand."""
    lvlm, prompt = example()
    model, row, seen = lvlm.model, 1, []
    visual = prompt.inputs["input_ids"][row] == lvlm.image_token_id
    pixels = prompt.inputs["pixel_values"][row : row + 1]
    hook = lvlm.decoder.layers[0].input_layernorm.register_forward_pre_hook(lambda norm, args: seen.append(args[0]))
    for method in (PruMerge, VisionZip):
        with prune(lvlm, method(positions="original", **OPTIONS[method])) as trace, torch.no_grad():
            model(**prompt.inputs)
        with torch.no_grad():
            wanted = model.model.multi_modal_projector(features_by_hand(method, model, pixels)[None])[0]
        kept = trace.kept[0][row]
        patches = kept[visual].nonzero()[:, 0]
        found = seen[-1][row, -int(kept.sum()) :][visual[kept]]
        near = torch.cdist(found, wanted).argmin(1)  # which of the merged tokens stands at each of the patches
        assert sorted(near.tolist()) == list(range(len(wanted))) and torch.allclose(found, wanted[near], atol=1e-4)
        places = patches[near.argsort()].tolist()
        out, parts = tower(model, pixels)
        if method is PruMerge:
            query, keys = parts[-1, "q_proj"][0, 0], parts[-1, "k_proj"][0]
            own = plain_prumerge(out.hidden_states[-2][0, 1:], query, keys, False)[1]
            assert places[:-1] == own and places[-1] == max(set(range(144)) - set(own))
        else:
            assert places[1:54] == sorted(places[1:54]) and places[54:] == sorted(places[54:])
            assert places[0] == min(set(range(144)) - set(places[1:]))
    hook.remove()


def test_numbers_of_tokens():
    lvlm, prompt = example()
    visual = prompt.inputs["input_ids"] == lvlm.image_token_id
    for method, options, wanted in (
        (PruMerge, {"keep": 30}, 30), (PruMerge, {"keep": 1.0}, 144), (PruMergePlus, {"keep": 30}, 30),
        (VisionZip, {}, 64), (VisionZip, {"dominant": 1, "contextual": 0}, 1), (VisionZip, {"keep": 1.0}, 144),
        (VisionZip, {"dominant": 20, "contextual": 7}, 27), (ToMe, {"keep": 20}, 20), (ToMe, {"r": 3}, 129),
        (ToMe, {"r": [9, 0, 0, 0, 1]}, 134), (ToMe, {"keep": 20, "proportional": False}, 20),
        (Downsample, {"keep": 64}, 64), (Downsample, {"keep": 20}, 16), (Downsample, {"keep": 1.0}, 144),
    ):  # fmt: skip
        kept = pruned(method, options=options, steps=1)[2]
        assert (kept & visual).sum(1).tolist() == [wanted] * 3, (method.__name__, options)
    for method in (ToMe, Downsample):  # nothing merged, nothing changed
        assert (pruned(method, options={"keep": 1.0}, steps=1)[1] - logits(lvlm, prompt, 1)[1]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        (PruMerge, {"keep": 1}, "needs 2"), (PruMerge, {"keep": 0}, "neither a share"),
        (VisionZip, {"dominant": 4}, "together"), (VisionZip, {"dominant": 140, "contextual": 5}, "more than 144"),
        (VisionZip, {"keep": 145}, "more than the 144"), (ToMe, {}, "Give keep"),
        (ToMe, {"keep": 9, "r": 2}, "Give keep"), (ToMe, {"r": [1, 2]}, "5 layers"), (ToMe, {"keep": 3}, "halves"),
        (Downsample, {"keep": 2.0}, "neither a share"),
    ],
)  # fmt: skip
def test_bad_options(method, options, words):
    with pytest.raises(ValueError, match=words):
        pruned(method, options=options)


def test_frames_of_a_video():
    lvlm = opened("video_llava")
    frames = tuple(noise(seed, 40, 40) for seed in range(3))
    prompt = lv.prompt(lvlm, None, question=QUESTIONS[0], video=frames)
    for method in (ToMe, Downsample):
        with prune(lvlm, method(**OPTIONS[method])) as trace:
            assert isinstance(lv.generate(lvlm, prompt, max_new_tokens=3), str)
        assert trace.mean_visual == 3 * {ToMe: 6, Downsample: 9}[method]


def test_bfloat16():
    model = opened("llava").model.to(torch.bfloat16)
    _, prompt = example("llava")
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in prompt.inputs.items()}
    for method in METHODS:
        with prune(model, method(**OPTIONS[method])), torch.no_grad():
            assert model(**batch).logits.isfinite().all()
