"""lv.answer with prune=: every prompt pruned as if alone, options as columns, errors as rows, shared beginnings."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ask, build, same, table, text_of
from families import build as build_family
from processors import lvlm as family_lvlm
from processors import processor
from small_methods import LastRow, Picky, Scattered, Unasked, Weak

import lvlm_utils as lv
from lvlm_utils import evaluate, methods
from lvlm_utils.prefix import clusters
from lvlm_utils.pruning.engine import Continuation
from lvlm_utils.results import MEASURED
from lvlm_utils.session import with_groups

BOTH = [LastRow(keep=0.5, layer=1), Unasked(drop=0.4)]


def alike(left, right):
    same(left, right)
    pd.testing.assert_frame_equal(left[list(MEASURED)], right[list(MEASURED)])


@pytest.fixture
def named(monkeypatch):
    """METHODS with two of ours, as if they came with the package."""
    for name, method in (("weak", Weak), ("last_row", LastRow)):
        monkeypatch.setitem(methods.METHODS, name, method)


# One prompt at a time or many ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "prune", [Unasked(), LastRow(keep=5, positions="contiguous"), Scattered(), BOTH], ids=["text", "visual", "0", "two"]
)
def test_answers_are_those_of_prune_and_generate(tiny, images, prune):
    samples = table(images[:1], (0, 60))
    one, eight = (ask(tiny, samples, prune=prune, batch_size=size, stop=()) for size in (1, 8))
    alike(one, eight)
    plain = ask(tiny, samples, stop=())
    assert (one["margin"] - plain["margin"]).abs().max() > 0.1
    first, *inner = prune if isinstance(prune, list) else [prune]
    for row, found in zip(samples.itertuples(), eight.itertuples(), strict=True):
        prompt = lv.prompt(tiny, row.image, row.context, row.question)
        with methods.prune(tiny, first) as trace:
            if inner:
                with methods.prune(tiny, inner[0]):
                    text = lv.generate(tiny, prompt, max_new_tokens=5)
            else:
                text = lv.generate(tiny, prompt, max_new_tokens=5)
        assert text == found.raw
        assert found.mean_tokens == pytest.approx(trace.mean_tokens)
        assert found.mean_text == pytest.approx(trace.mean_text)
        assert found.mean_visual == pytest.approx(trace.mean_visual)
        last = trace.kept[-1]
        assert found.final_visual == (last & prompt.groups.visual).sum()
        assert found.final_text == (last & prompt.groups.text).sum()
        assert found.final_context == (last & prompt.groups.context).sum() <= found.n_context_tokens
    pd.testing.assert_frame_equal(
        plain[list(MEASURED)].astype(int),
        pd.DataFrame({
            "mean_tokens": one["n_prefill_tokens"], "mean_visual": 16, "mean_text": one["n_prefill_tokens"] - 16,
            "final_visual": 16, "final_text": one["n_prefill_tokens"] - 16, "final_context": one["n_context_tokens"],
        }), check_dtype=False,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*cannot share prefixes")
@pytest.mark.parametrize(
    "family", ["llava", "vipllava", "llava_next", "llava_onevision", "internvl", "qwen2_vl", "qwen3_vl"]
)
@pytest.mark.parametrize("prune", [LastRow(), Unasked(layer=1), Scattered()], ids=["visual", "text", "0"])
def test_families(images, family, prune):
    """In every batch, at every length of the answer and with every way of asking."""
    lvlm, samples = family_lvlm(family), table(images[:2], (0, 40))
    alone = ask(lvlm, samples, prune=prune, share=False, batch_size=1, stop=(), max_new_tokens=8)
    alike(ask(lvlm, samples, prune=prune, stop=(), max_new_tokens=8), alone)
    assert alone["error"].isna().all() and alone["margin"].nunique() > 1
    row = samples.iloc[4]
    with methods.prune(lvlm, prune):
        text = lv.generate(lvlm, lv.prompt(lvlm, row["image"], row["context"], row["question"]), max_new_tokens=8)
    assert text == alone["raw"][4]


# Columns, keys and files ----------------------------------------------------------------------------------------------
def test_options_are_columns_and_part_of_the_key(tiny, images, tmp_path, named):
    out, samples = tmp_path / "results.parquet", table(images[:1], (60,))
    plain = ask(tiny, samples, out=out)
    pruned = {name: ask(tiny, samples, prune=prune, out=out) for name, prune in {
        "method": Weak(layers=(0, 1, 2)), "list": {"name": "weak", "layers": [0, 1, 2]},
        "range": [Weak(layers=range(3))],
        "drop": {"name": "weak", "layers": (0, 1, 2), "drop": 0.5}, "both": BOTH, "one": BOTH[0],
    }.items()}  # fmt: skip
    pd.testing.assert_frame_equal(pruned["method"], pruned["list"])
    pd.testing.assert_frame_equal(pruned["method"], pruned["range"])
    assert set(plain["options"]) == {"{}"} and set(plain["method"]) == {"none"} and plain["keep"].isna().all()
    options = json.loads(pruned["method"]["options"][0])
    assert options == {"drop": 0.4, "layers": [0, 1, 2], "positions": "original", "uses_question": False}
    assert set(pruned["method"]["method"]) == {"weak"} and pruned["method"]["keep"].isna().all()
    assert set(pruned["both"]["method"]) == {"last_row+Unasked"} and set(pruned["both"]["keep"]) == {"0.5"}
    assert [one.get("drop") for one in json.loads(pruned["both"]["options"][0])] == [None, 0.4]
    assert set(pruned["one"]["method"]) == {"last_row"} and isinstance(json.loads(pruned["one"]["options"][0]), dict)
    kept = pd.read_parquet(out)
    assert len(kept) == 5 * len(samples) == kept["key"].nunique()
    pd.testing.assert_frame_equal(ask(tiny, samples, out=out), plain)


# Errors ---------------------------------------------------------------------------------------------------------------
class Undecorated(methods.Method):
    """Not a dataclass, so nobody knows its options."""


@pytest.mark.parametrize(
    ("prune", "message"),
    [("last_row", "give a method such as"), ({"keep": 0.5}, "give a method"), ([], "give a method"),
     ([Unasked(), "last_row"], "give a method"), (LastRow, "give a method"), (Undecorated(), "dataclass"),
     ({"name": "nothing"}, "'nothing' is no pruning method"),
     ({"name": "last_row", "share": 0.5}, "last_row has no option share. There are: keep, layer, "),
     (LastRow(keep=-2.0), "keep=-2.0 is neither"), (Weak(layers=[99]), "Layer 99 is out of range"),
     (LastRow(layer=9), "Layer [89] is out of range"), (Weak(positions="new"), "positions='new' is not one of")],
)  # fmt: skip
def test_what_concerns_every_prompt_is_raised_at_once(tiny, images, prune, message, monkeypatch, named):
    def runs(*_, **__):
        raise AssertionError("A prompt was asked.")

    monkeypatch.setattr(tiny.decoder, "forward", runs)
    with pytest.raises(ValueError, match=message):
        ask(tiny, table(images[:1]), prune=prune)


def test_answer_inside_prune_is_refused(tiny, images):
    with methods.prune(tiny, Weak()), pytest.raises(ValueError, match="inside an lv.prune"):
        ask(tiny, table(images[:1]))


def test_options_as_numpy_has_them(tiny, images):
    found = ask(tiny, table(images[:1], (60,)), prune=Weak(drop=np.float64(0.25), layers=np.arange(2)))
    plain = ask(tiny, table(images[:1], (60,)), prune=Weak(drop=0.25, layers=(0, 1)))
    alike(found, plain)
    assert found["options"].tolist() == plain["options"].tolist()


@pytest.mark.parametrize("asks", [True, False])
def test_a_prompt_that_cannot_be_pruned_is_a_row(tiny, images, asks):
    samples = table(images[:2], (0, 60))
    with pytest.warns(UserWarning, match="6 of 12 rows failed.*A prompt has no context"):
        found = ask(tiny, samples, prune=Picky(layers=(1,), uses_question=asks))
    failed = found["error"].notna()
    assert (failed == (samples["length"] == 0)).all() and found.loc[failed, list(MEASURED)].isna().all(axis=None)
    assert (found.loc[failed, "n_visual_tokens"] == 16).all()
    same(found[~failed], ask(tiny, samples[~failed], prune=Weak(layers=(1,))))


# Shared beginnings ----------------------------------------------------------------------------------------------------
def shares_and_is_alike(lvlm, samples, prune, condition="original", **options):
    shared = ask(lvlm, samples, condition, prune=prune, **options)
    alike(shared, ask(lvlm, samples, condition, prune=prune, share=False, **options))
    alike(shared, ask(lvlm, samples, condition, prune=prune, batch_size=2, **options))
    return shared


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("layers", [(0,), (1, 3)])
def test_a_shared_beginning_is_that_of_separate_prompts(tiny_gqa, images, positions, layers):
    samples = table(images[:1])
    samples.loc[4, "question"] = "Does it rain?"  # has no beginning in common with the others
    prune = Weak(layers=layers, positions=positions)
    shared = shares_and_is_alike(tiny_gqa, samples, prune, stop=())
    plain, other = ask(tiny_gqa, samples), {"original": "contiguous", "contiguous": "original"}[positions]
    assert (shared["margin"] - plain["margin"]).abs().max() > 0.1 < shared["margin"].std()
    moved = ask(tiny_gqa, samples, prune=Weak(layers=layers, positions=other))
    assert (shared["margin"] - moved["margin"]).abs().max() > 0.1
    separate = ask(tiny_gqa, samples, prune=prune, share=False)
    assert shared["n_computed_tokens"].sum() < separate["n_computed_tokens"].sum() * 0.6
    assert (shared["n_computed_tokens"] == separate["n_computed_tokens"])[4]


@pytest.mark.parametrize("condition", ["white", "none"])
def test_sharing_without_the_picture(tiny, images, condition):
    shares_and_is_alike(tiny, table(images[:1], (0, 60)), Weak(), condition)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_sharing_in_other_families(images, positions):
    for name in ("llava", "internvl"):
        prune = Weak(layers=[0, 2], positions=positions)
        shared = shares_and_is_alike(family_lvlm(name), table(images[:1], (0, 40)), prune)
        assert shared["margin"].nunique() > 1 or shared["raw"].nunique() > 1


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_sharing_with_the_embedded_model(images, positions):
    shared = shares_and_is_alike(lv.load("tiny-llava"), table(images[:1], (60,)), Weak(0.6, (0, 3), positions))
    assert (shared["final_context"] < shared["n_context_tokens"] * 0.6).all()
    assert shared["n_computed_tokens"].max() > 150
    assert (shared["n_computed_tokens"] < 50).sum() == len(shared) - 1


def test_sharing_with_eager_attention_and_two_methods(images):
    lvlm = lv.load(*build(kv_heads=2), attention="eager")
    shares_and_is_alike(lvlm, table(images[:1], (0, 60)), [Weak(positions="contiguous"), Weak(layers=[3])])


def test_methods_that_ask_do_not_share_what_is_left(tiny, images):
    samples = table(images[:1], (60,))
    for prune in ([Weak(), Unasked()], Weak(uses_question=True)):
        found = ask(tiny, samples, prune=prune)
        assert (found["n_computed_tokens"] == found["n_prefill_tokens"]).all()
    found = ask(tiny, samples, prune=Weak())
    assert (found["n_computed_tokens"] < found["n_prefill_tokens"]).sum() == 2


def test_a_sliding_window_is_not_shared(images, monkeypatch):
    """Neither where the layers say so one by one, nor where only the window's size does."""
    model = build_family("llava")
    lvlm = lv.load(model, processor("llava"))
    assert evaluate.can_share(lvlm)
    for name, value in (("sliding_window", 16), ("layer_types", ["full_attention", "sliding_attention"])):
        with monkeypatch.context() as patch:
            patch.setattr(model.config.get_text_config(), name, value, raising=False)
            assert not evaluate.can_share(lvlm)


