"""FoPru (Jiang et al., 2024, arXiv:2411.14164): keep the patches, or the rows of patches, with most attention.

There is no official code: this is our reading of Sec. 4. The map is N x N over the patches of the penultimate layer,
without [CLS]; Eq. 3 averages it both ways (attention given and received) and Eq. 4 takes the vector of larger variance.
"""

from dataclasses import dataclass
from math import isqrt
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from lvlm_utils.pruning.engine import Chosen, PictureMethod, Positions
from lvlm_utils.pruning.keep import kept, top
from lvlm_utils.pruning.pictures import Pictures


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
        return top(score, keep)
    rows, columns = grid or (isqrt(tokens), isqrt(tokens))
    if rows * columns != tokens:
        raise ValueError(f"{tokens} patches are no grid of {rows} x {columns}: rows need grid=(rows, columns).")
    number = max(1, kept(keep, tokens) // columns) if isinstance(keep, Integral) else kept(keep, rows)
    return top(score.view(-1, rows, columns).sum(2), number).repeat_interleave(columns, 1)


def select(attention: Tensor, keep: float | int, strategy: str = "rank", grid: tuple[int, int] | None = None) -> Tensor:
    """Which patches stay, bool (batch, N), from the attention between patches (batch, heads, N, N)."""
    mean = attention.float().mean(1)  # Eq. 2
    return choice(significance(mean.mean(2), mean.mean(1)), keep, strategy, grid)  # Eq. 3 and 4


@dataclass
class FoPru(PictureMethod):
    """Keep the patches, or the rows of patches, that get or give most attention in the vision tower (FoPru).

    keep: share or number of the patches of every picture, tile or frame that the tower sees.
    strategy: "rank" takes single patches, "row" whole rows of the grid (Sec. 4.3).
    significance: "auto" is Eq. 4; "low", "given", "received" and "sum" are its ablations; "pool" (Tab. 3, w/o
        Significance) does not choose, but replaces every square of 2 x 2 patches by their mean (`keep` is not used).
    reorder: whether the tokens that stay have the order of the picture (Sec. 4.4), or the most significant comes first.
    positions: "contiguous" is our reading.
    """

    keep: float | int = 0.25
    strategy: Literal["rank", "row"] = "rank"
    significance: Literal["auto", "low", "given", "received", "sum", "pool"] = "auto"
    reorder: bool = True
    positions: Positions = "contiguous"

    deviations = (
        "Our reading of the paper: penultimate layer, [CLS] left out, unbiased variance, `keep` for each tile. Where a "
        "model merges patches, a visual token has the mean significance of its patches."
    )

    def sees(self):
        return {"given": -2, "received": -2}

    def pick(self, pictures):
        if self.significance == "pool":
            return _pooled(pictures)
        score = significance(pictures.seen("given").mean(1), pictures.seen("received").mean(1), self.significance)
        grid = pictures.grid if self.strategy == "row" else None
        stay = choice(score, self.keep, self.strategy, grid)
        if self.reorder:
            return stay
        if grid:  # rows by their sum; columns as they are
            score = score.view(-1, *grid).sum(2).repeat_interleave(grid[1], 1)
        order = score.masked_fill(~stay, -torch.inf).argsort(dim=1, descending=True, stable=True)
        new = pictures.projected.take_along_dim(order[..., None], 1)
        rank = (stay.cumsum(1) - 1).clamp(min=0)  # the first slot that is kept gets the most significant token
        return stay, new.take_along_dim(rank[..., None], 1)


def _pooled(pictures: Pictures) -> Chosen:
    """The upper left token of every square becomes the projected mean of the four; an odd last row or column goes."""
    (rows, columns), width = pictures.grid, pictures.features.shape[2]
    squares = pictures.features.view(-1, rows, columns, width)[:, : rows // 2 * 2, : columns // 2 * 2]
    mean = squares.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4))
    new = pictures.project(mean)
    stay = torch.zeros(len(mean), rows, columns, dtype=torch.bool, device=mean.device)
    stay[:, : rows // 2 * 2 : 2, : columns // 2 * 2 : 2] = True
    stay, merged = stay.flatten(1), pictures.projected.clone()
    merged[stay] = new.flatten(0, 2).to(merged.dtype)
    return stay, merged
