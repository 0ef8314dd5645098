"""Real processor classes of every family, built offline: a tiny tokenizer, small pictures, a template in its style.

Ids and sizes are those of families.py. The templates follow the prompt formats that the families document; they differ
on purpose in what a template may do: write BOS, strip the text, close the user's turn, leave the answer unopened.
"""

import numpy as np
import torch
import transformers as hf
from families import (
    BOS,
    EOS,
    FIRST_TEXT,
    IMAGE,
    PAD,
    PATCH,
    REGISTERS,
    SIDE,
    TOWERS,
    VIDEO,
    VISION_END,
    VISION_START,
    build,
    pinpoints,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers import processors as post
from transformers.models.smolvlm import processing_smolvlm
from transformers.utils import is_torchvision_available
from transformers.video_utils import VideoMetadata

import lvlm_utils as lv

SENTENCES = [
    "The room is quiet and the light falls on the floor; two books lie on the table.",
    "What do you see on the left side? There is a red chair beside the plant.",
    "Is the couch in the image? (Please answer with yes or no.)",
    "You are a helpful language and vision assistant.",
    "USER: yes ASSISTANT: no ###Human: ###Assistant: [INST] [/INST] user assistant system Frame1: Time 0.5s:",
]
HIGH_RES = 64  # pixels, second picture of the DeepSeek-VL hybrid


# Templates ----------------------------------------------------------------------------------------------------------
def template(opening: str, image: str, closing: str, answer: str, video: str = "", head: str = "", text="c['text']"):
    """A chat template that shows all pictures and videos of a turn, then its text."""
    return (
        head + "{% for m in messages %}" + opening + "{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}" + image + "{% elif c['type'] == 'video' %}" + video + "{% endif %}{% endfor %}"
        "{% for c in m['content'] if c['type'] == 'text' %}{{ " + text + " }}{% endfor %}" + closing + "{% endfor %}"
        "{% if add_generation_prompt %}" + answer + "{% endif %}"
    )  # fmt: skip


def _chatml(image: str, video: str, opening: str = "<|im_start|>user\n", head: str = "", closing: str = "\n") -> str:
    return template(opening, image, "<|im_end|>" + closing, "<|im_start|>assistant\n", video, head)


_VICUNA = template("USER: ", "<image>\n", " ", "ASSISTANT:", "<video>\n")
_DEEPSEEK = template(
    "User: ", "<image_placeholder>", "\n\n", "Assistant:", text="c['text'] | trim",
    head="You are a helpful language and vision assistant.\n\n",
)  # fmt: skip
_QWEN = _chatml(
    "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>",
    head="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
)  # fmt: skip
TEMPLATES = {
    **dict.fromkeys(("llava", *TOWERS), _VICUNA),
    "vipllava": template("###Human: ", "<image>\n", "", "###Assistant:"),
    "llava_next": template("[INST] ", "<image>\n", " [/INST]", ""),
    "llava_next_video": _VICUNA,
    "video_llava": _VICUNA,
    "deepseek_vl": _DEEPSEEK,
    "deepseek_vl_hybrid": _DEEPSEEK,
    "internvl": _chatml("<IMG_CONTEXT>\n", "<video>\n"),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "llava_onevision": _chatml("<image>\n", "<video>\n", "<|im_start|>user ", closing=""),
    "idefics3": template("User:", "<image>", "<end_of_utterance>\n", "Assistant:", head="<|begin_of_text|>"),
    "smolvlm": template("User:", "<image>", "<end_of_utterance>\n", "Assistant:", "<video>", "<|im_start|>"),
    "video_llama_3": _chatml("<|image_pad|>\n", "<|video_pad|>\n"),
}

# Tokenizers ---------------------------------------------------------------------------------------------------------
_LLAMA = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", IMAGE: "<image>", VIDEO: "<video>"}
_QWEN_TOKENS = {
    PAD: "<|endoftext|>", BOS: "<|im_start|>", EOS: "<|im_end|>", IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>",
    VISION_START: "<|vision_start|>", VISION_END: "<|vision_end|>",
}  # fmt: skip
_TILE_TAGS = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
_IDEFICS = {
    PAD: "<pad>", BOS: "<|begin_of_text|>", EOS: "<end_of_utterance>", IMAGE: "<image>", VIDEO: "<video>",
    VISION_START: "<fake_token_around_image>", VISION_END: "<global-img>",
    **dict(enumerate(_TILE_TAGS, VISION_END + 1)),
}  # fmt: skip
SPECIAL = {
    "deepseek_vl": {**_LLAMA, IMAGE: "<image_placeholder>"},
    "deepseek_vl_hybrid": {**_LLAMA, IMAGE: "<image_placeholder>"},
    "internvl": {
        **_QWEN_TOKENS, IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>", VISION_START: "<img>", VISION_END: "</img>"
    },
    "qwen2_vl": _QWEN_TOKENS,
    "qwen2_5_vl": _QWEN_TOKENS,
    "qwen3_vl": _QWEN_TOKENS,
    "llava_onevision": {**_QWEN_TOKENS, IMAGE: "<image>", VIDEO: "<video>"},
    "idefics3": _IDEFICS,
    "smolvlm": {**_IDEFICS, BOS: "<|im_start|>"},
    "video_llama_3": _QWEN_TOKENS,
}  # fmt: skip
NAMES = {
    "deepseek_vl": {"image_token": IMAGE},
    "deepseek_vl_hybrid": {"image_token": IMAGE},
    "internvl": {
        "context_image_token": IMAGE, "video_token": VIDEO, "start_image_token": VISION_START,
        "end_image_token": VISION_END,
    },
}  # fmt: skip


def tokenizer(family: str) -> hf.PreTrainedTokenizerFast:
    """Pieces of words with their space (Llama style, BOS added) or bytes (Qwen style, no BOS), by family."""
    special = SPECIAL.get(family, _LLAMA)
    reserved = [special.get(i, f"<unused_{i}>") for i in range(FIRST_TEXT)]
    made = Tokenizer(models.BPE())
    llama = special[EOS] == "</s>"
    if llama:
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
        alphabet = [chr(code) for code in range(32, 127)] + list("\n▁é“”日本…")
    else:
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=reserved, show_progress=False
    )
    made.train_from_iterator(SENTENCES * 5, trainer)
    bos = special[BOS]
    if llama or family == "idefics3":
        made.post_processor = post.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
    names = {name: special[i] for name, i in NAMES.get(family, {}).items()}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=special[PAD], eos_token=special[EOS], extra_special_tokens=names,
        bos_token=bos if made.post_processor else None,
    )  # fmt: skip


