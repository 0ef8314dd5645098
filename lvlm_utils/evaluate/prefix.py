"""Greedy answers to many prompts that share a beginning: prefill it once, run only the rest of each prompt.

The rests are packed in one row, one after the other, under a mask that lets each see its own part of the shared prefix
and itself. Keys and values are copied once per pack, not per prompt, and there is no padding. Every prompt is tokenised
in full and keeps the positions it has alone, so the results are those of separate prompts by construction.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature

import numpy as np
import torch
from transformers import DynamicCache

from lvlm_utils.models import LVLM

PACK_TOKENS = 2048  # at most so many new tokens a forward: attention inside a pack grows with its square


@dataclass
class Reply:
    """New token ids (up to one of `stop_ids`), float32 logits of the first, tokens computed to get it.

    `kept` counts the tokens that went into the layers of a pruned prompt, by name.
    """

    ids: list[int]
    logits: torch.Tensor
    computed: int
    kept: dict[str, float] | None = None


def can_share(lvlm: LVLM) -> bool:
    """Packing needs an attention that takes a 4-D mask, layers that see the whole past, and logits of chosen tokens.

    Positions must count tokens: on a grid (Qwen-VL) they hang on the picture's size too. Remote code is not trusted.
    """
    plain = not lvlm.family.grid_positions and lvlm.family.verified
    if not plain or "logits_to_keep" not in signature(lvlm.model.forward).parameters:  # VideoLLaMA3 ignores it
        return False
    text = lvlm.model.config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ["full_attention"])
    return lvlm.attention in ("sdpa", "eager") and layers == {"full_attention"}


def clusters(ids: list[list[int]], visual_end: int) -> Iterator[tuple[list[int], list[int]]]:
    """Split prompts (token ids) into groups worth sharing a prefix: (rows, cuts), the longest row first.

    `cuts[i]` tokens of row i are also the beginning of the longest row; at least one token of each row is left, and no
    cut is inside the visual tokens, which end at `visual_end`. A row that shares too little goes to another group.
    """
    left = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
    while left:
        anchor = np.asarray(ids[left[0]])
        rows, cuts, rest = [], [], []
        for row in left:
            mine = np.asarray(ids[row])
            differs = mine != anchor[: len(mine)]
            cut = min(int(differs.argmax()) if differs.any() else len(mine), len(mine) - 1)
            shares = row == left[0] or (cut >= max(visual_end, 1) and len(mine) - cut <= max(64, cut))
            (rows if shares else rest).append(row)
            cuts += [cut] * shares
        if len(rows) > 1:
            cuts[0] = max(cuts[1:])  # the anchor needs no longer prefix than the others use
        yield rows, cuts
        left = rest


@torch.inference_mode()
def answer_shared(
    lvlm: LVLM, ids: Sequence[list[int]], cuts: Sequence[int], extras: dict, max_new_tokens: int, batch_size: int
) -> list[Reply]:
    """Greedy replies to prompts `ids` (the first one holds the shared prefix) cut as `clusters` says.

    `extras` are the picture's tensors (pixel_values, ...) for the prefill; `batch_size` prompts are packed at once.
    """
    length = max(cuts)
    anchor = torch.tensor([ids[0][:length]], device=lvlm.device)
    prefix = lvlm.model(input_ids=anchor, use_cache=True, logits_to_keep=1, **extras).past_key_values
    replies: list[Reply | None] = [None] * len(ids)
    for pack in _packs([len(i) - c for i, c in zip(ids, cuts, strict=True)], cuts, batch_size):
        cut = max(cuts[row] for row in pack)
        done = _greedy(lvlm, prefix, cut, [ids[row][cuts[row] :] for row in pack], [cuts[row] for row in pack],
                       max_new_tokens)  # fmt: skip
        for row, reply in zip(pack, done, strict=True):
            replies[row] = reply
    replies[0].computed += length
    return replies


def _packs(lengths: Sequence[int], cuts: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Rows in packs of nearly equal cuts, at most `batch_size` rows or PACK_TOKENS tokens each (at least one row)."""
    pack: list[int] = []
    for row in sorted(range(len(cuts)), key=lambda row: cuts[row]):
        if pack and (len(pack) == batch_size or sum(lengths[r] for r in pack) + lengths[row] > PACK_TOKENS):
            yield pack
            pack = []
        pack.append(row)
    yield pack


