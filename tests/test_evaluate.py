"""lv.answer: the same answers however they are computed, and errors as rows."""

import pandas as pd
import pytest
import torch
from conftest import ask, build, same, table, text_of

import lvlm_utils as lv
from lvlm_utils import evaluate
from lvlm_utils.evaluate import parse, word_ids
from lvlm_utils.prefix import clusters, shared


@pytest.mark.parametrize("condition", ["original", "white", "none"])
@pytest.mark.parametrize("fixture", ["tiny", "tiny_gqa"])
def test_shared_or_separate_one_or_eight_give_the_same_answers(fixture, condition, request, images):
    lvlm, samples = request.getfixturevalue(fixture), table(images[:2])
    alone = ask(lvlm, samples, condition, share=False, batch_size=1)
    assert alone["margin"].std() > 0.5 and alone["raw"].nunique() > 5  # the prompts do differ
    same(ask(lvlm, samples, condition, share=False, batch_size=8), alone)
    for batch_size in (1, 4, 30):
        shared = ask(lvlm, samples, condition, batch_size=batch_size)
        same(shared, alone)
        assert shared["n_computed_tokens"].sum() < alone["n_computed_tokens"].sum() / 2
    shuffled = samples.sample(frac=1, random_state=0)
    same(ask(lvlm, shuffled, condition).sort_index(), alone)


def test_separate_prompts_are_what_prompt_and_generate_give(tiny, images):
    samples = table(images[:1])
    results = ask(tiny, samples)
    for row, found in zip(samples.itertuples(), results.itertuples(), strict=True):
        prompt = lv.prompt(tiny, row.image, row.context, row.question)
        assert lv.generate(tiny, prompt, max_new_tokens=5) == found.raw
        assert found.n_context_tokens == int(prompt.groups.context.sum()) and found.n_visual_tokens == 16
        with torch.inference_mode():
            logits = tiny.model(**prompt.inputs).logits[0, -1]
        yes, no = (logits[word_ids(tiny.tokenizer, len(tiny.tokenizer), word)].max() for word in ("yes", "no"))
        assert abs(float(yes - no) - found.margin) < 1e-4


@pytest.mark.parametrize("family", ["vipllava", "llava_next"])
def test_sharing_holds_for_other_families(family, images):
    lvlm, samples = lv.load(*build(kv_heads=2, family=family)), table(images[:2], (0, 60))
    same(ask(lvlm, samples), ask(lvlm, samples, share=False, batch_size=1))


def test_sharing_holds_for_eager_attention(images):
    lvlm, samples = lv.load(*build(kv_heads=2), attention="eager"), table(images[:1], (0, 60))
    same(ask(lvlm, samples), ask(lvlm, samples, share=False, batch_size=1))


def test_an_attention_that_cannot_share_says_so_and_answers_alike(tiny, images, monkeypatch):
    samples = table(images[:1], (0, 60))
    monkeypatch.setattr(evaluate, "can_share", lambda lvlm: False)
    with pytest.warns(UserWarning, match="cannot share prefixes"):
        separate = ask(tiny, samples)
    monkeypatch.undo()
    same(separate, ask(tiny, samples))


def test_answers_stop_at_eos_alike(images):
    model, processor = build()
    samples = table(images[:2], (0, 60))
    lvlm = lv.load(model, processor)
    free = ask(lvlm, samples, max_new_tokens=8)
    first = lv.prompt(lvlm, samples["image"][0], samples["context"][0], samples["question"][0])
    said = model.generate(**first.inputs, max_new_tokens=3, do_sample=False)[0, -3:].tolist()
    model.generation_config.eos_token_id = [2, *said[1:]]
    shared = ask(lvlm, samples, max_new_tokens=8)
    same(shared, ask(lvlm, samples, max_new_tokens=8, share=False, batch_size=1))
    same(shared, ask(lvlm, samples, max_new_tokens=8, share=False, batch_size=8))
    assert len(shared["raw"][0]) < len(free["raw"][0]) and (shared["raw"].str.len() <= free["raw"].str.len()).all()


