"""Information flow: against eager autograd in every family, and against the formulas written out in float64."""

import families
import numpy as np
import processors
import pytest
import torch
from captum.attr import LayerGradientXActivation
from conftest import picture, text_of
from recomputation import Chooses
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import lvlm_utils as lv
from lvlm_utils import saliency
from lvlm_utils.attention.intercept import WATCHED
from lvlm_utils.attention.streaming import pair_sums
from lvlm_utils.attention.visibility import Visibility
from lvlm_utils.methods import prune
from lvlm_utils.saliency import information_flow

CONTEXTS = ["Some words. A lamp stands near the window.", "", "The room is quiet."]
ANSWERS = ["yes", "no no", "yes"]


def ask(lvlm, rows=(0, 1, 2)):
    """A left-padded batch, or one prompt for a single row."""
    pictures, contexts = [picture("navy"), picture("red", 3), picture("green", 20)], CONTEXTS
    pick = (lambda values: [values[row] for row in rows]) if len(rows) > 1 else (lambda values: values[rows[0]])
    return lv.prompt(lvlm, pick(pictures), pick(contexts), "Is the dog in the image?")


def eager_products(lvlm, inputs, ids, first):
    """A * dL/dA of every layer (batch, heads, tokens, tokens) by autograd; ids (batch, answer) predicted from first."""
    before = lvlm.attention
    lvlm.model.set_attn_implementation({"text_config": "eager"})
    weights, handles = [], []
    for layer in lvlm.decoder.layers:
        keep = lambda module, args, output: (output[1].retain_grad(), weights.append(output[1]))[0]  # noqa: E731
        handles.append(layer.self_attn.register_forward_hook(keep))
    try:
        logits = lvlm.model(**inputs, use_cache=False).logits[:, first:][:, : ids.shape[1]]
        logits.log_softmax(-1).gather(-1, ids[..., None]).sum().neg().backward()
    finally:
        lvlm.model.set_attn_implementation({"text_config": before})
        for handle in handles:
            handle.remove()
        lvlm.model.zero_grad()
    return [(a * a.grad).detach().double() for a in weights]


def between(matrix, masks):
    """Sums of matrix (tokens, tokens) over [queries of one group, keys of another]."""
    return torch.stack([torch.stack([matrix[q][:, k].sum() for k in masks]) for q in masks])


@pytest.mark.parametrize("family", families.CASES)
def test_flow_equals_eager_autograd(family):
    """A padded batch with answers of unequal length, grouped queries; the reference asks row by row, unpadded."""
    lvlm = processors.lvlm(family)
    flows = {way: information_flow(lvlm, ask(lvlm), ANSWERS, absolute=way) for way in saliency.ABSOLUTE}
    assert all(p.requires_grad and p.grad is None for p in lvlm.model.parameters())
    for row, answer in enumerate(ANSWERS):
        prompt = ask(lvlm, [row])
        tokens = prompt.inputs["input_ids"].shape[1]
        target = torch.tensor([saliency._answer(lvlm, prompt.text, answer)])
        inputs = {
            name: torch.cat([v, {"input_ids": target, "attention_mask": torch.ones_like(target)}.get(
                name, torch.zeros_like(target))[:, :-1].to(v.dtype)], 1) if v.shape == (1, tokens) else v
            for name, v in prompt.inputs.items()
        }  # fmt: skip
        products = eager_products(lvlm, inputs, target, tokens - 1)
        groups = prompt.groups
        masks = torch.zeros(4, inputs["input_ids"].shape[1], dtype=torch.bool)
        masks[0, :tokens], masks[2, :tokens] = groups.visual[0], groups.context[0]
        masks[1, : tokens - 1] = (groups.text & ~groups.context)[0, :-1]
        masks[3, tokens - 1 :] = True
        for way, flow in flows.items():
            assert flow.tokens[row].tolist() == masks.sum(1).tolist()
            for layer, product in enumerate(products):
                whole = product[0].abs().sum(0) if way == "inside" else product[0].sum(0).abs()
                wanted, found = between(whole, masks), flow.groups[layer, row].double()
                assert (found - wanted).abs().max() < 1e-5 * wanted.max(), (way, row, layer)
                diagonal = torch.stack([whole.diagonal()[mask].sum() for mask in masks])
                assert (flow.diagonal[layer, row] - diagonal).abs().max() < 1e-5 * wanted.max()
                assert (found.T - wanted).abs().max() > 0.1 * wanted.max()  # the test would see a transposition
    inside, outside = (flow.groups.sum() for flow in flows.values())
    assert outside < 0.9 * inside