def fork(cache: DynamicCache, length: int) -> DynamicCache:
    """A new cache of the first `length` tokens of `cache`, which stays as it is."""
    return DynamicCache([(keys[:, :, :length], values[:, :, :length]) for keys, values, *_ in cache])


def _greedy(
    lvlm: LVLM, prefix: DynamicCache, cut: int, rests: list[list[int]], cuts: list[int], max_new_tokens: int
) -> list[Reply]:
    device, stop = lvlm.device, stop_ids(lvlm)
    cache = fork(prefix, cut)
    starts = torch.tensor(cuts, device=device)
    # of every token behind the prefix: the prompt it belongs to and its position there
    owner = torch.cat([torch.full((len(rest),), i) for i, rest in enumerate(rests)]).to(device)
    place = torch.cat([torch.arange(len(rest)) + c for rest, c in zip(rests, cuts, strict=True)]).to(device)
    tokens = torch.tensor([t for rest in rests for t in rest], device=device)
    ends = torch.tensor([len(rest) for rest in rests]).cumsum(0) - 1
    active, replies = list(range(len(rests))), [Reply([], torch.empty(0), len(rest)) for rest in rests]
    for step in range(max_new_tokens):
        mine, where = owner[-len(tokens) :], place[-len(tokens) :]
        sees_prefix = torch.arange(cut, device=device) < starts[mine, None]
        sees_rest = (owner == mine[:, None]) & (place <= where[:, None])
        logits = lvlm.model(
            input_ids=tokens[None], position_ids=where[None], past_key_values=cache, use_cache=True,
            attention_mask=_mask(lvlm, torch.cat([sees_prefix, sees_rest], 1)),
            logits_to_keep=ends.to(device) if step == 0 else 0,
        ).logits[0].float()  # fmt: skip
        chosen = logits.argmax(-1)
        for i, row in enumerate(active):
            replies[row].ids.append(int(chosen[i]))
            if step == 0:
                replies[row].logits = logits[i].cpu()
        going = [i for i, row in enumerate(active) if replies[row].ids[-1] not in stop]
        if not going or step == max_new_tokens - 1:
            break
        last = where[ends.to(device)] if step == 0 else where
        active, tokens = [active[i] for i in going], chosen[going]
        owner = torch.cat([owner, torch.tensor(active, device=device)])
        place = torch.cat([place, last[going] + 1])
    return replies


def _mask(lvlm: LVLM, allowed: torch.Tensor) -> torch.Tensor:
    """(queries, keys) bool -> (1, 1, queries, keys) in the form the attention wants: eager adds it to the scores."""
    if lvlm.attention == "sdpa":
        return allowed[None, None]
    zeros = torch.zeros(allowed.shape, dtype=lvlm.dtype, device=allowed.device)
    return zeros.masked_fill(~allowed, torch.finfo(lvlm.dtype).min)[None, None]


def stop_ids(lvlm: LVLM) -> set[int]:
    """Token ids that end an answer: EOS, and a yes or no, behind which nothing is read."""
    ids = lvlm.model.generation_config.eos_token_id
    ids = lvlm.tokenizer.eos_token_id if ids is None else ids
    ends = set(ids) if isinstance(ids, list | tuple) else {ids}
    return ends.union(word_ids(lvlm.tokenizer, "yes"), word_ids(lvlm.tokenizer, "no"))


@lru_cache(maxsize=16)
def word_ids(tokenizer, word: str) -> tuple[int, ...]:
    """Tokens that are `word`, in any case, with or without the mark of a space before it."""
    return tuple(i for token, i in tokenizer.get_vocab().items() if token.strip("Ġ▁ ").lower() == word)


def until(ids: list[int], stop: set[int]) -> list[int]:
    """New token ids up to the first that ends an answer."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in stop), len(ids))]
