"""A row through an unmodified Llama: hidden states and losses at the places that are trained, and nothing else of ours."""

import torch
import torch.nn.functional as F
from lessons import Row
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

LONG = (
    700  # tokens of a beginning from which on it runs without gradient: the adapters then learn from the branches alone
)


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **unused):
    """Grouped-query attention as plain matrix products: on a CPU faster than the fused kernels, its gradient above all.

    query (1, heads, queries, size), key and value (1, groups, keys, size); attention_mask, added, (1, 1, queries, keys).
    """
    query = (query * scaling).unflatten(1, (key.shape[1], -1))
    weights = (query @ key[:, :, None].transpose(-1, -2) + attention_mask).softmax(-1)
    return (weights @ value[:, :, None]).flatten(1, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register("grouped", grouped_attention)


def layout(row: Row) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and positions (tokens,), and who sees whom, (tokens, tokens), 0 or minus infinity.

    A branch sees the beginning up to its cut and itself up to each token; its positions go on from the cut.
    """
    start, total = len(row.ids), len(row.ids) + sum(len(ids) for _, ids, _ in row.branches)
    ids, positions, sees = list(row.ids), list(row.positions), torch.ones(total, total, dtype=torch.bool).tril()
    for cut, piece, _ in row.branches:
        at = len(ids)
        sees[at : at + len(piece), cut:start] = False
        sees[at : at + len(piece), start:at] = False
        first = row.positions[cut - 1] + 1
        ids, positions = ids + piece, positions + list(range(first, first + len(piece)))
    return torch.tensor(ids), torch.tensor(positions), torch.zeros(total, total).masked_fill_(~sees, float("-inf"))


def logits(language: nn.Module, head: Tensor, projector: nn.Module, row: Row, image: int) -> Tensor:
    """(marks, vocabulary), in the order of the branches and their marks. language: a Llama, adapted or not; head: its output table."""
    ids, positions, mask = layout(row)
    x = language.embed_tokens(ids)
    if len(row.features):
        x = x.masked_scatter((ids == image)[:, None], projector(row.features.float()).to(x.dtype))
    x, positions, mask, start, cache = x[None], positions[None], mask[None, None], len(row.ids), None
    if start > LONG:
        cache = DynamicCache(config=language.config)
        with torch.no_grad():
            language(inputs_embeds=x[:, :start], position_ids=positions[:, :start], past_key_values=cache,
                     attention_mask=mask[..., :start, :start])  # fmt: skip
        x, positions, mask = x[:, start:], positions[:, start:], mask[..., start:, :]
    hidden = language(inputs_embeds=x, position_ids=positions, attention_mask=mask, past_key_values=cache,
                      use_cache=cache is not None).last_hidden_state[0]  # fmt: skip
    places, at = [], 0 if cache is not None else start
    for _, piece, marks in row.branches:
        places += [at + mark.place for mark in marks]
        at += len(piece)
    return F.linear(hidden[places], head)


def loss(row: Row, logits: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy, weighted, a weight of one being one answer; accuracies of the row by kind of answer."""
    marks = [mark for _, _, marks in row.branches for mark in marks]
    each, column = logits.log_softmax(-1), torch.arange(len(marks))
    chance, weight = torch.tensor([m.chance for m in marks]), torch.tensor([m.weight for m in marks])
    right, other = (each[column, torch.tensor([getattr(m, name) for m in marks])] for name in ("token", "other"))
    entropy = -(chance * right + (1 - chance) * other)
    found, best = {}, logits.argmax(-1)
    for kind in sorted({mark.kind for mark in marks}):
        of = torch.tensor([mark.kind == kind for mark in marks])
        if kind in ("replay", "end"):
            found[f"{kind} loss"] = entropy[of].mean().item()
        elif bool((chance[of] == 1).all()):
            sure = best == torch.tensor([m.token for m in marks])
            sure = right > other if kind in ("yes or no", "early", "brief") else sure
            found[f"{kind} accuracy"] = sure[of].float().mean().item()
        else:  # how far the belief is from what the world makes likely
            belief = (right - torch.logaddexp(right, other)).exp()
            found[f"{kind} distance"] = (belief - chance)[of].abs().mean().item()
    return (entropy * weight).sum() / weight.sum(), found
