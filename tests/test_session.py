"""What observes or prunes a model leaves nothing to the next prompt, to another thread, to a copy or to training."""

import copy
import functools
import io
import pickle
import threading
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from families import IMAGE, build, inputs
from PIL import Image
from processors import lvlm as opened
from transformers import AttentionInterface, GenerationConfig
from transformers.cache_utils import DynamicCache

import lvlm_utils as lv
from lvlm_utils.methods import Method, PictureMethod
from lvlm_utils.session import with_groups

EVERY = ("received", "last", "groups", "entropy", "variance", "received_from", "equi")


@dataclass
class EveryOther(PictureMethod):
    """Drops every second visual token, and looks at the tower on the way."""

    layer: int = 0

    def sees(self):
        return {"received": -1}

    def pick(self, pictures):
        pictures.seen("received")
        return (torch.arange(pictures.slots.shape[1]) % 2 == 0).expand(pictures.slots.shape)


@dataclass
class Last(Method):
    """FastV in four lines."""

    keep: float = 0.5
    layer: int = 2

    def needs(self):
        return {self.layer - 1: ("last",)}

    def choose(self, tokens):
        return tokens.best(tokens.attention("last").mean(1), self.keep)


@dataclass
class Fails(Method):
    layer: int = 3

    def choose(self, tokens):
        raise RuntimeError("in the middle of a prompt")


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt_of(lvlm, pictures=1):
    images = tuple(picture(60 + 10 * n, 44, n) for n in range(pictures))
    return lv.prompt(lvlm, images, "The room is quiet.", "Is the couch in the image?")


def masks(batch):
    visual = batch["input_ids"] == IMAGE
    return {"visual": visual, "text": batch["attention_mask"].bool() & ~visual}


@torch.no_grad()
def generated(model, batch, **options):
    return model.generate(**batch, do_sample=False, **{"max_new_tokens": 4, **options})


# One failing prompt changes no later one --------------------------------------------------------------------------
def breaks(kind, lvlm, prompt):
    """Ask a prompt that fails in the middle: after the tower, in the tower, in the decoder, while it generates."""
    inputs, model = dict(prompt.inputs), lvlm.model
    if kind == "after the tower":
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == lvlm.image_token_id, 40)
    module = {"in the tower": lvlm.tower, "in the decoder": lvlm.decoder.layers[2], "in a step": lvlm.decoder}.get(kind)
    calls = []

    def fail(*_):
        calls.append(1)
        if kind != "in a step" or len(calls) > 1:
            raise ValueError("on purpose")

    hook = module.register_forward_hook(fail) if module is not None else None
    with pytest.raises(ValueError, match=".*"), torch.no_grad():
        if kind == "in a step" or kind == "in generate":
            if kind == "in generate":
                inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == lvlm.image_token_id, 40)
            model.generate(**inputs, max_new_tokens=4)
        else:
            model(**inputs)
    if hook is not None:
        hook.remove()


FAILURES = ("after the tower", "in the tower", "in the decoder", "in a step", "in generate")


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "idefics3"])
@pytest.mark.parametrize("kind", FAILURES)
def test_a_prompt_that_fails_changes_no_later_one(family, kind):
    lvlm = opened(family)
    bad, good = prompt_of(lvlm, 2), prompt_of(lvlm)
    with lv.observe(lvlm) as seen, lv.prune(lvlm, EveryOther()) as trace:
        wanted = lv.generate(lvlm, good, max_new_tokens=3), trace.kept, seen.vision.received
    with lv.observe(lvlm) as seen, lv.prune(lvlm, EveryOther()) as trace:
        breaks(kind, lvlm, bad)
        found = lv.generate(lvlm, good, max_new_tokens=3), trace.kept, seen.vision.received
    assert found[0] == wanted[0] and torch.equal(found[1], wanted[1]) and torch.equal(found[2], wanted[2])
    with lv.observe(lvlm) as seen, lv.prune(lvlm, EveryOther()) as trace, torch.no_grad():
        breaks(kind, lvlm, bad)
        breaks(kind, lvlm, bad)
        lv.forward(lvlm, good)
        assert torch.equal(trace.kept, wanted[1]) and torch.equal(seen.vision.received, wanted[2])


def test_a_prompt_without_picture_shows_none_after_a_failure():
    lvlm = opened("llava")
    with lv.observe(lvlm) as seen, torch.no_grad():
        breaks("after the tower", lvlm, prompt_of(lvlm, 2))
        lvlm.model(**lv.prompt(lvlm, question="Is it?").inputs)
        assert not seen.towers