def test_clusters_share_true_prefixes_and_spare_the_picture():
    visual = [1, 7, 7, 7]
    long = [*visual, *range(100, 300)]
    rows = [
        long, [*visual, 100, 101, 5], [*visual, *range(100, 180), 5, 6], [1, 7, 7, 9, 5], [*visual, *range(300, 500)],
        long[:150], long,
    ]  # fmt: skip
    found = list(clusters(rows, least=4))
    assert sorted(row for members, _ in found for row in members) == list(range(len(rows)))
    for members, cuts in found:
        for row, cut in zip(members, cuts, strict=True):
            assert rows[row][:cut] == rows[members[0]][:cut] and cut < len(rows[row])
            assert len(members) == 1 or cut >= 4
    assert sorted(found[0][0]) == [0, 1, 2, 5, 6] and [members for members, _ in found[1:]] == [[4], [3]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_that_go_on_at_different_cuts_see_their_own_beginning_only(attention, images):
    """A fork is as long as its longest cut; the columns between a row's cut and that end are off."""
    lvlm = lv.load(*build(), attention=attention)
    prompt = lv.prompt(lvlm, images[0], text_of(40), "Is it?")
    own = prompt.inputs["input_ids"][0].tolist()
    ids = [own, [*own[:60], 9, 9], [*own[:40], 8], own[:30], [*own[:40], *range(20, 40)]]
    ((members, cuts),) = clusters(ids, 25)
    ends = [lambda new: len(new) if len(new) > 3 else None] * 5
    found = shared(lvlm, prompt, [ids[row] for row in members], cuts, ends, 8)
    assert len(set(cuts)) > 2
    for row, reply in zip(members, found, strict=True):
        tokens = list(ids[row])
        for token in reply.ids:
            with torch.inference_mode():
                logits = lvlm.model(input_ids=torch.tensor([tokens]), pixel_values=prompt.inputs["pixel_values"]).logits
            assert token == logits[0, -1].argmax()
            tokens.append(token)
        assert len(reply.ids) == 4 and reply.computed >= len(ids[row]) - max(cuts)


def test_columns_and_counts(tiny, images, monkeypatch):
    samples = table(images[:1])
    samples.index = samples.index + 50
    first = iter(["Yes, it is", "no.", "maybe"] * 3)
    monkeypatch.setattr(tiny.tokenizer, "decode", lambda *_, **__: next(first), raising=False)
    results = ask(tiny, samples, stop=())
    assert list(results.columns) == evaluate.COLUMNS and results.index.equals(samples.index)
    assert results["sample"].tolist() == samples["sample"].tolist()
    assert set(results["answer"]) == {"yes", "no", None}
    assert lv.summary(results) == {"rows": 9, "unparsed": 3, "errors": 0, "unlabelled": 0}
    assert not results.loc[~results["parsed"], "correct"].any()
    assert (results["correct"] == (results["answer"] == results["label"])).all()
    assert (results["seconds"] > 0).all() and set(results["condition"]) == {"original"}


@pytest.mark.parametrize(
    ("raw", "said"),
    [("yes", "yes"), (" No, it", "no"), ("Yes.", "yes"), ("YES", "yes"), ("not", None), ("", None), ("the yes", None)],
)
def test_parse_reads_the_first_word(raw, said):
    assert parse(raw) == said


def test_errors_become_rows_and_the_rest_is_answered(images, tmp_path):
    lvlm = lv.load(*build(window=400))
    (tmp_path / "corrupt.png").write_bytes(b"\x89PNG but no more")
    pictures = [images[0], str(tmp_path / "corrupt.png"), str(tmp_path / "gone.png"), images[1]]
    samples = table(pictures, (0, 60))
    samples.loc[1, "context"] = text_of(900)
    samples.loc[2, "question"] = "Is the <image> there?"
    out = tmp_path / "results.parquet"
    with pytest.warns(UserWarning, match="14 of 24 rows failed"):
        results = ask(lvlm, samples, out=out)
    failed = results[results["error"].notna()]
    assert failed.index.tolist() == [1, 2, *range(6, 18)]
    assert "window of in-memory is 400" in failed.loc[1, "error"] and "placeholder" in failed.loc[2, "error"]
    assert failed.loc[6:11, "error"].str.contains("corrupt.png is not a readable picture").all()
    assert failed.loc[12:17, "error"].str.contains("No picture at .*gone.png").all()
    assert not failed["correct"].any() and not failed["parsed"].any() and failed["n_computed_tokens"].sum() == 0
    assert lv.summary(results)["errors"] == 14
    good = samples.drop(failed.index)
    same(results.drop(failed.index), ask(lvlm, good, share=False, batch_size=1))
    with pytest.warns(UserWarning, match="14 of 24"):  # asked again, and counted again
        pd.testing.assert_frame_equal(ask(lvlm, samples, out=out), results)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"image": "grey"}, "original, white, black, none"),
     ({"prune": {"method": "fastv"}}, "give a method such as"), ({"batch_size": 0}, "at least 1"),
     ({"max_new_tokens": 0}, "at least 1"), ({"stop": "yes"}, "a list of words")],
)  # fmt: skip
def test_bad_options_raise(tiny, images, options, message):
    with pytest.raises(ValueError, match=message):
        ask(tiny, table(images[:1]), **options)
    with pytest.raises(ValueError, match="no column question"):
        ask(tiny, table(images[:1]).drop(columns="question"))


def test_pictures_in_memory_are_told_apart(tiny, images):
    from lvlm_utils.prompts import open_image

    paths = table(images[:2], (0, 20))
    memory = paths.assign(image=[opened for path in images[:2] for opened in [open_image(path)] * 6])
    same(ask(tiny, memory), ask(tiny, paths))


def test_no_samples_give_no_results(tiny, images):
    results = ask(tiny, table(images[:1]).iloc[:0])
    assert list(results.columns) == evaluate.COLUMNS and not any(lv.summary(results).values())
