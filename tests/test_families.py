"""Tiny models of every family: attention matters in them, inputs are what they should be, and their parts are found."""

import copy
from itertools import chain

import families
import pytest
import torch
from families import (
    BOS,
    CASES,
    FAMILY_NAMES,
    IMAGE,
    PAD,
    PATCH,
    SIDE,
    VIDEO,
    VIDEO_FAMILIES,
    VISION_START,
    build,
    inputs,
)
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lvlm_utils.families import (
    FAMILIES,
    PLAIN_TOWERS,
    decoder_of,
    family_of,
    find_family,
    registers_of,
    towers_of,
    visual_ids,
)

OWN_ATTENTION = "high_res"  # SAM's attention adds relative positions to the scores and is not exchangeable


def uniform(module, query, key, value, attention_mask=None, **kw):
    """Attention without content: every visible token has the same weight. Remembers who called it."""
    uniform.callers.append(module)
    return sdpa_attention_forward(module, query * 0, key, value, attention_mask, **kw)


AttentionInterface.register("uniform", uniform)
AttentionMaskInterface.register("uniform", sdpa_mask)


@torch.inference_mode()
def logits(model, batch, **attention):
    """Of the real tokens; attention: a part of the config and the implementation used in it."""
    uniform.callers = []
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa", **attention})
    return model(**batch).logits[batch["attention_mask"].bool()]


@pytest.fixture(scope="module", params=CASES)
def model(request):
    return build(request.param)


def difference(left, right):
    return float((left - right).square().mean().sqrt() / right.std())


def test_attention_matters_and_rounding_does_not(model):
    batch = inputs(model)
    normal = logits(model, batch)
    assert normal.isfinite().all() and normal.abs().max() < 20
    # measured: 0.53 to 0.95 of the logits' spread for the decoder, 0.36 to 0.69 for the tower
    assert difference(logits(model, batch, text_config="uniform"), normal) > 0.4
    assert difference(logits(model, batch, vision_config="uniform"), normal) > 0.25
    assert (logits(model, batch, text_config="eager", vision_config="eager") - normal).abs().max() < 5e-5


def test_at_the_usual_initialisation_attention_would_not_matter(monkeypatch):
    monkeypatch.setattr(families, "_draw", lambda module: None)
    model = build("llava")
    batch = inputs(model)
    assert difference(logits(model, batch, text_config="uniform"), logits(model, batch)) < 0.05


def test_inputs_are_left_padded_rows_with_text_on_both_sides(model):
    batch = inputs(model)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    assert len(ids) == 3 and len(set(real.sum(1).tolist())) == 3
    assert ((ids == PAD) == ~real).all() and (real.int().diff(dim=1) >= 0).all()
    for row, mask in zip(ids, real, strict=True):
        row = row[mask]
        picture = (row == IMAGE).nonzero()
        assert row[0] == BOS and picture[0] > 4 and picture[-1] < len(row) - 9
    assert inputs(model, padded=False)["attention_mask"].all()
    two = inputs(model, images=2)
    assert ((two["input_ids"] == VISION_START).sum(1) > 1).all() and logits(model, two).isfinite().all()
    hidden = {**batch, "input_ids": torch.where(real, ids, 99)}  # what stands in the padding is not seen
    assert torch.equal(logits(model, hidden), logits(model, batch))


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_videos_are_seen(family):
    model = build(family, layers=2)
    batch = inputs(model, batch=2, video=True)
    assert not (batch["input_ids"] == IMAGE).any() and (batch["input_ids"] == VIDEO).any(1).all()
    other = {**batch, "pixel_values_videos": batch["pixel_values_videos"].flip(0)}
    assert difference(logits(model, other), logits(model, batch)) > 0.1


def test_a_family_without_videos_says_so():
    with pytest.raises(ValueError, match="deepseek_vl takes no video. These do: llava_next_video, "):
        inputs(build("deepseek_vl"), video=True)


def test_the_decoder_makes_the_logits(model):
    decoder, made = decoder_of(model), []
    hook = decoder.register_forward_hook(lambda module, args, output: made.append(output.last_hidden_state))
    with torch.inference_mode():
        found = model(**inputs(model, batch=1)).logits
        hook.remove()
        assert torch.equal(model.get_output_embeddings()(made[0]), found)


