"""What sets one family of models apart: one record each, and nothing about a family is said anywhere else.

Another family is another record: `FAMILIES["my_llava"] = FAMILIES["llava"]`, or one changed by `dataclasses.replace`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import isqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import select_best_resolution

if TYPE_CHECKING:
    from lvlm_utils.models import LVLM

# (how many tokens, which of the batch's pictures or videos, inputs, lvlm) -> (tokens, 3): tile, row, column
Finder = Callable[[int, int, BatchFeature, "LVLM"], Tensor]
NOWHERE = torch.full((1, 3), -1)  # a newline token


@dataclass(frozen=True)
class Family:
    """One family of models. Paths begin at the model that has the language-modelling head.

    towers: name -> path of a vision tower, the main one first.
    projector: path of the module that turns what a tower gives into tokens of the language model.
    layout: "image" and "video" -> finder of the places of its tokens. A kind that is not there has no places (-1).
    patches: how many patches of the tower become one visual token, as a number or read from the config; 1 means that
        tokens are patches one by one and that the projector works token by token. None where the tower packs pictures
        of any size, or where two towers make the tokens.
    linears: number of linear layers in the projector.
    grid_positions: positions are (time, row, column), so a token's place in the prompt alone does not give them.
    unwatched: names of towers that add to the tokens of another one, with an attention that methods cannot watch.
    verified: False where nobody has run this package on the family. Its code is then the authors' own.
    """

    towers: Mapping[str, str]
    projector: str
    layout: Mapping[str, Finder] = field(default_factory=dict)
    patches: int | Callable[[PreTrainedConfig], int] | None = None
    linears: int = 2
    grid_positions: bool = False
    unwatched: tuple[str, ...] = ()
    verified: bool = True

    @property
    def square(self) -> bool:
        """Whether every picture is one square of tokens, so that their number alone tells the places (no registers)."""
        return self.layout == WHOLE


def find_family(model_type: str | None, class_names: list[str]) -> Family:
    """The record for a config's `model_type` or, where it gives none, its `architectures`.

    ValueError, with the known ones, if there is none.
    """
    for name in (model_type, *class_names):
        if name in FAMILIES:
            return FAMILIES[name]
    known, unverified = (", ".join(sorted(n for n in FAMILIES if FAMILIES[n].verified is yes)) for yes in (True, False))
    raise ValueError(f"Unknown architecture {model_type or class_names}. Known: {known}; unverified: {unverified}. A "
                     "checkpoint in its authors' own format often has a converted one (...-hf).")  # fmt: skip


def family_of(model: PreTrainedModel) -> Family:
    """The record of a model. ValueError if its architecture is not known."""
    return find_family(model.config.model_type, [type(model).__name__, *(model.config.architectures or [])])


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The language model: .layers, .rotary_emb, .embed_tokens. ValueError if the authors' code builds it otherwise."""
    decoder = model.get_decoder()
    missing = [name for name in ("layers", "rotary_emb", "embed_tokens") if not hasattr(decoder, name)]
    if missing:
        raise ValueError(f"The decoder of {type(model).__name__} cannot be used here: it has no {', '.join(missing)}.")
    return decoder


def towers_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Vision towers by name: {"vision": ...}; Video-LLaVA "image" and "video"; DeepSeek-VL 7B "vision", "high_res"."""
    return {name: model.get_submodule(path) for name, path in family_of(model).towers.items()}


def registers_of(config: PreTrainedConfig) -> int:
    """How many register tokens the vision tower of a model has between [CLS] and the patches."""
    return getattr(getattr(config, "vision_config", None), "num_register_tokens", 0)


def visual_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Token ids of the placeholders of pictures and videos, the picture's first; () where there are none."""
    ids = (getattr(model.config, name, None) for name in ("image_token_id", "video_token_id"))
    return tuple(i for i in ids if i is not None)


# Where the tokens of one picture or video are -----------------------------------------------------------------------
def _raster(tiles: int, rows: int, columns: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(tiles), torch.arange(rows), torch.arange(columns))


