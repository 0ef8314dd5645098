"""Token groups of every family under its own processor: every token is text of its group or a place in a picture."""

import re
from contextlib import contextmanager, nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from conftest import QUESTION, ask, same, table, text_of
from families import FAMILY_NAMES, IMAGE, PATCH, SIDE, VIDEO, VIDEO_FAMILIES
from PIL import Image
from processors import lvlm

import lvlm_utils as lv
from lvlm_utils.families import FAMILIES, towers_of
from lvlm_utils.prefix import can_share

known = cache(lvlm)  # the tests leave the models as they are
PARTS = ("system", "visual", "context", "question")
TAGS = r"<(?:img|/img|fake_token_around_image|global-img|row_\d_col_\d)>"
FILMED = (*VIDEO_FAMILIES, "internvl", "smolvlm")  # the last two write frames as pictures
TILED = ("internvl", "idefics3", "smolvlm")  # write tags around their tiles
OPENINGS = {
    "llava": "ASSISTANT:", "llava_next_video": "ASSISTANT:", "video_llava": "ASSISTANT:", "vipllava": "###Assistant:",
    "llava_next": "[/INST]", "deepseek_vl": "Assistant:", "deepseek_vl_hybrid": "Assistant:", "idefics3": "Assistant:",
    "smolvlm": "Assistant:",
}  # fmt: skip
CONTEXTS = [" " + text_of(12), "", "An é, “quotes” and 日本 …\n" + text_of(40) + " "]
QUESTIONS = [QUESTION.format("couch"), "Is it? ", "Is it? Is it? ASSISTANT: no"]
SIZES = [(40, 32), (60, 20), (20, 50)]  # width, height


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def film(frames: int, seed: int = 0) -> tuple[Image.Image, ...]:
    return tuple(noise(SIDE, SIDE, seed + number) for number in range(frames))


def squash(text: str) -> str:
    """Without spaces: a tokenizer of whole words does not tell where one stood next to a special token."""
    return re.sub(r"\s", "", text)