# Pictures and videos ------------------------------------------------------------------------------------------------
_SQUARE = {"height": SIDE, "width": SIDE}
_PATCHES = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
_PIXELS = {"shortest_edge": 14 * 14, "longest_edge": 42 * 56}
_VIDEO_PIXELS = {"shortest_edge": 14 * 14, "longest_edge": 8 * 42 * 56}


class Frames:
    """Stands in for the video processors of transformers where torchvision, which they need, is not installed.

    Frames become squares of SIDE pixels and keep their order; with `merge` they are cut into patches in the order of
    the Qwen kind. The fields are those of the real classes.
    """

    def __init__(self, key: str = "pixel_values_videos", depth: int = 1, merge: int = 0, sizes: bool = False):
        self.key, self.temporal_patch_size, self.merge_size, self.sizes = key, depth, merge, sizes
        self.model_input_names, self.num_frames, self.fps = [key], None, None

    def __call__(self, videos, video_metadata=None, return_metadata=False, **_) -> hf.BatchFeature:
        squares = [[np.asarray(f.resize((SIDE, SIDE)), np.float32) / 255 - 0.5 for f in v] for v in videos]
        frames = [torch.tensor(np.stack(video)).permute(0, 3, 1, 2) for video in squares]
        data = self._patches(frames) if self.merge_size else {self.key: torch.stack(frames)}
        if self.key == "pixel_values":
            data["pixel_attention_mask"] = torch.ones_like(data["pixel_values"][:, :, 0], dtype=torch.int64)
        if return_metadata:
            data["video_metadata"] = [VideoMetadata(**metadata) for metadata in video_metadata]
        return hf.BatchFeature(data)

    def _patches(self, videos: list[torch.Tensor]) -> dict:
        depth, merge, side = self.temporal_patch_size, self.merge_size, SIDE // PATCH
        rows, grid = [], []
        for video in videos:
            video = torch.cat([video, video[-1:].expand(-len(video) % depth, -1, -1, -1)])
            cut = video.view(-1, depth, 3, side // merge, merge, PATCH, side // merge, merge, PATCH)
            rows.append(cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * depth * PATCH**2))
            grid.append([len(video) // depth, side, side])
        data = {"pixel_values_videos": torch.cat(rows), "video_grid_thw": torch.tensor(grid)}
        if self.sizes:  # VideoLLaMA3: a token that is as in the frame before is left out, but for one of a frame
            data["video_merge_sizes"] = torch.full((len(grid),), merge)
            tokens = [
                video.view(time, (side // merge) ** 2, -1) for video, (time, _, _) in zip(rows, grid, strict=True)
            ]
            new = [torch.cat([one[:1] != one[:1] + 1, one[1:] != one[:-1]]).any(-1) for one in tokens]
            for one in new:
                one[:, 0] |= ~one.any(-1)
            data["video_compression_mask"] = torch.cat([one.flatten() for one in new])
        return data


def _videos(real: str, options: dict, **stand_in):
    if not is_torchvision_available():
        return Frames(**stand_in)
    return getattr(hf, real)(**options, do_sample_frames=False)


def _real(name: str) -> type[hf.ProcessorMixin]:
    """The family's class; without torchvision it takes the stand-in, whose class it would not accept."""
    found = getattr(hf, name)
    if is_torchvision_available():
        return found
    return type(name, (found,), {"check_argument_for_proper_class": lambda *_: None})


def _llava(
    name: str, pictures: hf.BaseImageProcessor, patch: int = PATCH, registers: int = 0, **common
) -> hf.ProcessorMixin:
    return _real(name)(
        image_processor=pictures, patch_size=patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1 + registers, **common,
    )  # fmt: skip


def _build(family: str, common: dict, side: int, patch: int) -> hf.ProcessorMixin:
    """`common` holds the tokenizer and the chat template."""
    crop = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    anyres = {"image_grid_pinpoints": pinpoints(side), **crop}
    split = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    if family in ("llava", "vipllava", *TOWERS):
        registers = REGISTERS if family == "dinov2_with_registers" else 0
        return _llava("LlavaProcessor", hf.CLIPImageProcessor(**crop), patch, registers, **common)
    if family == "llava_next":
        return _llava("LlavaNextProcessor", hf.LlavaNextImageProcessor(**anyres), patch, **common)
    if (side, patch) != (SIDE, PATCH):
        raise ValueError(f"Other sizes are made for llava, vipllava and llava_next, not for {family}.")
    if family == "llava_next_video":
        common["video_processor"] = _videos("LlavaNextVideoVideoProcessor", crop)
        return _llava("LlavaNextVideoProcessor", hf.LlavaNextImageProcessor(**anyres), **common)
    if family == "video_llava":
        common["video_processor"] = _videos("VideoLlavaVideoProcessor", crop)
        return _llava("VideoLlavaProcessor", hf.VideoLlavaImageProcessor(**crop), **common)
    if family == "deepseek_vl":
        return hf.DeepseekVLProcessor(hf.DeepseekVLImageProcessor(size=_SQUARE), num_image_tokens=16, **common)
    if family == "deepseek_vl_hybrid":
        high = {"height": HIGH_RES, "width": HIGH_RES}
        pictures = hf.DeepseekVLHybridImageProcessor(size=_SQUARE, high_res_size=high)
        return hf.DeepseekVLHybridProcessor(pictures, num_image_tokens=16, **common)
    if family == "internvl":
        common["video_processor"] = _videos("InternVLVideoProcessor", {"size": _SQUARE})
        pictures = hf.GotOcr2ImageProcessor(size=_SQUARE, crop_to_patches=True, max_patches=4)
        return _real("InternVLProcessor")(pictures, image_seq_length=4, **common)
    if family == "llava_onevision":
        common["video_processor"] = _videos("LlavaOnevisionVideoProcessor", {"size": _SQUARE})
        pictures = hf.LlavaOnevisionImageProcessor(size=_SQUARE, image_grid_pinpoints=pinpoints(SIDE))
        options = {"num_image_tokens": (SIDE // PATCH) ** 2, "vision_feature_select_strategy": "full"}
        return _real("LlavaOnevisionProcessor")(pictures, **options, **common)
    if family == "idefics3":
        return hf.Idefics3Processor(hf.Idefics3ImageProcessor(**split), image_seq_len=4, **common)
    if family == "smolvlm":
        if processing_smolvlm.num2words is None:  # it only writes in words how many frames there are
            processing_smolvlm.num2words = str
        frames = {**split, "size": {"longest_edge": SIDE}}
        common["video_processor"] = _videos("SmolVLMVideoProcessor", frames, key="pixel_values")
        return _real("SmolVLMProcessor")(hf.SmolVLMImageProcessor(**split), image_seq_len=4, **common)
    if family == "video_llama_3":
        options = {"patch_size": PATCH, "merge_size": 2, "size": _VIDEO_PIXELS}
        common["video_processor"] = _videos("VideoLlama3VideoProcessor", options, merge=2, sizes=True)
        pictures = hf.VideoLlama3ImageProcessor(patch_size=PATCH, merge_size=1, size=_PIXELS)
        return _real("VideoLlama3Processor")(pictures, **common)
    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    videos = "Qwen3VLVideoProcessor" if family == "qwen3_vl" else "Qwen2VLVideoProcessor"
    common["video_processor"] = _videos(videos, {**_PATCHES, "size": _VIDEO_PIXELS}, depth=2, merge=2)
    return _real(f"{kind}Processor")(hf.Qwen2VLImageProcessor(**_PATCHES, size=_PIXELS), **common)


def processor(family: str, side: int = SIDE, patch: int = PATCH, **text) -> hf.ProcessorMixin:
    """The family's processor, for models of families.build.

    side, patch: of its tiles, in pixels. text: `tokenizer` and `chat_template`, in place of those of the family.
    """
    common = text or {"tokenizer": tokenizer(family), "chat_template": TEMPLATES[family]}
    return _build(family, common, side, patch)


def lvlm(family: str, window: int = 2048) -> "lv.models.LVLM":
    """A tiny model of the family with its processor."""
    return lv.load(build(family, window=window), processor(family), device="cpu")
