"""lv.answer with prune=: every prompt pruned as if alone, options as columns, errors as rows, shared beginnings."""

import json
import types

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ask, build, same, table, text_of
from lvlm_utils.pruning.continuation import Continuation
from processors import lvlm as family_lvlm

import lvlm_utils as lv
from lvlm_utils.evaluate import Store, continued, replies
from lvlm_utils.evaluate.pruned import MEASURED, read
from lvlm_utils.pruning import METHODS, Plan
from lvlm_utils.session import told

CONTEXT = {"name": "context", "drop": 0.3, "layers": range(3)}
BOTH = [{"name": "fastv", "keep": 0.5, "layer": 1}, {"name": "context", "drop": 0.4, "layers": [1, 2]}]


def alike(left, right):
    same(left, right)
    pd.testing.assert_frame_equal(left[list(MEASURED)], right[list(MEASURED)])


def weak(lvlm, drop=0.4, layers=(1, 2), positions="original", asks=False):
    """Drops the picture's and the context's tokens with the smallest hidden states: no question can change that."""

    def choose(tokens):
        may = tokens.here(tokens.groups.visual | tokens.groups.context) & tokens.alive & ~tokens.last
        size = tokens.hidden.norm(dim=-1).masked_fill(~may, torch.inf)
        rank = size.argsort(dim=1, stable=True).argsort(dim=1)  # equal words are equally large
        return ~may | (rank >= (may.sum(1, keepdim=True) * drop).long())

    return Plan({layer: choose for layer in layers}, positions, asks=asks)


@pytest.fixture
def methods(monkeypatch):
    monkeypatch.setitem(METHODS, "weak", types.SimpleNamespace(plan=weak))
    return METHODS


# One prompt at a time or many ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("prune", [CONTEXT, {"name": "fastv", "keep": 5, "positions": "contiguous"}, BOTH])
def test_answers_are_those_of_prune_and_generate(tiny, images, prune):
    samples = table(images[:1], (0, 60))
    one, eight = (ask(tiny, samples, prune=prune, batch_size=size) for size in (1, 8))
    alike(one, eight)
    plain = ask(tiny, samples)
    assert (one["margin"] - plain["margin"]).abs().max() > 0.1
    first, *inner = [prune] if isinstance(prune, dict) else prune
    for row, found in zip(samples.itertuples(), eight.itertuples(), strict=True):
        prompt = lv.prompt(tiny, row.image, row.context, row.question)
        with lv.prune(tiny, **first) as trace:
            if inner:
                with lv.prune(tiny, **inner[0]):
                    text = lv.generate(tiny, prompt, max_new_tokens=5)
            else:
                text = lv.generate(tiny, prompt, max_new_tokens=5)
        assert text == found.raw
        assert found.mean_tokens == pytest.approx(trace.mean_tokens) and found.mean_text == pytest.approx(
            trace.mean_text
        )
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


# Columns, keys and files ----------------------------------------------------------------------------------------------
def test_options_are_columns_and_part_of_the_key(tiny, images, tmp_path):
    out, samples = tmp_path / "results.parquet", table(images[:1], (60,))
    plain = ask(tiny, samples, out=out)
    pruned = {name: ask(tiny, samples, prune=prune, out=out) for name, prune in {
        "range": CONTEXT, "list": {**CONTEXT, "layers": [0, 1, 2]}, "default": {"name": "context", "layers": (0, 1, 2)},
        "drop": {**CONTEXT, "drop": 0.5}, "both": BOTH, "one": BOTH[:1],
    }.items()}  # fmt: skip
    pd.testing.assert_frame_equal(pruned["range"], pruned["list"])
    pd.testing.assert_frame_equal(pruned["range"], pruned["default"])
    assert set(plain["options"]) == {"{}"} and set(plain["method"]) == {"none"} and set(plain["keep"]) == {1.0}
    options = json.loads(pruned["range"]["options"][0])
    assert (options["drop"], options["layers"], options["reading"]) == (0.3, [0, 1, 2], "question")
    assert "groups" not in options and "name" not in options
    assert set(pruned["both"]["method"]) == {"fastv+context"} and set(pruned["both"]["keep"]) == {0.5}
    assert [one.get("layers") for one in json.loads(pruned["both"]["options"][0])] == [None, [1, 2]]
    assert set(pruned["one"]["method"]) == {"fastv"} and isinstance(json.loads(pruned["one"]["options"][0]), dict)
    kept = pd.read_parquet(out)
    assert len(kept) == 5 * len(samples) == kept["key"].nunique()
    pd.testing.assert_frame_equal(ask(tiny, samples, out=out), plain)