def words(model, prompt, group: str, row: int) -> str:
    ids = prompt.inputs["input_ids"][row][getattr(prompt.groups, group)[row]]
    return squash(model.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


@cache
def batch(family: str):
    """Three unequal prompts: two pictures, none, one."""
    pictures = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    return lv.prompt(known(family), [tuple(pictures[:2]), None, pictures[2]], CONTEXTS, QUESTIONS)


# The text -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_each_group_is_its_text(family):
    model, prompt = known(family), batch(family)
    bos = model.tokenizer.bos_token or ""
    for row, (context, question) in enumerate(zip(CONTEXTS, QUESTIONS, strict=True)):
        assert words(model, prompt, "context", row) == squash(context)
        assert words(model, prompt, "question", row) == squash(question)
        rendered = prompt.text[row].replace(model.processor.image_token, "")
        rendered = rendered if rendered.startswith(bos) else bos + rendered
        text, system = words(model, prompt, "text", row), words(model, prompt, "system", row)
        if family in TILED:
            assert not row == 0 or re.search(TAGS, system)
            text, system = (re.sub(TAGS, "", each) for each in (text, system))
        assert text == squash(rendered)
        assert system == text.replace(squash(context) + squash(question), "") != text
        assert text.endswith(words(model, prompt, "answer", row))
        assert words(model, prompt, "answer", row) == OPENINGS.get(family, "<|im_start|>assistant")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_groups_partition_the_real_tokens_of_a_left_padded_batch(family):
    model, prompt = known(family), batch(family)
    groups, ids, real = prompt.groups, prompt.inputs["input_ids"], prompt.inputs["attention_mask"].bool()
    assert torch.equal(sum(getattr(groups, name).int() for name in PARTS), real.int())
    assert (real.int().diff() >= 0).all() and not real[1, 0] and real.any(0).all()
    assert torch.equal(groups.visual, (ids == IMAGE) & real) and torch.equal(groups.text, real & ~groups.visual)
    assert not (groups.answer & ~groups.system).any()
    assert torch.equal(groups.last.nonzero()[:, 1], torch.full((3,), ids.shape[1] - 1)) and groups.answer[:, -1].all()
    for name in ("image", "tile", "row", "column"):
        assert (getattr(groups, name)[~groups.visual] == -1).all()
    assert groups.image[groups.visual].min() == 0 and groups.image.amax(1).tolist() == [1, -1, 0]
    for row, shown in enumerate([SIZES[:2], [], SIZES[2:]]):  # each row is what it is alone
        pictures = tuple(noise(*size, seed) for seed, size in enumerate(SIZES) if size in shown)
        alone = lv.prompt(model, pictures, CONTEXTS[row], QUESTIONS[row])
        assert torch.equal(alone.inputs["input_ids"][0], ids[row][real[row]])
        for name in vars(groups):
            assert torch.equal(getattr(alone.groups, name)[0], getattr(groups, name)[row][real[row]]), name


@pytest.mark.parametrize("family", FILMED)
def test_groups_of_videos(family):
    model = known(family)
    prompt = lv.prompt(model, None, CONTEXTS, QUESTIONS, video=[film(4), None, film(4, 9)])
    groups, ids, real = prompt.groups, prompt.inputs["input_ids"], prompt.inputs["attention_mask"].bool()
    assert torch.equal(groups.visual, torch.isin(ids, torch.tensor([IMAGE, VIDEO])) & real)
    assert groups.image.amax(1).tolist() == [0, -1, 0]
    assert groups.tile[0].max() == (1 if "qwen" in family else 3)  # Qwen puts two frames together
    for row, (context, question) in enumerate(zip(CONTEXTS, QUESTIONS, strict=True)):
        assert words(model, prompt, "context", row) == squash(context)
        assert words(model, prompt, "question", row) == squash(question)
    if family == "smolvlm":
        with pytest.raises(ValueError, match="either, not both"):
            lv.prompt(model, film(1), "", "Is it?", video=film(2))
        return
    both = lv.prompt(model, tuple(film(2)), "", "Is it?", video=film(2)).groups
    assert both.image[both.visual].unique().tolist() == [0, 1, 2]


# The places ---------------------------------------------------------------------------------------------------------
@contextmanager
def captured(module: torch.nn.Module, name: str):
    """What the module is given under this keyword, call by call."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, args, kw: seen.append(kw[name]), with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def without_attention(model):
    """Vision towers whose layers add nothing from other patches: a patch then shows in its own token only."""

    def nothing(module, args, output):
        zeros = torch.zeros_like(output[0] if isinstance(output, tuple) else output)
        return (zeros, *output[1:]) if isinstance(output, tuple) else zeros

    parts = [part for tower in towers_of(model.model).values() for part in tower.modules()]
    hooks = [part.register_forward_hook(nothing) for part in parts if re.search("Attention$", type(part).__name__)]
    assert hooks
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def embedded(model, prompt) -> torch.Tensor:
    """(batch, tokens, width): what the language model gets, with the pictures in their slots."""
    with captured(model.decoder, "inputs_embeds") as seen, without_attention(model):
        model.model(**prompt.inputs)
    return seen[0]


def repainted(picture: Image.Image, x: int, y: int, size: int) -> Image.Image:
    """The picture with other noise in the square of `size` pixels whose corner is at (x, y)."""
    changed = picture.copy()
    changed.paste(noise(size, size, 77), (x, y))
    return changed


def places(groups) -> torch.Tensor:
    return torch.stack([groups.image, groups.tile, groups.row, groups.column], -1)


# family -> width and height of a picture that is cut without being resized; pixels of a side of a tile, of one token
WHOLE, TILES = (SIDE, SIDE, SIDE, PATCH), (SIDE, 2 * PATCH)
PICTURES = {
    "llava": WHOLE, "vipllava": WHOLE, "video_llava": WHOLE, "deepseek_vl": WHOLE,
    "llava_next": (56, 28, SIDE, PATCH), "llava_next_video": (28, 56, SIDE, PATCH),
    "llava_onevision": (56, 56, SIDE, PATCH), "internvl": (84, 28, *TILES), "idefics3": (56, 56, *TILES),
    "smolvlm": (56, 28, *TILES), "qwen2_vl": (56, 42, 56, 2 * PATCH), "qwen2_5_vl": (42, 56, 56, 2 * PATCH),
    "qwen3_vl": (56, 42, 56, 2 * PATCH), "video_llama_3": (35, 49, 49, PATCH),
}  # fmt: skip


@pytest.mark.parametrize("family", PICTURES)
def test_a_patch_of_a_picture_arrives_in_the_slot_that_the_groups_name(family):
    """Change one patch of one picture in the middle row of a batch: no token of another place may change."""
    model, (width, height, side, size) = known(family), PICTURES[family]
    first = () if family == "llava_onevision" else (noise(SIDE, SIDE, 1),)  # it cuts only a single picture into tiles
    contexts, picture = ["", text_of(20), text_of(9)], noise(width, height, 2)

    def shown(one):
        return lv.prompt(model, [None, (*first, one), noise(width, height, 3)], contexts, "Is it?")

    prompt = shown(picture)
    before, groups = embedded(model, prompt), prompt.groups
    mine = (groups.image == len(first)) & (torch.arange(3) == 1)[:, None]
    cut = (width, height) > (side, side)  # else tile 0 is all there is
    for x, y in [(0, 0), (width - size, height - size), (size, height - size)]:
        changed = (embedded(model, shown(repainted(picture, x, y, size))) - before).norm(dim=-1)
        tile = cut * (1 + y // side * (width // side) + x // side)
        expected = torch.tensor([len(first), tile, y % side // size, x % side // size])
        slot = mine & (places(groups) == expected).all(-1)
        overview = mine & (groups.tile == 0) & cut
        assert slot.sum() == 1 and changed[slot] > 0.1
        assert changed[~slot & ~overview].max() < 1e-4
        if cut:  # the whole picture, made small: the change is where it was, within one token
            rows, columns = int(groups.row[overview].max()) + 1, int(groups.column[overview].max()) + 1
            most = places(groups).view(-1, 4)[changed.where(overview, -1.0).argmax()]
            assert abs(most[2] + 0.5 - (y + size / 2) / height * rows) <= 1
            assert abs(most[3] + 0.5 - (x + size / 2) / width * columns) <= 1


def test_a_patch_arrives_in_its_slot_of_the_two_towers_of_deepseek():
    """The second tower enlarges the picture, and convolutions look at neighbours: here the place is only a peak."""
    model, picture = known("deepseek_vl_hybrid"), noise(SIDE, SIDE)
    prompt = lv.prompt(model, picture, "", "Is it?")
    before = embedded(model, prompt)
    for x, y in [(0, 0), (21, 7), (7, 21)]:
        after = embedded(model, lv.prompt(model, repainted(picture, x, y, PATCH), "", "Is it?"))
        peak = (after - before).norm(dim=-1)[0].argmax()
        assert places(prompt.groups)[0, peak].tolist() == [0, 0, y // PATCH, x // PATCH]


@pytest.mark.parametrize("family", FILMED)
def test_a_patch_of_a_frame_arrives_in_the_slot_that_the_groups_name(family):
    model = known(family)
    size = PATCH if family == "video_llava" else 2 * PATCH
    videos = [None, film(4), film(4, 9)]

    def shown(video):
        return lv.prompt(model, None, ["", text_of(20), ""], "Is it?", video=[None, video, videos[2]])

    prompt = shown(videos[1])
    before, groups = embedded(model, prompt), prompt.groups
    for number, x, y in [(0, 0, 0), (3, SIDE - size, 0), (2, 0, SIDE - size)]:
        frames = list(videos[1])
        frames[number] = repainted(frames[number], x, y, size)
        changed = (embedded(model, shown(tuple(frames))) - before).norm(dim=-1)
        tile = number // 2 if "qwen" in family else number
        slot = (places(groups) == torch.tensor([0, tile, y // size, x // size])).all(-1)
        slot[2] = False
        assert slot.sum() == 1 and changed[slot] > 0.1 and changed[~slot].max() < 1e-4


def test_tokens_that_video_llama_3_leaves_out_have_no_slot():
    """A frame keeps the tokens that differ from the frame before."""
    model, still = known("video_llama_3"), noise(SIDE, SIDE)
    moved = repainted(still, 14, 0, 14)
    groups = lv.prompt(model, None, "", "Is it?", video=(still, moved, still)).groups
    found = places(groups)[groups.visual][:, 1:].tolist()
    assert found == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 1], [2, 0, 1]]


# LLaVA-NeXT and its kin: what the model itself packs ----------------------------------------------------------------
@contextmanager
def traced(model):
    """The projector gives features that say where they come from: number of the tile in the call, and patch."""

    def trace(module, args, output):
        tiles, patches = output.shape[:2]
        output = torch.zeros_like(output)
        output[..., 0], output[..., 1] = torch.arange(tiles)[:, None], torch.arange(patches)
        output[..., 2] = 1
        return output

    newline = model.model.model.image_newline
    hook = model.projector.register_forward_hook(trace)
    kept = newline.data.clone()
    newline.data.zero_()
    try:
        yield
    finally:
        hook.remove()
        newline.data.copy_(kept)


SHAPES = {"wide": (60, 17), "tall": (12, 52), "square": (50, 36)}  # width, height: none fills its tiles


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llava_next", "llava_next_video", "llava_onevision"])
def test_tiles_and_patches_are_where_the_model_packs_them(family, shape):
    model, several = known(family), family != "llava_onevision"
    pictures = [noise(56, 56), None, noise(*SHAPES[shape])]
    pictures[1] = (noise(30, 60), noise(*SHAPES[shape])) if several else noise(30, 60)
    prompt = lv.prompt(model, pictures, ["", text_of(20), text_of(5)], "Is it?")
    groups = prompt.groups
    with traced(model):
        arrived = embedded(model, prompt)[groups.visual][:, :3].round().long()
    side = SIDE // PATCH
    image, tile, row, column = places(groups)[groups.visual].T
    newline = arrived[:, 2] == 0
    assert newline.any() and torch.equal(newline, tile == -1)
    assert torch.equal((row * side + column)[~newline], arrived[~newline, 1])
    # the tiles of all pictures are numbered in one go; that of a picture's first token is its base
    begins = (tile == 0) & (row == 0) & (column == 0)
    assert begins.sum() == len(prompt.inputs["image_sizes"])
    bases = arrived[begins, 0][begins.cumsum(0) - 1]
    assert torch.equal((tile + bases)[~newline], arrived[~newline, 0])
    assert not torch.equal(tile[~newline], arrived[~newline, 0])  # so the numbers do tell pictures apart
    assert image[begins].tolist() == ([0, 0, 1, 0] if several else [0, 0, 0])


def test_the_shapes_are_cut_differently():
    """Last tile, patches and newlines. Three layouts of tiles, and padding cut off in both directions."""
    model, seen = known("llava_next"), {}
    for name, size in SHAPES.items():
        groups = lv.prompt(model, noise(*size), "", "Is it?").groups
        tokens = places(groups)[groups.visual & (groups.tile > 0)]
        seen[name] = (int(tokens[:, 1].max()), len(tokens), int((groups.visual & (groups.tile < 0)).sum()))
    assert seen == {"wide": (2, 2 * 8, 2), "tall": (2, 8 * 2, 8), "square": (4, 6 * 8, 6)}


def test_a_large_area_that_llava_onevision_shrinks_has_the_nearest_patches():
    model = lvlm("llava_onevision")
    model.model.config.vision_aspect_ratio = model.processor.vision_aspect_ratio = "anyres_max_1"
    prompt = lv.prompt(model, noise(56, 56), "", "Is it?")
    large = places(prompt.groups)[prompt.groups.visual & (prompt.groups.tile > 0)][:, 1:]
    assert len(large) == 16 and len(large.unique(dim=0)) == 16  # 8 x 8 patches became 4 x 4
    assert large[:4].tolist() == [[1, 1, 1], [1, 1, 3], [2, 1, 1], [2, 1, 3]] and large[-1].tolist() == [4, 3, 3]


def test_a_processor_that_is_not_the_models_is_refused():
    model = lvlm("llava_next")
    model.model.config.image_grid_pinpoints = [[SIDE, SIDE]]
    with pytest.raises(ValueError, match="wrote 88 tokens for image 0 of prompt 0, .* puts 36 there"):
        lv.prompt(model, noise(56, 56), "", "Is it?")


def test_every_family_has_places():
    verified = {name: family for name, family in FAMILIES.items() if family.verified}
    assert set(verified) == set(FAMILY_NAMES) and all("image" in family.layout for family in verified.values())
    assert {name for name, family in verified.items() if "video" in family.layout} >= set(FILMED)


# Answers ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_answers_alike_alone_in_a_batch_and_with_a_shared_beginning(family, images):
    model, samples = known(family), table(images[:1], (0, 30), ("couch",))
    alone = ask(model, samples, share=False, batch_size=1, max_new_tokens=2)
    assert alone["error"].isna().all() and alone["margin"].nunique() == 2
    groups = lv.prompt(model, images[0], samples["context"].tolist(), samples["question"].tolist()).groups
    assert alone["n_context_tokens"].tolist() == groups.context.sum(1).tolist()
    assert alone["n_visual_tokens"].tolist() == groups.visual.sum(1).tolist()
    with nullcontext() if can_share(model) else pytest.warns(UserWarning, match="cannot share"):
        same(ask(model, samples, max_new_tokens=2), alone)
    assert can_share(model) == (family not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llama_3"))
