"""Where the parts of a large vision-language model (LVLM) are: a small record for each family, and what it finds."""

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """Paths from the model (the one with the language-modelling head) to its vision towers and to its projector."""

    towers: dict[str, str]
    projector: str
    grid_positions: bool = False  # positions are (time, row, column): the place in the prompt alone does not give them


_LLAVA = Family({"vision": "model.vision_tower"}, "model.multi_modal_projector")
_QWEN = Family({"vision": "model.visual"}, "model.visual.merger", grid_positions=True)
_IDEFICS = Family({"vision": "model.vision_model"}, "model.connector")
_DEEPSEEK = Family({"vision": "model.vision_model"}, "model.aligner")

# config.model_type -> record. Another family is another record.
FAMILIES: dict[str, Family] = {
    "llava": _LLAVA,
    "vipllava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_next_video": _LLAVA,
    "llava_onevision": _LLAVA,
    "internvl": _LLAVA,
    "video_llava": Family({"image": "model.image_tower", "video": "model.video_tower"}, _LLAVA.projector),
    "deepseek_vl": _DEEPSEEK,
    "deepseek_vl_hybrid": Family({**_DEEPSEEK.towers, "high_res": "model.high_res_vision_model"}, _DEEPSEEK.projector),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "video_llama_3": Family({"vision": "model.vision_model"}, "model.projector"),
}

# What transformers does not have, by the authors' model_type or class name (CogVLM gives no model_type). Unverified:
# the paths follow their published code, but nobody has run this package on it.
REMOTE: dict[str, Family] = {
    "videollama2.*": Family({"vision": "model.vision_tower"}, "model.mm_projector"),
    "cogvlm.*": Family({"vision": "model.vision"}, "model.vision.linear_proj"),
    "qwen|qwenlmheadmodel": Family({"vision": "transformer.visual"}, "transformer.visual.attn_pool"),
}


def find_family(model_type: str | None, class_names: list[str]) -> Family:
    """The record for a config's `model_type` and `architectures`. ValueError, with the known ones, if there is none."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    for pattern, family in REMOTE.items():
        if any(re.fullmatch(pattern, name, re.IGNORECASE) for name in (model_type or "", *class_names)):
            return family
    raise ValueError(
        f"Unknown architecture {model_type or class_names}. Known: {', '.join(sorted(FAMILIES))}; as remote code also "
        "VideoLLaMA2, CogVLM, Qwen-VL. A checkpoint in its authors' own format often has a converted one (...-hf)."
    )


def family_of(model: PreTrainedModel) -> Family:
    """The record of a model. ValueError if its architecture is not known."""
    return find_family(model.config.model_type, [type(model).__name__, *(model.config.architectures or [])])


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The language model: .layers, .rotary_emb, .embed_tokens. ValueError if remote code builds it in another way."""
    decoder = model.get_decoder()
    missing = [name for name in ("layers", "rotary_emb", "embed_tokens") if not hasattr(decoder, name)]
    if missing:
        raise ValueError(f"The decoder of {type(model).__name__} cannot be used here: it has no {', '.join(missing)}.")
    return decoder


def towers_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Vision towers by name: {"vision": ...}; Video-LLaVA "image" and "video"; DeepSeek-VL 7B "vision", "high_res"."""
    return {name: model.get_submodule(path) for name, path in family_of(model).towers.items()}


def visual_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Token ids of the placeholders of pictures and videos, the picture's first; () where there are none."""
    ids = [getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")]
    return tuple(i for i in ids if i is not None)