def _square(tokens: int, *_) -> Tensor:
    """A square tile in reading order, after [CLS] where there is one token more. Another number is no known grid."""
    side = isqrt(tokens)
    if tokens - side**2 > 1:
        side = 0
    return torch.cat([torch.tensor([[0, -1, -1]]).expand(tokens - side**2, 3), _raster(1, side, side)])


def _whole(tokens: int, number: int, inputs: BatchFeature, lvlm: "LVLM") -> Tensor:
    """A square picture. Of a tower with registers they come first, after [CLS], as tokens that are nowhere."""
    registers = registers_of(lvlm.model.config)
    square = _square(tokens - registers)
    first = int(square[0, 1] < 0)  # [CLS]
    return torch.cat([square[:first], NOWHERE.expand(registers, 3), square[first:]])


def _frames(newlines: int, tokens: int, number: int, inputs: BatchFeature, lvlm: "LVLM") -> Tensor:
    """Square frames of a video, one after the other, then `newlines`."""
    frames = inputs["pixel_values_videos"].shape[1]
    frame = _square((tokens - newlines) // frames)
    moved = [frame + torch.tensor([number, 0, 0]) for number in range(frames)]
    return torch.cat([*moved, NOWHERE.expand(newlines, 3)])


def _tiles(tokens: int, number: int, inputs: BatchFeature, lvlm: "LVLM") -> Tensor:
    """Square tiles in reading order; after them the whole picture, which is tile 0."""
    places = _video_tiles(tokens, number, inputs, lvlm)
    places[:, 0] = (places[:, 0] + 1) % (places[-1, 0] + 1)
    return places


def _video_tiles(tokens: int, number: int, inputs: BatchFeature, lvlm: "LVLM") -> Tensor:
    """A video of the same families: every frame is one tile."""
    processor = lvlm.processor
    length = processor.image_seq_length if hasattr(processor, "image_seq_length") else processor.image_seq_len
    return _raster(tokens // length, isqrt(length), isqrt(length))


def _grid(kind: str, tokens: int, number: int, inputs: BatchFeature, lvlm: "LVLM") -> Tensor:
    """Pictures of any shape: a grid (time, height, width) in patches, of which merge x merge become one token."""
    grids = inputs[f"{kind}_grid_thw"]
    merge = inputs.get(f"{kind}_merge_sizes")
    if merge is None:
        merge = torch.tensor([lvlm.model.config.vision_config.spatial_merge_size]).expand(len(grids))
    time, height, width = grids[number].tolist()
    places = _raster(time, height // int(merge[number]), width // int(merge[number]))
    if kind == "video" and "video_compression_mask" in inputs:  # VideoLLaMA3 leaves out what does not change
        lengths = (grids.prod(-1) // merge**2).tolist()
        places = places[inputs["video_compression_mask"].bool().split(lengths)[number]]
    return places


def _anyres(packing: Callable, tokens: int, number: int, inputs: BatchFeature, lvlm: "LVLM") -> Tensor:
    """The LLaVA-NeXT kind: the whole picture, then its tiles put together, unpadded, each row ended by a newline.

    The model's own packing, with the options that `packing` reads from its config, is run on features that hold their
    place: row and column in the area of all tiles. Linear features stay true where LLaVA-OneVision interpolates, and
    are rounded to the nearest patch.
    """
    config = lvlm.model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    base = _square(side**2)
    if tokens == len(base) + 1:  # LLaVA-OneVision shows one of several pictures without tiles, and one newline
        return torch.cat([base, NOWHERE])
    size = inputs["image_sizes"][number : number + 1]
    height, width = select_best_resolution(size[0].tolist(), config.image_grid_pinpoints)
    columns = width // config.vision_config.image_size
    parts = _raster(height // config.vision_config.image_size * columns, side, side)
    area = torch.stack([parts[:, 0] // columns * side + parts[:, 1], parts[:, 0] % columns * side + parts[:, 2]], -1)
    features, newline = torch.cat([base[:, 1:], area]).view(-1, side**2, 2).float(), -torch.ones(2)
    (packed,), _ = lvlm.model.model.pack_image_features([features], size, image_newline=newline, **packing(config))
    row, column = (packed[len(base) :] + 0.5).floor().long().T
    tile = 1 + row // side * columns + column // side
    found = torch.stack([tile, row % side, column % side], -1)
    return torch.cat([base, found.where(column[:, None] >= 0, NOWHERE)])


# The records --------------------------------------------------------------------------------------------------------
WHOLE = {"image": _whole}
_NEXT = {"image": partial(_anyres, lambda config: {"vision_feature_select_strategy": "default"})}
_ONEVISION = {"image": partial(_anyres, lambda config: {"vision_aspect_ratio": config.vision_aspect_ratio})}
_TILES = {"image": _tiles, "video": _video_tiles}
_GRIDS = {kind: partial(_grid, kind) for kind in ("image", "video")}

_LLAVA = Family({"vision": "model.vision_tower"}, "model.multi_modal_projector", WHOLE, patches=1)
_DEEPSEEK = Family({"vision": "model.vision_model"}, "model.aligner", WHOLE, patches=1)
_QWEN = Family({"vision": "model.visual"}, "model.visual.merger", _GRIDS, grid_positions=True)
_IDEFICS = Family({"vision": "model.vision_model"}, "model.connector", _TILES, lambda c: c.scale_factor**2, linears=1)
_VIDEO_LLAMA_2 = Family({"vision": "model.vision_tower"}, "model.mm_projector", verified=False)
_COG = Family({"vision": "model.vision"}, "model.vision.linear_proj", verified=False)

# config.model_type -> record; the name of the class where a config gives no model_type.
FAMILIES: dict[str, Family] = {
    "llava": _LLAVA, "vipllava": _LLAVA,
    "llava_next": replace(_LLAVA, layout=_NEXT),
    "llava_next_video": replace(_LLAVA, layout={**_NEXT, "video": partial(_frames, 0)}),
    "llava_onevision": replace(_LLAVA, layout={**_ONEVISION, "video": partial(_frames, 1)}),
    "video_llava": replace(_LLAVA, towers={"image": "model.image_tower", "video": "model.video_tower"},
                           layout={**WHOLE, "video": partial(_frames, 0)}),
    "internvl": replace(_LLAVA, layout=_TILES, patches=lambda config: round(config.downsample_ratio**-2)),
    "deepseek_vl": _DEEPSEEK,
    "deepseek_vl_hybrid": replace(_DEEPSEEK, towers={**_DEEPSEEK.towers, "high_res": "model.high_res_vision_model"},
                                  patches=None, unwatched=("high_res",)),
    "qwen2_vl": _QWEN, "qwen2_5_vl": _QWEN, "qwen3_vl": _QWEN,
    "idefics3": _IDEFICS, "smolvlm": _IDEFICS,
    "video_llama_3": Family({"vision": "model.vision_model"}, "model.projector", _GRIDS),
    # Not in transformers. The paths follow the authors' published code.
    **dict.fromkeys(("videollama2_mistral", "videollama2_mixtral", "videollama2_qwen2"), _VIDEO_LLAMA_2),
    "CogVLMForCausalLM": _COG, "CogVLMVideoForCausalLM": _COG,
    "qwen": Family({"vision": "transformer.visual"}, "transformer.visual.attn_pool", verified=False),
}  # fmt: skip

# vision_config.model_type of plain transformers over pictures of one size -> tokens before the patches: [CLS] or none.
# Registers (`registers_of`) are counted apart.
PLAIN_TOWERS = {"clip_vision_model": 1, "internvl_vision": 1, "dinov2": 1, "dinov2_with_registers": 1,
                "siglip_vision_model": 0, "idefics3_vision": 0, "smolvlm_vision": 0}  # fmt: skip
ANY_SIZE = {"dinov2", "dinov2_with_registers"}  # those that fit their positions to every picture without being asked
