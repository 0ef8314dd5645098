"""What a row of lv.answer says: greedy decoding, failures, labels, replies, and columns that mean one thing."""

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ask, build, same, table
from PIL import Image
from processors import lvlm as family_lvlm
from small_methods import LastRow, Scattered, Unasked, Weak

import lvlm_utils as lv
from lvlm_utils.evaluate import fold, parse

MATCHING = "Is the couch in it?"


def samples_of(image, **columns) -> pd.DataFrame:
    """One row for each element of the first column."""
    rows = len(next(iter(columns.values())))
    plain = {"sample": [str(row) for row in range(rows)], "image": [image] * rows, "context": [""] * rows}
    return pd.DataFrame({**plain, "question": [MATCHING] * rows, **columns})


def says(lvlm, monkeypatch, *texts):
    """Let the model say these texts, whatever it is asked, one for each prompt in the order of a batch."""
    lines = [lvlm.tokenizer(text, add_special_tokens=False).input_ids + [lvlm.tokenizer.eos_token_id] for text in texts]
    real = type(lvlm.model).forward
    state = {"step": 0}

    def forward(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        first = kwargs["past_key_values"] is None or kwargs["past_key_values"].get_seq_length() == 0 if (
            "past_key_values" in kwargs) else True
        state["step"] = 0 if first else state["step"] + 1
        out.logits = torch.zeros_like(out.logits)
        for row in range(len(out.logits)):
            line = lines[row]
            out.logits[row, -1, line[min(state["step"], len(line) - 1)]] = 9.0
        return out

    monkeypatch.setattr(type(lvlm.model), "forward", forward)


# One way of decoding -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "setting",
    [
        {"suppress_tokens": list(range(250))}, {"begin_suppress_tokens": list(range(250))}, {"forced_eos_token_id": 2},
        {"encoder_repetition_penalty": 30.0}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 5},
        {"bad_words_ids": [[token] for token in range(4, 250)]},
        {"sequence_bias": [[[token], 50.0] for token in (9, 8)]},
        {"forced_bos_token_id": 7}, {"repetition_penalty": 50.0}, {"min_length": 900}, {"remove_invalid_values": True},
        {"exponential_decay_length_penalty": (1, 9.0)}, {"do_sample": True, "temperature": 9.0}, {"num_beams": 3},
        {"min_p": 0.9, "do_sample": True}, {"guidance_scale": 3.0}, {"renormalize_logits": True}, {"use_cache": False},
        {"max_length": 3}, {"max_time": 0.0}, {"stop_strings": ["a", "e"]}, {"num_return_sequences": 2, "num_beams": 2},
        {"watermarking_config": {"bias": 9.0}}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"},
    ],
    ids=lambda setting: next(iter(setting)),
)  # fmt: skip
@pytest.mark.parametrize("prune", [None, Weak()], ids=["plain", "pruned"])
def test_greedy_is_greedy_whatever_the_checkpoint_says(images, setting, prune):
    model, processor = build()
    lvlm, samples = lv.load(model, processor), table(images[:1], (0, 60))
    plain = ask(lvlm, samples, prune=prune)
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    for share in (True, False):
        same(ask(lvlm, samples, prune=prune, share=share), plain)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "video_llama_3", "llava_next", "smolvlm"])
def test_longer_answers_are_those_of_generate(family, images):
    """Also of text alone, after a prompt with a picture: positions on a grid are those of the prompt at hand."""
    lvlm, samples = family_lvlm(family), table(images[:2], (0, 40))
    for condition in ("original", "none"):
        found = ask(lvlm, samples, condition, max_new_tokens=12, stop=(), share=False)
        for row, raw in zip(samples.itertuples(), found["raw"], strict=True):
            prompt = lv.prompt(lvlm, None if condition == "none" else row.image, row.context, row.question)
            assert lv.generate(lvlm, prompt, max_new_tokens=12) == raw


def test_a_model_without_an_end_of_answers_answers(images):
    model, processor = build()
    lvlm = lv.load(model, processor)
    model.generation_config.eos_token_id = None
    lvlm.tokenizer.eos_token = None
    found = ask(lvlm, table(images[:1], (0,)), max_new_tokens=7)
    same(found, ask(lvlm, table(images[:1], (0,)), max_new_tokens=7, share=False))
    assert found["error"].isna().all() and (found["raw"].str.len() > 0).all()


