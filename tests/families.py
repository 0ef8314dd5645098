"""Tiny random models of every family, and inputs made by hand: no processor, no weights, no network.

At the usual initialisation (0.02) attention hardly shows in the logits: uniform attention in its place moves them
by 1% of their spread, and a test of attention passes whatever the code does. Here every matrix is drawn with
GAIN / sqrt(inputs), so that a score q.k / sqrt(d) has a standard deviation near GAIN squared. GAIN is the largest of
1, 1.4, 1.8 and 2.2 at which attention received in float32 is within 1e-5 of float64 (6e-6; 1.3e-5 at 1.8). Uniform
attention then moves the logits by 53-95% of their spread in the decoder, by 37-68% in the vision tower.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import transformers as hf
from torch import nn

VOCABULARY = 640  # size of the vocabulary; the ids below 32 are reserved for special tokens
PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END = range(7)
FIRST_TEXT = 32
SIDE, PATCH = 28, 7  # pixels: a tile has 4 x 4 patches
FRAMES = 3
GAIN = 1.4

Pick = list[list[int]]  # for each row and picture which of the family's shapes it has
Made = tuple[dict, list[list[list[int]]]]  # tensors; for each row and picture the lengths of its runs of placeholders


@dataclass(frozen=True)
class Tiny:
    """How to build one family: its configuration from that of the text, its pictures, its videos if it has them."""

    config: Callable[[dict], hf.PreTrainedConfig]
    pictures: Callable[[Pick], Made]
    videos: Callable[[Pick], Made] | None = None
    typed: bool = False  # the model wants mm_token_type_ids


def pinpoints(side: int) -> list[list[int]]:
    """Layouts of one by two, two by one and two by two tiles of `side` pixels: their (height, width) in pixels."""
    return [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]


# Configurations -----------------------------------------------------------------------------------------------------
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
SQUARE = {**TOWER, "image_size": SIDE, "patch_size": PATCH}
GRID = {"depth": 3, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
BOTH = {"image_token_index": IMAGE, "video_token_index": VIDEO}
TILED = {"image_token_index": IMAGE, "image_grid_pinpoints": pinpoints(SIDE)}


def _clip() -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(**SQUARE)


def _dinov2(tower: type, **options) -> Callable[[dict], hf.PreTrainedConfig]:
    shape = {**SQUARE, "mlp_ratio": 2, **options}
    return lambda text: hf.LlavaConfig(
        vision_config=tower(**shape), text_config=hf.LlamaConfig(**text), image_token_index=IMAGE
    )


def _siglip() -> hf.SiglipVisionConfig:
    return hf.SiglipVisionConfig(**SQUARE, vision_use_head=False)


def _deepseek(text: dict) -> dict:
    options = {"vision_config": _siglip(), "text_config": hf.LlamaConfig(**text)}
    return {**options, "image_token_id": IMAGE, "tie_word_embeddings": False}


def _hybrid(text: dict) -> hf.PreTrainedConfig:
    sam = hf.SamVisionConfig(
        hidden_size=32, mlp_dim=48, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=16,
        output_channels=16, window_size=2, global_attn_indexes=[1],
    )  # fmt: skip
    return hf.DeepseekVLHybridConfig(**_deepseek(text), high_res_vision_config=sam)


def _internvl(text: dict) -> hf.PreTrainedConfig:
    return hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**SQUARE), text_config=hf.Qwen2Config(**text), image_token_id=IMAGE,
        image_seq_length=4, tie_word_embeddings=False,
    )  # fmt: skip


def _shuffled(config: type, vision: type) -> Callable[[dict], hf.PreTrainedConfig]:
    """Idefics3 and SmolVLM: pixel shuffle by two in each direction."""
    return lambda text: config(
        vision_config=vision(**SQUARE), text_config=hf.LlamaConfig(**text), image_token_id=IMAGE, scale_factor=2
    )


def _qwen(config: type, tower: Callable[[int], dict]) -> Callable[[dict], hf.PreTrainedConfig]:
    """The Qwen-VL kind; `tower` gives its vision options for a hidden size of the text."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}  # adds up to half a head
    return lambda text: config(
        vision_config={**GRID, **tower(text["hidden_size"])}, text_config={**text, "rope_parameters": rope},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
    )  # fmt: skip


