"""Prompts: token groups by character offsets, padding, pictures, generation; attention of the last token."""

import processors
import pytest
import torch
from conftest import QUESTION, build, picture, text_of
from PIL import Image

import lvlm_utils as lv
from lvlm_utils.prompts import blank, open_image

GROUPS = ("system", "visual", "context", "question")


def words(lvlm, prompt, group, row=0):
    ids = prompt.inputs["input_ids"][row][getattr(prompt.groups, group)[row]]
    return lvlm.tokenizer.decode(ids).strip()


@pytest.mark.parametrize("context", ["", text_of(40), "Is it? Is it? An é, “quotes” and 日本 …", " spaces  "])
@pytest.mark.parametrize("question", ["Is it?", QUESTION.format("couch")])
@pytest.mark.parametrize("shown", [True, False])
def test_groups_hold_exactly_their_text(tiny, image, context, question, shown):
    prompt = lv.prompt(tiny, image if shown else None, context, question)
    assert words(tiny, prompt, "context") == context.strip()
    assert words(tiny, prompt, "question") == question
    assert words(tiny, prompt, "system").replace(" ", "") == ("<s>USER:\nASSISTANT:" if shown else "<s>USER:ASSISTANT:")
    assert prompt.groups.visual.sum() == (16 if shown else 0)
    assert prompt.text.count("<image>") == int(shown)


def test_groups_partition_the_real_tokens_of_a_padded_batch(tiny, image):
    contexts = ["", text_of(30), text_of(90)]
    batch = lv.prompt(tiny, [image, None, image], contexts, "Is it?")
    real = batch.inputs["attention_mask"].bool()
    assert torch.equal(sum(getattr(batch.groups, name).int() for name in GROUPS), real.int())
    assert torch.equal(batch.groups.text, real & ~batch.groups.visual)
    assert batch.groups.last.sum(1).tolist() == [1, 1, 1] and bool(batch.groups.last[:, -1].all())
    assert not real[0, 0] and real[2, 0]  # padding is on the left
    for row, shown in enumerate((image, None, image)):
        alone = lv.prompt(tiny, shown, contexts[row], "Is it?")
        assert torch.equal(batch.inputs["input_ids"][row][real[row]], alone.inputs["input_ids"][0])
        for name in (*GROUPS, "text"):
            assert torch.equal(getattr(batch.groups, name)[row][real[row]], getattr(alone.groups, name)[0])


def test_bos_stands_once_also_when_the_template_writes_it(tiny, image):
    model, processor = build()
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    processor.tokenizer.chat_template = processor.chat_template
    lvlm = lv.load(model, processor)
    written = lv.prompt(lvlm, image, "", "Is it?").inputs["input_ids"]
    assert torch.equal(written, lv.prompt(tiny, image, "", "Is it?").inputs["input_ids"])


@pytest.mark.parametrize("family", ["llava", "vipllava", "llava_next"])
def test_every_family_runs_and_counts_its_visual_tokens(family):
    lvlm = lv.load(*build(family=family))
    sizes = [(40, 32), (60, 28)]
    prompt = lv.prompt(lvlm, [Image.new("RGB", size, "red") for size in sizes], "A lamp.", ["Is it?", "And?"])
    with torch.inference_mode():
        logits = lvlm.model(**prompt.inputs).logits
    assert logits.shape[:2] == prompt.inputs["input_ids"].shape and bool(logits.isfinite().all())
    assert [words(lvlm, prompt, "question", row) for row in (0, 1)] == ["Is it?", "And?"]


def test_generate_returns_only_new_text_and_batches_change_nothing(tiny):
    pictures = [picture("navy"), picture("green", 2), None]
    contexts = ["", text_of(60), text_of(20)]
    batch = lv.generate(tiny, lv.prompt(tiny, pictures, contexts, "Is it?"), max_new_tokens=6)
    alone = [
        lv.generate(tiny, lv.prompt(tiny, i, c, "Is it?"), max_new_tokens=6)
        for i, c in zip(pictures, contexts, strict=True)
    ]
    assert batch == alone and all(isinstance(text, str) and "ASSISTANT" not in text for text in batch)
    assert all(text == text.strip() for text in batch) and any(batch)


def test_too_long_gives_both_numbers(image):
    lvlm = lv.load(*build(window=64))
    with pytest.raises(ValueError, match=r"has \d{3} tokens, the window of .* is 64: shorten"):
        lv.prompt(lvlm, image, text_of(100), "Is it?")


