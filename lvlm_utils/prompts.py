"""Picture + context + question -> model inputs, and which token belongs to which part of the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from transformers import BatchFeature

from lvlm_utils.models import LVLM

Picture = Image.Image | str | Path


@dataclass
class TokenGroups:
    """Bool masks (batch, tokens). system, visual, context and question partition the real (not padding) tokens.

    system is the chat template (role names, newline, BOS); text is everything real that is not visual; last is the
    token whose prediction is the answer (it also belongs to system).
    """

    system: torch.Tensor
    visual: torch.Tensor
    context: torch.Tensor
    question: torch.Tensor
    text: torch.Tensor
    last: torch.Tensor


@dataclass
class Prompt:
    inputs: BatchFeature
    text: str | list[str]  # as the chat template renders it, one placeholder a picture
    groups: TokenGroups


@dataclass
class Rendered:
    """One prompt as text, with the half-open character spans of its context and question (None where empty)."""

    text: str
    spans: dict[str, tuple[int, int]]

    def expanded(self, image_token: str, replacement: str | None) -> "Rendered":
        """The same with the picture's placeholder repeated as the processor does; spans moved along."""
        if replacement is None:
            return self
        at = self.text.index(image_token)
        grown = len(replacement) - len(image_token)
        moved = {k: (a + grown, b + grown) if a > at else (a, b) for k, (a, b) in self.spans.items()}
        return Rendered(self.text[:at] + replacement + self.text[at + len(image_token) :], moved)


def open_image(source: Picture) -> Image.Image:
    """The picture as RGB, fully decoded. FileNotFoundError for a missing file, ValueError for an unreadable one."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if not isinstance(source, str | Path):
        raise ValueError(f"A picture is a path or a PIL image, not {type(source).__name__}.")
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


def render(lvlm: LVLM, has_image: bool, context: str, question: str) -> Rendered:
    """The chat template filled with `context` + " " + `question`. ValueError if the text holds the placeholder."""
    if not isinstance(context, str) or not isinstance(question, str):
        raise ValueError(f"context and question are text, not {type(context).__name__} and {type(question).__name__}.")
    user = f"{context} {question}" if context and question else context + question
    if lvlm.processor.image_token in user:
        raise ValueError(f"The text contains the placeholder {lvlm.processor.image_token!r}: remove or rewrite it.")
    if lvlm.processor.chat_template is None:
        raise ValueError(f"The processor of {lvlm.name} has no chat template: set processor.chat_template first.")
    content = [{"type": "image"}] * has_image + [{"type": "text", "text": user}]
    text = lvlm.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    start = text.rfind(user)
    if start < 0:
        raise ValueError("The chat template changes the user's text, so its tokens cannot be located.")
    end = start + len(user)
    spans = {"context": (start, start + len(context)), "question": (end - len(question), end)}
    return Rendered(text, {name: span for name, span in spans.items() if span[0] < span[1]})


def inside(offsets: torch.Tensor, span: tuple[int, int] | None) -> torch.Tensor:
    """Which tokens, given as character offsets (..., tokens, 2), end inside the half-open `span`.

    A token of many tokenizers carries the space before its word, so the end of a token decides, not its start.
    """
    last = offsets[..., 1] - 1
    real = offsets[..., 1] > offsets[..., 0]
    return real & (last >= span[0]) & (last < span[1]) if span else torch.zeros_like(real)


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
    image: Picture | None | Sequence[Picture | None],
    context: str | Sequence[str] = "",
    question: str | Sequence[str] = "",
) -> Prompt:
    """Model inputs and token groups of one prompt, or of a left-padded batch where any argument is a list.

    A single value is used for every row. `image=None` gives a text-only prompt. Raises FileNotFoundError or ValueError
    for a picture that is missing or unreadable, ValueError for a prompt longer than `lvlm.window`.
    """
    made = assemble(lvlm, image, context, question)
    for length in made.inputs["attention_mask"].sum(-1).tolist():
        check_length(lvlm, length)
    return made


def check_length(lvlm: LVLM, tokens: int) -> None:
    if tokens > lvlm.window:
        raise ValueError(
            f"The prompt has {tokens} tokens, the window of {lvlm.name} is {lvlm.window}: shorten the context, or use "
            "a model with a longer window."
        )


def assemble(lvlm: LVLM, image, context, question) -> Prompt:
    """`prompt` without its check of length."""
    lists = [v for v in (image, context, question) if isinstance(v, list | tuple)]
    rows = len(lists[0]) if lists else 1
    if any(len(v) != rows for v in lists) or rows == 0:
        raise ValueError(f"image, context and question differ in length, or are empty: {[len(v) for v in lists]}.")
    images, contexts, questions = (
        list(v) if isinstance(v, list | tuple) else [v] * rows for v in (image, context, question)
    )
    rendered = [render(lvlm, i is not None, c, q) for i, c, q in zip(images, contexts, questions, strict=True)]
    inputs, expanded = _process(lvlm, images, rendered)
    offsets = inputs.pop("offset_mapping")
    groups = _groups(lvlm, inputs, offsets, expanded)
    texts = [r.text for r in rendered]
    return Prompt(inputs.to(lvlm.device, lvlm.dtype), texts if lists else texts[0], groups)


def _process(lvlm: LVLM, images: list, rendered: list[Rendered]) -> tuple[BatchFeature, list[Rendered]]:
    """Run the processor on a batch; also returns the texts as it expanded them (one picture a row, or none)."""
    pictures = [open_image(i) for i in images if i is not None]
    inputs = lvlm.processor(
        images=pictures or None, text=[r.text for r in rendered], padding=True, padding_side="left",
        return_text_replacement_offsets=True, return_tensors="pt", **tokenizer_options(lvlm, rendered[0].text),
    )  # fmt: skip
    replaced = inputs.pop("text_replacement_offsets")
    replacements = [r[0]["replacement"] if r else None for r in replaced]
    token = lvlm.processor.image_token
    return inputs, [r.expanded(token, new) for r, new in zip(rendered, replacements, strict=True)]


def _groups(lvlm: LVLM, inputs: BatchFeature, offsets: torch.Tensor, rendered: list[Rendered]) -> TokenGroups:
    real = inputs["attention_mask"].bool()
    visual = (inputs["input_ids"] == lvlm.image_token_id) & real
    parts = {
        name: torch.stack([inside(o, r.spans.get(name)) for o, r in zip(offsets, rendered, strict=True)]) & real
        for name in ("context", "question")
    }
    last = torch.zeros_like(real)
    last[:, -1] = True
    system = real & ~visual & ~parts["context"] & ~parts["question"]
    masks = {"system": system, "visual": visual, **parts, "text": real & ~visual, "last": last}
    return TokenGroups(**{name: mask.to(lvlm.device) for name, mask in masks.items()})


@dataclass
class Encoded:
    """Prompts about one picture, tokenised in full, one by one; `extras` are the picture's tensors for the model."""

    ids: list[list[int]]
    n_context: list[int]
    extras: dict


