"""A tiny random LLaVA with its own tokenizer, built in memory: tests need no weights and no network."""

import random

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

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
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def build(kv_heads: int = 4, family: str = "llava", window: int = 4096):
    """(model, processor): 16 patches a tile, 3 vision and 4 decoder layers; attention shows in the logits."""
    tokenizer = _tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=window, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tiles = [[28, 56], [56, 28], [56, 56]]
    config_class, model_class, options = {
        "llava": (LlavaConfig, LlavaForConditionalGeneration, {"vision_feature_layer": -2}),
        "vipllava": (VipLlavaConfig, VipLlavaForConditionalGeneration, {"vision_feature_layers": [-2, -1]}),
        "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration, {"image_grid_pinpoints": tiles}),
    }[family]
    torch.manual_seed(0)
    model = model_class(config_class(vision_config=vision, text_config=text, image_token_id=3, **options)).eval()
    with torch.no_grad():  # at the default initialisation attention barely moves the logits and every test would pass
        for parameter in model.get_decoder().layers.parameters():
            if parameter.dim() == 2:
                parameter.mul_(7)
        model.get_input_embeddings().weight.mul_(20)
        model.get_output_embeddings().weight.mul_(20)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    common = {
        "tokenizer": tokenizer, "patch_size": 7, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1, "chat_template": TEMPLATE,
    }  # fmt: skip
    if family == "llava_next":
        pictures = LlavaNextImageProcessor(image_grid_pinpoints=tiles, **size)
        return model, LlavaNextProcessor(image_processor=pictures, **common)
    return model, LlavaProcessor(image_processor=CLIPImageProcessor(**size), **common)


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
