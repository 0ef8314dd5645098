"""Picture + context + question -> model inputs, and which token belongs to which part of the prompt; asking a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, PreTrainedModel

from lvlm_utils.models import LVLM, bare, evaluating
from lvlm_utils.session import stated, with_groups
from lvlm_utils.token_groups import PARTITION, Rendered, TokenGroups, token_groups

Picture = Image.Image | str | Path | np.ndarray | torch.Tensor
MARK = "\ue000"  # in place of the user's text, to see what a template writes around it; no script has this character
SHOWN = 4  # prompts that print() describes
TOKENS = ("eos_token_id", "bos_token_id")  # what a generation config says about the tokens themselves
# How to turn off settings of a generation config that transformers cannot do without. None turns off all others.
OFF = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True, "length_penalty": 1.0,
       "num_assistant_tokens": 20}  # fmt: skip


@dataclass(repr=False)
class Prompt:
    """One prompt or a left-padded batch: what the model takes, and which token is what."""

    inputs: BatchFeature
    text: str | list[str]  # as the chat template renders it, one placeholder a picture
    groups: TokenGroups

    def __repr__(self) -> str:
        texts = self.text if isinstance(self.text, list) else [self.text]
        lines = [f"Prompt: {len(texts)} x {self.groups.visual.shape[1]} tokens, padding on the left"]
        for row, text in enumerate(texts[:SHOWN]):
            counts = ", ".join(f"{int(getattr(self.groups, part)[row].sum())} {part}" for part in PARTITION)
            lines.append(f"  {row}: {counts}: {text if len(text) <= 60 else f'{text[:30]} ... {text[-25:]}'!r}")
        return "\n".join(lines + [f"  and {len(texts) - SHOWN} more"] * (len(texts) > SHOWN))


# Pictures -----------------------------------------------------------------------------------------------------------
def open_image(source: Picture) -> Image.Image:
    """The picture as a person sees it, in RGB and fully decoded; what is given stays as it is.

    source: a path, a PIL image, an array or a tensor. An array is (height, width), (height, width, channels) or
    (channels, height, width) with 1, 3 or 4 channels, in uint8, uint16 or floats from 0 to 1.

    EXIF orientation is followed, 16 bits are scaled to 8, and what is transparent shows white. Of several frames
    (GIF, WebP, TIFF) it is the first, or the one that a PIL image is at. FileNotFoundError for a missing file,
    ValueError that names the picture for one that cannot be read or that may mean two things.
    """
    kind, name = type(source).__name__, source
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or f"PIL image (mode {source.mode}, {source.width} x {source.height})"
    elif isinstance(source, np.ndarray | torch.Tensor):
        name = f"{kind.lower().removeprefix('nd')} of shape {tuple(source.shape)}"
    elif not isinstance(source, str | Path):
        raise ValueError(f"A picture is a path, an image or an array, not {kind}; several of one prompt are a tuple.")
    elif str(source).startswith(("http://", "https://")):
        raise ValueError(f"{source} is a URL: download the picture and give its path.")
    elif not Path(source).is_file():
        raise FileNotFoundError(f"No picture at {source}")
    try:
        if isinstance(source, str | Path):
            with Image.open(source) as image:
                return _as_seen(image)
        return _as_seen(source if isinstance(source, Image.Image) else _from_array(source))
    except Exception as error:  # whatever a decoder raises about a file that is broken
        raise ValueError(f"{name} is not a readable picture: {_line(error)}") from error


def _as_seen(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError("it has no pixels")
    inverted = image.format == "TIFF" and image.tag_v2.get(262) == 0  # white is zero, which Pillow leaves so in 16 bits
    image = ImageOps.exif_transpose(image)
    clear = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
        raise ValueError("its transparent colour has 16 bits and its pixels 8: save it with an alpha channel")
    if image.mode.startswith(("I", "F")):  # grey of more than 8 bits, of which one value may mean transparent
        values = np.asarray(image)
        values = 65535 - values if inverted and image.mode.startswith("I;16") else values
        return Image.fromarray(np.where(values == clear, np.uint8(255), _eight_bits(values))).convert("RGB")
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _from_array(values: np.ndarray | torch.Tensor) -> Image.Image:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    if values.dtype.kind != "f" and values.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise ValueError(f"{values.dtype} is neither uint8, nor uint16, nor floats from 0 to 1")
    first, last = (values.ndim == 3 and values.shape[axis] in (1, 3, 4) for axis in (0, -1))
    if values.ndim != 2 and first == last:
        raise ValueError("it is not clearly (height, width), (height, width, channels) or (channels, height, width), "
                         "with 1, 3 or 4 channels; several of one prompt are a tuple")  # fmt: skip
    values = np.moveaxis(values, 0, 2) if first else values
    values = values[..., 0] if values.shape[2:] == (1,) else values
    return Image.fromarray(np.ascontiguousarray(_eight_bits(values)))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """uint8 from uint8, from 16 bits, or from floats from 0 to 1. ValueError for other numbers."""
    if values.size == 0:
        raise ValueError("it has no pixels")
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and not (low >= 0 and high <= 1):  # NaN is neither
        raise ValueError(f"its floats are not all from 0 to 1, but from {low} to {high}")
    if values.dtype.kind == "i" and (low < 0 or high > 65535 or 0 < high < 256):
        raise ValueError(f"its numbers from {low} to {high} are no 16 bits (0 to 65535); 8 bits belong in mode L")
    scale = 255 if values.dtype.kind == "f" else 1 if values.dtype == np.uint8 else 1 / 257
    return np.rint(values.astype(np.float64) * scale).astype(np.uint8)


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def blank(image: Image.Image, colour: str) -> Image.Image:
    """A picture of one colour ("white", "black", ...) and of the size of `image`."""
    return Image.new("RGB", image.size, colour)


def pictures_of(image: Picture | tuple[Picture, ...] | None) -> list[Image.Image]:
    return [] if image is None else [open_image(one) for one in (image if isinstance(image, tuple) else (image,))]


def _frames(video: tuple[Picture, ...] | None) -> list[Image.Image] | None:
    if video is not None and (not isinstance(video, tuple) or not video):
        raise ValueError("A video is a tuple of frames (pictures or paths), at least one; a list of them is a batch.")
    frames = pictures_of(video)
    if len(sizes := {frame.size for frame in frames}) > 1:
        raise ValueError(f"The frames of a video differ in size: {sorted(sizes)}.")
    return frames or None


# Text ---------------------------------------------------------------------------------------------------------------
def render(lvlm: LVLM, images: int, context: str, question: str, videos: int = 0) -> Rendered:
    """The chat template filled with pictures, videos, and `context` + " " + `question`.

    ValueError if the text holds a placeholder, or if the template cannot show these inputs or changes the text.
    """
    if not isinstance(context, str) or not isinstance(question, str):
        raise ValueError(f"context and question are text, not {type(context).__name__} and {type(question).__name__}.")
    processor, name = lvlm.processor, lvlm.name
    if getattr(processor, "image_token", None) is None:
        raise ValueError(f"The processor of {name} has no placeholder for a picture: build its inputs yourself.")
    if processor.chat_template is None:
        raise ValueError(f"The processor of {name} has no chat template: set processor.chat_template first.")
    user = f"{context} {question}" if context and question else context + question
    wanted = {processor.image_token: int(images)}
    if getattr(processor, "video_token", None):
        wanted[processor.video_token] = videos
    elif videos:
        raise ValueError(f"{name} takes no video: show its frames as pictures, image=(first, second, ...).")
    if written := [token for token in wanted if token in user]:
        raise ValueError(f"The text contains the placeholder {written[0]!r}: remove or rewrite it.")
    content = [{"type": "image"}] * images + [{"type": "video"}] * videos

    def fill(text: str, opened: bool = True) -> str:
        turn = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        return processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=opened)

    text, framed, closed = fill(user), fill(MARK), fill(MARK, opened=False)
    before, _, after = framed.partition(MARK)
    shown = next((t for t in (user, user.strip()) if text == before + t + after), None)
    if shown is None:
        raise ValueError("The chat template changes the user's text, so its tokens cannot be located.")
    if any(text.count(token) != number for token, number in wanted.items()):
        found = ", ".join(f"{text.count(token)} of {number} {token}" for token, number in wanted.items())
        raise ValueError(f"The chat template of {name} does not show these pictures and videos, but {found}.")
    skipped = 0 if shown == user else len(user) - len(user.lstrip())
    edges = (0, len(context), len(user) - len(question), len(user))
    edges = [len(before) + min(max(edge - skipped, 0), len(shown)) for edge in edges]
    opening = len(framed) - len(closed) if framed.startswith(closed) else 0
    answer = len(text) - (opening or len(after))
    spans = {"context": (edges[0], edges[1]), "question": (edges[2], edges[3]), "answer": (answer, len(text))}
    return Rendered(text, {name: span for name, span in spans.items() if span[0] < span[1]})


def tokenizer_options(lvlm: LVLM, text: str) -> dict:
    """Options under which the tokenizer gives offsets, and BOS exactly once (some templates already write it)."""
    if not lvlm.tokenizer.is_fast:
        raise ValueError(f"{lvlm.name} has a slow tokenizer, which gives no character offsets: load its fast version.")
    special = not (lvlm.tokenizer.bos_token and text.startswith(lvlm.tokenizer.bos_token))
    return {"add_special_tokens": special, "return_offsets_mapping": True, "return_token_type_ids": False}


def prompt(
    lvlm: LVLM, image: Picture | tuple[Picture, ...] | None | list[Picture | tuple[Picture, ...] | None] = None,
    context: str | Sequence[str] = "", question: str | Sequence[str] = "",
    video: tuple[Picture, ...] | None | list[tuple[Picture, ...] | None] = None,
) -> Prompt:  # fmt: skip
    """Model inputs and token groups of one prompt, or of a left-padded batch where any argument is a list.

    image: what `open_image` takes; a tuple of pictures shows several in one prompt, None shows none.
    context, question: the text after the pictures; the question is what the answer is about.
    video: a tuple of frames. All of them are shown, as if taken at the rate of the family's processor, or one a second.

    A single value is used for every row. Raises FileNotFoundError or ValueError for a picture that is missing or
    unreadable, ValueError for inputs that the family cannot take and for a prompt longer than `lvlm.window`.
    """
    made = assemble(lvlm, image, context, question, video)
    for length in made.inputs["attention_mask"].sum(-1).tolist():
        check_length(lvlm, length)
    return made


def check_length(lvlm: LVLM, tokens: int) -> None:
    if tokens > lvlm.window:
        raise ValueError(f"The prompt has {tokens} tokens, the window of {lvlm.name} is {lvlm.window}: shorten the "
                         "context, or use a model with a longer window.")  # fmt: skip


def assemble(lvlm: LVLM, image, context, question, video=None) -> Prompt:
    """`prompt` without its check of length."""
    arguments = {"image": image, "context": context, "question": question, "video": video}
    many = {"context": list | tuple, "question": list | tuple}  # a tuple of pictures is one prompt
    lists = {name: list(v) for name, v in arguments.items() if isinstance(v, many.get(name, list))}
    lengths = {name: len(v) for name, v in lists.items()}
    rows = next(iter(lengths.values()), 1)
    if set(lengths.values()) - {rows} or rows == 0:
        raise ValueError(f"The lists differ in length, or are empty: {lengths}.")
    images, contexts, questions, videos = (lists.get(name, [v] * rows) for name, v in arguments.items())
    pictures, frames = [pictures_of(i) for i in images], [_frames(v) for v in videos]
    rendered = [render(lvlm, len(p), c, q, int(f is not None))
                for p, c, q, f in zip(pictures, contexts, questions, frames, strict=True)]  # fmt: skip
    inputs, replaced = process(lvlm, pictures, frames, rendered)
    offsets = inputs.pop("offset_mapping")
    expanded = [r.expanded(found) for r, found in zip(rendered, replaced, strict=True)]
    groups = token_groups(lvlm, inputs, offsets, expanded).to(lvlm.device)
    texts = [r.text for r in rendered]
    return Prompt(inputs.to(lvlm.device, lvlm.dtype), texts if lists else texts[0], groups)


def process(
    lvlm: LVLM, pictures: list[list[Image.Image]], frames: list[list[Image.Image] | None], rendered: list[Rendered]
) -> tuple[BatchFeature, list[list[dict]]]:
    """Run the processor on a batch; also returns for each row what it wrote for the placeholders, in their order.

    ValueError for pictures that the processor refuses, and where it does not say what it wrote.
    """
    options: dict = {"images": pictures} if any(pictures) else {}
    if videos := [video for video in frames if video is not None]:
        processor = lvlm.processor.video_processor
        if options and "pixel_values" in processor.model_input_names:
            raise ValueError(f"{lvlm.name} has one place for pictures and videos: a batch shows either, not both.")
        rate = getattr(processor, "fps", None) or 1
        options |= {"videos": videos, "do_sample_frames": False, "video_metadata": [
            {"total_num_frames": len(v), "fps": rate, "duration": len(v) / rate, "frames_indices": list(range(len(v)))}
            for v in videos
        ]}  # fmt: skip
    tensors = {"return_tensors": "pt"}  # not for the text, whose rows are filled up below
    texts = {"padding": False, "return_tensors": None, **tokenizer_options(lvlm, rendered[0].text)}
    try:
        inputs = lvlm.processor(
            **options, text=[r.text for r in rendered], return_text_replacement_offsets=True, text_kwargs=texts,
            images_kwargs={**tensors, "input_data_format": "channels_last"}, videos_kwargs=tensors,
        )  # fmt: skip
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if len(lengths := {len(v) for v in videos}) > 1:
            raise ValueError(f"{lvlm.name} takes no videos of {sorted(lengths)} frames in one batch.") from error
        sizes = ", ".join(f"{one.width} x {one.height}" for row in pictures + videos for one in row)
        raise ValueError(f"The processor of {lvlm.name} takes no pictures of {sizes} pixels: {_line(error)}") from error
    replaced = inputs.pop("text_replacement_offsets", []) or [[]] * len(rendered)
    if [len(row) for row in replaced] != [len(p) + (f is not None) for p, f in zip(pictures, frames, strict=True)]:
        raise ValueError(f"{type(lvlm.processor).__name__} does not say what it wrote for each picture, so where these "
                         "are is not known: take a processor of transformers.")  # fmt: skip
    lengths = [len(row) for row in inputs["input_ids"]]
    for key, rows in inputs.items():  # filled up here: the user's tokenizer may have no token for it
        if isinstance(rows, list) and [len(row) for row in rows if isinstance(row, list)] == lengths:
            fill = {"input_ids": lvlm.pad_token_id, "offset_mapping": (0, 0)}.get(key, 0)
            inputs[key] = [[fill] * (max(lengths) - len(row)) + row for row in rows]
    return inputs.convert_to_tensors("pt"), replaced


# Asking -------------------------------------------------------------------------------------------------------------
def greedy_options(lvlm: LVLM | PreTrainedModel, max_new_tokens: int, **given: Any) -> dict:
    """Keywords for `model.generate` that mean plain greedy decoding, but for what is `given`.

    Whatever else the checkpoint's generation_config says is turned off, except which tokens end a text.
    """
    own = stated(bare(lvlm).generation_config)
    pad = lvlm.pad_token_id if isinstance(lvlm, LVLM) else own.get("pad_token_id")
    options = {name: OFF.get(name) for name in own if name not in TOKENS}
    options |= {"pad_token_id": pad, "max_new_tokens": max_new_tokens}
    return {**options, **stated(given.pop("generation_config", None)), **given}


@torch.inference_mode()
def generate(lvlm: LVLM, prompt: Prompt, max_new_tokens: int = 20, **given: Any) -> str | list[str] | list[list[str]]:
    """The model's continuation as text, stripped: greedy, unless `given` keywords of `generate` say otherwise.

    One text for one prompt, a list for a batch. With num_return_sequences above 1 each text becomes a list. The model
    is in eval mode meanwhile. ValueError for keywords whose results would be lost, such as output_scores.
    """
    options = greedy_options(lvlm, max_new_tokens, **given)
    if lost := [name for name in options if name.startswith(("output_", "return_dict")) and options[name]]:
        raise ValueError(f"lv.generate returns text alone, {lost[0]}=True would be lost: use lvlm.model.generate.")
    with evaluating(lvlm.model), with_groups(lvlm.model, prompt.groups):
        output = lvlm.model.generate(**prompt.inputs, **options)
    new = output[:, prompt.inputs["input_ids"].shape[1] :]
    texts = [text.strip() for text in lvlm.tokenizer.batch_decode(new, skip_special_tokens=True)]
    several = len(texts) // len(prompt.groups.visual)
    if several > 1:
        texts = [texts[at : at + several] for at in range(0, len(texts), several)]
    return texts if isinstance(prompt.text, list) else texts[0]


def forward(lvlm: LVLM, prompt: Prompt, gradients: bool = False, **given: Any) -> torch.Tensor:
    """The logits (batch, tokens, vocabulary) of one forward pass, in eval mode.

    Inside lv.prune or lv.observe the prompt's groups are passed on, which a bare `model(...)` does not do. gradients:
    whether to keep what a backward pass needs; otherwise it runs in inference mode. `given`: further keywords of the
    model, such as logits_to_keep. ValueError for keywords whose results would be lost, such as labels.
    """
    if lost := [name for name in given if name.startswith(("labels", "output_")) and given[name] is not None]:
        raise ValueError(f"lv.forward returns logits alone, {lost[0]} would be lost: use lvlm.model.")
    mode = torch.enable_grad() if gradients else torch.inference_mode()
    with evaluating(lvlm.model), with_groups(lvlm.model, prompt.groups), mode:
        return lvlm.model(**prompt.inputs, **given).logits