def test_files_from_before_pruning_are_still_valid(tiny, images, tmp_path, monkeypatch):
    out, samples = tmp_path / "results.parquet", table(images[:1], (60,))
    before = ask(tiny, samples, out=out)
    pd.read_parquet(out).drop(columns=["options", *MEASURED]).to_parquet(out)
    monkeypatch.setattr(replies, "_separate", None)
    monkeypatch.setattr(replies, "answer_shared", None)
    after = ask(tiny, samples, out=out)
    pd.testing.assert_frame_equal(after.drop(columns=list(MEASURED)), before.drop(columns=list(MEASURED)))
    monkeypatch.undo()
    ask(tiny, samples, prune=CONTEXT, out=out)
    assert len(Store(out).table) == 2 * len(samples) and set(Store(out).table["options"].str.len()) != {2}


def test_the_key_of_a_plain_answer_is_the_one_it_always_had():
    """Kept answers stay valid: these keys were computed before lv.answer could prune."""
    stands_for = types.SimpleNamespace(
        name="m", revision="r", dtype=torch.float32, attention="sdpa",
        processor=types.SimpleNamespace(chat_template="t"),
    )  # fmt: skip
    samples = table(["no such picture"], (0,))
    wanted = lv.evaluate._wanted(stands_for, samples, "original", read(stands_for, None), 4)
    assert wanted["key"].tolist() == [
        "8967d3cd07a9be219bd68489", "a7def42de59e4eeb91d15553", "bec30b43fbe04f34395d1f41"
    ]  # fmt: skip


def test_a_pruned_run_resumes(tiny, images, tmp_path, monkeypatch):
    out, samples, asked = tmp_path / "results.parquet", table(images, (0, 60)), []
    run = lv.evaluate.ask

    def stopped(lvlm, pictures, *rest):
        if asked:
            raise KeyboardInterrupt
        asked.extend(pictures)
        return run(lvlm, pictures[:3], *rest)

    monkeypatch.setattr(lv.evaluate, "ask", stopped)
    monkeypatch.setattr(lv.evaluate.Store, "finish", lambda self: None)
    with pytest.raises((ValueError, TypeError)):  # one picture of four is left out
        ask(tiny, samples, prune=CONTEXT, out=out)
    monkeypatch.undo()
    counted = []
    monkeypatch.setattr(
        lv.evaluate, "ask", lambda lvlm, pictures, *rest: counted.extend(pictures) or run(lvlm, pictures, *rest)
    )
    alike(ask(tiny, samples, prune=CONTEXT, out=out), ask(tiny, samples, prune=CONTEXT))
    assert len(counted) == 1 + 4


# Errors ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prune", "message"),
    [("fastv", "that is a method of lv.prune"), ({"keep": 0.5}, "that is a method"), ([], "that is a method"),
     ([CONTEXT, "fastv"], "that is a method"), ({"name": "nothing"}, "'nothing' is no pruning method"),
     ({"name": "fastv", "share": 0.5}, "fastv has no option share. There are: keep, layer, "),
     ({"name": "fastv", "keep": 2.0}, "keep=2.0 is neither"), ({**CONTEXT, "layers": [99]}, "Layer 99 is out of range"),
     ({"name": "fastv", "layer": 9}, "Layer 9 is out of range"),
     ({"name": "fastv", "keep": object()}, "Option keep of fastv is <object"),
     ({"name": "fastv", "keep": float("nan")}, "Option keep of fastv is nan"),
     ({**CONTEXT, "protect": {1: "system"}}, "Option protect of context .*its keys are not text")],
)  # fmt: skip
def test_what_concerns_every_prompt_is_raised_at_once(tiny, images, prune, message, monkeypatch):
    monkeypatch.setattr(lv.evaluate, "ask", None)
    with pytest.raises(ValueError, match=message):
        ask(tiny, table(images[:1]), prune=prune)


