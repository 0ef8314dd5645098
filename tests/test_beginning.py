"""Prompts that share what comes before any choice: answers as if alone, with tower and first layers run once."""

import types
from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from conftest import ask, build, same, table, text_of
from processors import lvlm as family_lvlm

import lvlm_utils as lv
from lvlm_utils.evaluate.pruned import MEASURED, read
from lvlm_utils.families import towers_of
from lvlm_utils.pruning import METHODS, Plan
from lvlm_utils.pruning.beginning import Beginning, first_choice

CONTEXT = {"name": "context", "drop": 0.3, "layers": [1, 2]}
FASTV = {"name": "fastv", "keep": 0.5, "layer": 2}
ASKING = {
    "context": CONTEXT,
    "first layer": {**CONTEXT, "layers": [0, 2]},
    "contiguous": {**CONTEXT, "positions": "contiguous"},
    "last": {**CONTEXT, "reading": "last"},
    "received": {**CONTEXT, "reading": "received"},
    "sentences": {**CONTEXT, "unit": "sentence"},
    "blind": {**CONTEXT, "pooling": "random"},
    "fastv": FASTV,
    "pyramiddrop": {"name": "pyramiddrop", "keep": 0.25, "layers": [2, 3]},
    "sparsevlm": {"name": "sparsevlm", "keep": 0.5, "layers": [0, 1, 2]},
    "spatten": {"name": "spatten", "drop": 0.5, "first": 2},
    "ltp": {"name": "ltp", "theta": 0.5},
    "random": {"name": "random", "keep": 0.5, "layer": 1},
    "both": [{**FASTV, "layer": 1}, CONTEXT],
}