def test_a_method_that_fails_leaves_the_next_prompt_alone():
    model = build("llava")
    batch = inputs(model)
    with lv.prune(model, Last()) as trace:
        wanted = generated(model, batch), trace.kept
        with pytest.raises(RuntimeError, match="in the middle"), lv.prune(model, Fails()):
            generated(model, batch)
        assert torch.equal(generated(model, batch), wanted[0]) and torch.equal(trace.kept, wanted[1])


# What is not the prompt --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, says",
    [
        ({"assistant_model": "another"}, "ssisted"),
        ({"prompt_lookup_num_tokens": 3}, "ssisted"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"use_cache": False}, "without cache"),
        ({"past_key_values": "of another prompt"}, "already hold"),
    ],
)
@pytest.mark.parametrize("what", ["observe", "prune"])
def test_what_reads_a_prompt_in_another_way_is_refused(what, options, says):
    model = build("llava")
    batch = inputs(model, batch=1, padded=False)
    options = dict(options)
    if "assistant_model" in options:
        options["assistant_model"] = build("llava", layers=1)
    if "past_key_values" in options:
        with torch.no_grad():
            options["past_key_values"] = model(**batch, use_cache=True).past_key_values
    watching = lv.observe(model) if what == "observe" else lv.prune(model, Last())
    with watching, pytest.raises(ValueError, match=says):
        generated(model, batch, **options)


def test_settings_of_the_checkpoint_are_refused_as_well():
    model = build("llava")
    model.generation_config.guidance_scale = 2.0
    for watching in (lv.observe(model), lv.prune(model, Last())):
        with watching, pytest.raises(ValueError, match="guidance_scale"):
            generated(model, inputs(model))


@pytest.mark.parametrize("setting", [{"guidance_scale": 2.0}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}])
def test_settings_that_a_given_config_leaves_to_the_checkpoint_are_refused(setting):
    model = build("llava")
    vars(model.generation_config).update(setting)
    given = GenerationConfig(max_new_tokens=4, pad_token_id=0)
    for watching in (lv.observe(model), lv.prune(model, Last())):
        with watching, pytest.raises(ValueError, match="guidance_scale|without cache|ssisted"):
            model.generate(**inputs(model, batch=1), generation_config=given)


def test_beams_of_the_checkpoint_count_under_a_given_config():
    model = build("llava")
    model.generation_config.num_beams = 3
    batch = inputs(model)
    with lv.observe(model, masks(batch)) as seen:
        model.generate(**batch, generation_config=GenerationConfig(max_new_tokens=2, pad_token_id=0))
    assert seen.groups.shape[1] == 9


@pytest.mark.parametrize("what", ["observe", "prune"])
def test_a_second_prompt_inside_generate_is_refused(what):
    model = build("llava")
    batch = inputs(model, padded=False)

    def asks_again(ids, scores, **more):
        model(input_ids=ids[:, -3:], use_cache=False)
        return torch.zeros(len(ids), dtype=torch.bool)

    watching = lv.observe(model) if what == "observe" else lv.prune(model, Last())
    with watching, pytest.raises(ValueError, match="second prompt"):
        generated(model, batch, stopping_criteria=[asks_again])
    with lv.observe(model) as seen:  # the next one is a first one again
        generated(model, batch)
    assert seen.received.shape[-1] == batch["input_ids"].shape[1]


def test_a_prompt_read_in_pieces_by_hand_is_refused():
    model = build("llava")
    batch = inputs(model, padded=False)
    cache, ids = DynamicCache(), batch["input_ids"]
    cut = int((ids[0] == IMAGE).nonzero().max()) + 2
    with lv.observe(model), torch.no_grad(), pytest.raises(ValueError, match="in pieces"):
        model(input_ids=ids[:, :cut], pixel_values=batch["pixel_values"], past_key_values=cache)
        model(input_ids=ids[:, cut:], past_key_values=cache)


