"""Greedy replies to prompts, alone or after a beginning that they share: it is read once, forked, and continued.

A fork repeats the keys and values of the beginning for a batch of prompts. Each prompt goes on after its own cut: an
ordinary two-dimensional mask hides the columns between its cut and the end of the fork, and positions are those that
the prompt has when it is read alone. A beginning that was pruned is continued by the engine (`Continuation`). There is
one loop of decoding: the largest logit, whatever the checkpoint's defaults are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from inspect import signature
from os.path import commonprefix

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from lvlm_utils.models import LVLM
from lvlm_utils.prompts import Prompt
from lvlm_utils.pruning.engine import Continuation, Trace, short_sighted
from lvlm_utils.results import MEASURED
from lvlm_utils.session import with_groups
from lvlm_utils.token_groups import TokenGroups

GoOn = Callable[[Tensor, Tensor], Tensor]  # the next ids (rows, new), and which of them are real -> logits (rows, all)
Ends = Callable[[list[int]], int | None]  # the new ids of a row -> how many of them are its reply, None if it goes on


@dataclass
class Reply:
    """ids: the new tokens. logits: of the first, float32. computed: how many of the prompt's tokens the model read for
    it. kept: of a pruned prompt, MEASURED."""

    ids: list[int]
    logits: Tensor
    computed: int
    kept: dict[str, float] | None


def can_share(lvlm: LVLM) -> bool:
    """Whether prompts can go on after one cache.

    Layers have to see the whole past, and positions have to count tokens: on a grid (Qwen-VL) they depend on the
    picture's size too. Remote code is not trusted, nor is a model that cannot give the last logits alone.
    """
    plain = not lvlm.family.grid_positions and lvlm.family.verified
    return plain and not short_sighted(lvlm.decoder.config) and bool(_last_only(lvlm.model))


def clusters(ids: Sequence[list[int]], least: int) -> Iterator[tuple[list[int], list[int]]]:
    """Split prompts (token ids) into groups worth sharing a beginning: (rows, cuts), the longest row first.

    `cuts[i]` tokens of row i, at least `least`, are also the beginning of the longest row; at least one token of each
    row is left. A row that shares too little goes to another group.
    """
    left = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
    while left:
        anchor, *others = left
        cuts = {row: min(len(commonprefix([ids[anchor], ids[row]])), len(ids[row]) - 1) for row in others}
        cuts = {row: cut for row, cut in cuts.items() if cut >= max(least, 1) and len(ids[row]) - cut <= max(64, cut)}
        cuts = {anchor: max(cuts.values(), default=len(ids[anchor]) - 1), **cuts}  # no more than the others need
        yield list(cuts), list(cuts.values())
        left = [row for row in others if row not in cuts]


class Fork:
    """Rows that go on after what `cache` holds of each: the columns `alive` (rows, columns), bool; `position` (rows, 1)
    is that of the next token."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, alive: Tensor, position: Tensor):
        self.model, self.cache, self.alive, self.position = model, cache, alive, position

    def __call__(self, ids: Tensor, real: Tensor) -> Tensor:
        """Logits (rows, vocabulary) after the next `ids` (rows, new), of which those that are `real` count."""
        self.alive = torch.cat([self.alive, real], 1)
        positions = self.position + real.cumsum(1) - 1
        self.position = positions[:, -1:] + 1
        return self.model(
            input_ids=ids, attention_mask=self.alive.long(), position_ids=positions.clamp(min=0),
            past_key_values=self.cache, use_cache=True, **_last_only(self.model),
        ).logits[:, -1]  # fmt: skip


@torch.inference_mode()
def separate(lvlm: LVLM, prompt: Prompt, ends: Sequence[Ends], trace: Trace | None = None) -> list[Reply]:
    """Replies to a left-padded batch. `trace` is that of the pruning inside which this is called."""
    real = prompt.inputs["attention_mask"].bool()
    next_position, positions = real.sum(1, keepdim=True), (real.cumsum(1) - 1).clamp(min=0)
    on_grid = lvlm.family.grid_positions and any(name.endswith("grid_thw") for name in prompt.inputs)
    with with_groups(lvlm.model, prompt.groups):
        out = lvlm.model(**prompt.inputs, position_ids=None if on_grid else positions, use_cache=True,
                         **_last_only(lvlm.model))  # fmt: skip
    if on_grid:
        next_position = next_position + lvlm.model.model.rope_deltas.to(next_position.device)
    kept = [None] * len(ends) if trace is None else counts(trace, prompt.groups)
    go_on = Fork(lvlm.model, out.past_key_values, real, next_position)
    replies = _greedy(out.logits[:, -1], go_on, ends)
    return [Reply(*one, *more) for one, *more in zip(replies, real.sum(1).tolist(), kept, strict=True)]


