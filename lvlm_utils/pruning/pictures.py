"""Pictures as a method sees them: which visual token is which patch, what the tower showed of it, and what is kept."""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvlm_utils.attention.towers import AXIS, Picture
from lvlm_utils.families import family_of, registers_of, visual_ids

if TYPE_CHECKING:
    from lvlm_utils.pruning.engine import Tokens


@dataclass
class View:
    """One picture, tile or frame of one prompt."""

    row: int  # of the batch
    slots: Tensor  # (V,) of its visual tokens
    places: Tensor  # (V, 2) their rows and columns
    order: Tensor  # (V,) which of its tokens they are, as the prompt counts
    patches: Tensor  # (V, patches that make a token) numbered as in the tower
    size: int  # patches in the tower
    picture: Picture | None  # what a tower showed of it


class Pictures:
    """Pictures, tiles or frames of equal size: P of them with V visual tokens each, of any prompts of the batch.

    `rows` (P,) is the prompt that each belongs to, `slots` (P, V) where its tokens are there. Visual slots that are
    no patch (newlines, registers, [CLS] of a video) belong to no picture and are not kept.
    """

    def __init__(self, tokens: "Tokens", views: list["View"]):
        device = tokens.hidden.device
        self.tokens, self.views = tokens, views
        self.rows = torch.tensor([view.row for view in views], device=device)
        self.slots = torch.stack([view.slots for view in views]).to(device)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the visual tokens, which are in reading order. ValueError where they fill no grid."""
        rows, columns = (len(self.views[0].places[:, axis].unique()) for axis in (0, 1))
        if rows * columns != self.slots.shape[1]:
            raise ValueError(f"The {self.slots.shape[1]} visual tokens of a picture fill no grid, so it has no rows.")
        return rows, columns

    @cached_property
    def projected(self) -> Tensor:
        """(P, V, D): the visual tokens as they go into the language model."""
        return self.tokens.hidden[self.rows[:, None], self.slots]

    @cached_property
    def features(self) -> Tensor:
        """(P, V, C): what goes into the projector; the projected tokens where the projector mixes patches."""
        first = self.views[0]
        if first.picture is None or first.picture.features is None:
            return self.projected
        found = [view.picture.features for view in self.views]
        if self._patch_by_patch:  # after registers, and [CLS], which Video-LLaVA projects too
            rows = [x[len(x) - first.size :].T for x in found]
            return torch.stack([self._of_tokens(x, view).T for x, view in zip(rows, self.views, strict=True)])
        if len(found[0]) * first.patches.shape[1] == first.size:  # merged before the projector
            return torch.stack([x[view.order.to(x.device)] for x, view in zip(found, self.views, strict=True)])
        return self.projected

    @property
    def _patch_by_patch(self) -> bool:
        """Whether what goes into the projector is one row for each patch of the tower."""
        first = self.views[0]
        features = None if first.picture is None else first.picture.features
        before = 1 + registers_of(self.tokens.prefill.model.config)
        return features is not None and 0 <= len(features) - first.size <= before

    def seen(self, name: str) -> Tensor:
        """What the method sees ("cls", "received" or "given") of every visual token, (P, heads, V).

        The mean over its patches, where the model merges several into one token; [CLS] as a key is left out.
        """
        found = zip(self._seen(name), self.views, strict=True)
        return torch.stack([self._of_tokens(x[:, x.shape[1] - view.size :], view) for x, view in found])

    def raw(self, name: str) -> Tensor:
        """What the method sees as the tower has it, (P, ...): of [CLS] if there is one, and of patches that are tokens.

        ValueError unless every visual token is one patch.
        """
        found = self._seen(name)
        if not self.one_to_one:
            raise ValueError(
                f"{self._model} makes a visual token of several patches, so patches of its tower cannot "
                "be merged: take a method that only selects, such as vispruner or divprune."
            )
        if name == "query":
            return torch.stack(found)
        axis = AXIS.get(name, -1)
        skip = found[0].shape[axis] - self.views[0].size  # [CLS] first, and registers, which are left out
        patches = [skip + view.patches[:, 0].to(x.device) for view, x in zip(self.views, found, strict=True)]
        index = [torch.cat([torch.arange(min(skip, 1), device=at.device), at]) for at in patches]
        return torch.stack([x.index_select(axis, at) for x, at in zip(found, index, strict=True)])

    def project(self, features: Tensor) -> Tensor:
        """(..., C) -> (..., D) by the model's projector. ValueError where that mixes patches."""
        if not self.one_to_one or not self._patch_by_patch:
            raise ValueError(
                f"The projector of {self._model} mixes patches, so merged ones cannot go through it: "
                "take a method that only selects, such as vispruner or divprune."
            )
        model = self.tokens.prefill.model
        projector = model.get_submodule(family_of(model).projector)
        flat = features.flatten(0, -2)[None]
        return projector(flat.to(next(projector.parameters()).dtype))[0].view(*features.shape[:-1], -1)

    @property
    def one_to_one(self) -> bool:
        """Whether a visual token is a patch of the tower. (Some patches may be no token: padding of LLaVA-NeXT.)"""
        return all(view.patches.shape[1] == 1 and view.picture is not None for view in self.views)

    @property
    def _model(self) -> str:
        return self.tokens.prefill.model.config.model_type

    def _seen(self, name: str) -> list[Tensor]:
        if name not in self.tokens.sees:
            raise ValueError(f"{name!r} of the tower was not recorded: name it in the method's `sees`.")
        return [view.picture.seen[name][0] for view in self.views]

    @staticmethod
    def _of_tokens(x: Tensor, view: "View") -> Tensor:
        """(..., patches) -> (..., V)."""
        return x[..., view.patches.to(x.device)].mean(-1)