# The formulas, written out -------------------------------------------------------------------------------------------
MASKS = []  # ones that multiply the attention of each layer; their gradient is A * dL/dA


def attention_with_ones(module, query, key, value, attention_mask, scaling, **_):
    """Attention as Wang et al. (2023) change it: what comes out of the softmax is multiplied by ones."""
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    scores = (query @ key.mT * scaling).masked_fill(~torch.ones(query.shape[2], key.shape[2]).tril().bool(), -torch.inf)
    MASKS.append(torch.ones_like(scores, requires_grad=True))
    return (scores.softmax(-1) * MASKS[-1] @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def exact():
    lvlm = processors.lvlm("llava")
    lvlm.model.double()
    AttentionInterface.register("ones", attention_with_ones)
    AttentionMaskInterface.register("ones", sdpa_mask)
    yield lvlm
    for table in (AttentionInterface, AttentionMaskInterface):
        table._global_mapping.pop("ones")
    MASKS.clear()


@pytest.mark.parametrize("absolute", saliency.ABSOLUTE)
def test_scores_are_the_papers_formulas(exact, absolute):
    """Eq. 17 to 23 as they stand, pair by pair: (source, target), so that the matrix is transposed."""
    prompt = ask(exact, [0])
    tokens = prompt.inputs["input_ids"].shape[1]
    flow = information_flow(exact, prompt, 77, absolute=absolute)

    exact.model.set_attn_implementation({"text_config": "ones"})
    logits = exact.model(**prompt.inputs, use_cache=False).logits[0, -1]
    loss = torch.nn.functional.cross_entropy(logits[None], torch.tensor([77]))
    loss.backward()
    assert float(flow.loss) == pytest.approx(loss.item(), rel=1e-9)

    t = [tokens - 1]
    v, c = (mask[0].nonzero()[:, 0].tolist() for mask in (prompt.groups.visual, prompt.groups.context))
    r = [i for i in range(tokens) if i not in v + c + t]
    named = {"Svr": (v, r, len(r)), "Svc": (v, c, len(c))}
    named |= {"Srt": (r, t, len(r)), "Sct": (c, t, len(c)), "Svt": (v, t, 1)}
    assert tuple(flow.scores.columns) == (*named, "Sww") and flow.scores.index.names == ["sample", "layer"]
    for layer, ones in enumerate(MASKS):
        product = ones.grad[0].mT
        matrix = (product.abs().sum(0) if absolute == "inside" else product.sum(0).abs()).numpy()
        rest = {(i, j) for i in range(tokens) for j in range(i + 1, tokens)}
        found, means = flow.scores.loc[0, layer], flow.pair_means.loc[0, layer]
        for name, (sources, targets, paper) in named.items():
            pairs = {(i, j) for i in sources for j in targets}
            total = sum(matrix[i, j] for i, j in pairs)
            possible = {(i, j) for i, j in pairs if i < j}
            rest -= pairs
            np.testing.assert_allclose(found[name], total / paper, rtol=1e-6)
            np.testing.assert_allclose(means[name], total / len(possible), rtol=1e-6)
            last = layer == len(MASKS) - 1  # where only the last token's row has a gradient
            assert last or abs(sum(matrix[j, i] for i, j in pairs) / total - 1) > 0.05  # not the other direction
        other = sum(matrix[i, j] for i, j in rest)
        np.testing.assert_allclose([found["Sww"], means["Sww"]], other / len(rest), rtol=1e-6)
        assert matrix.trace() > 0.05 * other  # with what tokens send to themselves it would be another number


@pytest.mark.parametrize("absolute", saliency.ABSOLUTE)
def test_blocks_of_any_size_give_the_sums_of_the_whole_matrix(absolute):
    """float64, grouped queries, padding on both sides, overlapping groups, blocks that cut everything."""
    torch.manual_seed(0)
    batch, heads, key_heads, tokens, width = 3, 6, 2, 45, 8
    query, key, value = (torch.randn(batch, n, tokens, width).double() for n in (heads, key_heads, key_heads))
    real = torch.ones(batch, tokens, dtype=torch.bool)
    real[0, :21], real[1, 40:] = False, False
    mask = torch.ones(tokens, tokens).tril().bool() & real[:, None, None]
    groups = (torch.rand(batch, tokens, 5) > 0.5) & real[..., None]

    scores = query @ key.repeat_interleave(3, 1).mT * width**-0.5
    weights = scores.masked_fill(~mask, -1e300).softmax(-1).requires_grad_()
    output = (weights @ value.repeat_interleave(3, 1)).transpose(1, 2)
    output.retain_grad()
    (output.sin() * real[..., None, None]).sum().backward()
    product = weights * weights.grad
    matrix = product.abs().sum(1) if absolute == "inside" else product.sum(1).abs()
    wanted = torch.einsum("bij,bip,bjq->bpq", matrix, groups.double(), groups.double())
    itself = torch.einsum("bii,bip->bp", matrix, groups.double())

    for rows in (45, 7, 1):
        view = Visibility(mask, batch, tokens, True, rows, query.device)
        found = pair_sums(query, key, value, output.grad, width**-0.5, view, groups.double(), absolute)
        torch.testing.assert_close(found, (wanted, itself), rtol=1e-12, atol=1e-12)


def test_captum_gives_the_same_products():
    """Layer gradient x activation of the module that gives the attention weights is A * dL/dA."""
    lvlm = processors.lvlm("llava")
    prompt = ask(lvlm, [0])
    flow = information_flow(lvlm, prompt, 77)
    lvlm.model.set_attn_implementation({"text_config": "eager"})
    others = {name: value for name, value in prompt.inputs.items() if name != "pixel_values"}

    def loss(pixel_values):
        return -lvlm.model(pixel_values=pixel_values, **others, use_cache=False).logits[:, -1].log_softmax(-1)[:, 77]

    modules = [layer.self_attn for layer in lvlm.decoder.layers]
    found = LayerGradientXActivation(loss, modules).attribute(prompt.inputs["pixel_values"])
    for layer, (_, products) in enumerate(found):  # (output, attention weights)
        torch.testing.assert_close(products[0].abs().sum(), flow.groups[layer].sum(), rtol=1e-5, atol=0)


# Targets --------------------------------------------------------------------------------------------------------------
def test_a_target_is_text_ids_or_one_for_each_row(tiny_gqa, image):
    prompt = lv.prompt(tiny_gqa, [image, image], "Some words.", ["Is it?", "Is the dog in the image?"])
    yes, no = (tiny_gqa.tokenizer(f"ASSISTANT: {word}").input_ids[-1] for word in ("yes", "no"))
    text, number = information_flow(tiny_gqa, prompt, ["yes", "no"]), information_flow(tiny_gqa, prompt, [yes, (no,)])
    assert torch.equal(text.groups, number.groups) and torch.equal(text.loss, number.loss)
    with torch.inference_mode():  # also from there
        same = information_flow(tiny_gqa, prompt, yes)
    assert torch.equal(same.groups[:, 0], text.groups[:, 0])
    assert not torch.allclose(same.groups[:, 1], text.groups[:, 1], rtol=0.05)
    likely = tiny_gqa.model(**prompt.inputs).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(text.loss.float(), -torch.stack([likely[0, yes], likely[1, no]]))


def test_a_sure_answer_keeps_its_digits():
    """Of 1 - p = 5e-6 float32 has hardly two digits; the reference is the same model in float64."""
    lvlm = processors.lvlm("llava")
    prompt = ask(lvlm, [0])
    best = int(lvlm.model(**prompt.inputs).logits[0, -1].argmax())
    while information_flow(lvlm, prompt, best).loss > 5e-6:
        lvlm.model.get_output_embeddings().weight.data.mul_(1.2)
    found = information_flow(lvlm, prompt, best).groups
    lvlm.model.double()
    wanted = information_flow(lvlm, ask(lvlm, [0]), best).groups
    assert ((found - wanted).abs().amax((2, 3)) < 1e-3 * wanted.amax((2, 3))).all()


def test_targets_that_cannot_be_are_refused(tiny, image):
    prompt = lv.prompt(tiny, [image, image], ["Some words.", ""], "Is it?")
    for wrong, message in (
        ({"target": ["yes"]}, "1 entries, the prompt 2 rows"),
        ({"target": ""}, "cannot be cut off"),
        ({"target": ()}, "neither text nor ids"),
        ({"target": 10**6}, "neither text nor ids"),
        ({"absolute": "both"}, "not one of inside, outside"),
        ({"pruned": torch.ones(2, 3, dtype=torch.bool)}, "pruned has to be bool"),
    ):
        with pytest.raises(ValueError, match=message):
            information_flow(tiny, prompt, **{"target": "yes", **wrong})


# The model stays as it was --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_stays_as_it_was(attention):
    lvlm = processors.lvlm("internvl")
    lvlm.model.set_attn_implementation(attention)
    frozen = next(lvlm.model.parameters()).requires_grad_(False)
    prompt, before = ask(lvlm), dict(WATCHED)
    lvlm.model(**prompt.inputs)  # transformers adds hooks of its own in the first pass
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lvlm.model.modules())
    flows = [information_flow(lvlm, prompt, "yes")]
    with pytest.raises(ValueError, match="pruned has to be bool"):  # noticed between the two passes
        information_flow(lvlm, prompt, "yes", pruned=torch.ones(3, 3))
    flows.append(information_flow(lvlm, prompt, "yes"))
    assert torch.equal(flows[0].groups, flows[1].groups)
    assert dict(WATCHED) == before and lvlm.attention == attention
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lvlm.model.modules())
    assert [p for p in lvlm.model.parameters() if not p.requires_grad] == [frozen]
    assert all(p.grad is None for p in lvlm.model.parameters())


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_no_tensor_is_tokens_by_tokens(tiny_gqa, image):
    prompt = lv.prompt(tiny_gqa, image, text_of(600), "Is it?")
    tokens = prompt.inputs["input_ids"].shape[1]
    with Largest() as seen:
        information_flow(tiny_gqa, prompt, 70)
    assert seen.numbers < tokens**2
    with Largest() as eager:
        eager_products(tiny_gqa, prompt.inputs, torch.tensor([[70]]), tokens - 1)
    assert eager.numbers >= 4 * tokens**2