def test_answers_after_a_shared_beginning_stop_at_eos(images):
    model, processor = build()
    samples, lvlm = table(images[:1], (0, 60)), lv.load(model, processor)
    free = ask(lvlm, samples, prune=Weak(), max_new_tokens=8)
    said = lvlm.tokenizer(free["raw"][0], add_special_tokens=False)["input_ids"]
    model.generation_config.eos_token_id = [2, *said[1:]]
    shared = ask(lvlm, samples, prune=Weak(), max_new_tokens=8)
    same(shared, ask(lvlm, samples, prune=Weak(), max_new_tokens=8, share=False))
    assert (shared["raw"].str.len() <= free["raw"].str.len()).all() and len(shared["raw"][0]) < len(free["raw"][0])


def test_beginnings_hold_picture_context_and_one_token_more(tiny, images):
    context = text_of(30)
    questions = [
        "Is the couch there?",
        "Is the dog there?",
        "Is the dog there? Yes?",
        "What is it?",
        "Is the couch there?",
    ]
    prompts = [lv.prompt(tiny, images[0], context, question) for question in questions]
    ids = [one.inputs["input_ids"][0].tolist() for one in prompts]
    least = int(prompts[0].groups.context[0].nonzero().amax()) + 2
    found = dict((tuple(sorted(rows)), min(cuts)) for rows, cuts in clusters(ids, least))
    assert set(found) == {(0, 1, 2, 4), (3,)}
    cut = found[0, 1, 2, 4]
    assert cut >= least and len({tuple(ids[row][:cut]) for row in (0, 1, 2, 4)}) == 1
    assert len({ids[row][cut] for row in (0, 1, 2, 4)}) > 1
    assert list(clusters([ids[0], ids[0]], least)) == [([0, 1], [len(ids[0]) - 1] * 2)]