@contextmanager
def counting(lvlm):
    """Pictures that the tower sees, and tokens that go into each layer of the decoder."""
    seen, hooks = {"pictures": 0, "tokens": [0] * len(lvlm.decoder.layers)}, []

    def picture(module, args, kwargs, output):
        seen["pictures"] += len(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0])

    def layer(number):
        def tokens(module, args, kwargs, output):
            x = args[0] if args else kwargs["hidden_states"]
            seen["tokens"][number] += x.shape[0] * x.shape[1]

        return tokens

    hooks += [tower.register_forward_hook(picture, with_kwargs=True) for tower in towers_of(lvlm.model).values()]
    hooks += [one.register_forward_hook(layer(n), with_kwargs=True) for n, one in enumerate(lvlm.decoder.layers)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def alike(left, right):
    same(left, right)
    columns = [*MEASURED, "n_prefill_tokens"]
    pd.testing.assert_frame_equal(left[columns], right[columns])


def state(lvlm):
    return [len(one._forward_pre_hooks) + len(one._forward_hooks) for one in lvlm.model.modules()]


@pytest.mark.parametrize("name", ASKING)
def test_answers_are_those_of_separate_prompts(tiny_gqa, images, name):
    samples = table(images[:2], (0, 60, 200))
    alone = ask(tiny_gqa, samples, prune=ASKING[name], share=False)
    assert alone["error"].isna().all() and alone["margin"].std() > 0.1
    before = state(tiny_gqa)  # transformers keeps hooks of its own from the first call on
    for size in (1, 8):
        alike(ask(tiny_gqa, samples, prune=ASKING[name], batch_size=size), alone)
    assert state(tiny_gqa) == before


@pytest.mark.parametrize("condition", ["white", "none"])
def test_without_the_picture(tiny, images, condition):
    samples = table(images[:1], (0, 60))
    alike(ask(tiny, samples, condition, prune=CONTEXT), ask(tiny, samples, condition, prune=CONTEXT, share=False))


def test_other_attention_and_longer_answers(images):
    lvlm = lv.load(*build(kv_heads=2), attention="eager")
    samples = table(images[:1], (0, 60))
    found = [ask(lvlm, samples, prune=CONTEXT, share=share, max_new_tokens=6) for share in (True, False)]
    alike(*found)
    assert found[0]["raw"].str.len().max() > 5


@pytest.mark.parametrize("family", ["llava", "vipllava", "llava_next", "llava_onevision", "internvl", "idefics3"])
@pytest.mark.parametrize("prune", [CONTEXT, FASTV], ids=["context", "fastv"])
def test_families(images, family, prune):
    lvlm, samples = family_lvlm(family), table(images[:2], (0, 40))
    alone = ask(lvlm, samples, prune=prune, share=False)
    alike(ask(lvlm, samples, prune=prune), alone)
    assert alone["error"].isna().all() and alone["margin"].nunique() > 1


def test_the_embedded_model(images):
    lvlm, samples = lv.load("tiny-llava"), table(images[:1], (60, 200))
    alike(ask(lvlm, samples, prune={"name": "context"}), ask(lvlm, samples, prune={"name": "context"}, share=False))


def test_what_is_shared_runs_once(tiny, images):
    samples = table(images[:1], (60, 200))  # six prompts about one picture
    with counting(tiny) as alone:
        ask(tiny, samples, prune=FASTV, share=False, batch_size=1)
    with counting(tiny) as shared:
        ask(tiny, samples, prune=FASTV, batch_size=1)
    assert (alone["pictures"], shared["pictures"]) == (6, 1)
    assert shared["tokens"][2] == pytest.approx(alone["tokens"][2], abs=6)  # steps of decoding may differ
    for layer in (0, 1):
        assert shared["tokens"][layer] < 0.4 * alone["tokens"][layer]


def test_one_question_a_picture_is_asked_as_before(tiny, images):
    samples = table(images, (60,), objects=("couch",))
    with counting(tiny) as shared:
        found = ask(tiny, samples, prune=FASTV)
    with counting(tiny) as alone:
        same(found, ask(tiny, samples, prune=FASTV, share=False))
    assert shared == alone and shared["pictures"] == len(images)


def test_a_method_that_looks_at_the_tower_gets_every_picture(tiny, images):
    samples = table(images[:1], (60,))
    both = [{"name": "vispruner", "keep": 8}, CONTEXT]
    with counting(tiny) as seen:
        alike(ask(tiny, samples, prune=both, batch_size=1), ask(tiny, samples, prune=both, share=False, batch_size=1))
    assert seen["pictures"] == 2 * len(samples)


def test_errors_stay_rows(tiny, images, monkeypatch):
    def picky(lvlm):
        def choose(tokens):
            if not tokens.groups.context.any(1).all():
                raise ValueError("A prompt has no context.")
            return tokens.alive & ~tokens.here(tokens.groups.visual)

        return Plan({1: choose})

    monkeypatch.setitem(METHODS, "picky", types.SimpleNamespace(plan=picky))
    samples = table(images[:1], (0, 60))
    with pytest.warns(UserWarning, match="3 of 6 rows failed.*A prompt has no context"):
        found = ask(tiny, samples, prune={"name": "picky"})
    assert (found["error"].notna() == (samples["length"] == 0)).all()
    fine = samples["length"] > 0
    alike(found[fine], ask(tiny, samples[fine], prune={"name": "picky"}, share=False))


def test_a_beginning_is_no_prompt_of_the_pruned_model(tiny, images):
    """Neither its tokens nor its hooks are left in the model, and the trace is that of the prompt before."""
    prompt = lv.prompt(tiny, images[0], text_of(40), "Is there a couch?")
    with lv.prune(tiny, **FASTV) as trace, torch.inference_mode():
        tiny.model(**prompt.inputs)
        kept, before = trace.kept, state(tiny)
        extras = {"pixel_values": prompt.inputs["pixel_values"]}
        shared = Beginning(tiny.model, prompt.inputs["input_ids"][0, :-5].tolist(), extras, 2)
        assert state(tiny) == before and (trace.kept == kept).all()
    assert shared.hidden.shape[1] == prompt.inputs["input_ids"].shape[1] - 5 and len(shared.cache.layers) == 2


@pytest.mark.parametrize(
    ("prune", "layer"),
    [(FASTV, 2), (CONTEXT, 2), ({**CONTEXT, "reading": "received"}, 1), ({"name": "vispruner"}, None),
     (ASKING["both"], 1), (ASKING["sparsevlm"], 0), ({"name": "fastv", "keep": 1.0}, None)],
)  # fmt: skip
def test_how_far_prompts_are_alike(tiny, prune, layer):
    assert read(tiny, prune).alike == layer
    assert first_choice([]) is None
