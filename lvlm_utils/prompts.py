"""Picture + context + question -> model inputs, and which token belongs to which part of the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from transformers import BatchFeature

from lvlm_utils.models import LVLM
from lvlm_utils.session import told
from lvlm_utils.token_groups import Rendered, TokenGroups, token_groups

Picture = Image.Image | str | Path
MARK = "\ue000"  # stands for the user's text to see what a template writes around it; no script uses this character


@dataclass
class Prompt:
    inputs: BatchFeature
    text: str | list[str]  # as the chat template renders it, one placeholder a picture
    groups: TokenGroups


def open_image(source: Picture) -> Image.Image:
    """The picture as RGB, fully decoded. FileNotFoundError for a missing file, ValueError for an unreadable one."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if not isinstance(source, str | Path):
        kind = type(source).__name__
        raise ValueError(f"A picture is a path or a PIL image, not {kind}; several of one prompt are a tuple.")
    if str(source).startswith(("http://", "https://")):
        raise ValueError(f"{source} is a URL: download the picture and give its path.")
    if not Path(source).is_file():
        raise FileNotFoundError(f"No picture at {source}")
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{source} is not a readable picture: {error}") from error


def blank(image: Image.Image, colour: str) -> Image.Image:
    """A picture of one colour ("white", "black", ...) and of the size of `image`."""
    return Image.new("RGB", image.size, colour)


def render(lvlm: LVLM, images: int, context: str, question: str, videos: int = 0) -> Rendered:
    """The chat template filled with pictures, videos, and `context` + " " + `question`.

    ValueError if the text holds a placeholder, or if the template cannot show these inputs or changes the text.
    """
    if not isinstance(context, str) or not isinstance(question, str):
        raise ValueError(f"context and question are text, not {type(context).__name__} and {type(question).__name__}.")
    processor = lvlm.processor
    if getattr(processor, "image_token", None) is None:
        raise ValueError(f"The processor of {lvlm.name} has no placeholder for a picture: build its inputs yourself.")
    if processor.chat_template is None:
        raise ValueError(f"The processor of {lvlm.name} has no chat template: set processor.chat_template first.")
    user = f"{context} {question}" if context and question else context + question
    wanted = {processor.image_token: int(images)}
    if getattr(processor, "video_token", None):
        wanted[processor.video_token] = videos
    elif videos:
        raise ValueError(f"{lvlm.name} takes no video: show its frames as pictures, image=(first, second, ...).")
    for token in wanted:
        if token in user:
            raise ValueError(f"The text contains the placeholder {token!r}: remove or rewrite it.")
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
        raise ValueError(f"The chat template of {lvlm.name} does not show these pictures and videos, but {found}.")
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
    bos = lvlm.tokenizer.bos_token
    return {
        "add_special_tokens": not (bos and text.startswith(bos)),
        "return_offsets_mapping": True,
        "return_token_type_ids": False,
    }


def prompt(
    lvlm: LVLM,
    image: Picture | tuple[Picture, ...] | None | list[Picture | tuple[Picture, ...] | None] = None,
    context: str | Sequence[str] = "",
    question: str | Sequence[str] = "",
    video: tuple[Picture, ...] | None | list[tuple[Picture, ...] | None] = None,
) -> Prompt:
    """Model inputs and token groups of one prompt, or of a left-padded batch where any argument is a list.

    A single value is used for every row. A tuple of pictures shows several in one prompt, None shows none. `video` is a
    tuple of frames, of which none is left out; they count as taken at the rate of the family's processor, or one a
    second. Raises FileNotFoundError or ValueError for a picture that is missing or unreadable, ValueError for inputs
    that the family cannot take and for a prompt longer than `lvlm.window`.
    """
    made = assemble(lvlm, image, context, question, video)
    for length in made.inputs["attention_mask"].sum(-1).tolist():
        check_length(lvlm, length)
    return made


def check_length(lvlm: LVLM, tokens: int) -> None:
    if tokens > lvlm.window:
        raise ValueError(
            f"The prompt has {tokens} tokens, the window of {lvlm.name} is {lvlm.window}: shorten the context, or use "
            "a model with a longer window."
        )


