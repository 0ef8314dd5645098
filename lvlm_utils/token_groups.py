"""Which token of a prompt belongs to what: parts of the text, found by characters, and places in the pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import isqrt

import torch
from torch.nn.functional import pad
from transformers import BatchFeature
from transformers.image_processing_utils import select_best_resolution

from lvlm_utils.models import LVLM, visual_ids


@dataclass
class TokenGroups:
    """Bool masks, and whole numbers for visual tokens, all (batch, tokens).

    system, visual, context and question partition the real (not padding) tokens. visual holds the placeholders that
    the model replaces by pictures or videos; system is what the chat template and the processor write (role names,
    newlines, BOS, brackets around pictures, tags of tiles, time stamps). text is everything real that is not visual.
    answer is the part of system that opens the assistant's turn (all behind the user's text where the template opens
    nothing); last is the final token, whose prediction is the answer.

    image counts the pictures and videos of the prompt, in its order. tile is the tile, crop or frame (a group of frames
    where the model merges them): 0 is the whole picture, where the family shows one, and 1, 2, ... its parts in reading
    order. row and column are the patch's place in its tile, after merging. All are -1 off the pictures; the last three
    also for a newline token, and row and column for [CLS]. Where LLaVA-OneVision shrinks its large area, a token has
    the place of the nearest patch.
    """

    system: torch.Tensor
    visual: torch.Tensor
    context: torch.Tensor
    question: torch.Tensor
    text: torch.Tensor
    answer: torch.Tensor
    last: torch.Tensor
    image: torch.Tensor
    tile: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor

    def to(self, device: torch.device | str) -> "TokenGroups":
        return TokenGroups(*(getattr(self, field.name).to(device) for field in fields(self)))

    def padded(self, tokens: int) -> "TokenGroups":
        """With so many tokens of padding more, on the left."""
        masks = {field.name: getattr(self, field.name) for field in fields(self)}
        return TokenGroups(*(pad(m, (tokens, 0), value=False if m.dtype == torch.bool else -1) for m in masks.values()))

    @staticmethod
    def joined(groups: Sequence["TokenGroups"]) -> "TokenGroups":
        """Prompts of equal length as one batch."""
        return TokenGroups(*(torch.cat([getattr(one, field.name) for one in groups]) for field in fields(TokenGroups)))


@dataclass
class Rendered:
    """One prompt as text, with half-open character spans of its context, question and answer (none where empty).

    `pictures` has the spans of its pictures and videos, with their kind, once their placeholders are expanded.
    """

    text: str
    spans: dict[str, tuple[int, int]]
    pictures: Sequence[tuple[str, tuple[int, int]]] = ()

    def expanded(self, replaced: Sequence[dict]) -> "Rendered":
        """The same with each placeholder replaced as the processor did: dicts of its type, text and replacement."""
        text, spans, pictures, at = self.text, self.spans, [], 0
        for one in replaced:
            start = text.index(one["text"], at)
            at, grown = start + len(one["replacement"]), len(one["replacement"]) - len(one["text"])
            text = text[:start] + one["replacement"] + text[start + len(one["text"]) :]
            spans = {name: (a + grown, b + grown) if a > start else (a, b) for name, (a, b) in spans.items()}
            pictures.append((one["type"], (start, at)))
        return Rendered(text, spans, pictures)


def inside(offsets: torch.Tensor, span: tuple[int, int] | None) -> torch.Tensor:
    """Which tokens, given as character offsets (..., tokens, 2), end inside the half-open `span`.

    A token of many tokenizers carries the space before its word, so the end of a token decides, not its start.
    """
    last = offsets[..., 1] - 1
    real = offsets[..., 1] > offsets[..., 0]
    return real & (last >= span[0]) & (last < span[1]) if span else torch.zeros_like(real)


def token_groups(lvlm: LVLM, inputs: BatchFeature, offsets: torch.Tensor, rendered: Sequence[Rendered]) -> TokenGroups:
    """Groups of a left-padded batch from the offsets (batch, tokens, 2) of its tokens in the expanded texts."""
    real = inputs["attention_mask"].bool()
    visual = torch.isin(inputs["input_ids"], torch.tensor(visual_ids(lvlm.model), dtype=torch.long)) & real
    context, question = (
        torch.stack([inside(o, r.spans.get(name)) for o, r in zip(offsets, rendered, strict=True)]) & real & ~visual
        for name in ("context", "question")
    )
    starts = torch.tensor([r.spans["answer"][0] if "answer" in r.spans else len(r.text) for r in rendered])
    last = torch.zeros_like(real)
    last[:, -1] = True
    return TokenGroups(
        real & ~visual & ~context & ~question, visual, context, question, real & ~visual,
        real & (offsets[..., 1] > starts[:, None]), last, *_places(lvlm, inputs, offsets, rendered, visual),
    )  # fmt: skip


def _places(lvlm: LVLM, inputs: BatchFeature, offsets, rendered, visual: torch.Tensor) -> torch.Tensor:
    """image, tile, row and column, (4, batch, tokens)."""
    places = torch.full((4, *visual.shape), -1)
    finders = PLACES.get(lvlm.model.config.model_type, {})
    seen = {"image": 0, "video": 0}
    for row, one in enumerate(rendered):
        for number, (kind, span) in enumerate(one.pictures):
            slots = (visual[row] & inside(offsets[row], span)).nonzero()[:, 0]
            places[0, row, slots] = number
            if kind in finders:
                found = finders[kind](lvlm, inputs, seen[kind], len(slots))
                if len(found) != len(slots):
                    raise ValueError(
                        f"The processor wrote {len(slots)} tokens for {kind} {number} of prompt {row}, {lvlm.name} "
                        f"puts {len(found)} there: the processor is not the model's."
                    )
                places[1:, row, slots] = found.T
            seen[kind] += 1
    return places


# Places of the tokens of one picture or video, (tokens, 3): tile, row, column --------------------------------------
Finder = Callable[[LVLM, BatchFeature, int, int], torch.Tensor]
NOWHERE = torch.full((1, 3), -1)  # a newline token


def _raster(tiles: int, rows: int, columns: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(tiles), torch.arange(rows), torch.arange(columns))


def _square(tokens: int) -> torch.Tensor:
    """A square tile in reading order, behind [CLS] where there is one token more. Another number is no known grid."""
    side = isqrt(tokens)
    if tokens - side**2 > 1:
        side = 0
    return torch.cat([torch.tensor([[0, -1, -1]]).expand(tokens - side**2, 3), _raster(1, side, side)])


def _one_tile(lvlm: LVLM, inputs: BatchFeature, number: int, tokens: int) -> torch.Tensor:
    return _square(tokens)


def _frames(newlines: int) -> Finder:
    """Square frames of a video, one behind the other, then `newlines`."""

    def find(lvlm: LVLM, inputs: BatchFeature, number: int, tokens: int) -> torch.Tensor:
        frames = inputs["pixel_values_videos"].shape[1]
        frame = _square((tokens - newlines) // frames)
        moved = [frame + torch.tensor([number, 0, 0]) for number in range(frames)]
        return torch.cat([*moved, NOWHERE.expand(newlines, 3)])

    return find


def _tiles(lvlm: LVLM, inputs: BatchFeature, number: int, tokens: int) -> torch.Tensor:
    """Square tiles in reading order; behind them the whole picture, which is tile 0."""
    places = _video_tiles(lvlm, inputs, number, tokens)
    places[:, 0] = (places[:, 0] + 1) % (places[-1, 0] + 1)
    return places


def _video_tiles(lvlm: LVLM, inputs: BatchFeature, number: int, tokens: int) -> torch.Tensor:
    """A video of the same families: every frame is one tile."""
    processor = lvlm.processor
    length = processor.image_seq_length if hasattr(processor, "image_seq_length") else processor.image_seq_len
    return _raster(tokens // length, isqrt(length), isqrt(length))


def _grid(kind: str) -> Finder:
    """Pictures of any shape: a grid (time, height, width) in patches, of which merge x merge become one token."""

    def find(lvlm: LVLM, inputs: BatchFeature, number: int, tokens: int) -> torch.Tensor:
        grids = inputs[f"{kind}_grid_thw"]
        merge = inputs.get(f"{kind}_merge_sizes")
        if merge is None:
            merge = torch.tensor([lvlm.model.config.vision_config.spatial_merge_size]).expand(len(grids))
        lengths = (grids.prod(-1) // merge**2).tolist()
        time, height, width = grids[number].tolist()
        places = _raster(time, height // int(merge[number]), width // int(merge[number]))
        if kind == "video" and "video_compression_mask" in inputs:  # VideoLLaMA3 leaves out what does not change
            places = places[inputs["video_compression_mask"].bool().split(lengths)[number]]
        return places

    return find


def _anyres(lvlm: LVLM, inputs: BatchFeature, number: int, tokens: int) -> torch.Tensor:
    """The LLaVA-NeXT kind: the whole picture, then its tiles put together, unpadded, each row ended by a newline.

    The model's own packing is run on features that hold their place: row and column in the area of all tiles. Linear
    features stay true where LLaVA-OneVision interpolates, and are rounded to the nearest patch.
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
    features = torch.cat([base[:, 1:], area]).view(-1, side**2, 2).float()
    options = {"vision_feature_select_strategy": "default"}
    if config.model_type == "llava_onevision":
        options = {"vision_aspect_ratio": config.vision_aspect_ratio}
    (packed,), _ = lvlm.model.model.pack_image_features([features], size, image_newline=-torch.ones(2), **options)
    row, column = (packed[len(base) :] + 0.5).floor().long().T
    tile = 1 + row // side * columns + column // side
    found = torch.stack([tile, row % side, column % side], -1)
    return torch.cat([base, found.where(column[:, None] >= 0, NOWHERE)])


_WHOLE = {"image": _one_tile}
_ANYRES = {"image": _anyres}
_TILES = {"image": _tiles, "video": _video_tiles}
_GRID = {"image": _grid("image"), "video": _grid("video")}
# config.model_type -> how its pictures and videos are laid out. What is not here has no places: all are -1.
PLACES: dict[str, dict[str, Finder]] = {
    "llava": _WHOLE,
    "vipllava": _WHOLE,
    "llava_next": _ANYRES,
    "llava_next_video": {**_ANYRES, "video": _frames(newlines=0)},
    "llava_onevision": {**_ANYRES, "video": _frames(newlines=1)},
    "video_llava": {**_WHOLE, "video": _frames(newlines=0)},
    "deepseek_vl": _WHOLE,
    "deepseek_vl_hybrid": _WHOLE,
    "internvl": _TILES,
    "idefics3": _TILES,
    "smolvlm": _TILES,
    "qwen2_vl": _GRID,
    "qwen2_5_vl": _GRID,
    "qwen3_vl": _GRID,
    "video_llama_3": _GRID,
}