def test_only_the_latest_prompt_can_be_continued(tiny, images):
    prompt = lv.prompt(tiny, images[0], text_of(30), "Is it?")
    row, pair = prompt.inputs["input_ids"][:, -1:], lv.prompt(tiny, images[0], [text_of(30)] * 2, "Is it?")
    with pytest.raises(ValueError, match="Only the latest"):
        Continuation(tiny.model, tiny.model(**prompt.inputs).past_key_values, 2)
    two = row.expand(2, -1), torch.ones(2, 1, dtype=torch.bool)
    with methods.prune(tiny, LastRow()), torch.no_grad():
        cache = tiny.model(**prompt.inputs).past_key_values
        go_on = Continuation(tiny.model, cache, 2)
        said = go_on(*two)
        for step in (row.expand(2, -1), row.expand(2, 3)):
            with pytest.raises(ValueError, match="another prompt"):  # the door is open for `go_on` alone
                tiny.model(input_ids=step, past_key_values=go_on.cache)
        torch.testing.assert_close(tiny.model(input_ids=row, past_key_values=cache).logits[:, -1].expand(2, -1), said)
        with pytest.raises(ValueError, match="Only the latest"):  # its beginning has gone on by itself
            Continuation(tiny.model, cache, 2)
        fresh = tiny.model(**prompt.inputs).past_key_values
        torch.testing.assert_close(tiny.model(input_ids=row, past_key_values=fresh).logits[:, -1].expand(2, -1), said)
        with pytest.raises(ValueError, match="Only the latest"):
            Continuation(tiny.model, cache, 2)
        with with_groups(tiny.model, pair.groups), pytest.raises(ValueError, match="a single one"):
            Continuation(tiny.model, tiny.model(**pair.inputs).past_key_values, 2)
    with pytest.raises(ValueError, match="has ended"):
        tiny.model(input_ids=two[0], past_key_values=go_on.cache)