# Arithmetic in float32 ---------------------------------------------------------------------------------------------
def test_statistics_under_autocast_are_float32():
    model = build("llava")
    batch = inputs(model)
    real = batch["attention_mask"].sum(1)
    groups = {"real": batch["attention_mask"].bool()}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), lv.observe(model, groups, EVERY) as seen:
        model(**batch)
    for name in EVERY:
        assert getattr(seen, name).dtype == torch.float32, name
    sums = seen.groups[..., 0, 0]
    torch.testing.assert_close(sums, real[:, None].expand(sums.shape[1:]).expand_as(sums).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(seen.received.sum(-1), sums, rtol=1e-5, atol=0)
    torch.testing.assert_close(seen.last.sum(-1), torch.ones_like(sums), rtol=1e-5, atol=0)
    torch.testing.assert_close(seen.vision.received.sum(-1), torch.full_like(seen.vision.received[..., 0], 17.0))


def test_flow_under_autocast_is_summed_in_float32():
    lvlm = opened("llava")
    prompt = prompt_of(lvlm)
    plain = lv.information_flow(lvlm, prompt, target=40)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = lv.information_flow(lvlm, prompt, target=40)
    assert mixed.groups.dtype == torch.float32
    difference = (mixed.groups - plain.groups).abs().amax() / plain.groups.abs().amax()
    assert difference < 0.2  # of the model's own rounding
    rounded = mixed.groups.to(torch.bfloat16).float()
    assert not torch.equal(rounded, mixed.groups)


def test_another_default_dtype_changes_nothing():
    model = build("llava")
    batch, found = inputs(model), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            with lv.observe(model, masks(batch), EVERY) as seen, torch.no_grad():
                model(**batch)
            with lv.prune(model, lv.methods.ToMe(keep=8)) as trace, torch.no_grad():
                model(**batch)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append([*(getattr(seen, name) for name in EVERY), trace.kept])
    assert all(map(torch.equal, *found))


def test_a_choice_under_autocast_is_made_in_float32():
    model = build("llava")
    seen = []

    @dataclass
    class Products(Method):
        layer: int = 1

        def needs(self):
            return {0: ("received",)}

        def choose(self, tokens):
            seen.append((tokens.attention("received") @ tokens.hidden.float().unsqueeze(1)).dtype)
            return tokens.alive

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), lv.prune(model, Products()):
        model(**inputs(model))
    assert seen == [torch.float32]


# Any order, and threads --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_contexts_end_in_any_order(attention, first):
    models = [build("llava"), build("llava", seed=1), build("internvl")]
    for model in models:
        model.set_attn_implementation(attention)
    batches = [inputs(model) for model in models]
    wanted = []
    for model, batch in zip(models, batches):
        with lv.observe(model) as seen, torch.no_grad():
            model(**batch)
        wanted.append(seen.received)
    watching = [lv.observe(model) for model in models]
    found = [one.__enter__() for one in watching]
    watching[first].__exit__(None, None, None)
    with torch.no_grad():
        for number, (model, batch) in enumerate(zip(models, batches)):
            model(**batch)
            if number != first:
                assert torch.equal(found[number].received, wanted[number])
    for number in {0, 1, 2} - {first}:
        watching[number].__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="has not run"):
        _ = found[first].received


def test_two_observers_and_two_methods_of_one_model_end_in_any_order():
    model = build("llava")
    batch = inputs(model)
    with lv.observe(model) as seen, torch.no_grad():
        model(**batch)
    wanted = seen.last
    one, other = lv.observe(model), lv.observe(model)
    one.__enter__(), (seen := other.__enter__())
    one.__exit__(None, None, None)
    with torch.no_grad():
        model(**batch)
    other.__exit__(None, None, None)
    assert torch.equal(seen.last, wanted)
    with lv.prune(model, Last(keep=0.25, layer=3)) as trace:
        generated(model, batch)
        alone = trace.kept
    one, other = lv.prune(model, Last(layer=1)), lv.prune(model, Last(keep=0.25, layer=3))
    one.__enter__(), (trace := other.__enter__())
    one.__exit__(None, None, None)
    generated(model, batch)
    assert torch.equal(trace.kept, alone)
    other.__exit__(None, None, None)
    assert "generate" not in vars(model) and not model.get_decoder()._forward_pre_hooks


