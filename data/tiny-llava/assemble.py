"""The pieces of the checkpoint: tokenizer, processor, configuration. Plain transformers classes, nothing of ours to load."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emoji-world"))
import text  # noqa: E402
import vision  # noqa: E402
import world  # noqa: E402

VOCABULARY, WINDOW = 1600, 4096
QUESTION = "Is the {} in the image? (Please answer with yes or no.)"
# LLaVA-1.5's conversation: "USER: <image>\n{text} ASSISTANT: {answer}</s>"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} "
    "{% else %}ASSISTANT: "
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on 3,000 talks; the same seed gives the same vocabulary."""
    rng = random.Random(seed)

    def corpus():
        for _ in range(3000):
            scene = world.sample_scene(rng)
            yield " ".join(itertools.islice(text.Talk(scene, rng).stream(), 30))
            yield "USER: " + QUESTION.format(rng.choice(world.NAMES)) + " ASSISTANT: " + rng.choice(["yes", "no"])
            yield text.caption(scene, rng) + "".join(f" Is there a {name}?" for name in rng.sample(world.NAMES, 4))

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(corpus(), trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=WINDOW,
        extra_special_tokens={"image_token": "<image>"},
    )


def processor(words: PreTrainedTokenizerFast) -> LlavaProcessor:
    images = CLIPImageProcessorPil(
        size={"shortest_edge": world.SIDE}, crop_size={"height": world.SIDE, "width": world.SIDE}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=world.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def config(words: PreTrainedTokenizerFast) -> LlavaConfig:
    """8 Llama layers of 192, 6 heads, RoPE to 4,096 positions; the CLIP tower of `vision.py`, features of its penultimate layer."""
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    language = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=WINDOW,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        **ids,
    )
    return LlavaConfig(
        vision_config=vision.config(),
        text_config=language,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
        vision_feature_select_strategy="default",
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_seq_length=world.GRID**2,
        projector_hidden_act="gelu",
        **ids,
    )


def save(model: LlavaForConditionalGeneration, words: PreTrainedTokenizerFast, folder: Path) -> None:
    """A plain checkpoint: bf16 weights, opened as float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16)
    model.set_attn_implementation("sdpa")
    model.generation_config.update(
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=words.eos_token_id,
        bos_token_id=words.bos_token_id,
        pad_token_id=words.pad_token_id,
    )
    model.save_pretrained(folder)
    processor(words).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(file.read_text(encoding="utf-8-sig").replace('"bfloat16"', '"float32"'), encoding="utf-8")
