"""Greedy answers to questions about one picture and context whose common beginning is pruned, and read, only once.

Only for methods whose choice does not depend on the question. The beginning ends behind the first token of the question
or template that all share, so that its last token is one that every such method keeps anyway.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import fields

import torch

from lvlm_utils.evaluate.prefix import Reply, stop_ids, until
from lvlm_utils.evaluate.pruned import MEASURED, counts
from lvlm_utils.models import LVLM
from lvlm_utils.prompts import Prompt
from lvlm_utils.pruning import Trace
from lvlm_utils.pruning.continuation import Continuation
from lvlm_utils.pruning.engine import told
from lvlm_utils.token_groups import TokenGroups


def begin_alike(ids: Sequence[list[int]], groups: TokenGroups) -> Iterator[tuple[list[int], int]]:
    """Split prompts with one picture and context (token ids) into (rows, length of their common beginning).

    `groups` are those of the first prompt. Every beginning holds the picture, the context and a token more; the length
    is 0 for a prompt that shares no such beginning.
    """
    chosen_from = (groups.visual | groups.context)[0].nonzero()
    least = int(chosen_from.amax()) + 2 if len(chosen_from) else 1
    alike = defaultdict(list)
    for row, own in enumerate(ids):
        alike[tuple(own[:least])].append(row)
    for rows in alike.values():
        ends = zip(*(ids[row] for row in rows), strict=False)
        length = next((at for at, tokens in enumerate(ends) if len(set(tokens)) > 1), None)
        shortest = min(len(ids[row]) for row in rows) - 1
        length = shortest if length is None else min(length, shortest)
        if len(rows) > 1 and length >= least:
            yield rows, length
        else:
            yield from (([row], 0) for row in rows)


@torch.inference_mode()
def answer_continued(
    lvlm: LVLM, prompt: Prompt, ids: Sequence[list[int]], cut: int, trace: Trace, max_new_tokens: int, batch_size: int
) -> list[Reply]:
    """Greedy replies to prompts `ids`, which all begin with the first `cut` tokens of `prompt`, a single one."""
    groups = _beginning(prompt.groups, cut)
    inputs = {k: v[:, :cut] if v.shape == prompt.groups.visual.shape else v for k, v in prompt.inputs.items()}
    with told(lvlm.model, groups):
        cache = lvlm.model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    kept = counts(trace, groups)[0]
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    replies: list[Reply | None] = [None] * len(ids)
    for at in range(0, len(order), batch_size):
        pack = order[at : at + batch_size]
        rests = [ids[row][cut:] for row in pack]
        new, logits = _greedy(lvlm, Continuation(lvlm.model, cache, len(pack)), rests, max_new_tokens)
        for row, rest, said, first in zip(pack, rests, new, logits, strict=True):
            more = {name: float(len(rest)) for name in ("mean_tokens", "mean_text", "final_text")}
            replies[row] = Reply(said, first, len(rest), {name: kept[name] + more.get(name, 0) for name in MEASURED})
    replies[0].computed += cut
    return replies


def _beginning(groups: TokenGroups, cut: int) -> TokenGroups:
    """Groups of the first `cut` tokens."""
    first = TokenGroups(*(getattr(groups, field.name)[:, :cut] for field in fields(groups)))
    first.last = torch.zeros_like(first.last)
    first.last[:, -1] = True
    return first


def _greedy(
    lvlm: LVLM, go_on: Continuation, rests: list[list[int]], max_new_tokens: int
) -> tuple[list[list[int]], torch.Tensor]:
    """New token ids of every prompt, and logits of the first (rows, vocabulary), float32 on the CPU."""
    stop, width = stop_ids(lvlm), max(len(rest) for rest in rests)
    pad = lvlm.tokenizer.pad_token_id
    tokens = torch.tensor([[pad] * (width - len(rest)) + rest for rest in rests], device=lvlm.device)
    real = torch.tensor([[at >= width - len(rest) for at in range(width)] for rest in rests], device=lvlm.device)
    new, ended, first = [], torch.zeros(len(rests), dtype=torch.bool, device=lvlm.device), None
    for _ in range(max_new_tokens):
        logits = go_on(tokens, real).float()
        first = logits.cpu() if first is None else first
        tokens = logits.argmax(-1, keepdim=True)
        real = torch.ones_like(tokens, dtype=torch.bool)
        new.append(tokens)
        ended |= torch.isin(tokens[:, 0], torch.tensor(sorted(stop), device=lvlm.device))
        if ended.all():
            break
    return [until(ids, stop) for ids in torch.cat(new, 1).tolist()], first