def _video_llama_3(text: dict) -> hf.PreTrainedConfig:
    vision = hf.VideoLlama3VisionConfig(**TOWER, patch_size=PATCH)
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    return hf.VideoLlama3Config(vision_config=vision, text_config=hf.Qwen2Config(**text), **ids)


# Pictures and videos ------------------------------------------------------------------------------------------------
def _runs(pick: Pick, lengths: list[list[int]]) -> list[list[list[int]]]:
    return [[lengths[shape % len(lengths)] for shape in row] for row in pick]


def _count(pick: Pick) -> int:
    return sum(len(row) for row in pick)


def _single(pick: Pick, registers: int = 0) -> Made:
    """One tile, one token a patch, and one a register of the tower."""
    return {"pixel_values": torch.randn(_count(pick), 3, SIDE, SIDE)}, _runs(pick, [[registers + 16]])


def _two_resolutions(pick: Pick) -> Made:
    tensors, runs = _single(pick)
    return {**tensors, "high_res_pixel_values": torch.randn(_count(pick), 3, 64, 64)}, runs


# height and width of the picture, tiles (with the base one), tokens: base + rows x (columns + newline)
SHAPES = [(28, 56, 3, 16 + 4 * 9), (20, 56, 3, 16 + 2 * 9), (56, 56, 5, 16 + 8 * 9)]


def _anyres(pick: Pick) -> Made:
    """Base tile and tiles of a layout from `pinpoints`; the rows that only pad the second shape are cut off."""
    chosen = [SHAPES[shape % len(SHAPES)] for row in pick for shape in row]
    pixels = torch.zeros(len(chosen), max(tiles for *_, tiles, _ in chosen), 3, SIDE, SIDE)
    for picture, (_, _, tiles, _) in zip(pixels, chosen, strict=True):
        picture[:tiles] = torch.randn(tiles, 3, SIDE, SIDE)
    sizes = torch.tensor([shape[:2] for shape in chosen])
    return {"pixel_values": pixels, "image_sizes": sizes}, _runs(pick, [[tokens] for *_, tokens in SHAPES])


def _anyres_alone(pick: Pick) -> Made:
    """LLaVA-OneVision cuts a picture into tiles only where it is the single one of its row; else base and newline."""
    if len(pick[0]) == 1:
        return _anyres(pick)
    tensors = {
        "pixel_values": torch.randn(_count(pick), 1, 3, SIDE, SIDE),
        "image_sizes": torch.tensor([[56, 56]] * _count(pick)),
        "batch_num_images": torch.tensor([len(row) for row in pick]),
    }
    return tensors, _runs(pick, [[16 + 1]])


def _tiles(pick: Pick) -> Made:
    """InternVL: one tile, or two and a thumbnail, one after the other; four tokens each."""
    runs = _runs(pick, [[3 * 4], [4]])
    return {"pixel_values": torch.randn(sum(r[0] for row in runs for r in row) // 4, 3, SIDE, SIDE)}, runs


def _split(pick: Pick) -> Made:
    """Idefics3: tiles with text between them; rows of fewer tiles are filled with zeros."""
    runs = _runs(pick, [[4, 4, 4], [4]])
    tiles = [sum(len(picture) for picture in row) for row in runs]
    pixels = torch.zeros(len(pick), max(tiles), 3, SIDE, SIDE)
    for row, n in zip(pixels, tiles, strict=True):
        row[:n] = torch.randn(n, 3, SIDE, SIDE)
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, :, 0], dtype=torch.bool)}, runs