def test_answer_inside_prune_is_refused(tiny, images):
    with lv.prune(tiny, "fastv"), pytest.raises(ValueError, match="inside an lv.prune"):
        ask(tiny, table(images[:1]))


def test_numpy_numbers_are_options(tiny):
    found = read(tiny, {"name": "context", "drop": np.float64(0.25), "layers": np.arange(2)})
    assert json.loads(found.options)["drop"] == 0.25 and found.methods[0][1]["layers"] == [0, 1]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_states_its_options(tiny, name):
    found = read(tiny, {"name": name} | ({"keep": 0.5} if name in ("random", "tome") else {}))
    assert found.name == name and json.loads(found.options).get("positions") in ("original", "contiguous", None)
    assert "0x" not in found.options  # no address of a function: the same in every process


@pytest.mark.parametrize("asks", [True, False])
def test_a_prompt_that_cannot_be_pruned_is_a_row(tiny, images, methods, asks, monkeypatch):
    samples = table(images[:2], (0, 60))

    def picky(lvlm):
        plan = weak(lvlm, asks=asks)

        def choose(tokens):
            if not tokens.groups.context.any(1).all():
                raise ValueError("A prompt has no context.")
            return plan.choose[1](tokens)

        return Plan({1: choose}, asks=asks)

    monkeypatch.setitem(METHODS, "picky", types.SimpleNamespace(plan=picky))
    with pytest.warns(UserWarning, match="6 of 12 rows failed.*A prompt has no context"):
        found = ask(tiny, samples, prune={"name": "picky"})
    failed = found["error"].notna()
    assert (failed == (samples["length"] == 0)).all() and found.loc[failed, list(MEASURED)].isna().all(axis=None)
    assert (found.loc[failed, "n_visual_tokens"] == 16).all()
    same(found[~failed], ask(tiny, samples[~failed], prune={"name": "weak", "layers": [1]}))


# Shared beginnings ----------------------------------------------------------------------------------------------------
def shares_and_is_alike(lvlm, samples, prune, condition="original"):
    shared = ask(lvlm, samples, condition, prune=prune)
    alike(shared, ask(lvlm, samples, condition, prune=prune, share=False))
    alike(shared, ask(lvlm, samples, condition, prune=prune, batch_size=2))
    return shared


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("layers", [(0,), (1, 3)])
def test_a_shared_beginning_is_that_of_separate_prompts(tiny_gqa, images, methods, positions, layers):
    samples = table(images[:1])
    samples.loc[4, "question"] = "Does it rain?"  # has no beginning in common with the others
    prune = {"name": "weak", "layers": layers, "positions": positions}
    shared = shares_and_is_alike(tiny_gqa, samples, prune)
    plain, other = ask(tiny_gqa, samples), {"original": "contiguous", "contiguous": "original"}[positions]
    assert (shared["margin"] - plain["margin"]).abs().max() > 0.1 < shared["margin"].std()
    moved = ask(tiny_gqa, samples, prune={**prune, "positions": other})
    assert (shared["margin"] - moved["margin"]).abs().max() > 0.1
    separate = ask(tiny_gqa, samples, prune=prune, share=False)
    assert shared["n_prefill_tokens"].sum() < separate["n_prefill_tokens"].sum() * 0.6
    assert (shared["n_prefill_tokens"] == separate["n_prefill_tokens"])[4]


@pytest.mark.parametrize("condition", ["white", "none"])
def test_sharing_without_the_picture(tiny, images, methods, condition):
    shares_and_is_alike(tiny, table(images[:1], (0, 60)), {"name": "weak"}, condition)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_sharing_in_other_families(images, methods, positions):
    prune = {"name": "weak", "positions": positions, "layers": [0, 2]}
    for name in ("llava", "internvl"):
        shared = shares_and_is_alike(family_lvlm(name), table(images[:1], (0, 40)), prune)
        assert shared["margin"].nunique() > 1 or shared["raw"].nunique() > 1


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_sharing_with_the_embedded_model(images, positions):
    prune = {"name": "context", "layers": [0, 3], "reading": "context", "positions": positions}
    shared = shares_and_is_alike(lv.load("tiny-llava"), table(images[:1], (60,)), prune)
    assert (shared["final_context"] < shared["n_context_tokens"] * 0.6).all() and shared["n_prefill_tokens"].max() > 150
    assert (shared["n_prefill_tokens"] < 50).sum() == len(shared) - 1