@torch.inference_mode()
def shared(
    lvlm: LVLM, prompt: Prompt, ids: Sequence[list[int]], cuts: Sequence[int], ends: Sequence[Ends], batch_size: int,
    trace: Trace | None = None,
) -> list[Reply]:  # fmt: skip
    """Replies to prompts `ids`, which begin with `cuts` tokens of `prompt`, a single one with the tensors of its
    picture. What is left of a pruned beginning is continued where all go on."""
    cuts = list(cuts) if trace is None else [min(cuts)] * len(cuts)
    groups = _first(prompt.groups, max(cuts))
    inputs = {k: v[:, : max(cuts)] if v.shape == prompt.groups.visual.shape else v for k, v in prompt.inputs.items()}
    with with_groups(lvlm.model, groups):
        cache = lvlm.model(**inputs, use_cache=True, **_last_only(lvlm.model)).past_key_values
    kept = None if trace is None else counts(trace, groups)[0]
    endings = [own[cut:] for own, cut in zip(ids, cuts, strict=True)]
    order = sorted(range(len(ids)), key=lambda row: (len(endings[row]).bit_length(), cuts[row]))  # little padding
    replies: dict[int, Reply] = {}
    for pack in (order[at : at + batch_size] for at in range(0, len(order), batch_size)):
        go_on = _forked(lvlm, cache, [cuts[row] for row in pack]) if trace is None else Continuation(
            lvlm.model, cache, len(pack))  # fmt: skip
        tokens, real = _padded(lvlm, [endings[row] for row in pack])
        for row, one in zip(pack, _greedy(go_on(tokens, real), go_on, [ends[row] for row in pack]), strict=True):
            new = len(endings[row])
            more = dict.fromkeys(("mean_tokens", "mean_text", "final_text"), new)
            replies[row] = Reply(*one, new, kept and {name: kept[name] + more.get(name, 0) for name in MEASURED})
    replies[0].computed += max(cuts)  # the beginning was read once, and is counted for the first row
    return [replies[row] for row in range(len(ids))]


def counts(trace: Trace, groups: TokenGroups) -> list[dict[str, float]]:
    """MEASURED of every prompt in the latest prefill: the tokens that go into a layer, mean over the layers, and those
    that go into the last layer."""
    kept = trace.kept
    total, visual, context = (
        (kept & mask.to(kept.device)).sum(-1).double()
        for mask in (torch.ones_like(groups.visual), groups.visual, groups.context)
    )
    text = total - visual
    found = [total.mean(0), visual.mean(0), text.mean(0), visual[-1], text[-1], context[-1]]
    return [dict(zip(MEASURED, row, strict=True)) for row in torch.stack(found, 1).tolist()]


def _greedy(logits: Tensor, go_on: GoOn, ends: Sequence[Ends]) -> list[tuple[list[int], Tensor]]:
    """(new ids, logits of the first) of every row. A row whose reply has ended runs on until all have."""
    first, new = logits.float().cpu(), [[] for _ in ends]
    if first.isnan().any():
        raise ValueError("The logits are no numbers: the weights are damaged, or too large for their dtype.")
    length: dict[int, int] = {}
    while True:
        tokens = logits.float().argmax(-1, keepdim=True)
        for row, (token,) in enumerate(tokens.tolist()):
            if row not in length:
                new[row].append(token)
                if (found := ends[row](new[row])) is not None:
                    length[row] = found
        if len(length) == len(ends):
            return [(own[: length[row]], first[row]) for row, own in enumerate(new)]
        logits = go_on(tokens, torch.ones_like(tokens, dtype=torch.bool))


def _forked(lvlm: LVLM, cache: DynamicCache, cuts: Sequence[int]) -> Fork:
    """One row for each cut. `cache`, of one prompt, stays as it is."""
    width, rows = max(cuts), (len(cuts), -1, -1, -1)
    own = DynamicCache([(k[:, :, :width].expand(rows), v[:, :, :width].expand(rows)) for k, v, *_ in cache])
    position = torch.tensor(cuts, device=lvlm.device)[:, None]
    return Fork(lvlm.model, own, torch.arange(width, device=lvlm.device) < position, position)


def _padded(lvlm: LVLM, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids as a left-padded batch, and where they are no padding."""
    ids = pad_sequence([torch.tensor(row) for row in rows], True, padding_value=-1, padding_side="left").to(lvlm.device)
    return ids.clamp(min=0), ids >= 0


def _first(groups: TokenGroups, tokens: int) -> TokenGroups:
    """Groups of the first tokens, of which the last one ends the prompt."""
    first = TokenGroups(*(getattr(groups, field.name)[:, :tokens] for field in fields(groups)))
    first.last = torch.zeros_like(first.last)
    first.last[:, -1] = True
    return first


def _last_only(model: PreTrainedModel) -> dict[str, int]:
    """The option for logits of the last token alone, where the model has it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
