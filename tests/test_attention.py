"""lv.observe: the streamed sums, what a user may do with it, and that it leaves no trace."""

import pytest
import torch
from families import build, inputs
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

import lvlm_utils as lv
from lvlm_utils.attention import STATISTICS
from lvlm_utils.attention.intercept import WATCHED, Call
from lvlm_utils.attention.streaming import STREAMED, attention_row, stream
from lvlm_utils.attention.visibility import Visibility
from lvlm_utils.pruning import prune
from lvlm_utils.session import OPEN

KINDS = ("causal", "full", "left", "right", "flash", "additive", "scattered")


def masked(kind, batch, tokens):
    """(mask as an implementation gets it, is_causal, visible (batch, queries, keys))."""
    keep = torch.ones(batch, tokens).bool()
    for row in range(batch):
        cut = row * (tokens // 4)
        if kind == "right":
            keep[row, tokens - cut :] = False
        elif kind not in ("causal", "full"):
            keep[row, :cut] = False
    visible = torch.ones(tokens, tokens).bool() if kind == "full" else torch.ones(tokens, tokens).tril().bool()
    visible = visible & keep[:, None]
    if kind == "scattered":
        visible &= torch.rand(batch, tokens, tokens) < 0.4
        visible |= torch.eye(tokens).bool() & keep[:, None]
    mask = {
        "causal": None,
        "full": None,
        "flash": keep.long(),
        "additive": torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None],
    }.get(kind, visible[:, None])
    return mask, kind != "full", visible & keep[:, :, None]


def by_definition(query, key, scale, visible, groups):
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~visible[:, None], -torch.inf)
    matrix = scores.softmax(-1).nan_to_num(0)
    count, onehot = visible.sum(-1)[:, None].clamp(min=1), groups.double()
    mean = matrix.sum(-1) / count
    from_groups = torch.einsum("big,bhij->bhgj", onehot, matrix)
    return matrix, {
        "received": matrix.sum(2),
        "received_from": from_groups,
        "groups": from_groups @ onehot[:, None],
        "entropy": -torch.special.xlogy(matrix, matrix).sum(-1),
        "variance": ((matrix - mean[..., None]).square() * visible[:, None]).sum(-1) / count,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "heads", "key_heads"), [(5, 2, 2), (130, 6, 2), (300, 4, 1)])