def _grids(kind: str, grids: list[tuple], frame_runs: bool = False, depth: int = 2, merge: int | None = None):
    """Patches in a flat list, with (time, height, width) in patches; `merge` patches a side become one token.

    `depth` frames are in one patch; `frame_runs`: text stands between the frames.
    """
    pixels, grid, sizes = {
        "image": ("pixel_values", "image_grid_thw", "image_merge_sizes"),
        "video": ("pixel_values_videos", "video_grid_thw", "video_merge_sizes"),
    }[kind]

    def make(pick: Pick) -> Made:
        chosen = [grids[shape % len(grids)] for row in pick for shape in row]
        patches = sum(t * h * w for t, h, w in chosen)
        tensors = {pixels: torch.randn(patches, 3 * depth * PATCH**2), grid: torch.tensor(chosen)}
        if merge:
            tensors[sizes] = torch.tensor([merge] * len(chosen))
        frames = [(t, h * w // (merge or 2) ** 2) for t, h, w in grids]
        return tensors, _runs(pick, [[n] * t if frame_runs else [t * n] for t, n in frames])

    return make


def _frames(a_frame: int, extra: int = 0) -> Callable[[Pick], Made]:
    """A video of FRAMES frames with `a_frame` tokens each, and `extra` tokens behind them."""
    return lambda pick: (
        {"pixel_values_videos": torch.randn(_count(pick), FRAMES, 3, SIDE, SIDE)},
        _runs(pick, [[FRAMES * a_frame + extra]]),
    )


# The second grid does not fill Qwen2.5-VL's windows of 2 x 2 tokens, the third is a single row of them.
_qwen_pictures = _grids("image", [(1, 8, 8), (1, 6, 8), (1, 4, 8)])
_qwen_videos = _grids("video", [(2, 4, 4), (2, 4, 8)])

FAMILIES = {
    "llava": Tiny(
        lambda text: hf.LlavaConfig(vision_config=_clip(), text_config=hf.LlamaConfig(**text), image_token_index=IMAGE),
        _single,
    ),
    "vipllava": Tiny(
        lambda text: hf.VipLlavaConfig(
            vision_config=_clip(), text_config=hf.LlamaConfig(**text), image_token_index=IMAGE,
            vision_feature_layer=[-2, -1],
        ),
        _single,
    ),
    "llava_next": Tiny(
        lambda text: hf.LlavaNextConfig(vision_config=_clip(), text_config=hf.LlamaConfig(**text), **TILED), _anyres
    ),
    "llava_next_video": Tiny(
        lambda text: hf.LlavaNextVideoConfig(
            vision_config=_clip(), text_config=hf.LlamaConfig(**text), **TILED, video_token_index=VIDEO
        ),
        _anyres,
        _frames(4),  # patches are pooled two by two
    ),
    "video_llava": Tiny(
        lambda text: hf.VideoLlavaConfig(vision_config=_clip(), text_config=hf.LlamaConfig(**text), **BOTH),
        _single,
        _frames(1 + 16),  # videos keep the [CLS] token of each frame
    ),
    "deepseek_vl": Tiny(lambda text: hf.DeepseekVLConfig(**_deepseek(text)), _single),
    "deepseek_vl_hybrid": Tiny(_hybrid, _two_resolutions),
    "internvl": Tiny(_internvl, _tiles),
    "qwen2_vl": Tiny(
        _qwen(hf.Qwen2VLConfig, lambda width: {"embed_dim": 32, "hidden_size": width, "mlp_ratio": 2}),
        _qwen_pictures,
        _qwen_videos,
        typed=True,
    ),
    "qwen2_5_vl": Tiny(
        _qwen(
            hf.Qwen2_5_VLConfig,
            lambda width: {
                "hidden_size": 32, "out_hidden_size": width, "intermediate_size": 48, "window_size": 28,
                "fullatt_block_indexes": [1],
            },
        ),
        _qwen_pictures,
        _qwen_videos,
        typed=True,
    ),
    "qwen3_vl": Tiny(
        _qwen(
            hf.Qwen3VLConfig,
            lambda width: {
                "hidden_size": 32, "out_hidden_size": width, "intermediate_size": 48, "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1],
            },
        ),
        _qwen_pictures,
        _grids("video", [(2, 4, 4), (2, 4, 8)], frame_runs=True),  # a time stamp before every frame
        typed=True,
    ),
    "llava_onevision": Tiny(
        lambda text: hf.LlavaOnevisionConfig(
            vision_config=_siglip(), text_config=hf.Qwen2Config(**text), **TILED, video_token_index=VIDEO
        ),
        _anyres_alone,
        _frames(4, extra=1),
    ),
    "idefics3": Tiny(_shuffled(hf.Idefics3Config, hf.Idefics3VisionConfig), _split),
    "smolvlm": Tiny(_shuffled(hf.SmolVLMConfig, hf.SmolVLMVisionConfig), _split),
    "video_llama_3": Tiny(
        _video_llama_3,
        _grids("image", [(1, 4, 4), (1, 2, 6)], depth=1, merge=1),
        _grids("video", [(2, 4, 4), (2, 4, 8)], frame_runs=True, depth=1, merge=2),
    ),
}  # fmt: skip
FAMILY_NAMES = tuple(FAMILIES)
VIDEO_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.videos)

# LLaVA with the towers of another maker: vision_config.model_type -> how to build it. Its layers have other names than
# CLIP's, positions fit pictures of any size, and registers are visual tokens that are no patches.
REGISTERS = 3
TOWERS = {
    "dinov2": Tiny(_dinov2(hf.Dinov2Config), _single),
    "dinov2_with_registers": Tiny(
        _dinov2(hf.Dinov2WithRegistersConfig, num_register_tokens=REGISTERS), partial(_single, registers=REGISTERS)
    ),
}
CASES = (*FAMILY_NAMES, *TOWERS)


# Models and inputs --------------------------------------------------------------------------------------------------
def build(
    family: str,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    window: int = 512,
    seed: int = 0,
    text: dict | None = None,
    tower: dict | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> hf.PreTrainedModel:
    """A random model of the family or tower, in eval mode, which never stops generating by itself.

    It is tiny unless told otherwise.

    text: options of the language model's config in place of those of a tiny one ("hidden_size", "vocab_size" ...).
    tower: options of the tower's config, likewise, for families with a plain tower; layouts of tiles follow its
    "image_size". device, dtype: where and as what the weights are made; on a GPU billions of them take seconds.
    """
    options = {
        "vocab_size": VOCABULARY, "hidden_size": 16 * heads, "intermediate_size": 24 * heads, "head_dim": 16,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": window, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None,
        "tie_word_embeddings": False, **(text or {}),
    }  # fmt: skip
    config = (FAMILIES | TOWERS)[family].config(options)
    if tower:
        config.vision_config.update(tower)
    if tower and hasattr(config, "image_grid_pinpoints"):
        config.image_grid_pinpoints = pinpoints(config.vision_config.image_size)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        with torch.device(device):
            model = hf.AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
        for module in model.modules():
            _draw(module)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    return model


def _draw(module: nn.Module) -> None:
    """Random weights under which every part of the model shows in the logits (norms stay as they are)."""
    if "Norm" in type(module).__name__:
        return
    for name, value in module.named_parameters(recurse=False):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and name == "weight":
            nn.init.normal_(value, std=GAIN / value[0].numel() ** 0.5)
        elif isinstance(module, nn.Embedding) and len(value) >= VOCABULARY:  # of words, not of positions
            nn.init.normal_(value)
        else:  # biases, [CLS], position embeddings, newline, layer scale
            nn.init.normal_(value, std=0.3)


def inputs(
    model: hf.PreTrainedModel, batch: int = 3, padded: bool = True, images: int = 1, seed: int = 0, video: bool = False
) -> dict:
    """Keywords for `model.forward`: text, picture, text ..., with `images` pictures (or videos) in each row.

    padded: rows of unequal text and, where the family has them, pictures of unequal shape, filled up on the left.
    Otherwise the rows are equally long. ValueError for video=True where the family takes none.
    """
    family = TOWERS.get(getattr(model.config.vision_config, "model_type", None)) or FAMILIES[model.config.model_type]
    make = family.videos if video else family.pictures
    if make is None:
        raise ValueError(f"{model.config.model_type} takes no video. These do: {', '.join(VIDEO_FAMILIES)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tensors, runs = make([[padded * row + picture for picture in range(images)] for row in range(batch)])
        rows = [
            _row(pictures, VIDEO if video else IMAGE, 4 + 3 * row * padded, 9 + 2 * row * padded)
            for row, pictures in enumerate(runs)
        ]
    length = max(len(row) for row in rows)
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    real = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    if family.typed:
        tensors["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return {"input_ids": ids, "attention_mask": real, **tensors}


def _row(pictures: list[list[int]], placeholder: int, before: int, after: int) -> list[int]:
    """Token ids: BOS, text, every run of placeholders with its brackets and two tokens of text behind it, text."""
    ids = [BOS, *_text(before)]
    for length in (length for runs in pictures for length in runs):
        ids += [VISION_START, *[placeholder] * length, VISION_END, *_text(2)]
    return ids + _text(after)


def _text(length: int) -> list[int]:
    return torch.randint(FIRST_TEXT, VOCABULARY, (length,)).tolist()