def test_logits_that_are_no_numbers_are_an_error(images):
    lvlm, samples = lv.load(*build()), table(images[:1], (0,), ("couch", "dog"))
    with torch.no_grad():
        lvlm.model.get_output_embeddings().weight[5] = torch.nan
    with pytest.warns(UserWarning, match="2 of 2 rows failed.*no numbers"):
        assert ask(lvlm, samples)["raw"].isna().all()


# Failures are rows ---------------------------------------------------------------------------------------------------
def truncated(path):
    Image.effect_noise((300, 300), 90).convert("RGB").save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-9000])
    return Image.open(path)


def closed(path):
    image = Image.new("RGB", (9, 9))
    image.close()
    return image


def bomb(path):
    Image.new("1", (20_000, 10_000)).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("make", "family"),
    [(truncated, "llava"), (closed, "llava"), (bomb, "llava"), (lambda path: str(path.parent), "llava"),
     (lambda path: float("nan"), "llava"), (lambda path: 3, "llava"), (lambda path: "x" * 5000, "llava"),
     (lambda path: Image.new("RGB", (400, 1)), "qwen2_vl"), (lambda path: Image.new("RGB", (0, 5)), "llava")],
    ids=["truncated", "closed", "bomb", "folder", "nan", "number", "long name", "400x1", "empty"],
)  # fmt: skip
@pytest.mark.parametrize("share", [True, False])
def test_a_picture_that_fails_is_a_row(images, tmp_path, monkeypatch, make, family, share):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000_000)
    lvlm, out = family_lvlm(family), tmp_path / "out.parquet"
    samples = samples_of(images[0], question=[MATCHING, "Is the dog in it?", MATCHING])
    samples["image"] = samples["image"].astype(object)
    samples.at[1, "image"] = make(tmp_path / "bad.jpg" if make is not bomb else tmp_path / "bad.png")
    with pytest.warns(UserWarning, match="1 of 3 rows failed"):
        found = ask(lvlm, samples, out=out, share=share)
    assert found["error"].notna().tolist() == [False, True, False]
    same(found.drop(1), ask(lvlm, samples.drop(1), share=share))
    assert pd.read_parquet(out)["error"].notna().sum() == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyError, TypeError, MemoryError, AssertionError, OSError])
@pytest.mark.parametrize("where", ["forward", "processor"])
@pytest.mark.parametrize("share", [True, False])
def test_every_class_of_failure_is_a_row(images, monkeypatch, error, where, share):
    """One prompt, in a batch and about a picture with others, fails; the others are answered as without it."""
    lvlm, samples = lv.load(*build()), table(images[:1], (0, 60))
    plain = ask(lvlm, samples, share=share)
    samples.loc[4, "question"] += " Now?"
    bad = lvlm.tokenizer(samples["question"][4], add_special_tokens=False).input_ids[-5:]

    def fails(ids):
        return any(bad == row[i : i + 5] for row in ids for i in range(len(row) - 4))

    if where == "forward":
        real = type(lvlm.model).forward

        def forward(self, *args, **kwargs):
            if fails(kwargs["input_ids"].tolist()):
                raise error("out of something")
            return real(self, *args, **kwargs)

        monkeypatch.setattr(type(lvlm.model), "forward", forward)
    else:
        call = type(lvlm.tokenizer).__call__

        def tokenized(self, *args, **kwargs):
            found = call(self, *args, **kwargs)
            if fails(found["input_ids"]):
                raise error("out of something")
            return found

        monkeypatch.setattr(type(lvlm.tokenizer), "__call__", tokenized)
    with pytest.warns(UserWarning, match="1 of 6 rows failed.*out of something"):
        found = ask(lvlm, samples, share=share)
    assert found["error"].notna().tolist() == [row == 4 for row in range(6)]
    same(found.drop(4), plain.drop(4))


def test_cells_that_are_no_text_are_rows(tiny, images):
    samples = samples_of(images[0], question=[MATCHING, None, 3, MATCHING])
    samples["context"] = ["", "", "", float("nan")]
    with pytest.warns(UserWarning, match="3 of 4 rows failed"):
        found = ask(tiny, samples)
    assert found["error"].notna().tolist() == [False, True, True, True]