def test_streamed_sums_are_those_of_the_matrix(kind, tokens, heads, key_heads):
    torch.manual_seed(0)
    query, key = torch.randn(3, heads, tokens, 16), torch.randn(3, key_heads, tokens, 16)
    mask, causal, visible = masked(kind, 3, tokens)
    groups = torch.rand(3, tokens, 3) < 0.5
    view = Visibility(mask, 3, tokens, causal, 64, query.device)
    matrix, expected = by_definition(query, key, 0.3, visible, groups)
    found = stream(query, key, 0.3, view, STREAMED, groups)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-5, msg=name)
        alone = stream(query, key, 0.3, view, (name,), groups)
        assert list(alone) == [name]
        torch.testing.assert_close(alone[name], found[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(view.seen.expand(3, -1), visible.sum(2)) and torch.equal(
        view.seers.expand(3, -1), visible.sum(1)
    )
    last = view.last(3)
    row = attention_row(query, key, 0.3, view, last)
    torch.testing.assert_close(row.double(), matrix[torch.arange(3), :, last], rtol=0, atol=1e-6)
    assert (visible.any(2).long() * torch.arange(tokens)).amax(1).equal(last)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_of_a_few_groups_are_read_alone_and_give_the_same_sums(kind, monkeypatch):
    """Blocks of rows without any query of a group are left out; in a batch the groups stand in other blocks."""
    torch.manual_seed(0)
    batch, tokens = 3, 300
    query, key = torch.randn(batch, 4, tokens, 16), torch.randn(batch, 2, tokens, 16)
    mask, causal, visible = masked(kind, batch, tokens)
    groups = torch.zeros(batch, tokens, 2).bool()
    groups[0, -20:, 0] = groups[1, 150:160, 0] = groups[2, :, 1] = True
    groups[0, 5:9, 1] = True
    made, plain = [], torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, *rest, **more: made.append(x.numel()) or plain(x, *rest, **more))
    found = {}
    for only in (2, 3):  # with a group over the whole of the third prompt, and without that prompt
        rows = slice(0, only)
        view = Visibility(None if mask is None else mask[rows], only, tokens, causal, 64, query.device)
        found[only] = stream(query[rows], key[rows], 0.25, view, {"received_from", "groups"}, groups[rows])
    _, expected = by_definition(query, key, 0.25, visible, groups)
    for only, values in found.items():
        for name in ("received_from", "groups"):
            torch.testing.assert_close(values[name], expected[name][:only].float(), atol=1e-4, rtol=1e-4)
    assert made
    made.clear()
    view = Visibility(None if mask is None else mask[:1], 1, tokens, causal, 64, query.device)
    stream(query[:1], key[:1], 0.25, view, {"received_from"}, groups[:1])
    few = sum(made)
    stream(query[:1], key[:1], 0.25, view, {"received"}, None)
    assert few < 0.75 * (sum(made) - few)


def test_peaked_scores_and_half_precision_keep_their_sums():
    """Scores up to 200: nothing overflows, entropies stay right; bfloat16 and float16 are summed in float32."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 600, 16) * 6, torch.randn(1, 2, 600, 16) * 6
    groups = torch.ones(1, 600, 1).bool()
    visible = torch.ones(1, 600, 600).tril().bool()
    view = Visibility(None, 1, 600, True, 64, query.device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = query.to(dtype), key.to(dtype)
        found = stream(*given, 0.25, view, STREAMED, groups)
        _, expected = by_definition(*given, 0.25, visible, groups)
        for name, value in expected.items():
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-4, msg=name)
        torch.testing.assert_close(found["received"].sum(-1), torch.full((1, 2), 600.0), rtol=1e-6, atol=0)


class Largest(TorchDispatchMode):
    """Size of the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.size = max(self.size, one.numel())
        return out


@pytest.mark.parametrize("kind", ["causal", "flash"])
def test_nothing_grows_with_the_square_of_the_tokens(kind):
    sizes = []
    for tokens in (1024, 2048):
        query, key = torch.randn(1, 1, tokens, 4), torch.randn(1, 1, tokens, 4)
        mask, causal = (None, True) if kind == "causal" else (torch.ones(1, tokens).long(), True)
        with Largest() as largest:
            view = Visibility(mask, 1, tokens, causal, 32, query.device)
            stream(query, key, 0.3, view, STREAMED, torch.ones(1, tokens, 2).bool())
            attention_row(query, key, 0.3, view, view.last(1))
        sizes.append(largest.size)
    assert sizes[1] < 2048**2 / 20 and sizes[1] <= 2 * sizes[0]


def state(model):
    """All that observing might touch."""
    hooks = [
        (name, kind, len(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    ]
    implementations = [
        (name, module.config._attn_implementation)
        for name, module in model.named_modules()
        if hasattr(module, "config")
    ]
    return hooks, implementations, model.config.to_json_string(), dict(WATCHED), dict(OPEN)


@torch.inference_mode()
def test_nothing_stays_behind_however_the_context_ends():
    model = build("llava")
    model.set_attn_implementation({"text_config": "eager"})  # the parts differ
    given = inputs(model)
    plain = model(**given).logits  # the first call of a model sets hooks of transformers itself
    before = state(model)
    with pytest.raises(RuntimeError, match="stop"), lv.observe(model):
        raise RuntimeError("stop")
    assert state(model) == before
    with lv.observe(model) as outer:
        between = state(model)
        with lv.observe(model, statistics=("last",), vision=False) as inner:
            assert torch.equal(model(**given).logits, plain)
        assert state(model) == between
        with lv.observe(build("llava", seed=1)):  # another model's context does not disturb
            kept = outer.last
    assert state(model) == before
    assert torch.equal(inner.last, kept) and torch.equal(outer.last, kept)
    with lv.observe(model) as again:
        assert torch.equal(model(**given).logits, plain)
    assert state(model) == before and torch.equal(again.received, outer.received)
    assert torch.equal(model(**given).logits, plain)


def mask_of_keys(module, query, key, value, attention_mask, **kwargs):
    """Takes what flash attention takes: a mask (batch, keys) or none."""
    if attention_mask is not None:
        tokens = key.shape[2]
        causal = torch.ones(tokens, tokens).tril().bool()[tokens - query.shape[2] :]
        attention_mask = (causal & attention_mask[:, None].bool())[:, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("mask_of_keys", mask_of_keys)
AttentionMaskInterface.register("mask_of_keys", flash_attention_mask)


@torch.inference_mode()
@pytest.mark.parametrize("padded", [True, False])
def test_implementations_agree_and_keep_their_outputs(padded):
    model = build("qwen2_vl")
    given, found = inputs(model, padded=padded), {}
    for name in ("sdpa", "eager", "mask_of_keys"):
        model.set_attn_implementation(name)
        plain = model(**given).logits
        with lv.observe(model, statistics=("received", "last", "entropy", "equi")) as found[name]:
            assert torch.equal(model(**given).logits, plain)
    for name in ("eager", "mask_of_keys"):
        for statistic in ("received_mean", "last", "entropy", "equi"):
            one, other = getattr(found[name], statistic), getattr(found["sdpa"], statistic)
            torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
        torch.testing.assert_close(found[name].vision.received, found["sdpa"].vision.received, rtol=0, atol=2e-5)


def test_packed_pictures_come_apart():
    query, key = torch.randn(1, 2, 10, 4), torch.randn(1, 2, 10, 4)
    ends, output = torch.tensor([0, 3, 10], dtype=torch.int32), query.transpose(1, 2)
    first, second = Call(None, query, key, key, None, 0.5, False, ends, output).unpacked()
    assert torch.equal(first.query, query[:, :, :3]) and torch.equal(second.key, key[:, :, 3:])
    assert torch.equal(second.output, output[:, 3:]) and second.lengths is None


@torch.inference_mode()
def test_the_prompt_is_seen_not_the_decode_steps():
    model = build("llava")
    given = inputs(model)
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(**given, **options)
    with lv.observe(model) as prompt:
        model(**given)
    with lv.observe(model) as seen:
        assert torch.equal(model.generate(**given, **options), plain)
    for name in ("received", "last", "entropy", "variance"):  # generate numbers left-padded prompts from 0: rounding
        torch.testing.assert_close(getattr(seen, name), getattr(prompt, name), rtol=0, atol=2e-5)
    assert torch.equal(seen.vision.cls, prompt.vision.cls)


@torch.inference_mode()
def test_a_new_prompt_replaces_the_one_before():
    model = build("llava")
    given = inputs(model, images=2)
    text = {"input_ids": torch.arange(40, 60)[None]}
    with lv.observe(model) as seen:
        with pytest.raises(RuntimeError, match="has not run yet"):
            seen.last  # noqa: B018
        model(**given)
        assert seen.vision.cls.shape[1] == 6
        model(**given)
        assert seen.vision.cls.shape[1] == 6  # not 12
        model(**text)
    assert seen.last.shape == (4, 1, 4, 20) and not seen.towers
    with pytest.raises(ValueError, match="no tower"):
        seen.vision  # noqa: B018
    torch.testing.assert_close(seen.received.sum(-1), torch.full((4, 1, 4), 20.0), rtol=1e-5, atol=0)


def test_mistakes_are_explained():
    model = build("llava")
    given = inputs(model)
    groups = {"visual": given["input_ids"] == model.config.image_token_id}
    for wrong, words in [
        ({"statistics": ("recieved",)}, "Known: received"),
        ({"statistics": "last"}, "sequence"),
        ({"statistics": ("groups",)}, "need groups"),
        ({"groups": {"visual": groups["visual"].long()}}, "bool masks"),
        ({"groups": {}}, "bool masks"),
    ]:
        with pytest.raises(ValueError, match=words), lv.observe(model, **wrong):
            pass
    with pytest.raises(ValueError, match="this very prompt"), lv.observe(model, {"all": groups["visual"][:, 1:]}):
        model(**given)
    with pytest.raises(ValueError, match="input_ids"), lv.observe(model, statistics=("equi",)):
        model(inputs_embeds=model.get_input_embeddings()(given["input_ids"]))
    with lv.observe(model, statistics=("last",), vision=False) as seen:
        model(**given)
    with pytest.raises(AttributeError, match="Asked for: last"):
        seen.received_mean  # noqa: B018
    biased = torch.zeros(1, 1, 8, 8) + 0.5
    for mask in (biased, biased.expand(1, 2, 8, 8).bool(), object()):
        with pytest.raises(NotImplementedError, match="choose another attention"):
            Visibility(mask, 1, 8, True, 4, "cpu")


@torch.inference_mode()
def test_right_padding_is_left_out_too():
    model = build("llava")
    given = inputs(model, batch=1, padded=False)
    wider = {**given, "input_ids": torch.nn.functional.pad(given["input_ids"], (0, 5))}
    wider["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (0, 5))
    with lv.observe(model) as seen:
        model(**wider)
    with lv.observe(model) as plain:
        model(**given)
    for name in ("received", "last", "entropy", "variance"):
        one, other = getattr(seen, name), getattr(plain, name)
        torch.testing.assert_close(one[..., :-5], other, rtol=0, atol=1e-5)
        assert not one[..., -5:].any()
    with pytest.raises(ValueError, match="left padding"), lv.observe(model, statistics=("equi",)):
        model(**wider)


@torch.inference_mode()
def test_layers_of_a_pruned_prompt_are_listed_one_by_one():
    model = build("llava")
    with prune(model, "fastv", keep=0.5) as trace, lv.observe(model, statistics=("received", "last")) as seen:
        model(**inputs(model))
    kept = [layer.sum(-1) for layer in trace.kept]
    assert kept[-1].sum() < kept[0].sum()
    for received, mean, last, tokens in zip(seen.received, seen.received_mean, seen.last, kept, strict=True):
        torch.testing.assert_close(received.sum(-1), tokens[:, None].expand(-1, 4).float(), rtol=1e-5, atol=0)
        torch.testing.assert_close(last.sum(-1), torch.ones(3, 4))
        assert received.shape == mean.shape == last.shape and last.shape[-1] == tokens.max()


@torch.inference_mode()
def test_bfloat16_is_near_float32():
    model = build("llava", layers=2)
    given = inputs(model)
    groups = {"visual": given["input_ids"] == model.config.image_token_id, "all": given["attention_mask"].bool()}
    with lv.observe(model, groups, STATISTICS) as exact:
        model(**given)
    model = model.bfloat16()
    given["pixel_values"] = given["pixel_values"].bfloat16()
    plain = model(**given).logits
    with lv.observe(model, groups, STATISTICS) as seen:
        assert torch.equal(model(**given).logits, plain)
    assert seen.received.dtype == torch.float32
    # Rows still sum to 1 in float32, although the model's own weights would be rounded to 8 bits.
    real = given["attention_mask"].sum(-1)[None, :, None].expand(2, -1, 4).float()
    torch.testing.assert_close(seen.received.sum(-1), real, rtol=1e-5, atol=0)
    torch.testing.assert_close(seen.groups[..., 1, 1], real, rtol=1e-5, atol=0)
    # Scores of size 5 to 10, with 8 bits each: their error is some percent, and so is that of the weights.
    for name in ("received_mean", "last", "equi"):
        assert (getattr(seen, name) - getattr(exact, name)).abs().mean() < 2e-3
    assert (seen.entropy - exact.entropy).abs().mean() < 0.05
    torch.testing.assert_close(seen.groups, exact.groups, rtol=0.1, atol=0.5)


@torch.inference_mode()
def test_groups_of_a_prompt_are_its_partition(tiny, image):
    prompt = lv.prompt(tiny, image, ["A lamp stands near the window.", ""], "Is it red?")
    with lv.observe(tiny, prompt.groups) as seen:
        tiny.model(**prompt.inputs)
    assert seen.group_names == ("system", "visual", "context", "question")
    tokens = prompt.inputs["attention_mask"].sum(-1).float()
    torch.testing.assert_close(seen.groups.sum((-1, -2)), tokens[None, :, None].expand(4, -1, 4), rtol=1e-5, atol=0)
    assert (seen.groups[:, 1, :, 2] == 0).all() and (seen.groups[:, 0, :, 2, 1] > 0).all()
    with lv.observe(tiny, prompt.groups, statistics=("received_from",)) as by_group:
        tiny.model(**prompt.inputs)
    visual = (by_group.received_from[:, :, :, 3] * prompt.groups.visual[None, :, None]).sum(-1)
    torch.testing.assert_close(visual, seen.groups[..., 3, 1])