def in_threads(*runs):
    """Run all at the same time; their results, or what they raised."""
    results, ready = [None] * len(runs), threading.Barrier(len(runs))

    def start(number, run):
        ready.wait()
        try:
            results[number] = run()
        except Exception as error:  # noqa: BLE001 - it is what the test looks at
            results[number] = error

    threads = [threading.Thread(target=start, args=one) for one in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def test_two_models_run_in_two_threads():
    models = [build("llava"), build("llava", layers=3, seed=1)]
    batches = [inputs(models[0]), inputs(models[1], batch=2, seed=5)]

    def run(number):
        model, batch = models[number], batches[number]
        out = []
        for _ in range(8):
            with lv.observe(model) as seen, lv.prune(model, Last()) as trace:
                ids = generated(model, batch)
            out.append((ids, trace.kept, [one.clone() for one in seen.last]))
        return out

    wanted = [run(0)[0], run(1)[0]]
    for number, found in enumerate(in_threads(lambda: run(0), lambda: run(1))):
        assert not isinstance(found, Exception), found
        for ids, kept, last in found:
            assert torch.equal(ids, wanted[number][0]) and torch.equal(kept, wanted[number][1])
            assert all(map(torch.equal, last, wanted[number][2]))


def test_another_thread_is_not_pruned_and_not_observed():
    model = build("llava")
    batch = inputs(model)
    plain = generated(model, batch)
    with lv.prune(model, Last()) as trace, lv.observe(model) as seen:
        (found,) = in_threads(lambda: generated(model, batch))
        (forward,) = in_threads(lambda: model(**batch))
        (nested,) = in_threads(lambda: lv.prune(model, Last()).__enter__())
        with pytest.raises(ValueError, match="no prefill"):
            _ = trace.kept
        with pytest.raises(RuntimeError, match="has not run"):
            _ = seen.received
    for error in (found, forward, nested):
        assert isinstance(error, ValueError) and "another thread" in str(error)
    with lv.observe(model) as seen:
        (found,) = in_threads(lambda: generated(model, batch))
        with pytest.raises(RuntimeError, match="has not run"):
            _ = seen.received
    assert torch.equal(found, plain)


def test_an_attention_that_is_registered_anew_is_the_one_that_runs():
    from transformers import AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    model, called = build("llava"), []

    def version(number):
        def attention(*args, **kwargs):
            called.append(number)
            return sdpa_attention_forward(*args, **kwargs)

        return attention

    AttentionMaskInterface.register("in_versions", sdpa_mask)
    for number in (1, 2):
        AttentionInterface.register("in_versions", version(number))
        model.set_attn_implementation("in_versions")
        with lv.observe(model) as seen, torch.no_grad():
            model(**inputs(model))
        assert seen.received.shape[0] == 4 and set(called) == {number}
        called.clear()


# Rows of beams -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_groups_of_a_prompt_count_for_all_of_its_beams(options):
    model = build("llava")
    batch = inputs(model)
    rows = options["num_beams"]
    with lv.observe(model, masks(batch)) as seen:
        generated(model, batch)
        alone = seen.groups
        generated(model, batch, **options)
    assert seen.groups.shape[1] == 3 * rows
    torch.testing.assert_close(seen.groups, alone.repeat_interleave(rows, 1), rtol=1e-4, atol=1e-5)
    with lv.observe(model, masks(batch)) as seen:
        model.generate(**batch, do_sample=True, num_return_sequences=2, max_new_tokens=2)
    torch.testing.assert_close(seen.groups, alone.repeat_interleave(2, 1), rtol=1e-4, atol=1e-5)


# Training ----------------------------------------------------------------------------------------------------------
def gradients(model, batch, watching):
    with ExitStack() as stack:
        for one in watching():
            stack.enter_context(one)
        model(**batch).logits[:, -1].square().sum().backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("method", [EveryOther, Last])
def test_gradient_checkpointing_changes_no_gradient(family, method):
    lvlm = opened(family)
    model, prompt = copy.deepcopy(lvlm.model), prompt_of(lvlm)

    def watched():
        return [lv.observe(model), lv.prune(model, method()), with_groups(model, prompt.groups)]

    wanted = gradients(model, prompt.inputs, watched)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, prompt.inputs, watched)
    assert found.keys() == wanted.keys() and any(value.abs().max() > 0 for value in found.values())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_flow_with_gradient_checkpointing_is_the_same_or_refused():
    lvlm = opened("llava")
    prompt = prompt_of(lvlm)
    wanted = lv.information_flow(lvlm, prompt, target=40)
    lvlm.model.train()
    try:
        lvlm.model.gradient_checkpointing_enable({"use_reentrant": False})
        found = lv.information_flow(lvlm, prompt, target=40)
        torch.testing.assert_close(found.groups, wanted.groups, rtol=1e-4, atol=1e-6)
        lvlm.model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(ValueError, match="use_reentrant"):
            lv.information_flow(lvlm, prompt, target=40)
    finally:
        lvlm.model.gradient_checkpointing_disable()
        lvlm.model.eval()


def test_reentrant_checkpointing_is_refused_where_a_method_looks_at_the_tower():
    model = build("llava").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    batch = inputs(model)
    with lv.prune(model, EveryOther()), pytest.raises(ValueError, match="use_reentrant"):
        model(**batch)
    with lv.prune(model, EveryOther()), torch.no_grad():
        model(**batch)