def test_text_and_file_names_that_are_no_unicode_end_no_run(tiny, images, tmp_path):
    """Bytes that nobody could decode are lone surrogates in Python, which parquet cannot hold."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    path.write_bytes(Path(images[0]).read_bytes())
    samples = samples_of(images[0], question=[MATCHING, "Is it?"]).astype(object)
    samples.at[0, "image"], samples.at[1, "question"] = path, "Is the \udc80 in it?"
    with pytest.warns(UserWarning, match="1 of 2 rows failed"):
        first = ask(tiny, samples, out=tmp_path / "out.parquet")
    assert first["error"].notna().tolist() == [False, True]
    with pytest.warns(UserWarning, match="1 of 2 rows failed"):
        same(ask(tiny, samples, out=tmp_path / "out.parquet"), first)


def test_an_interruption_is_no_failure(tiny, images, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tiny.model), "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        ask(tiny, table(images[:1], (0,)))


# Labels --------------------------------------------------------------------------------------------------------------
PLAIN = ["Yes", True, 1, "TRUE ", "yes", 1.0, "1", np.True_, np.int64(1), "Yes.", "y", "1.0"]
PLAIN_NO = ["No", False, 0, " false", "NO!", 0.0, "0", np.False_, np.float32(0), "n"]


@pytest.mark.parametrize("label", [*PLAIN, *PLAIN_NO], ids=repr)
def test_plain_labels_are_normalised(tiny, images, monkeypatch, label):
    says(tiny, monkeypatch, "yes", "yes")
    samples = samples_of(images[0], label=pd.Series([label, label], dtype=object))
    found = ask(tiny, samples, share=False)
    yes = any(label is one for one in PLAIN)
    assert set(found["label"]) == {"yes" if yes else "no"} and set(found["correct"]) == {yes}


@pytest.mark.parametrize("label", ["maybe", "ja", "yes or no", 2, -1, 0.5, "-1", ("yes",), "yess"], ids=repr)
def test_other_labels_of_a_yes_or_no_question_are_refused(tiny, images, label):
    samples = samples_of(images[0], label=pd.Series(["yes", label, "no"], dtype=object)).set_index(pd.Index([5, 6, 7]))
    with pytest.raises(ValueError, match="[Rr]ow 6.*label"):
        ask(tiny, samples)
    samples["question"] = "The couch is in it. (Please answer with yes or no.)"
    with pytest.raises(ValueError, match="[Rr]ow 6"):
        ask(tiny, samples)


@pytest.mark.parametrize("label", [None, float("nan"), pd.NA, "", "  "], ids=repr)
def test_a_missing_label_gives_no_correct(tiny, images, label):
    samples = samples_of(images[0], label=pd.Series(["yes", label, "no"], dtype=object))
    found = ask(tiny, samples)
    assert found["correct"].isna().tolist() == [False, True, False] and pd.isna(found["label"][1])
    assert lv.summary(found)["unlabelled"] == 1
    alone = ask(tiny, samples.drop(columns="label"))
    assert alone["correct"].isna().all() and lv.summary(alone)["unlabelled"] == 3


def test_choices(tiny, images, monkeypatch):
    says(tiny, monkeypatch, "Red, I think", "blue-green", "3.5", "-5", "green", "navy blue")
    samples = samples_of(
        images[0],
        question=["What colour?"] * 6,
        choices=[["red", "blue"], ["blue", "blue-green"], ["3", "3.5"], ["5", "-5"], ("red",), ["navy blue", "navy"]],
        label=["RED", "blue-green", "3.5", "-5", None, "navy"],
    )
    found = ask(tiny, samples, share=False, max_new_tokens=30)
    assert found["answer"].tolist()[:4] == ["red", "blue-green", "3.5", "-5"]
    assert pd.isna(found["answer"][4]) and found["answer"][5] == "navy blue"
    assert found["label"].tolist()[:4] == ["red", "blue-green", "3.5", "-5"] and pd.isna(found["label"][4])
    assert found["correct"].tolist()[:4] == [True] * 4 and pd.isna(found["correct"][4]) and not found["correct"][5]
    assert found["parsed"].tolist() == [True] * 4 + [False, True] and lv.summary(found)["unparsed"] == 1


@pytest.mark.parametrize(
    ("choices", "label", "message"),
    [(["red", "blue"], "green", "label"), ("red", "red", "choices"), ([], "red", "choices"),
     (["red", "Red."], "red", "choices"), ([None, "red"], "red", "choices"), (["red", ""], "red", "choices"),
     (3, "red", "choices")],
)  # fmt: skip
def test_choices_that_do_not_fit_are_refused(tiny, images, choices, label, message):
    samples = samples_of(images[0], choices=[["red", "blue"], choices], label=["red", label])
    with pytest.raises(ValueError, match=f"[Rr]ow 1.*{message}"):
        ask(tiny, samples)


@pytest.mark.parametrize(
    ("said", "label", "right"),
    [("A red couch.", "a red couch", True), ("“Red”", "red", True), ("red", "blue", False), ("3", 3, True),
     (unicodedata.normalize("NFD", "piñata"), "Piñata", True), ("STRASSE", "straße", True), ("-5", "5", False),
     ("a  red\ncouch", "a red couch", True), ("किताबें", "किताब", False), ("🙂", "🙁", False), ("3", 3.0, True)],
)  # fmt: skip
def test_free_answers_are_compared_as_text(tiny, images, monkeypatch, said, label, right):
    says(tiny, monkeypatch, said)
    found = ask(tiny, samples_of(images[0], question=["What is it?"], label=pd.Series([label], dtype=object)),
                max_new_tokens=60)  # fmt: skip
    assert found["correct"].tolist() == [right] and found["label"].tolist() == [label] and found["answer"][0] == said


def test_kinds_of_questions_stand_side_by_side(tiny, images, monkeypatch):
    questions = ["Is it red?", "What colour is it?", "How many are there?", "Which one?", "¿Hay un sofá?"]
    samples = samples_of(images[0], question=questions, choices=[None, None, None, ["A", "B"], None],
                         label=pd.Series([1, "red", 1, "a", "yes"], dtype=object))  # fmt: skip
    texts = ["Yes", "Red.", "1", "A", "yes"]
    order = sorted(range(5), key=lambda row: len(tiny.tokenizer(questions[row]).input_ids))  # as they come in a batch
    says(tiny, monkeypatch, *(texts[row] for row in order))
    found = ask(tiny, samples, share=False, max_new_tokens=9)
    assert found["label"].tolist() == ["yes", "red", 1, "A", "yes"]
    assert found["answer"].tolist() == ["yes", "Red.", "1", "A", "yes"] and found["correct"].all()


# Replies -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("said", "raw", "answer"),
    [("There is no dog, but yes a cat", "There is no dog, but yes a cat", None), ("yes. And more", "yes", "yes"),
     ("No, there is none", "No", "no"), ("nothing at all", "nothing at all", None), ("no-one", "no-one", None)],
)  # fmt: skip
def test_a_stop_word_counts_as_the_first_word_only(tiny, images, monkeypatch, said, raw, answer):
    says(tiny, monkeypatch, said)
    found = ask(tiny, samples_of(images[0], question=[MATCHING]), max_new_tokens=40)
    assert found["raw"].tolist() == [raw] and (found["answer"][0] == answer or pd.isna(found["answer"][0]))
    whole = ask(tiny, samples_of(images[0], question=[MATCHING]), max_new_tokens=40, stop=())
    assert whole["raw"].tolist() == [said]


def test_yes_or_no_takes_four_tokens_and_free_answers_sixty_four(tiny, images, monkeypatch):
    words = " ".join(["lamp"] * 200)
    says(tiny, monkeypatch, words, words, words)
    questions = [MATCHING, "What is it?", "Describe it."]
    found = lv.answer(tiny, samples_of(images[0], question=questions), share=False, progress=False)
    counts = [len(tiny.tokenizer(raw, add_special_tokens=False).input_ids) for raw in found["raw"]]
    assert counts == [4, 64, 64]
    options = {"stop": ["LAMP"], "max_new_tokens": 9, "progress": False, "share": False}
    stopped = lv.answer(tiny, samples_of(images[0], question=questions), **options)
    assert set(stopped["raw"]) == {"lamp"}


# Columns -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prune", [None, Weak(), LastRow()], ids=["plain", "alike", "asking"])
@pytest.mark.parametrize("share", [True, False])
def test_lengths_of_prompts_and_tokens_computed_are_two_columns(tiny, images, prune, share):
    samples, computed = table(images[:1], (0, 60)), []

    def count(module, args, kwargs):
        mask, width = kwargs["attention_mask"], kwargs["inputs_embeds"].shape[1]
        ones = torch.ones(len(kwargs["inputs_embeds"]), width)
        computed.append(int(ones.sum() if mask is None else mask[:, -width:].sum()))

    hook = tiny.decoder.register_forward_pre_hook(count, with_kwargs=True)
    try:
        found = ask(tiny, samples, prune=prune, share=share, max_new_tokens=1)
    finally:
        hook.remove()
    lengths = [lv.prompt(tiny, row.image, row.context, row.question).inputs["input_ids"].shape[1]
               for row in samples.itertuples()]  # fmt: skip
    assert found["n_prefill_tokens"].tolist() == lengths
    shared = share and not isinstance(prune, LastRow)
    assert (found["n_computed_tokens"].sum() < sum(lengths) / 2) == shared
    if not isinstance(prune, Weak) or not share:  # there the engine takes the mask of what goes on
        assert found["n_computed_tokens"].sum() == sum(computed)


@pytest.mark.parametrize(
    ("prune", "keep"),
    [(Scattered(keep=1.0), "1.0"), (Scattered(keep=1), "1"), (Scattered(keep=0.25), "0.25"), (Unasked(), None),
     (None, None), ([Scattered(keep=8), Unasked()], "8"), ([Scattered(keep=8), LastRow(keep=0.5)], "8+0.5"),
     (Scattered(keep=np.int64(3)), "3")],
)  # fmt: skip
def test_keep_is_shown_as_it_was_given(tiny, images, prune, keep):
    found = ask(tiny, table(images[:1], (20,)), prune=prune, max_new_tokens=1)
    assert found["keep"].tolist() == [keep] * 3
    options = json.loads(found["options"][0])
    assert isinstance(options, list) == isinstance(prune, list) and (prune is not None or options == {})


def test_a_failed_prompt_keeps_its_length_and_computes_nothing(images):
    lvlm = lv.load(*build(window=60))
    samples = table(images[:1], (0, 200))
    with pytest.warns(UserWarning, match="rows failed"):
        found = ask(lvlm, samples)
    failed = found[found["error"].notna()]
    assert (failed["n_prefill_tokens"] > 60).all() and (failed["n_computed_tokens"] == 0).all()


def test_rows_say_which_question_and_which_model_they_are_of(images, tmp_path):
    model, processor = build()
    for name in "ab":
        model.save_pretrained(tmp_path / name / "final")
        processor.save_pretrained(tmp_path / name / "final")
    samples = table(images[:1], (0,))
    found = pd.concat([ask(lv.load(tmp_path / name / "final"), samples) for name in "ab"])
    assert found["model"].nunique() == 1 and found["path"].nunique() == 2
    assert found["question"].tolist() == samples["question"].tolist() * 2


@pytest.mark.parametrize(
    "question, label, wanted",
    [
        ("In this picture, how many are there?", 1, 1), ("Number of dogs?", 0, 0), ("Which way: N, E or S?", "N", "N"),
        ("The letter on the shirt?", "Y", "Y"), ("Is it there?", 1, "yes"), ("Is it there?", "N", "no"),
        ("What do you say?", True, "yes"),
    ],
)  # fmt: skip
def test_letters_and_numbers_are_yes_or_no_only_where_that_is_asked(tiny, images, question, label, wanted):
    samples = pd.DataFrame([{"sample": "0", "image": images[0], "context": "", "question": question, "label": label}])
    found = ask(tiny, samples.astype({"label": object}))
    assert found["label"].tolist() == [wanted]


def test_replies_are_compared_as_they_are_meant():
    for one, other in (("It’s red", "it's red"), ("blue‑green", "Blue-green"), ("−5", "-5"), ("１２", "12")):
        assert fold(one) == fold(other)
    assert fold(".5") != fold("5") and fold("-.5") != fold(".5") and fold(".5") != fold("-5")
    assert parse(".5", ("5", "1")) is None and parse("1/2", ("1", "2")) is None and parse("5:30", ("5", "6")) is None
    assert parse("don’t know", ("don't know", "know")) == "don't know"
    assert parse("blue–green", ("blue", "blue-green")) == "blue-green"
