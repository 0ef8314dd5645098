"""FoPru (Jiang et al., 2024, arXiv:2411.14164): keep the patches, or the rows of patches, with most attention.

There is no official code: this is our reading of Sec. 4. The map is N x N over the patches of the penultimate layer,
without [CLS]; Eq. 3 averages it both ways (attention given and received) and Eq. 4 takes the vector of larger variance.
"""

from math import isqrt

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lvlm_utils.models import LVLM
from lvlm_utils.pruning.budget import check_keep, kept
from lvlm_utils.pruning.pictures import Pictures
from lvlm_utils.pruning.ranking import top
from lvlm_utils.pruning.tokens import Plan, Tokens

KIND = "visual, before the LLM"
NEEDS_CLS = False
OFFICIAL = "none public"
DEVIATIONS = (
    "Our reading of the paper: penultimate layer, [CLS] left out, unbiased variance, `keep` for each tile. Where a "
    "model merges patches, a visual token has the mean significance of its patches."
)
STRATEGIES = ("rank", "row")
SIGNIFICANCE = ("auto", "low", "given", "received", "sum", "pool")


def significance(given: Tensor, received: Tensor, which: str = "auto") -> Tensor:
    """Eq. 4: the one of s1 = `given` and s2 = `received` (batch, N) with the larger variance, picture by picture.

    "low" takes the other one (Tab. 3, w/o Variance); "given", "received" and "sum" do not look at the variance.
    """
    if which in ("given", "received", "sum"):
        return {"given": given, "received": received, "sum": given + received}[which]
    first = given.var(1, keepdim=True) > received.var(1, keepdim=True)
    return torch.where(first == (which == "auto"), given, received)


def choice(score: Tensor, keep: float | int, strategy: str = "rank", grid: tuple[int, int] | None = None) -> Tensor:
    """Sec. 4.3: which patches stay, bool (batch, N), from their significance `score` (batch, N).

    "rank" takes the best patches. "row" takes whole rows of the `grid` (rows, columns; a square if not given) by their
    summed significance: the share `keep` of the rows, or as many as fit into the number `keep`; at least one.
    """
    tokens = score.shape[1]
    if strategy == "rank":
        return top(score, kept(keep, tokens))
    rows, columns = grid or (isqrt(tokens), isqrt(tokens))
    if rows * columns != tokens:
        raise ValueError(f"{tokens} patches are no grid of {rows} x {columns}: rows need grid=(rows, columns).")
    number = kept(keep, rows) if isinstance(keep, float) else max(1, kept(keep, tokens) // columns)
    return top(score.view(-1, rows, columns).sum(2), number).repeat_interleave(columns, 1)


def select(attention: Tensor, keep: float | int, strategy: str = "rank", grid: tuple[int, int] | None = None) -> Tensor:
    """Which patches stay, bool (batch, N), from the attention between patches (batch, heads, N, N)."""
    mean = attention.float().mean(1)  # Eq. 2
    return choice(significance(mean.mean(2), mean.mean(1)), keep, strategy, grid)  # Eq. 3 and 4


def plan(
    lvlm_or_model: LVLM | PreTrainedModel,
    keep: float | int = 0.25,
    strategy: str = "rank",
    significance: str = "auto",
    reorder: bool = True,
    positions: str = "contiguous",
) -> Plan:
    """`keep` is a share or number for each picture, tile or frame that the tower sees.

    significance: "auto" is Eq. 4; the others are the ablations of `significance` above, and "pool" (Tab. 3, w/o
    Significance) does not choose, but replaces every square of 2 x 2 patches by their mean (`keep` is not used then).
    reorder=False leaves out Sec. 4.4: the tokens that stay stand with the most significant one first.
    """
    check_keep(keep)
    for name, value, known in (("strategy", strategy, STRATEGIES), ("significance", significance, SIGNIFICANCE)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}.")
    if significance == "pool":
        return Plan({0: _pool}, positions, sees={"received": -2}, asks=False)

    def choose(tokens: Tokens) -> Tensor | tuple[Tensor, Tensor]:
        for pictures in tokens.pictures:
            score = _score(pictures, significance)
            stay = choice(score, keep, strategy, pictures.grid if strategy == "row" else None)
            if reorder:
                pictures.keep(stay)
                continue
            if strategy == "row":  # rows by their sum; columns as they are
                rows, columns = pictures.grid
                score = score.view(-1, rows, columns).sum(2).repeat_interleave(columns, 1)
            order = score.masked_fill(~stay, -torch.inf).argsort(dim=1, descending=True, stable=True)
            new = pictures.projected.gather(1, order[..., None].expand_as(pictures.projected))
            rank = (stay.cumsum(1) - 1).clamp(min=0)  # the first slot that is kept gets the most significant token
            pictures.keep(stay, new.gather(1, rank[..., None].expand_as(new)))
        return tokens.chosen()

    return Plan({0: choose}, positions, sees={"given": -2, "received": -2}, asks=False)


def _score(pictures: Pictures, which: str) -> Tensor:
    return significance(pictures.seen("given").mean(1), pictures.seen("received").mean(1), which)


def _pool(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The upper left token of every square becomes the projected mean of the four; an odd last row or column goes."""
    for pictures in tokens.pictures:
        (rows, columns), width = pictures.grid, pictures.features.shape[2]
        squares = pictures.features.view(-1, rows, columns, width)[:, : rows // 2 * 2, : columns // 2 * 2]
        mean = squares.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4))
        new = pictures.project(mean)
        stay = torch.zeros(len(mean), rows, columns, dtype=torch.bool, device=mean.device)
        stay[:, : rows // 2 * 2 : 2, : columns // 2 * 2 : 2] = True
        merged = pictures.projected.clone()
        merged[stay.flatten(1)] = new.flatten(0, 2).to(merged.dtype)
        pictures.keep(stay.flatten(1), merged)
    return tokens.chosen()