# Columns that were dropped -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_columns_that_are_not_there_any_more_cannot_be_asked_for(family):
    model = build(family)
    batch = inputs(model, padded=False)
    ids = batch["input_ids"]
    with lv.prune(model, Last()), torch.no_grad():
        asked = (torch.tensor([20]), ids.shape[1], -3, np.int64(4), np.array([20]), [20], slice(20, 22))
        for options in ({"labels": ids}, *({"logits_to_keep": one} for one in asked)):
            with pytest.raises(ValueError, match="were dropped"):
                model(**batch, **options)
        last = model(**batch).logits[:, -4:]
        torch.testing.assert_close(model(**batch, logits_to_keep=4).logits, last, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError):  # a call that fails asks nothing of the next one
            model(**{**batch, "input_ids": ids.masked_fill(ids == IMAGE, 40)}, labels=ids)
        assert model.model(**batch).last_hidden_state.shape[1] < ids.shape[1]
    with lv.prune(model, Last(keep=1.0)), torch.no_grad():  # nothing is dropped, so every column is there
        wanted = model(**batch).logits[:, 20]
        found = model(**batch, labels=ids).loss
        torch.testing.assert_close(model(**batch, logits_to_keep=torch.tensor([20])).logits[:, 0], wanted)
    assert found.isfinite()


# Copies ------------------------------------------------------------------------------------------------------------
def test_what_was_seen_can_be_copied_and_saved():
    model = build("llava")
    batch = inputs(model)
    with lv.observe(model, masks(batch)) as seen, torch.inference_mode():
        model(**batch)
    with lv.prune(model, EveryOther()) as trace, torch.inference_mode():
        out = model(**batch, use_cache=True)
        inside = copy.deepcopy(trace).kept
    for made in (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved):
        assert torch.equal(made(seen).groups[0], seen.groups[0])
        assert torch.equal(made(seen).vision.received, seen.vision.received)
        with pytest.raises(AttributeError):
            _ = made(seen).hidden
        assert torch.equal(made(trace).kept, trace.kept) and made(trace).kv_bytes == trace.kv_bytes > 0
        assert torch.equal(inside, trace.kept)
        assert made(out.past_key_values).get_seq_length() == out.past_key_values.get_seq_length()


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("made", [copy.deepcopy, saved])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_model_copied_inside_a_block_is_a_model_of_its_own(made, family):
    model = build(family)  # not run before it is copied: the library's own hooks for outputs cannot be saved
    batch = inputs(model)
    plain = generated(build(family), batch)
    with lv.observe(model) as seen, lv.prune(model, EveryOther() if family == "llava" else Last()):
        other = made(model)
        with torch.no_grad():
            for value in other.parameters():
                value.mul_(1.1)
        free = copy.deepcopy(build(family))
        with torch.no_grad():
            for value in free.parameters():
                value.mul_(1.1)
        wanted = generated(free, batch)
        assert torch.equal(generated(other, batch), wanted) and not torch.equal(wanted, plain)
        with pytest.raises(RuntimeError, match="has not run"):
            _ = seen.last
    assert torch.equal(generated(other, batch), wanted)
    with lv.prune(other, Last()) as trace:
        generated(other, batch)
    assert trace.mean_visual < trace.kept[0].sum() / 3
    assert torch.equal(generated(model, batch), plain)


def test_a_copy_of_a_pruned_cache_ends_with_the_block():
    model = build("llava")
    batch = inputs(model)
    with lv.prune(model, EveryOther()), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        made = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
        model(input_ids=batch["input_ids"][:, -1:], past_key_values=cache)
    for one in (*made, cache, copy.deepcopy(cache)):
        with pytest.raises(ValueError, match="has ended"):
            model(input_ids=batch["input_ids"][:, -1:], past_key_values=one)


def test_what_a_user_sets_on_the_model_stays():
    model = build("llava")
    mine = functools.partial(type(model).generate, model)
    with lv.observe(model):
        model.generate = mine
    assert model.generate is mine
    with lv.observe(model):
        assert copy.deepcopy(model).generate.func.func is mine.func
    assert model.generate is mine


# What is held ------------------------------------------------------------------------------------------------------
def test_a_finished_trace_holds_no_tensor_of_the_model():
    import gc
    import weakref

    model, features = build("llava"), []

    class Kept(EveryOther):
        def pick(self, pictures):
            features.extend(weakref.ref(view.picture) for view in pictures.views)
            return super().pick(pictures)

    hook = model.get_submodule("model.vision_tower").register_forward_hook(
        lambda module, args, out: features.append(weakref.ref(out.last_hidden_state))
    )
    with lv.prune(model, Kept()) as trace, torch.no_grad():
        model(**inputs(model))
        hook.remove()
        gc.collect()
        assert len(features) > 3 and all(one() is None for one in features)
    held = pickle.dumps(trace)
    assert len(held) < 20_000
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
