"""Statistics of A = softmax(scale q k^T) without A: blocks of rows that fit the cache are made, read and dropped.

The functions take query (batch, heads, tokens, width) after rotation and key (batch, key heads, tokens, width), as
the attention function of a layer gets them. They accumulate in float32 (float64 for float64) and know nothing of
models. Rows of padding are all zero.
"""

from collections.abc import Collection, Iterator

import torch

from lvlm_utils.attention.visibility import Part, Visibility

# Scores held at a time: on a CPU 4 MiB, which stay in its caches; a GPU wants fewer and larger kernels.
SCORES = {"cpu": 2**20, "cuda": 2**25}
STREAMED = ("received", "received_from", "groups", "entropy", "variance")
HIDDEN = -1e30  # the score of a key that may not be seen; finite, so that 0 x score is 0

Turn = tuple[torch.Tensor, torch.Tensor]  # cosine and sine (batch or 1, tokens, rotated width)


def scores_of(device: torch.device) -> int:
    """Scores to hold at a time on `device`."""
    return SCORES.get(device.type, SCORES["cuda"])


@torch.no_grad()
def attention_row(
    query: torch.Tensor, key: torch.Tensor, scale: float, view: Visibility, at: torch.Tensor, turn: Turn | None = None
) -> torch.Tensor:
    """Row number `at` (batch,) of the attention of every prompt, (batch, heads, tokens); hidden keys get exactly 0.

    turn: angles by which the keys are rotated further, in the convention of Llama (halves, not pairs).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, _, tokens, width = query.shape
    row = query[torch.arange(batch, device=query.device), :, at].to(dtype) * scale
    row = row.view(batch, key.shape[1], -1, width)  # heads that share a key head are neighbours
    scores = row.new_empty(*row.shape[:3], tokens)
    for head in range(key.shape[1]):  # one by one, so that the keys are never copied as a whole
        keys = key[:, head, :tokens].to(dtype)
        scores[:, head] = row[:, head] @ (keys if turn is None else _turned(keys, *turn)).transpose(1, 2)
    hidden = ~view.row(at)[:, None, None]
    return scores.masked_fill_(hidden, HIDDEN).softmax(-1).masked_fill_(hidden, 0).flatten(1, 2)


def _turned(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Keys (batch, tokens, width) with their first components rotated; those beyond the angles stay."""
    turning, rest = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    left, right = turning.chunk(2, -1)
    return torch.cat([turning * cos + torch.cat([-right, left], -1) * sin, rest], -1)