# Inside lv.prune ------------------------------------------------------------------------------------------------------
def thinned(tokens):
    """Drops unequal numbers of the tokens that are left, at random but every time the same."""
    chance = torch.rand(tokens.alive.shape, generator=torch.Generator().manual_seed(tokens.layer))
    share = torch.tensor([0.2, 0.5, 0.0])[:, None]
    return (chance > share) | tokens.last


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("layers", [(0,), (1, 3)])
def test_flow_of_a_pruned_model(family, layers):
    """Group masks follow the tokens that are left; the reference is eager autograd in the same pruned model."""
    lvlm = processors.lvlm(family)
    prompt = ask(lvlm)
    plan = Chooses(layers, thinned)
    with prune(lvlm, plan):
        flow = information_flow(lvlm, prompt, 77)
    with prune(lvlm, plan) as trace:
        products = eager_products(lvlm, prompt.inputs, torch.full((3, 1), 77), -1)
    gone = ~trace.kept[-1] & prompt.groups.text
    assert torch.equal(flow.pruned, gone) and gone[:2].any(1).all() and not gone[2].any()
    last = prompt.groups.last
    masks = torch.stack([prompt.groups.visual, prompt.groups.text & ~gone & ~last, gone, last], 1)
    for layer, product in enumerate(products):
        for row in range(3):
            kept = trace.kept[layer, row]
            here = masks[row][:, kept]
            wanted = between(product[row].abs().sum(0)[-kept.sum() :, -kept.sum() :], here)
            found = flow.groups[layer, row].double()
            assert (found - wanted).abs().max() < 1e-5 * wanted.max(), (layer, row)
            order = here.double().cumsum(1) - here.double()
            assert torch.equal(flow.pairs[layer, row].double(), here.double() @ order.T)
    assert (flow.groups[layers[0] :, :2, 2] == 0).all() == (layers == (0,))  # who is gone gets nothing any more
    plain = information_flow(lvlm, prompt, 77, pruned=flow.pruned)
    assert torch.equal(plain.tokens, flow.tokens)
    assert torch.allclose(plain.groups[:, 2], flow.groups[:, 2], rtol=1e-4)  # of the third prompt nothing was dropped
    assert not torch.allclose(plain.groups[:, 0], flow.groups[:, 0], rtol=0.05)
    assert plain.scores["Svc"].loc[[0, 1]].notna().all() and plain.scores["Svc"].loc[2].isna().all()


def test_a_method_of_pruning_knows_the_groups_of_the_prompt(tiny, image):
    prompt = lv.prompt(tiny, image, text_of(40), "Is it?")
    with prune(tiny, "context", drop=0.5, layers=[0, 1]) as trace:
        flow = information_flow(tiny, prompt, "yes")
        with pytest.raises(ValueError, match="Inside lv.prune the target is one token"):
            information_flow(tiny, prompt, (70, 71))
    assert torch.equal(flow.pruned, ~trace.kept[-1] & prompt.groups.context) and flow.pruned.any()
    assert flow.scores["Svc"].iloc[-1] == 0 < flow.scores["Svc"].iloc[0]
    assert np.isnan(flow.pair_means["Svc"].iloc[-1])