def encode(lvlm: LVLM, image: Picture | None, rendered: Sequence[Rendered]) -> Encoded:
    """Tokenise many rendered prompts about one picture; the picture is processed once. No check of length."""
    inputs, first = _process(lvlm, [image], rendered[:1])
    token, replacement = lvlm.processor.image_token, None
    if image is not None:
        grown = len(first[0].text) - len(rendered[0].text) + len(token)
        at = rendered[0].text.index(token)
        replacement = first[0].text[at : at + grown]
    expanded = [r.expanded(token, replacement) for r in rendered]
    batch = lvlm.tokenizer([r.text for r in expanded], **tokenizer_options(lvlm, rendered[0].text))
    n_context = [
        int(inside(torch.tensor(o), r.spans.get("context")).sum())
        for o, r in zip(batch["offset_mapping"], expanded, strict=True)
    ]
    not_of_picture = ("input_ids", "attention_mask", "offset_mapping")
    extras = {k: v for k, v in inputs.to(lvlm.device, lvlm.dtype).items() if k not in not_of_picture}
    return Encoded(batch["input_ids"], n_context, extras)


def greedy_options(lvlm: LVLM, max_new_tokens: int) -> dict:
    """Options for `generate` that mean plain greedy decoding, whatever the checkpoint's generation config says."""
    return {
        "do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None,
        "repetition_penalty": 1.0, "max_new_tokens": max_new_tokens, "pad_token_id": lvlm.tokenizer.pad_token_id,
    }  # fmt: skip


@torch.inference_mode()
def generate(lvlm: LVLM, prompt: Prompt, max_new_tokens: int = 20, **kw) -> str | list[str]:
    """The model's continuation, greedy unless `kw` (options of `generate`) says otherwise: the new text, stripped."""
    options = {**greedy_options(lvlm, max_new_tokens), **kw}
    output = lvlm.model.generate(**prompt.inputs, **options)
    ids = output if isinstance(output, torch.Tensor) else output.sequences
    new = ids[:, prompt.inputs["input_ids"].shape[1] :]
    texts = [text.strip() for text in lvlm.tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts if isinstance(prompt.text, list) else texts[0]