@torch.no_grad()
def stream(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    view: Visibility,
    wanted: Collection[str],
    groups: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The statistics in `wanted` (of STREAMED) of one layer, in one pass.

    received (batch, heads, tokens): column sums, sum_i A_ij.
    received_from (batch, heads, G, tokens): the same over the queries i of one group.
    groups (batch, heads, G, G): sums over the queries of one group and the keys of another.
    entropy (batch, heads, tokens): -sum_j A_ij ln A_ij of row i, in nats.
    variance (batch, heads, tokens): of A_ij over the keys j that query i sees.
    groups: bool (batch, tokens, G) for the two that need it; groups may overlap.
    """
    if not wanted:
        return {}
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, tokens, _ = query.shape
    zeros = query.new_zeros(batch, heads, tokens, dtype=dtype)
    entropy, squares = (torch.zeros_like(zeros) if name in wanted else None for name in ("entropy", "variance"))
    weights = [query.new_ones(batch, tokens, 1, dtype=dtype)] if "received" in wanted else []
    weights += [groups.to(dtype)] if {"received_from", "groups"} & set(wanted) else []
    columns = None
    if weights:  # of every row in each of the column sums: (batch, 1, sums, tokens)
        weights = torch.cat(weights, 2).transpose(1, 2)[:, None]
        weights = weights if view.real is None else weights * view.real[:, None, None]
        columns = zeros[:, :, None].repeat(1, 1, weights.shape[2], 1)
    parts = view.parts if {"received", "entropy", "variance"} & set(wanted) else view.parts_with(groups.any(2))
    for (prompts, some, rows), block, scores, attention in _blocks(query, key, scale, view, parts, dtype):
        if columns is not None:
            of_rows = weights[prompts, :, :, rows].expand(-1, scores.shape[1], -1, -1).flatten(0, 1)
            part = columns[prompts, some, :, block.first : block.end].flatten(0, 1)
            part.baddbmm_(of_rows, attention.flatten(0, 1))
        if squares is not None:
            squares[prompts, some, rows] = torch.linalg.vector_norm(attention, dim=-1).square_()
        if entropy is not None:  # ln A_ij - ln max_j A_ij = s_ij - max_j s_ij
            mean = scores.sub_(scores.amax(-1, keepdim=True)).mul_(attention).sum(-1)
            entropy[prompts, some, rows] = attention.amax(-1).log_().add_(mean).neg_()

    out = {}
    if entropy is not None:
        out["entropy"] = entropy
    if squares is not None:  # mean of squares less squared mean; a row sums to 1
        seen = view.seen[:, None].clamp(min=1).to(dtype)
        out["variance"] = (squares / seen - 1 / seen.square()).clamp_(min=0)
    if view.real is not None:
        for of_padding in out.values():
            of_padding.mul_(view.real[:, None])
    if "received" in wanted:
        out["received"] = columns[:, :, 0].contiguous()
    if "received_from" in wanted:
        out["received_from"] = columns[:, :, -groups.shape[2] :]
    if "groups" in wanted:
        out["groups"] = columns[:, :, -groups.shape[2] :] @ groups.to(dtype)[:, None]
    return out


def _blocks(
    query: torch.Tensor, key: torch.Tensor, scale: float, view: Visibility, parts: list[Part], dtype: torch.dtype
) -> Iterator:
    """For each block of rows of a few heads: its place (prompts, heads, queries), the Block, and two buffers.

    They hold the scores (HIDDEN for hidden keys) and their softmax, (prompts, heads, queries, keys), and may be
    overwritten. Rows of padding hold anything finite.
    """
    batch, heads, tokens, _ = query.shape
    shared = heads // key.shape[1]  # heads that share a key head
    rows = max((b.bottom - b.top for part in parts for b in part.blocks), default=0)
    room = scores_of(query.device) // max(rows * tokens, 1)
    fits = [n for n in range(1, heads + 1) if heads % n == 0 and (shared % n == 0 or n % shared == 0) and n <= room]
    step = max(fits, default=1)
    many = min(room // heads, batch) if step == heads else 1
    buffers = query.new_empty(2, many * step * rows * tokens, dtype=dtype)
    for part in parts:
        for start in range(part.start, part.stop, many):
            prompts = slice(start, min(start + many, part.stop))
            for first in range(0, heads, step):
                some = slice(first, first + step)
                queries = query[prompts, some].to(dtype) * scale
                keys = key[prompts, first // shared : (first + step - 1) // shared + 1, :tokens].to(dtype)
                keys = keys.transpose(2, 3).contiguous().flatten(0, 1)
                for block in part.blocks:
                    rows, width = slice(block.top, block.bottom), block.end - block.first
                    left = queries[:, :, rows].reshape(len(keys), -1, queries.shape[3])
                    size = left.shape[0] * left.shape[1] * width
                    scores, attention = buffers[0, :size], buffers[1, :size]
                    torch.bmm(left, keys[:, :, block.first : block.end], out=scores.view(len(keys), -1, width))
                    scores, attention = (b.view(*queries.shape[:2], -1, width) for b in (scores, attention))
                    if block.mixed < block.end:
                        mixed = slice(block.mixed, block.end)
                        hidden = ~view.visible(block.top, block.bottom, mixed, prompts)[:, None]
                        scores[..., block.mixed - block.first :].masked_fill_(hidden, HIDDEN)
                    torch.softmax(scores, -1, out=attention)
                    yield (prompts, some, rows), block, scores, attention


@torch.no_grad()
def pair_sums(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor, scale: float, view: Visibility,
    groups: torch.Tensor, absolute: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Sums of I_ij = sum over heads of |A_ij dL/dA_ij|, with its absolute value "inside" that sum or "outside".

    Gives the sums over the queries i of one group and the keys j of another, (batch, G, G), and the part of them that
    is on the diagonal, (batch, G). As O_i = sum_j A_ij V_j, dL/dA_ij = dO_i . V_j.

    query (batch, heads, tokens, width), key and value (batch, key heads, tokens, width): what the attention function
    gets; gradient (batch, tokens, heads, width): dO, by what it gives; groups (batch, tokens, G): 1 or 0, and all 0 for
    padding. Everything is summed in the dtype of the groups.
    """
    dtype, (_, heads, _, width) = groups.dtype, query.shape
    sums = groups.new_zeros(len(groups), groups.shape[2], groups.shape[2])
    diagonal = sums[:, 0].clone()
    blocks = [(n, block) for part in view.parts for n in range(part.start, part.stop) for block in part.blocks]
    for prompt, block in blocks:
        rows, keys = slice(block.top, block.bottom), slice(block.first, block.end)
        # heads that share a key head come one after the other: (key heads, heads x queries, width)
        queries = query[prompt, :, rows].to(dtype).mul(scale).reshape(key.shape[1], -1, width)
        scores = (queries @ key[prompt, :, keys].to(dtype).mT).view(heads, -1, block.end - block.first)
        visible = view.visible(block.top, block.bottom, slice(block.mixed, block.end), slice(prompt, prompt + 1))
        scores[..., block.mixed - block.first :].masked_fill_(~visible, HIDDEN)
        outputs = gradient[prompt, rows].to(dtype).transpose(0, 1).reshape(key.shape[1], -1, width)
        by_weights = (outputs @ value[prompt, :, keys].to(dtype).mT).view_as(scores)
        terms = scores.softmax(-1).mul_(by_weights)
        flow = terms.abs_().sum(0) if absolute == "inside" else terms.sum(0).abs_()
        sums[prompt] += groups[prompt, rows].T @ (flow @ groups[prompt, keys])
        itself = slice(max(block.top, block.first), min(block.bottom, block.end))  # rows beyond are padding
        diagonal[prompt] += flow.diagonal(block.top - block.first) @ groups[prompt, itself]
    return sums, diagonal