def test_sharing_with_eager_attention_and_two_methods(images, methods):
    lvlm = lv.load(*build(kv_heads=2), attention="eager")
    prune = [{"name": "weak", "positions": "contiguous"}, {"name": "weak", "layers": [3]}]
    shares_and_is_alike(lvlm, table(images[:1], (0, 60)), prune)


def test_methods_that_ask_do_not_share_what_is_left(tiny, images, methods, monkeypatch):
    monkeypatch.setattr(replies, "answer_continued", None)
    ask(tiny, table(images[:1], (60,)), prune=[{"name": "weak"}, CONTEXT])
    ask(tiny, table(images[:1], (60,)), prune={"name": "weak", "asks": True})
    with pytest.raises(TypeError):
        ask(tiny, table(images[:1], (60,)), prune={"name": "weak"})


def test_answers_after_a_shared_beginning_stop_at_eos(images, methods):
    model, processor = build()
    samples, lvlm = table(images[:1], (0, 60)), lv.load(model, processor)
    prune = {"name": "weak"}
    free = ask(lvlm, samples, prune=prune, max_new_tokens=8)
    said = lvlm.tokenizer(free["raw"][0], add_special_tokens=False)["input_ids"]
    model.generation_config.eos_token_id = [2, *said[1:]]
    shared = ask(lvlm, samples, prune=prune, max_new_tokens=8)
    same(shared, ask(lvlm, samples, prune=prune, max_new_tokens=8, share=False))
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
    groups = prompts[0].groups
    least = int(groups.context[0].nonzero().amax()) + 1
    found = list(continued.begin_alike(ids, groups))
    assert sorted(row for rows, _ in found for row in rows) == [0, 1, 2, 3, 4]
    assert found[0][0] == [0, 1, 2, 4] and found[1] == ([3], 0)
    cut = found[0][1]
    assert cut > least and len({tuple(ids[row][:cut]) for row in (0, 1, 2, 4)}) == 1
    assert len({ids[row][cut] for row in (0, 1, 2, 4)}) > 1
    same_twice = list(continued.begin_alike([ids[0], ids[0]], groups))
    assert same_twice == [([0, 1], len(ids[0]) - 1)]


def test_only_the_latest_prompt_can_be_continued(tiny, images, methods):
    prompt = lv.prompt(tiny, images[0], text_of(30), "Is it?")
    row, pair = prompt.inputs["input_ids"][:, -1:], lv.prompt(tiny, images[0], [text_of(30)] * 2, "Is it?")
    with pytest.raises(ValueError, match="Only the latest"):
        Continuation(tiny.model, tiny.model(**prompt.inputs).past_key_values, 2)
    two = row.expand(2, -1), torch.ones(2, 1, dtype=torch.bool)
    with lv.prune(tiny, "fastv"), torch.no_grad():
        cache = tiny.model(**prompt.inputs).past_key_values
        go_on = Continuation(tiny.model, cache, 2)
        said = go_on(*two)
        for step in (row.expand(2, -1), row.expand(2, 3)):
            with pytest.raises(ValueError, match="at once on a pruned cache"):  # the door is open for `go_on` alone
                tiny.model(input_ids=step, past_key_values=go_on.cache)
        with pytest.raises(ValueError, match="another prompt"):
            tiny.model(input_ids=row, past_key_values=cache)
        fresh = tiny.model(**prompt.inputs).past_key_values
        torch.testing.assert_close(tiny.model(input_ids=row, past_key_values=fresh).logits[:, -1].expand(2, -1), said)
        with pytest.raises(ValueError, match="Only the latest"):
            Continuation(tiny.model, cache, 2)
        with told(tiny.model, pair.groups), pytest.raises(ValueError, match="a single one"):
            Continuation(tiny.model, tiny.model(**pair.inputs).past_key_values, 2)
    with pytest.raises(ValueError, match="has ended"):
        tiny.model(input_ids=two[0], past_key_values=go_on.cache)
