"""Many prompts about one picture, tokenised once: their ids, and batches of some of them with their token groups."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import BatchFeature

from lvlm_utils.models import LVLM
from lvlm_utils.prompts import Picture, Prompt, pictures_of, process, tokenizer_options
from lvlm_utils.token_groups import Rendered, TokenGroups, inside, token_groups


@dataclass
class Encoded:
    """Prompts about one picture, tokenised in full, one by one; `extras` are the picture's tensors for the model."""

    ids: list[list[int]]
    n_context: list[int]
    extras: dict
    rendered: list[Rendered]  # with their pictures
    offsets: list[torch.Tensor]  # (tokens, 2) of every prompt


def encode(lvlm: LVLM, image: Picture | None, rendered: Sequence[Rendered]) -> Encoded:
    """Tokenise many rendered prompts about one picture; the picture is processed once. No check of length."""
    inputs, replaced = process(lvlm, [pictures_of(image)], [None], rendered[:1])
    expanded = [r.expanded(replaced[0]) for r in rendered]
    batch = lvlm.tokenizer([r.text for r in expanded], **tokenizer_options(lvlm, rendered[0].text))
    offsets = [torch.from_numpy(np.array(o)) for o in batch["offset_mapping"]]  # numpy reads lists faster
    n_context = [int(inside(o, r.spans.get("context")).sum()) for o, r in zip(offsets, expanded, strict=True)]
    of_text = ("input_ids", "attention_mask", "offset_mapping", "mm_token_type_ids")
    extras = {k: v for k, v in inputs.to(lvlm.device, lvlm.dtype).items() if k not in of_text}
    return Encoded(batch["input_ids"], n_context, extras, expanded, offsets)


def padded(lvlm: LVLM, coded: Encoded, rows: Sequence[int]) -> Prompt:
    """The prompts `rows` as a left-padded batch, with their groups, but without the tensors of their picture."""
    width, ids, groups = max(len(coded.ids[row]) for row in rows), [], []
    for row in rows:
        own = torch.tensor([coded.ids[row]])
        inputs = BatchFeature({**coded.extras, "input_ids": own, "attention_mask": torch.ones_like(own)})
        found = token_groups(lvlm, inputs, coded.offsets[row][None], coded.rendered[row : row + 1])
        groups.append(found.padded(width - len(coded.ids[row])))
        ids.append(pad(own, (width - own.shape[1], 0), value=lvlm.tokenizer.pad_token_id))
    groups = TokenGroups.joined(groups).to(lvlm.device)
    inputs = BatchFeature({"input_ids": torch.cat(ids), "attention_mask": (groups.text | groups.visual).long()})
    return Prompt(inputs.to(lvlm.device), [coded.rendered[row].text for row in rows], groups)
