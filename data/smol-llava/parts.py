"""smol-llava put together: DINOv2-small, a projector of ours and SmolLM2-135M-Instruct as an unmodified LLaVA."""

from pathlib import Path

import store
import torch
import wheels
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)


def build(weights: Path | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model in float32 and eval mode, and its processor.

    weights: folder with the trained projector and the adapters of `model.model.language_model`, which are merged.
    None: an untrained projector, always the same one, and the language model as it came.
    """
    language, words = wheels.language()
    image = words.convert_tokens_to_ids(words.image_token)
    language.resize_token_embeddings(len(words), mean_resizing=False)  # <image> gets a row of its own
    table = language.get_input_embeddings().weight.data
    table[image] = table[:image].mean(0)  # a picture replaces it when read; when written it is never the likeliest
    tower = wheels.vision()
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = LlavaConfig(
        vision_config=tower.config, text_config=language.config, tie_word_embeddings=True,
        vision_feature_layer=-2, vision_feature_select_strategy="default", projector_hidden_act="gelu",
        image_token_id=image, image_seq_length=(wheels.SIDE // wheels.PATCH) ** 2, **ids,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)  # not from_pretrained: it would be saved under other names
    model.model.language_model.load_state_dict(language.model.state_dict())  # lm_head is tied to its embeddings
    model.model.vision_tower.load_state_dict(tower.state_dict())
    projector = load_file(weights / store.PROJECTOR) if weights else untrained(config)
    model.model.multi_modal_projector.load_state_dict(projector)
    model.generation_config = GenerationConfig(max_new_tokens=20, do_sample=False, **ids)
    if weights:
        adapted = PeftModel.from_pretrained(model.model.language_model, weights)  # in float32, as the model is
        model.model.language_model = adapted.merge_and_unload(safe_merge=True)
    return model.eval(), processor(words)


def untrained(config: LlavaConfig) -> dict[str, Tensor]:
    """A projector that keeps the size of what goes through it."""
    seen, width = config.vision_config.hidden_size, config.text_config.hidden_size
    draw = torch.Generator().manual_seed(0)
    weights = {}
    for name, inputs in (("linear_1", seen), ("linear_2", width)):
        weights[f"{name}.weight"] = torch.randn(width, inputs, generator=draw) * inputs**-0.5
        weights[f"{name}.bias"] = torch.zeros(width)
    return weights


def images() -> CLIPImageProcessorPil:
    """Pictures of 224 pixels with ImageNet's mean and deviation, as DINOv2 was trained."""
    side = wheels.SIDE
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip


def processor(words: PreTrainedTokenizerBase) -> LlavaProcessor:
    """One token a patch; SmolLM2's own conversation, in which the pictures of a turn stand before its text."""
    return LlavaProcessor(
        image_processor=images(), tokenizer=words, patch_size=wheels.PATCH, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=(store.HERE / "chat_template.jinja").read_text(encoding="utf-8"),
    )  # fmt: skip
