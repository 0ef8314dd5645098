"""smol-llava put together: DINOv2-small, a projector of ours and SmolLM2-135M-Instruct as an unmodified LLaVA."""

from pathlib import Path

import torch
import wheels
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

TEMPLATE = wheels.HERE / "chat_template.jinja"  # SmolLM2's own conversation; pictures come first in their turn
PROJECTOR, ADAPTERS = "projector.safetensors", "adapter_model.safetensors"  # what training writes, with peft's config


def build(weights: Path | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model in float32 and eval mode, and its processor.

    weights: folder with the trained projector and the adapters of `model.model.language_model`, which are merged.
    None: an untrained projector, always the same one, and the language model as it came.
    """
    language, words = wheels.language()
    image = words.convert_tokens_to_ids(words.image_token)
    language.resize_token_embeddings(len(words), mean_resizing=False)  # <image> gets a row of its own
    table = language.get_input_embeddings().weight.data
    table[image] = table[:image].mean(0)  # replaced by the picture when read; as an output never the most likely one
    tower = wheels.vision()
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = LlavaConfig(
        vision_config=tower.config, text_config=language.config, tie_word_embeddings=True,
        vision_feature_layer=-2, vision_feature_select_strategy="default", projector_hidden_act="gelu",
        image_token_id=image, image_seq_length=(wheels.SIDE // wheels.PATCH) ** 2, **ids,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.generation_config = GenerationConfig(max_new_tokens=20, do_sample=False, **ids)
    if weights is not None:
        model.model.multi_modal_projector.load_state_dict(load_file(weights / PROJECTOR))  # half precision to float32
        adapted = PeftModel.from_pretrained(model.model.language_model, weights)
        model.model.language_model = adapted.merge_and_unload(safe_merge=True)  # refuses what is not finite
    return model.eval(), processor(words)


def processor(words: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Pictures of 224 pixels with ImageNet's mean and deviation, as DINOv2 was trained; one token a patch."""
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": wheels.SIDE}, crop_size={"height": wheels.SIDE, "width": wheels.SIDE},
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=pictures, tokenizer=words, patch_size=wheels.PATCH, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=TEMPLATE.read_text(encoding="utf-8"),
    )  # fmt: skip
