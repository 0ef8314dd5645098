"""Which token of a prompt belongs to what: parts of the text, found by characters, and places in the pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel

from lvlm_utils.families import visual_ids
from lvlm_utils.models import LVLM

PARTITION = ("system", "visual", "context", "question")  # every real token is in exactly one


@dataclass
class TokenGroups:
    """Bool masks, and whole numbers for visual tokens, all (batch, tokens).

    system, visual, context and question partition the real (not padding) tokens. visual holds the placeholders that
    the model replaces by pictures or videos; system is what the chat template and the processor write (role names,
    newlines, BOS, brackets around pictures, tags of tiles, time stamps). text is everything real that is not visual.
    answer is the part of system that opens the assistant's turn (all after the user's text where the template opens
    nothing); last is the final token, whose prediction is the answer.

    image counts the pictures and videos of the prompt, in its order. tile is the tile, crop or frame (a group of frames
    where the model merges them): 0 is the whole picture, where the family shows one, and 1, 2, ... its parts in reading
    order. row and column are the patch's place in its tile, after merging. All are -1 off the pictures; the last three
    also for a newline token, and row and column for [CLS]. Where LLaVA-OneVision shrinks its large area, a token has
    the place of the nearest patch.
    """

    system: Tensor
    visual: Tensor
    context: Tensor
    question: Tensor
    text: Tensor
    answer: Tensor
    last: Tensor
    image: Tensor
    tile: Tensor
    row: Tensor
    column: Tensor

    def to(self, device: torch.device | str) -> "TokenGroups":
        return TokenGroups(*(getattr(self, field.name).to(device) for field in fields(self)))


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


def is_visual(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Which of the token ids are placeholders of pictures and videos: bool, of the shape of `ids`."""
    return torch.isin(ids, torch.tensor(visual_ids(model), dtype=torch.long, device=ids.device))


def inside(offsets: Tensor, span: tuple[int, int] | None) -> Tensor:
    """Which tokens, given as character offsets (..., tokens, 2), end inside the half-open `span`.

    A token of many tokenizers carries the space before its word, so the end of a token decides, not its start.
    """
    start, end = span or (0, 0)
    return (offsets[..., 1] > offsets[..., 0]) & (offsets[..., 1] > start) & (offsets[..., 1] <= end)


def token_groups(lvlm: LVLM, inputs: BatchFeature, offsets: Tensor, rendered: Sequence[Rendered]) -> TokenGroups:
    """Groups of a left-padded batch from the offsets (batch, tokens, 2) of its tokens in the expanded texts."""
    real = inputs["attention_mask"].bool()
    visual = is_visual(lvlm.model, inputs["input_ids"]) & real
    text = real & ~visual
    context, question = (
        torch.stack([inside(o, r.spans.get(name)) for o, r in zip(offsets, rendered, strict=True)]) & text
        for name in ("context", "question")
    )
    starts = torch.tensor([r.spans["answer"][0] if "answer" in r.spans else len(r.text) for r in rendered])
    answer = real & (offsets[..., 1] > starts[:, None])
    last = torch.zeros_like(real)
    last[:, -1] = True
    places = _places(lvlm, inputs, offsets, rendered, visual)
    return TokenGroups(text & ~context & ~question, visual, context, question, text, answer, last, *places)


def _places(lvlm: LVLM, inputs: BatchFeature, offsets: Tensor, rendered: Sequence[Rendered], visual: Tensor) -> Tensor:
    """image, tile, row and column, (4, batch, tokens)."""
    places, layout = torch.full((4, *visual.shape), -1), lvlm.family.layout
    seen = {"image": 0, "video": 0}
    for row, one in enumerate(rendered):
        for number, (kind, span) in enumerate(one.pictures):
            slots = (visual[row] & inside(offsets[row], span)).nonzero()[:, 0]
            places[0, row, slots] = number
            if kind in layout:
                found = layout[kind](len(slots), seen[kind], inputs, lvlm)
                if len(found) != len(slots):
                    wrote = f"The processor wrote {len(slots)} tokens for {kind} {number} of prompt {row}"
                    raise ValueError(f"{wrote}, {lvlm.name} puts {len(found)} there: the processor is not the model's.")
                places[1:, row, slots] = found.T
            seen[kind] += 1
    return places
