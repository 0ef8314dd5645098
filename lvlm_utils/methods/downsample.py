"""Downsample: a control, not a method. The vision tower sees a smaller picture, so that fewer tokens are left.

VTC-Bench (Chenfei-Liao/VTC-Bench) found that it beats many pruning methods. The tower's position embeddings are
interpolated by the library.
"""

from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lvlm_utils.families import ANY_SIZE, towers_of
from lvlm_utils.methods.tome import TowerMethod
from lvlm_utils.models import bare
from lvlm_utils.pruning.engine import Positions
from lvlm_utils.pruning.keep import kept


def small_grid(grid: tuple[int, int], keep: int) -> tuple[int, int]:
    """Rows and columns, in the proportion of `grid`, whose product is nearest to `keep` side by side."""
    share = (keep / (grid[0] * grid[1])) ** 0.5
    return tuple(max(1, round(side * share)) for side in grid)


def cells(grid: tuple[int, int], small: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Which patch of the `small` grid covers each of the full `grid`, (patches,), both in reading order."""
    rows, columns = (torch.arange(n, device=device) * m // n for n, m in zip(grid, small, strict=True))
    return (rows[:, None] * small[1] + columns).flatten()


@dataclass
class Downsample(TowerMethod):
    """Show the vision tower a smaller picture: a control, not a method.

    keep: about this share or number of the patches of every picture, tile or frame is left: a grid of them.
    positions: "contiguous", as if the picture had been given so.
    """

    keep: float | int = 64
    positions: Positions = "contiguous"

    deviations = (
        "A control without official code. What is shrunk (bilinear, antialiased) is the picture as the processor made "
        "it, not the original one. A grid in the same proportion has to be filled, so `keep` is met only nearly."
    )

    def fit(self, lvlm):
        super().fit(lvlm)
        for tower in towers_of(bare(lvlm)).values():
            if not (_asked_to_interpolate(tower) or tower.config.model_type in ANY_SIZE):
                raise ValueError(f"{type(tower).__name__} takes pictures of one size only: take the method random.")
        return self

    def inside(self, tower, skip, session, stack):
        run = _Smaller(skip, self.keep)
        stack.callback(session.hook(tower, run.start))
        return run


def _asked_to_interpolate(tower: nn.Module) -> bool:
    return "interpolate_pos_encoding" in signature(tower.forward).parameters


class _Smaller:
    """One tower that sees small pictures."""

    def __init__(self, skip: int, keep: float | int):
        self.skip, self.keep = skip, keep

    def start(self, tower: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        pixels = args[0] if args else kwargs["pixel_values"]
        patch = tower.config.patch_size
        grid = tuple(side // patch for side in pixels.shape[-2:])
        small = small_grid(grid, kept(self.keep, grid[0] * grid[1]))
        if small != grid:
            size = tuple(side * patch for side in small)
            less = interpolate(pixels.float(), size=size, mode="bilinear", antialias=True).to(pixels.dtype)
            if _asked_to_interpolate(tower):
                kwargs = {**kwargs, "interpolate_pos_encoding": True}
            args, kwargs = ((less, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": less})
        whole = torch.arange(self.skip, device=pixels.device)
        source = torch.cat([whole, self.skip + cells(grid, small, pixels.device)]).expand(len(pixels), -1)
        self.maps = {small[0] * small[1] + self.skip: source}
        return args, kwargs