def look(tokens: "Tokens") -> list[Pictures]:
    """All pictures of the batch, those of equal size together. ValueError without any, or if they are not known."""
    views = _views(tokens)
    if not views:
        raise ValueError("No visual tokens to prune: a prompt has no picture, or all its tokens were dropped before.")
    sizes = defaultdict(list)
    for view in views:
        shape = tuple(len(view.places[:, axis].unique()) for axis in (0, 1))
        sizes[len(view.slots), shape, view.size, view.patches.shape[1]].append(view)
    return [Pictures(tokens, group) for group in sizes.values()]


def _views(tokens: "Tokens") -> list[View]:
    prefill, seen = tokens.prefill, None if tokens.towers is None else tokens.towers.pictures
    places = _places(tokens).cpu()  # image, tile, row, column (4, prompts, tokens)
    ids = prefill.ids.cpu()
    times = len(tokens.place) // places.shape[1]  # rows are repeated for beams
    kinds = {token: kind for kind, token in enumerate(visual_ids(prefill.model))}
    found = []
    for row, (image, tile, *_) in enumerate(places.transpose(0, 1)):
        pairs = torch.stack([image, tile], 1)[(image >= 0) & (tile >= 0)]
        for number, part in dict.fromkeys(map(tuple, pairs.tolist())):  # in the order of the prompt
            columns = ((image == number) & (tile == part)).nonzero()[:, 0]
            found.append((kinds.get(int(ids[row * times, columns[0]]), 0), row, number, columns))
    found.sort(key=lambda one: one[:3])  # a tower sees all pictures, then all videos
    if seen is not None and len(seen) != len(found):
        raise ValueError(
            f"The vision tower saw {len(seen)} pictures, tiles or frames, the prompts have {len(found)}: "
            "this way of showing pictures cannot be pruned by what the tower sees (divprune needs no tower)."
        )
    # column of the prompt -> slot of the layer
    where = torch.full((len(tokens.place), prefill.tokens), -1, device=places.device)
    slots = torch.arange(tokens.place.shape[1], device=places.device).expand(tokens.place.shape)
    where.scatter_(1, tokens.place.cpu(), slots.where(tokens.alive.cpu(), -1))
    whole = {}  # largest grid among the tiles of an image
    for _, row, number, columns in found:
        size = 1 + int(places[2:, row, columns].max())
        whole[row, number] = max(size, whole.get((row, number), 0))
    views = []
    for at, (_, row, number, columns) in enumerate(found):
        picture = seen[at] if seen is not None else None
        for copy in range(row * times, (row + 1) * times):
            views += _view(picture, copy, where[copy, columns], places[2:, row, columns].T, whole[row, number])
    return views


def _view(picture: Picture | None, row: int, slots: Tensor, places: Tensor, whole: int) -> list[View]:
    """The tokens of one picture that are patches and still there; none if there are none."""
    size, blocks = (len(slots), True) if picture is None else (picture.size, picture.merged)
    order = torch.arange(len(slots), device=slots.device)
    if blocks:  # the patches of a token follow each other
        merged, rank = size // len(slots), places[:, 0] * (1 + places[:, 1].max()) + places[:, 1]
        if merged * len(slots) != size or (picture is not None and not torch.equal(rank, order)):
            raise ValueError(
                f"{len(slots)} visual tokens are not all of a picture of {size} patches: some were left out."
            )
        patches = order[:, None] * merged + torch.arange(merged, device=slots.device)
    else:
        side = isqrt(size)
        merge = side // whole
        if side**2 != size or merge * whole != side:
            raise ValueError(f"{size} patches of a tower do not fit a grid of {whole} x {whole} visual tokens.")
        steps = torch.arange(merge, device=slots.device)
        inside = torch.cartesian_prod(steps, steps).view(-1, 2)
        patches = (places[:, :1] * merge + inside[:, 0]) * side + places[:, 1:] * merge + inside[:, 1]
    there = (slots >= 0) & (places >= 0).all(1)
    return [View(row, slots[there], places[there], order[there], patches[there], size, picture)] if there.any() else []


def _places(tokens: "Tokens") -> Tensor:
    """image, tile, row and column of every token, (4, prompts, tokens); -1 where there is none."""
    prefill, groups = tokens.prefill, tokens.groups
    if groups is not None:
        return torch.stack([groups.image, groups.tile, groups.row, groups.column])
    visual = prefill.visual
    if visual is None or registers_of(prefill.model.config) or not family_of(prefill.model).square:
        raise ValueError("Which visual tokens are one picture is not known here: ask with lv.generate.")
    visual = visual.cpu()
    sizes = {picture.size for picture in tokens.towers.pictures} if tokens.towers is not None else set()
    starts = visual & ~torch.cat([torch.zeros_like(visual[:, :1]), visual[:, :-1]], 1)
    size = sizes.pop() if len(sizes) == 1 else int(visual.sum()) // max(int(starts.sum()), 1)
    rank = visual.cumsum(1) - 1
    side = isqrt(size)
    if side**2 != size or bool((visual.sum(1) % size).any()):
        raise ValueError(f"Pictures of {size} visual tokens are no squares: ask with lv.generate.")
    image = rank // size
    places = torch.stack([image, torch.zeros_like(rank), rank % size // side, rank % side])
    return places.where(visual, -1)