def test_bad_input_is_named(tiny, image):
    with pytest.raises(ValueError, match="placeholder"):
        lv.prompt(tiny, image, "An <image> here.", "Is it?")
    with pytest.raises(ValueError, match="differ in length"):
        lv.prompt(tiny, [image, image], ["one"], "Is it?")
    with pytest.raises(ValueError, match="are text, not float"):
        lv.prompt(tiny, image, float("nan"), "Is it?")


def test_a_tuple_of_pictures_is_one_prompt_and_a_list_is_a_batch(tiny, image, images):
    several = lv.prompt(tiny, (image, images[1]), "A lamp.", "Is it?")
    assert several.text.count("<image>") == 2 and several.groups.visual.sum() == 32
    assert several.groups.image[several.groups.visual].tolist() == [0] * 16 + [1] * 16
    batch = lv.prompt(tiny, [(image, images[1]), images[0], (), None], "A lamp.", "Is it?")
    assert [text.count("<image>") for text in batch.text] == [2, 1, 0, 0]
    assert torch.equal(batch.inputs["input_ids"][0], several.inputs["input_ids"][0])
    assert torch.equal(batch.inputs["pixel_values"][:2], several.inputs["pixel_values"])
    with pytest.raises(ValueError, match="not list; several of one prompt are a tuple"):
        lv.prompt(tiny, [[image, image]], "", "Is it?")


def with_template(change):
    """A tiny LLaVA whose chat template is changed."""
    model, processor = build()
    processor.chat_template = change(processor.chat_template)
    return lv.load(model, processor)


def test_a_template_may_strip_the_text(image):
    stripping = with_template(
        lambda old: old.replace("{{ c['text'] }}{% endfor %} ", "{{ c['text'] | trim }}{% endfor %} ")
    )
    assert "trim" in stripping.processor.chat_template
    for context, question in (
        ("  A lamp.\n", " Is it? "),
        ("", "\tIs it?  "),
        ("  A lamp. ", ""),
        ("A lamp.", "Is it?"),
    ):
        prompt = lv.prompt(stripping, image, context, question)
        assert words(stripping, prompt, "context") == context.strip()
        assert words(stripping, prompt, "question") == question.strip()
        assert words(stripping, prompt, "answer") == "ASSISTANT:"


@pytest.mark.parametrize("question", ["ASSISTANT:", "USER: ", "Is it? Is it?", " "])
def test_the_text_may_be_what_the_template_writes(tiny, image, question):
    prompt = lv.prompt(tiny, image, "Is it?", question)
    assert words(tiny, prompt, "question") == question.strip() and words(tiny, prompt, "context") == "Is it?"
    assert words(tiny, prompt, "answer") == "ASSISTANT:"


def test_a_template_that_closes_the_turn_only_leaves_the_answer_there(image):
    closing = with_template(lambda old: old.replace("{{ c['text'] }}{% endfor %} ", "{{ c['text'] }}{% endfor %} END")
                            .replace("ASSISTANT:{% endif %}", "{% endif %}"))  # fmt: skip
    prompt = lv.prompt(closing, image, "A lamp.", "Is it?")
    assert words(closing, prompt, "answer") == "END" and prompt.text.endswith("Is it? END")


def test_templates_that_cannot_be_used_say_why(tiny, image):
    shouting = with_template(lambda old: old.replace("{{ c['text'] }}", "{{ c['text'] | upper }}"))
    with pytest.raises(ValueError, match="changes the user's text"):
        lv.prompt(shouting, image, "", "Is it?")
    twice = with_template(lambda old: old.replace("{{ c['text'] }}", "{{ c['text'] }} {{ c['text'] }}"))
    with pytest.raises(ValueError, match="changes the user's text"):
        lv.prompt(twice, image, "", "Is it?")
    blind = with_template(lambda old: old.replace("<image>", ""))
    with pytest.raises(ValueError, match="does not show these pictures and videos, but 0 of 1 <image>"):
        lv.prompt(blind, image, "", "Is it?")
    with pytest.raises(ValueError, match="no chat template: set processor.chat_template"):
        lv.prompt(with_template(lambda old: None), image, "", "Is it?")
    del shouting.processor.image_token
    with pytest.raises(ValueError, match="no placeholder for a picture: build its inputs yourself"):
        lv.prompt(shouting, image, "", "Is it?")


