"""lv.prune: attention implementations, dtypes, beams, merging, nesting, what methods choose, trace and refusals."""

import functools

import pytest
import torch
from families import FIRST_TEXT, IMAGE, PAD, build, inputs
from recomputation import Chooses, Recomputation, greedy, plan_of, same
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache
from transformers.masking_utils import flash_attention_mask, sdpa_mask

import lvlm_utils as lv
from lvlm_utils.attention.intercept import WATCHED
from lvlm_utils.families import decoder_of
from lvlm_utils.methods import context, fastv, prune
from lvlm_utils.pruning.engine import stage_of
from lvlm_utils.session import OPEN, with_groups

RECEIVED = {"protect": (), "reading": "received"}  # what needs no groups of tokens


def by_hand(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """A plain attention function of a user."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is None and module.is_causal:
        attention_mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def two_dimensional(module, query, key, value, attention_mask, **kwargs):
    """Takes padding as (batch, keys), the way flash attention does."""
    if attention_mask is not None and attention_mask.dim() == 2:
        queries, keys = query.shape[2], key.shape[2]
        causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        attention_mask = causal & attention_mask[:, None, None].bool()
    return by_hand(module, query, key, value, attention_mask, **kwargs)


for name, function, mask in (
    ("by_hand", by_hand, sdpa_mask),
    ("two_dimensional", two_dimensional, flash_attention_mask),
):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask)


@functools.cache
def example(family="llava", attention="sdpa", dtype=torch.float32):
    """(model, batch of three left-padded rows, its recomputation)."""
    model = build(family).to(dtype)
    model.set_attn_implementation(attention)
    batch = inputs(model)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    return model, batch, Recomputation(model, batch)


def random_stays(real, layers=(0, 1, 2), share=0.25):
    """layer -> (batch, tokens) bool of what is still there, unequal numbers in the rows."""
    left, stays = real.clone(), {}
    for layer in layers:
        noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(layer))
        noise[:, -1] = 1
        left = left & (noise > share)
        stays[layer] = left
    return stays


def worst(got, batch, plain, stays, renumber=()):
    """Largest difference of the logits, prefill and decode steps, to the recomputation."""
    tokens, errors = batch["input_ids"].shape[1], []
    for row in range(len(plain.real)):
        wanted = plain.logits(row, got.sequences[row, tokens:-1], stays, renumber)
        errors.append((torch.stack([step[row] for step in got.logits]) - wanted).abs().max().item())
    return max(errors)


# The engine -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["eager", "by_hand", "two_dimensional"])
def test_every_attention_implementation(attention):
    model, batch, plain = example(attention=attention)
    with prune(model, plan_of({0: plain.real, 2: plain.real})):
        assert same(greedy(model, batch), plain.plain)
    stays = random_stays(plain.real)
    for positions, renumber, other in (("original", (), stays), ("contiguous", stays, ())):
        with prune(model, plan_of(stays, positions)):
            got = greedy(model, batch)
        assert worst(got, batch, plain, stays, renumber) < 1e-4
        assert worst(got, batch, plain, stays, other) > 0.05 < worst(got, batch, plain, {})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfloat16(attention):
    model, batch, plain = example(attention=attention, dtype=torch.bfloat16)
    with prune(model, plan_of({0: plain.real, 2: plain.real})):
        assert same(greedy(model, batch), plain.plain)
    stays = random_stays(plain.real, share=0.4)
    with prune(model, plan_of(stays)):
        got = greedy(model, batch)
    assert worst(got, batch, plain, stays) < 0.3
    assert min(worst(got, batch, plain, stays, stays), worst(got, batch, plain, {})) > 2


def test_beams():
    model, batch, plain = example()
    stays, tokens = random_stays(plain.real), batch["input_ids"].shape[1]
    scores = []
    for chosen in (stays, {}):
        with prune(model, plan_of(chosen)):
            got = greedy(model, batch, num_beams=3, output_scores=True)
        for row in range(3):
            new = got.sequences[row, tokens:]
            logits = plain.logits(row, new[:-1], stays).log_softmax(-1)
            scores.append((got.sequences_scores[row] - logits.gather(1, new[:, None]).mean()).abs().item())
    assert max(scores[:3]) < 1e-4 < 0.02 < min(scores[3:])


def test_all_beams_of_a_prompt_keep_the_same_tokens():
    model, batch, plain = example()

    def choose(tokens):
        return torch.rand(tokens.alive.shape, generator=torch.Generator().manual_seed(0)).gt(0.3) | tokens.last

    with prune(model, Chooses((1,), choose)) as trace:
        greedy(model, batch, num_beams=3)
        kept = trace.kept[1].view(3, 3, -1)
        assert torch.equal(kept, kept[:, :1].expand_as(kept)) and not torch.equal(kept[0], kept[1])
        greedy(model, batch)
        assert len(trace.kept[1]) == 3


def test_dropping_before_the_first_layer_is_removing_features_and_placeholders():
    model, batch, plain = example()
    features = model.model.get_image_features(batch["pixel_values"], return_dict=True)
    ids, visual = batch["input_ids"], batch["input_ids"] == IMAGE
    gone = visual & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    rows = [row[real & ~off] for row, real, off in zip(ids, plain.real, gone)]
    width = max(len(row) for row in rows)
    short = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=PAD) for row in rows])
    features.pooler_output = [f[~off[v]] for f, off, v in zip(features.pooler_output, gone, visual)]
    wanted = greedy(
        model,
        {"input_ids": short, "attention_mask": (short != PAD).long(), "mm_encoder_outputs": {"image": features}},
    )
    got = {}
    for positions in ("contiguous", "original"):
        with prune(model, plan_of({0: ~gone}, positions)):
            got[positions] = greedy(model, batch)
    difference = {k: max((a - b).abs().max() for a, b in zip(g.logits, wanted.logits)) for k, g in got.items()}
    assert difference["contiguous"] < 1e-5 < 0.1 < difference["original"]
    assert torch.equal(got["contiguous"].sequences[:, ids.shape[1] :], wanted.sequences[:, width:])


def test_merging_replaces_hidden_states():
    model, batch, plain = example()
    stays = random_stays(plain.real, layers=(0,))
    embedded, prompt = plain.prompt["inputs_embeds"], plain.prompt
    merged = embedded + embedded.roll(1, 1) * stays[0][..., None]

    def choose(tokens):
        return tokens.here(stays[0]), merged

    with prune(model, Chooses((0,), choose)):
        got = greedy(model, batch)
    assert worst(got, batch, plain, stays) > 0.05
    plain.prompt = {**prompt, "inputs_embeds": merged}
    try:
        assert worst(got, batch, plain, stays) < 1e-4
        with prune(model, Chooses((0,), lambda tokens: (tokens.alive, merged))):  # nothing dropped, yet merged
            assert worst(greedy(model, batch), batch, plain, {}) < 1e-4
    finally:
        plain.prompt = prompt


@pytest.mark.parametrize("inner, positions", [(2, "original"), (2, "contiguous"), (0, "contiguous")])
def test_two_methods_at_once(inner, positions):
    model, batch, plain = example()
    first = random_stays(plain.real, layers=(0,))[0]
    second, seen = random_stays(first, layers=(9,))[9], []

    def choose(tokens):
        seen.append(tokens.alive.sum(1))
        return tokens.here(second)

    with (
        prune(model, plan_of({0: first}, "contiguous")) as outer,
        prune(model, Chooses((inner,), choose, positions)) as trace,
    ):
        got = greedy(model, batch)
    assert outer is trace and torch.equal(trace.kept[inner], second)
    assert torch.equal(seen[0], first.sum(1))  # the inner method chooses from what the outer one left
    anew = {(2, "original"): (0,), (2, "contiguous"): (0, 2), (0, "contiguous"): (0,)}
    stays = {0: first} | {inner: second}
    for case, renumber in anew.items():
        if case[0] == inner:
            assert (worst(got, batch, plain, stays, renumber) < 1e-4) == (case[1] == positions)
    assert worst(got, batch, plain, {0: first}, (0,)) > 0.05


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_a_loop_by_hand_is_generate(family):
    model = build(family)
    batch = inputs(model, padded=False)
    stays = random_stays(batch["attention_mask"].bool(), layers=(0, 2))
    with prune(model, plan_of(stays)), torch.no_grad():
        wanted = greedy(model, batch)
        out = model(**batch, use_cache=True, logits_to_keep=1)
        for step in wanted.logits[1:]:
            out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
            assert (out.logits[:, -1] - step).abs().max() < 1e-5


@pytest.mark.parametrize("attention", ["eager", "by_hand", "two_dimensional"])
@pytest.mark.parametrize("name, options", [("fastv", {}), ("context", {**RECEIVED, "layers": (0, 1)})])
def test_methods_choose_alike_under_every_implementation(attention, name, options):
    kept = []
    for implementation in ("sdpa", attention):
        model, batch, _ = example(attention=implementation)
        with prune(model, name, **options) as trace, torch.no_grad():
            model(**batch)
        kept.append(trace.kept)
    assert torch.equal(*kept) and not kept[0][3].equal(kept[0][0])


@pytest.mark.parametrize("name, options", [("fastv", {}), ("context", {**RECEIVED, "layers": (0, 1, 2)})])
def test_rows_of_a_batch_do_not_touch_each_other(name, options):
    model, batch, plain = example()
    with prune(model, name, **options) as trace:
        together, kept = greedy(model, batch), trace.kept
        for row, real in enumerate(plain.real):
            one = {k: v[row : row + 1] for k, v in batch.items()}
            one |= {k: one[k][:, real] for k in ("input_ids", "attention_mask")}
            alone = greedy(model, one)
            assert torch.equal(trace.kept[:, 0], kept[:, row, real])
            assert max((a[0] - b[row]).abs().max() for a, b in zip(alone.logits, together.logits)) < 1e-4


def test_trace():
    model, batch, plain = example()
    visual = batch["input_ids"] == IMAGE
    stays = {2: plain.real & ~(visual & (torch.arange(visual.shape[1]) % 2 == 0))}
    with prune(model, plan_of(stays)) as trace:
        with pytest.raises(ValueError, match="no prefill yet"):
            _ = trace.kept
        cache = greedy(model, batch, steps=1).past_key_values
        model(**batch, use_cache=False)
        assert trace.kv_bytes == 0
        cache = model(**batch).past_key_values
    assert torch.equal(trace.kept, torch.stack([plain.real, plain.real, stays[2], stays[2]]))
    before, after = (kept.sum().item() / 3 for kept in (plain.real, stays[2]))
    assert trace.tokens_per_layer == pytest.approx([before, before, after, after])
    assert trace.mean_tokens == pytest.approx((before + after) / 2)
    assert trace.mean_visual == pytest.approx((visual.sum() + (visual & stays[2]).sum()).item() / 6)
    assert trace.mean_text == pytest.approx((plain.real & ~visual).sum().item() / 3)
    lengths = [cache.get_seq_length(layer) for layer in range(4)]
    assert lengths[0] == lengths[1] == visual.shape[1] and lengths[2] == lengths[3] == stays[2].sum(1).max()
    assert trace.kv_bytes == sum(lengths) * 3 * 2 * 2 * 16 * 4  # rows, keys and values, heads, width, bytes


def test_gradients_pass_through():
    model, batch, plain = example()
    with prune(model, plan_of(random_stays(plain.real, layers=(1,)))):
        model(**batch).logits[:, -1].sum().backward()
    grad = decoder_of(model).layers[0].mlp.up_proj.weight.grad
    assert grad.abs().max() > 0
    model.zero_grad()


# The methods' choices -------------------------------------------------------------------------------------------------
@functools.cache
def eager_attention(family):
    """(model, batch, attention of the plain model (layers, batch, heads, tokens, tokens), rows of padding are 0)."""
    model = build(family)
    batch = inputs(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = torch.stack(model(**batch, output_attentions=True).attentions)
    model.set_attn_implementation("sdpa")
    real = batch["attention_mask"].bool()
    return model, batch, attention * real[:, None, :, None]


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen3_vl"])
@pytest.mark.parametrize("keep", [0.5, 3])
def test_fastv_keeps_what_eager_attention_says(family, keep):
    model, batch, attention = eager_attention(family)
    with prune(model, "fastv", keep=keep, layer=2) as trace:
        greedy(model, batch, steps=2)
    real, visual = batch["attention_mask"].bool(), torch.isin(batch["input_ids"], torch.tensor([IMAGE]))
    for row in range(3):
        score = attention[1, row, :, -1].mean(0)[visual[row]]
        number = keep if isinstance(keep, int) else int(len(score) * keep)
        wanted = real[row] & ~visual[row]
        wanted[visual[row].nonzero()[score.argsort(descending=True)[:number], 0]] = True
        assert torch.equal(trace.kept[2, row], wanted) and torch.equal(trace.kept[1, row], real[row])
        wrong = attention[2, row, :, -1].mean(0)[visual[row]]
        assert not torch.equal(score.argsort(), wrong.argsort())


@pytest.mark.parametrize("reading", ["received", "received_mean", "last"])
@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_context_drops_what_eager_attention_says(reading, pooling):
    model, batch, attention = eager_attention("llava")
    with prune(model, "context", drop=0.3, layers=[1], reading=reading, pooling=pooling, protect=()) as trace:
        greedy(model, batch, steps=2)
    real, visual = batch["attention_mask"].bool(), batch["input_ids"] == IMAGE
    for row in range(3):
        here = real[row]
        heads = attention[1, row][:, here][:, :, here].double()
        score = heads[:, -1] if reading == "last" else heads.sum(1)
        if reading == "received_mean":
            score = score / torch.arange(len(score[0]), 0, -1)
        score = score.amax(0) if pooling == "max" else score.mean(0)
        text = ~visual[row, here]
        text[-1] = False
        lowest = torch.where(text, score, torch.inf).argsort()[: int(text.sum() * 0.3)]
        wanted = here.clone()
        wanted[here.nonzero()[lowest, 0]] = False
        assert torch.equal(trace.kept[2, row], wanted) and torch.equal(trace.kept[1, row], here)


def test_context_in_several_layers_drops_a_share_of_what_is_left(tiny, image):
    prompt = lv.prompt(tiny, image, "A lamp stands near the window, and two books lie on the table. " * 6, "Is it?")
    groups = prompt.groups
    with prune(tiny, "context", drop=0.3, layers=range(3)) as trace:
        lv.forward(tiny, prompt)
    left = [int((groups.context & kept).sum()) for kept in trace.kept]
    for before, after in zip(left, left[1:]):
        assert after == before - int(before * 0.3)
    assert all((kept | groups.context).all() for kept in trace.kept)  # everything else stays
    with prune(tiny, "context", layers=[0]), pytest.raises(ValueError, match="lv.forward"):
        tiny.model(**prompt.inputs)
    longer = lv.prompt(tiny, image, "One more.", "Is it?")
    with prune(tiny, "context", layers=[0]), with_groups(tiny.model, groups):
        with pytest.raises(ValueError, match="very prompt"):
            tiny.model(**longer.inputs)


def test_the_choices_are_functions_on_tensors():
    attention = torch.tensor(
        [[[0.1, 0.5, 0.2, 0.1], [0.1, 0.1, 0.3, 0.0]], [[0.4, 0.0, 0.1, 0.2], [0.4, 0.0, 0.2, 0.3]]]
    )
    assert fastv.select(attention, 2).tolist() == [[False, True, True, False], [True, False, False, True]]
    assert fastv.select(attention, 0.75).sum(1).tolist() == [3, 3]
    assert fastv.select(attention, 0.1).sum(1).tolist() == [1, 1]
    assert fastv.select(attention, 1.0).all()
    assert torch.equal(context.score(attention), attention.amax(1))
    assert torch.equal(context.score(attention, "mean"), attention.mean(1))
    may = torch.tensor([[True, True, False, True], [True, True, True, True]])
    assert context.select(attention[:, 0], may, 0.5).tolist() == [[False, True, True, True], [True, False, False, True]]
    assert context.select(attention[:, 0], may, 0.0).all()


def test_methods_that_drop_nothing_cost_nothing():
    model, batch, plain = example()
    for name, options in (("fastv", {"keep": 1.0}), ("context", {"drop": 0, "layers": [0]})):
        with prune(model, name, **options):
            assert not WATCHED  # no attention call is looked at
            assert same(greedy(model, batch), plain.plain)


# Leaving no trace -----------------------------------------------------------------------------------------------------
def state(model):
    """Everything that pruning touches."""
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), sorted(vars(m))) for m in model.modules()]
    return hooks, dict(WATCHED), dict(OPEN), model.config._attn_implementation


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_the_model_is_as_it_was(family):
    model, batch, plain = example(family)
    before = state(model)

    def fail(tokens):
        raise RuntimeError("in the middle of a prefill")

    for _ in range(2):  # also when used again
        with prune(model, "fastv") as trace, prune(model, "context", protect=(), layers=[1], reading="received"):
            first = greedy(model, batch)
        assert state(model) == before and stage_of(model, 0) is None
        with pytest.raises(RuntimeError, match="body"), prune(model, "fastv"):
            raise RuntimeError("body")
        with pytest.raises(RuntimeError, match="prefill"), prune(model, "fastv"), prune(model, Chooses((3,), fail)):
            greedy(model, batch)
        with pytest.raises(ValueError, match="no pruning method"), prune(model, "fastv"), prune(model, "nothing"):
            pass
        assert state(model) == before
        assert same(greedy(model, batch), plain.plain)
    with prune(model, "fastv"):
        with prune(model, "context", protect=(), layers=[1], reading="received") as trace:
            assert same(greedy(model, batch), first)
        greedy(model, batch)
        assert torch.equal(trace.kept[1], plain.real) and not torch.equal(trace.kept[2], plain.real)


# Refusals -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, options, says",
    [
        ("nothing", {}, "'nothing' is no pruning method. There are: cdpruner, context, divprune"),
        ("fastv", {"layer": 4}, "Layer 4 is out of range: the model has 4 layers"),
        ("fastv", {"layer": -1}, "out of range"),
        ("fastv", {"layer": 0}, "at least 1"),
        ("context", {"layers": range(10), "protect": ()}, "out of range"),
        ("context", {"layers": [3], "protect": ()}, "out of range"),
        ("fastv", {"keep": 0.0}, "keep=0.0 is neither a share"),
        ("fastv", {"keep": 1.5}, "keep=1.5"),
        ("fastv", {"keep": 0}, "keep=0"),
        ("fastv", {"keep": True}, "keep=True"),
        ("fastv", {"positions": "new"}, "positions='new' is not one of original, contiguous"),
        ("context", {"drop": 1.0}, "drop=1.0"),
        ("context", {"drop": -0.1}, "drop=-0.1"),
        ("context", {"reading": "given"}, "reading='given'"),
        ("context", {"pooling": "sum"}, "pooling='sum'"),
        ("context", {"protect": ("visual",)}, "protect=.visual. is not one of"),
        (Chooses((2,), None, needed={1: ("entropy",)}), {}, "needs entropy"),
        (Chooses((), None), {"keep": 0.5}, "keep cannot be given"),
    ],
)
def test_options_that_do_not_fit(name, options, says):
    model, _, _ = example()
    before = state(model)
    with pytest.raises(ValueError, match=says), prune(model, name, **options):
        pass
    assert state(model) == before


def test_what_cannot_be_pruned_is_refused():
    model, batch, plain = example()

    def refused(says, plan="fastv", family_batch=None, **options):
        given = family_batch or batch
        with prune(model, plan), pytest.raises(ValueError, match=says) as error:
            model.generate(**given, max_new_tokens=3, **options)
        assert "\n" not in str(error.value)

    text = torch.randint(FIRST_TEXT, 600, (1, 9))
    no_picture = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    refused("No visual tokens", family_batch=no_picture)
    refused("keep=17 is more than the 16 visual tokens", fastv.FastV(17))
    refused("last token of a prompt was dropped", Chooses((1,), lambda tokens: ~tokens.last))
    refused("has to choose with bool", Chooses((1,), lambda tokens: tokens.alive.float()))
    refused("prefill_chunk_size", prefill_chunk_size=8)
    refused("without cache", use_cache=False)
    refused("Assisted", prompt_lookup_num_tokens=3)
    refused("Assisted", assistant_model=build("llava", layers=1))
    refused("StaticCache cannot hold", cache_implementation="static")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    refused("StaticCache cannot hold", past_key_values=cache)


def test_a_pruned_cache_serves_one_prompt_in_one_context():
    model, batch, plain = example()
    ids = batch["input_ids"]
    with prune(model, "fastv"), torch.no_grad():
        out = greedy(model, batch)
        cache = out.past_key_values
        with pytest.raises(ValueError, match="already hold tokens"):
            model.generate(input_ids=out.sequences, past_key_values=cache, max_new_tokens=2)
        with pytest.raises(ValueError, match="2 tokens at once"):
            model(input_ids=out.sequences[:, -2:], past_key_values=cache)
        with pytest.raises(ValueError, match="builds its own masks"):
            model(input_ids=ids, pixel_values=batch["pixel_values"], attention_mask=torch.ones(3, 1, 9, 9))
        with pytest.raises(ValueError, match="packed"):
            model(**batch, cu_seq_lens_q=torch.tensor([0, 9]))
        greedy(model, batch)
        with pytest.raises(ValueError, match="another prompt"):
            model(input_ids=out.sequences[:, -1:], past_key_values=cache)
        outside = plain.plain.past_key_values
        with pytest.raises(ValueError, match="outside lv.prune"):
            model(input_ids=out.sequences[:, -1:], past_key_values=outside)
        last = greedy(model, batch)
    with pytest.raises(ValueError, match="has ended"):
        model(input_ids=last.sequences[:, -1:], past_key_values=last.past_key_values)
    with prune(model, "fastv"), pytest.raises(ValueError, match="another prompt"):
        model(input_ids=last.sequences[:, -1:], past_key_values=last.past_key_values)


def test_models_that_cannot_be_pruned():
    grid = build("qwen2_vl")
    with pytest.raises(ValueError, match="positions on a grid"), prune(grid, Chooses((), None, "contiguous")):
        pass
    model = build("internvl")
    decoder_of(model).config.layer_types = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(ValueError, match="sliding_attention: only full attention"), prune(model, "fastv"):
        pass
