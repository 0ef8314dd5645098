"""Downsample: a control, not a method. The vision tower sees a smaller picture, so that fewer tokens are left.

VTC-Bench (Chenfei-Liao/VTC-Bench) found that it beats many pruning methods. The tower's position embeddings are
interpolated by the library.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from lvlm_utils.families import towers_of
from lvlm_utils.models import LVLM
from lvlm_utils.pruning.budget import check_keep, kept
from lvlm_utils.pruning.tokens import Plan
from lvlm_utils.pruning.tome import behind, check, representatives
from lvlm_utils.pruning.vision import has_cls

KIND = "visual, before the LLM"
NEEDS_CLS = False
OFFICIAL = "none public"
DEVIATIONS = (
    "A control without official code. What is shrunk (bilinear, antialiased) is the picture as the processor made it, "
    "not the original one. A grid in the same proportion has to be filled, so `keep` is met only nearly."
)


def small_grid(grid: tuple[int, int], keep: int) -> tuple[int, int]:
    """Rows and columns, in the proportion of `grid`, whose product is nearest to `keep` side by side."""
    share = (keep / (grid[0] * grid[1])) ** 0.5
    return tuple(max(1, round(side * share)) for side in grid)


def cells(grid: tuple[int, int], small: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Which patch of the `small` grid covers each of the full `grid`, (patches,), both in reading order."""
    rows, columns = (torch.arange(n, device=device) * m // n for n, m in zip(grid, small, strict=True))
    return (rows[:, None] * small[1] + columns).flatten()


def plan(lvlm_or_model: LVLM | PreTrainedModel, keep: float | int = 64, positions: str = "contiguous") -> Plan:
    """About `keep` patches of every picture, tile or frame are left: a grid of them, which the tower sees alone.

    ValueError where the tower does not interpolate its position embeddings, or tokens are no patches.
    """
    check_keep(keep)
    model = check(lvlm_or_model, "downsample")
    for tower in towers_of(model).values():
        if "interpolate_pos_encoding" not in signature(tower.forward).parameters:
            raise ValueError(f"{type(tower).__name__} takes pictures of one size only: take the method random.")
    return Plan({0: representatives}, positions, sees={"keys": 0}, within=partial(_smaller, keep=keep), asks=False)


@contextmanager
def _smaller(model: PreTrainedModel, keep: float | int) -> Iterator[None]:
    with ExitStack() as stack:
        for tower in towers_of(model).values():
            run = _Smaller(model, int(has_cls(model)), keep)
            stack.enter_context(tower.register_forward_pre_hook(run.shrink, with_kwargs=True))
            stack.enter_context(tower.register_forward_hook(run.finish))
        yield


class _Smaller:
    """One tower that sees small pictures."""

    def __init__(self, model: PreTrainedModel, skip: int, keep: float | int):
        self.model, self.skip, self.keep = model, skip, keep

    def shrink(self, tower: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        pixels = args[0] if args else kwargs["pixel_values"]
        patch = tower.config.patch_size
        grid = tuple(side // patch for side in pixels.shape[-2:])
        small = small_grid(grid, kept(self.keep, grid[0] * grid[1]))
        if small != grid:
            size = tuple(side * patch for side in small)
            less = interpolate(pixels.float(), size=size, mode="bilinear", antialias=True).to(pixels.dtype)
            kwargs = {**kwargs, "interpolate_pos_encoding": True}
            args, kwargs = ((less, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": less})
        whole = torch.arange(self.skip, device=pixels.device)
        source = torch.cat([whole, self.skip + cells(grid, small, pixels.device)]).expand(len(pixels), -1)
        self.maps = {small[0] * small[1] + self.skip: source}
        return args, kwargs

    def finish(self, tower: nn.Module, args: tuple, output: Any) -> ModelOutput:
        return behind(self.model, output, self.maps, self.skip)
