"""lv.observe against whole attention matrices, in every family: decoder and towers, padding, several pictures."""

import copy

import pytest
import torch
import transformers as hf
from families import CASES as MODELS
from families import VIDEO_FAMILIES, VOCABULARY, build, inputs
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.vision_utils import get_vision_window_index

import lvlm_utils as lv
from lvlm_utils.attention import STATISTICS
from lvlm_utils.families import decoder_of, towers_of, visual_ids

CASES = [(name, False) for name in MODELS] + [(name, True) for name in VIDEO_FAMILIES]
WITH_CLASS = ("clip_vision_model", "internvl_vision", "dinov2", "dinov2_with_registers")
MATRICES = {}  # module -> its attention matrices, in the order of the calls


def keeps_matrices(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Eager attention written out, as a user's own implementation; keeps every matrix."""
    shared = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(shared, 1).transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    MATRICES.setdefault(module, []).append(weights)
    return (weights @ value.repeat_interleave(shared, 1)).transpose(1, 2).contiguous(), None


AttentionInterface.register("keeps_matrices", keeps_matrices)
AttentionMaskInterface.register("keeps_matrices", eager_mask)


def groups_of(model, given):
    ids, real = given["input_ids"], given["attention_mask"].bool()
    visual = torch.isin(ids, torch.tensor(visual_ids(model)))
    late = torch.zeros_like(real)
    late[:, -6:] = True  # overlaps with text
    return {"visual": visual, "text": real & ~visual, "late": late}


def statistics_of(matrix, seen, groups=None):
    """All statistics of A (..., heads, queries, keys) by their definitions; seen (..., queries, keys) bool."""
    matrix, seen = matrix.double(), seen.unsqueeze(-3)
    matrix = matrix * seen.any(-1, keepdim=True)
    count = seen.sum(-1)
    mean = matrix.sum(-1) / count.clamp(min=1)
    made = {
        "received": matrix.sum(-2),
        "received_mean": matrix.sum(-2) / seen.sum(-2).clamp(min=1),
        "last": matrix[..., -1, :],
        "entropy": -torch.special.xlogy(matrix, matrix).sum(-1),
        "variance": ((matrix - mean[..., None]).square() * seen).sum(-1) / count.clamp(min=1),
    }
    if groups is not None:
        onehot = torch.stack([*groups.values()], -1).double()
        made["received_from"] = torch.einsum("big,lbhij->lbhgj", onehot, matrix)
        made["groups"] = torch.einsum("lbhgj,bjk->lbhgk", made["received_from"], onehot)
    return made


def assert_close(found, expected):
    for name, value in expected.items():
        one = getattr(found, name)
        assert one.shape == value.shape, name
        error = (one - value).abs() / (value.abs().clamp(min=1) if name in ("groups", "received_from") else 1)
        assert error.max() < 1e-5, (name, float(error.max()))


def tower_statistics(model, tower, given, video):
    """name -> (layers, heads, tokens) of every picture, or None for a tower that keeps no matrices."""
    layers = [MATRICES[module] for module in tower.modules() if module in MATRICES]
    if not layers:
        return None
    made = [[statistics_of(matrix, torch.ones_like(matrix[:, 0]).bool()) for matrix in calls] for calls in layers]
    for calls, matrices in zip(made, layers, strict=True):
        for call, matrix in zip(calls, matrices, strict=True):
            call["cls"] = matrix[..., 0, :].double()
    grid = given.get("video_grid_thw" if video else "image_grid_thw")
    if grid is None:
        return {
            name: [*torch.stack([torch.cat([call[name] for call in calls]) for calls in made], 1)]
            for name in made[0][0]
        }
    order = torch.arange(int(grid.prod(-1).sum()))
    config = tower.config
    if config.model_type == "qwen2_5_vl_vision":  # its blocks see the pictures sorted by windows
        merge = config.spatial_merge_size
        index, _ = get_vision_window_index(grid, merge, config.window_size, config.patch_size)
        order = order.view(-1, merge**2)[index].flatten().argsort()
        assert video or not torch.equal(order, order.sort().values)
    packed = {
        name: torch.stack([torch.cat([call[name] for call in calls], -1)[0] for calls in made]) for name in made[0][0]
    }
    return {name: value[..., order].split(grid.prod(-1).tolist(), -1) for name, value in packed.items()}


def check_tower(model, name, seen, given, video):
    expected = tower_statistics(model, towers_of(model)[name], given, video)
    if expected is None:  # the other tower of Video-LLaVA; SAM
        assert name not in seen.towers
        return
    found = seen.towers[name]
    assert found is seen.vision
    names = ["received", "received_mean", "entropy", "variance"]
    if model.config.vision_config.model_type in WITH_CLASS:
        names.append("cls")
    else:
        assert not hasattr(found, "cls")
    assert not hasattr(found, "last")
    for name in names:
        value = getattr(found, name)
        equal = len({picture.shape for picture in expected[name]}) == 1
        assert isinstance(value, torch.Tensor) == equal
        pictures = value.unbind(1) if equal else value
        assert len(pictures) == len(expected[name])
        for one, other in zip(pictures, expected[name], strict=True):
            torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5, msg=name)
            if one.shape[-1] > 1:  # every picture has its own: the check would notice another order
                assert (one.roll(1, -1) - other).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "video"), CASES)