def test_towers_and_projector_are_on_the_way_of_the_picture(model):
    towers, projector = towers_of(model), model.get_submodule(family_of(model).projector)
    with torch.inference_mode():
        normal = [model(**batch).logits for batch in seen_by(model)]
        for module in (*towers.values(), projector):
            hook = module.register_forward_pre_hook(lambda module, args, kw: nothing(args, kw), with_kwargs=True)
            moved = [model(**batch).logits for batch in seen_by(model)]
            hook.remove()
            assert any((m - n).abs().max() > 0.5 for m, n in zip(moved, normal, strict=True))


def seen_by(model):
    """A batch for every tower: Video-LLaVA has one for pictures and one for videos."""
    return [inputs(model, batch=1, video=name == "video") for name in towers_of(model) if name != OWN_ATTENTION]


def nothing(args, kw):
    """The same call with zeros in place of pixels or features."""

    def zero(value):
        return value * 0 if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tuple(map(zero, args)), {name: zero(value) for name, value in kw.items()}


def test_all_attention_is_in_the_decoder_or_a_tower(model):
    parts = {"text": decoder_of(model), **towers_of(model)}
    callers = []
    for batch in seen_by(model):
        logits(model, batch, text_config="uniform", vision_config="uniform")
        callers += uniform.callers
    inside = {name: [c for c in callers if c in set(part.modules())] for name, part in parts.items()}
    assert {name for name, found in inside.items() if not found} == set(parts) & {OWN_ATTENTION}
    assert set(callers) == set(chain(*inside.values()))
    assert len(set(inside["text"])) == len(parts["text"].layers)


def test_visual_ids_are_the_placeholders(model):
    assert visual_ids(model) == ((IMAGE, VIDEO) if model.config.model_type in VIDEO_FAMILIES else (IMAGE,))


def test_an_own_class_of_a_family_is_of_that_family():
    model = build("llava")
    own = copy.copy(model)
    own.__class__ = type("MyLlava", (type(model),), {})
    assert towers_of(own)["vision"] is model.model.vision_tower


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [
        ("videollama2_mistral", "Videollama2MistralForCausalLM"), ("videollama2_qwen2", ""), ("", "CogVLMForCausalLM"),
        (None, "CogVLMVideoForCausalLM"), ("qwen", "QWenLMHeadModel"),
    ],
)  # fmt: skip
def test_unverified_families_are_known_by_type_or_class(model_type, class_name):
    family = find_family(model_type, [class_name])
    assert not family.verified and family.patches is None and not family.layout


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_5", "internvl_chat", "videollama3_qwen2", "", None])
def test_an_unknown_architecture_lists_the_known_ones(model_type):
    with pytest.raises(ValueError, match=f"Known: {', '.join(sorted(FAMILY_NAMES))}; unverified: CogVLM.*videollama2"):
        find_family(model_type, ["SomethingElse"])


def test_the_record_says_what_the_model_does(model):
    """Patches that become a token, tokens before them, and positions on a grid, each as the modules show it."""
    family, text = family_of(model), model.config.get_text_config()
    assert family.grid_positions == ("mrope_section" in text.rope_parameters)
    assert set(family.unwatched) <= set(family.towers) and set(family.unwatched) == {OWN_ATTENTION} & set(family.towers)
    if family.patches is None:
        return
    seen = []
    hook = model.get_submodule(family.projector).register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.inference_mode():
        for batch in seen_by(model):
            model(**batch)
    hook.remove()
    vision = model.config.vision_config
    patches = (SIDE // PATCH) ** 2
    merged = family.patches if isinstance(family.patches, int) else family.patches(model.config)
    for (_, output), tower in zip(seen[:1], towers_of(model).values()):
        names = {name.rpartition(".")[2] for name, _ in tower.named_parameters()}
        assert PLAIN_TOWERS[vision.model_type] == int(bool({"class_embedding", "cls_token"} & names))
        assert output.shape[-2] == patches // merged + registers_of(model.config)
    linears = [part for part in model.get_submodule(family.projector).modules() if isinstance(part, nn.Linear)]
    assert len(linears) == family.linears


def test_square_families_show_every_picture_as_one_square():
    assert {name for name, family in FAMILIES.items() if family.square} == {
        "llava", "vipllava", "deepseek_vl", "deepseek_vl_hybrid"
    }  # fmt: skip


def test_a_decoder_that_cannot_be_used_says_what_it_lacks():
    model = nn.Module()
    model.get_decoder = lambda: nn.ModuleDict()
    with pytest.raises(ValueError, match="decoder of Module cannot be used here: it has no layers, rotary_emb"):
        decoder_of(model)