def assemble(lvlm: LVLM, image, context, question, video=None) -> Prompt:
    """`prompt` without its check of length."""
    arguments = {"image": image, "context": context, "question": question, "video": video}
    lists = {name: v for name, v in arguments.items() if isinstance(v, list)}
    lists |= {k: list(v) for k, v in arguments.items() if isinstance(v, tuple) and k in ("context", "question")}
    lengths = {name: len(v) for name, v in lists.items()}
    rows = next(iter(lengths.values()), 1)
    if set(lengths.values()) - {rows} or rows == 0:
        raise ValueError(f"The lists differ in length, or are empty: {lengths}.")
    images, contexts, questions, videos = (lists.get(name, [v] * rows) for name, v in arguments.items())
    pictures = [pictures_of(i) for i in images]
    frames = [_frames(v) for v in videos]
    rendered = [
        render(lvlm, len(p), c, q, int(f is not None))
        for p, c, q, f in zip(pictures, contexts, questions, frames, strict=True)
    ]
    inputs, replaced = process(lvlm, pictures, frames, rendered)
    offsets = inputs.pop("offset_mapping")
    expanded = [r.expanded(found) for r, found in zip(rendered, replaced, strict=True)]
    groups = token_groups(lvlm, inputs, offsets, expanded).to(lvlm.device)
    texts = [r.text for r in rendered]
    return Prompt(inputs.to(lvlm.device, lvlm.dtype), texts if lists else texts[0], groups)


def pictures_of(image: Picture | tuple[Picture, ...] | None) -> list[Image.Image]:
    if isinstance(image, tuple):
        return [open_image(one) for one in image]
    return [] if image is None else [open_image(image)]


def _frames(video: tuple[Picture, ...] | None) -> list[Image.Image] | None:
    if video is None:
        return None
    if not isinstance(video, tuple) or not video:
        raise ValueError("A video is a tuple of frames (pictures or paths), at least one; a list of them is a batch.")
    frames = [open_image(frame) for frame in video]
    if len(sizes := {frame.size for frame in frames}) > 1:
        raise ValueError(f"The frames of a video differ in size: {sorted(sizes)}.")
    return frames


def process(
    lvlm: LVLM, pictures: list[list[Image.Image]], frames: list[list[Image.Image] | None], rendered: list[Rendered]
) -> tuple[BatchFeature, list[list[dict]]]:
    """Run the processor on a batch; also returns for each row what it wrote for the placeholders, in their order."""
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
    tensors = {"return_tensors": "pt"}  # not for the text: some processors then stumble over a row without pictures
    try:
        inputs = lvlm.processor(
            **options, text=[r.text for r in rendered], padding=True, padding_side="left", images_kwargs=tensors,
            videos_kwargs=tensors, return_text_replacement_offsets=True,
            **tokenizer_options(lvlm, rendered[0].text),
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        if len(lengths := {len(v) for v in videos}) > 1:
            raise ValueError(f"{lvlm.name} takes no videos of {sorted(lengths)} frames in one batch.") from error
        raise
    replaced = inputs.pop("text_replacement_offsets", [[]] * len(rendered))
    return inputs.convert_to_tensors("pt"), replaced


def greedy_options(lvlm: LVLM, max_new_tokens: int) -> dict:
    """Options for `generate` that mean plain greedy decoding, whatever the checkpoint's generation config says."""
    return {
        "do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None,
        "repetition_penalty": 1.0, "max_new_tokens": max_new_tokens, "pad_token_id": lvlm.tokenizer.pad_token_id,
    }  # fmt: skip


@torch.inference_mode()
def generate(lvlm: LVLM, prompt: Prompt, max_new_tokens: int = 20, **kw) -> str | list[str]:
    """The model's continuation, greedy unless `kw` (options of `generate`) says otherwise: the new text, stripped."""
    with told(lvlm.model, prompt.groups):  # a pruning method may ask which token is what
        output = lvlm.model.generate(**prompt.inputs, **{**greedy_options(lvlm, max_new_tokens), **kw})
    ids = output if isinstance(output, torch.Tensor) else output.sequences
    new = ids[:, prompt.inputs["input_ids"].shape[1] :]
    texts = [text.strip() for text in lvlm.tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts if isinstance(prompt.text, list) else texts[0]


def forward(lvlm, prompt, **kw):
    with told(lvlm.model, prompt.groups):
        return lvlm.model(**prompt.inputs, **kw).logits
