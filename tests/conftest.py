"""A tiny random LLaVA with a tokenizer of bytes, built in memory: tests need no weights and no network."""

import random

import families
import numpy as np
import pandas as pd
import processors
import pytest
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers import processors as post
from transformers import PreTrainedTokenizerFast

import lvlm_utils as lv

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: "
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %} "
    "{% else %}ASSISTANT: {% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SENTENCES = [
    "The room is quiet and the light falls on the floor.",
    "A lamp stands near the window, and two books lie on the table.",
    "What do you see on the left side? There is a red chair beside the plant.",
    "It looks like a calm afternoon in a small town by the sea.",
    "Is the couch in the image? (Please answer with yes or no.)",
]
QUESTION = "Is the {} in the image? (Please answer with yes or no.)"


def text_of(words: int, seed: int = 0) -> str:
    """Nested: the text of more words begins with the text of fewer, at the same seed."""
    pick = random.Random(seed)
    text = " ".join(pick.choice(SENTENCES[:4]) for _ in range(words // 8 + 1))
    return " ".join(text.split()[:words])


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
    )  # fmt: skip
    tokenizer.train_from_iterator([f"USER: {s} ASSISTANT: yes ASSISTANT: no" for s in SENTENCES] * 5, trainer)
    tokenizer.post_processor = post.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def build(kv_heads: int = 4, family: str = "llava", window: int = 4096):
    """(model, processor): 16 patches a tile, 3 vision and 4 decoder layers; attention shows in the logits."""
    model = families.build(family, kv_heads=kv_heads, window=window)
    model.generation_config.eos_token_id = families.EOS
    return model, processors.processor(family, tokenizer=_tokenizer(), chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def tiny() -> "lv.models.LVLM":
    return lv.load(*build(), device="cpu")


@pytest.fixture(scope="session")
def tiny_gqa() -> "lv.models.LVLM":
    return lv.load(*build(kv_heads=2), device="cpu")


def picture(colour: str, mark: int = 8) -> Image.Image:
    image = Image.new("RGB", (40, 32), colour)
    ImageDraw.Draw(image).rectangle((mark, 6, mark + 12, 20), fill="yellow")
    return image


@pytest.fixture
def image() -> Image.Image:
    return picture("navy")


@pytest.fixture
def images(tmp_path) -> list[str]:
    """Paths of four different pictures."""
    paths = []
    for number, colour in enumerate(("navy", "darkred", "green", "grey")):
        paths.append(str(tmp_path / f"{number}.png"))
        picture(colour, 4 * number).save(paths[-1])
    return paths


def table(images, lengths=(0, 60, 200), objects=("couch", "dog", "old lamp")) -> pd.DataFrame:
    rows = []
    for number, image in enumerate(images):
        for words in lengths:
            for k, name in enumerate(objects):
                rows.append({
                    "sample": f"{number}-{k}", "image_id": str(number), "image": image, "group": str(words),
                    "length": words, "context": text_of(words, number), "question": QUESTION.format(name),
                    "label": ("yes", "no")[k % 2], "target": name, "kind": "present", "size": None,
                })  # fmt: skip
    return pd.DataFrame(rows)


def ask(lvlm, samples, image="original", **kw) -> pd.DataFrame:
    return lv.answer(lvlm, samples, image, **{"max_new_tokens": 5, "progress": False, **kw})


def same(left: pd.DataFrame, right: pd.DataFrame) -> None:
    assert left["raw"].tolist() == right["raw"].tolist()
    np.testing.assert_allclose(left["margin"], right["margin"], atol=1e-4, rtol=0)