def test_videos_that_cannot_be_shown(tiny, image):
    with pytest.raises(ValueError, match="takes no video: show its frames as pictures"):
        lv.prompt(tiny, None, "", "Is it?", video=(image, image))
    filmed = processors.lvlm("llava_next_video")
    for wrong in ([[image, image]], [()], [image]):
        with pytest.raises(ValueError, match="A video is a tuple of frames"):
            lv.prompt(filmed, None, "", "Is it?", video=wrong)
    with pytest.raises(ValueError, match="frames of a video differ in size"):
        lv.prompt(filmed, None, "", "Is it?", video=(image, image.rotate(90, expand=True)))
    with pytest.raises(ValueError, match=r"no videos of \[1, 2\] frames in one batch"):
        lv.prompt(filmed, None, "", "Is it?", video=[(image,), (image, image)])
    with pytest.raises(ValueError, match="placeholder '<video>'"):
        lv.prompt(filmed, image, "A <video> here.", "Is it?")
    blind = processors.lvlm("llava_next_video")
    blind.processor.chat_template = blind.processor.chat_template.replace("<video>", "")
    with pytest.raises(ValueError, match="1 of 1 <image>, 0 of 1 <video>"):
        lv.prompt(blind, image, "", "Is it?", video=(image, image))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "video_llama_3"])
def test_pictures_that_a_processor_refuses_are_named_by_their_size(family, image):
    lvlm = processors.lvlm(family)
    for shape in ((400, 1), (1, 300)):
        refused = r"takes no pictures of 40 x 32, {} x {} pixels: absolute aspect ratio".format(*shape)
        with pytest.raises(ValueError, match=refused):
            lv.prompt(lvlm, [image, Image.new("RGB", shape)], "", "Is it?")
    broken = processors.lvlm("llava")
    for error in (RuntimeError("no memory\nfor it"), ZeroDivisionError(), TypeError("odd"), IndexError("2")):
        def refuse(*_, error=error, **__):
            raise error

        broken.processor.image_processor.preprocess = refuse
        with pytest.raises(ValueError, match="takes no pictures of 40 x 32 pixels: ") as caught:
            lv.prompt(broken, image, "", "Is it?")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llava", "vipllava", "video_llava"])
@pytest.mark.parametrize("height", [1, 3, 4])
def test_a_picture_as_high_as_it_has_channels_is_not_turned(family, height):
    lvlm = processors.lvlm(family)
    low, high = (lv.prompt(lvlm, Image.new("RGB", (40, h), "orange"), "", "Is it?").inputs for h in (height, 30))
    (name,) = (name for name in low if name.startswith("pixel_values"))
    assert torch.equal(low[name], high[name])


@pytest.mark.parametrize("reported", [None, [], [[]], [[], [], []]])
def test_a_processor_that_does_not_say_what_it_wrote_is_refused(reported, image):
    """Where placeholders were in the text; without any there is nothing to say."""
    model, processor = build()

    class Silent(type(processor)):
        def __call__(self, **kwargs):
            made = super().__call__(**kwargs)
            made.pop("text_replacement_offsets")
            if reported is not None:
                made["text_replacement_offsets"] = reported
            return made

    processor.__class__ = Silent
    lvlm = lv.load(model, processor)
    with pytest.raises(ValueError, match="Silent does not say what it wrote for each picture"):
        lv.prompt(lvlm, [None, image], "", "Is it?")
    if not reported:
        assert lv.prompt(lvlm, None, "A lamp.", "Is it?").groups.context.any()


def test_print_of_a_prompt_says_what_it_holds(tiny, image):
    said = repr(lv.prompt(tiny, image, "A lamp.", "Is it?"))
    prompt = lv.prompt(tiny, [image, None] * 4, ["", text_of(50)] * 4, "Is it?")
    lines = repr(prompt).splitlines()
    assert len(said.splitlines()) == 2 and "16 visual" in said and "<image>" in said and "1 x " in said
    assert len(lines) == 6 and lines[0].startswith(f"Prompt: 8 x {prompt.groups.visual.shape[1]} tokens")
    assert f"0 visual, {int(prompt.groups.context[1].sum())} context" in lines[2] and "4 more" in lines[5]
    assert max(map(len, lines)) <= 140


def test_pictures_that_cannot_be_opened(tmp_path, images):
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        open_image(tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("no picture")
    with open(images[0], "rb") as file:
        (tmp_path / "cut.png").write_bytes(file.read()[:80])
    for name in ("text.png", "cut.png"):
        with pytest.raises(ValueError, match=f"{name} is not a readable picture"):
            open_image(tmp_path / name)
    with pytest.raises(ValueError, match="URL"):
        open_image("https://example.org/a.png")
    with pytest.raises(ValueError, match="not int"):
        open_image(3)


def test_pictures_become_rgb(tmp_path):
    Image.new("RGBA", (5, 4), (255, 0, 0, 9)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").mode == "RGB"
    white = blank(open_image(tmp_path / "a.png"), "white")
    assert (white.size, white.getpixel((2, 2))) == ((5, 4), (255, 255, 255))