@pytest.mark.parametrize("padded", [True, False])
def test_every_statistic_is_that_of_the_whole_matrix(family, video, padded):
    model = build(family)
    given = inputs(model, padded=padded, images=1 if video else 2, video=video)
    groups, real = groups_of(model, given), given["attention_mask"].bool()
    with torch.inference_mode():
        plain = model(**given).logits
        with lv.observe(model, groups, STATISTICS) as seen:
            assert torch.equal(model(**given).logits, plain)
        model.set_attn_implementation("keeps_matrices")
        MATRICES.clear()
        with lv.observe(model, groups, STATISTICS) as again:
            model(**given)
    layers = [MATRICES[layer.self_attn] for layer in decoder_of(model).layers]
    matrix = torch.stack([calls[-1] for calls in layers])
    visible = torch.ones(matrix.shape[-2:]).tril().bool() & real[:, None] & real[:, :, None]
    expected = statistics_of(matrix, visible, groups)
    assert_close(again, expected)
    # the same, where the model runs with another kernel: only the model's own rounding is added
    for name, value in expected.items():
        torch.testing.assert_close(getattr(seen, name).double(), value, rtol=1e-4, atol=1e-5, msg=name)
    # would the check notice a mask that is wrong in a single place?
    wrong = visible.clone()
    wrong[-1, -1, int(real[-1].nonzero()[0, 0])] = False
    with pytest.raises(AssertionError):
        assert_close(again, statistics_of(matrix * wrong[:, None], visible, groups))
    for name in towers_of(model):
        check_tower(model, name, again, given, video)


def numbered_with_one_visual_token(visual, real):
    """Positions (batch, tokens) as the paper's code counts them: all visual tokens together take a single place."""
    rows = []
    for is_visual, is_real in zip(visual.tolist(), real.tolist(), strict=True):
        positions, place, common = [], 0, None
        for one, counts in zip(is_visual, is_real, strict=True):
            if one and common is not None:
                positions.append(common)
                continue
            common = place if one else common
            positions.append(place)
            place += counts
        rows.append(positions)
    return torch.tensor(rows)


def scaled(**rope):
    """LLaVA whose text model has another rotary embedding."""
    model = build("llava")
    config = copy.deepcopy(model.config)
    config.text_config.rope_parameters = {"rope_theta": 10000.0, **rope}
    return _with_weights_of(model, config)


def partial():
    """LLaVA around a text model that rotates only half of each head."""
    config = copy.deepcopy(build("llava").config)
    config.text_config = hf.PhiConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512, partial_rotary_factor=0.5,
    )  # fmt: skip
    model = hf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(7 if parameter.dim() == 2 else 1)
    return model


def _with_weights_of(model, config):
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
EQUI = {name: lambda name=name: build(name) for name in MODELS} | {
    "yarn": lambda: scaled(**YARN),
    "partial": partial,
}


@torch.inference_mode()
@pytest.mark.parametrize("kind", EQUI)
def test_equi_is_the_row_of_a_layer_run_with_the_positions_of_the_papers_code(kind):
    model = EQUI[kind]()
    decoder, given, hidden = decoder_of(model), inputs(model, images=2), []
    groups, real = groups_of(model, given), given["attention_mask"].bool()
    hooks = [layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0])) for layer in decoder.layers]
    with lv.observe(model, statistics=("equi", "last"), vision=False) as seen:
        model(**given)
    for hook in hooks:
        hook.remove()
    with lv.observe(model, {"visual": groups["visual"]}, statistics=("equi",), vision=False) as by_groups:
        model(**given)
    assert torch.equal(seen.equi, by_groups.equi)

    positions = numbered_with_one_visual_token(groups["visual"], real)
    if kind.startswith("qwen"):
        positions = positions.expand(3, -1, -1)
    rotary = copy.deepcopy(decoder.rotary_emb).double()
    cos, sin = rotary(hidden[0].double(), positions)
    if kind == "yarn":
        assert rotary.attention_scaling > 1.1
    visible = torch.ones(real.shape[1], real.shape[1]).tril().bool() & real[:, None]
    mask = torch.zeros(visible.shape).double().masked_fill(~visible, -1e9)[:, None]
    model.set_attn_implementation("keeps_matrices")
    for number, layer in enumerate(decoder.layers):
        exact = copy.deepcopy(layer).double()
        MATRICES.clear()
        exact(hidden[number].double(), attention_mask=mask, position_embeddings=(cos, sin))
        row = MATRICES[exact.self_attn][0][:, :, -1]
        torch.testing.assert_close(seen.equi[number].double(), row, rtol=0, atol=1e-5)
        assert (seen.last[number] - row).abs().max() > 1e-3
