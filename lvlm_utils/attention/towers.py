"""What the vision towers show of a prompt's pictures on their way through: for `observe` and for methods that prune."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lvlm_utils.attention.intercept import Call, intercept
from lvlm_utils.attention.streaming import attention_row, scores_of, stream
from lvlm_utils.attention.visibility import Views, Visibility
from lvlm_utils.families import family_of, towers_of
from lvlm_utils.models import LVLM, bare
from lvlm_utils.session import Session

CLASS_TOKEN = {"class_embedding", "cls_token"}  # names of the parameter in towers that have one
SEEN = ("cls", "received", "given", "keys", "query", "hidden")  # what a method may see
OF_CLASS = {"cls", "query"}  # what only a tower with [CLS] has
OBSERVED = {"sums": "received", "entropy": "entropy", "variance": "variance"}  # the statistics of `stream`
AXIS = {"keys": 1, "hidden": 0}  # of the tokens; the last one otherwise


def has_cls(lvlm: LVLM | nn.Module) -> bool:
    """Whether the vision tower has a [CLS] token (CLIP and InternVL have one; SigLIP and the Qwen kind do not)."""
    return _has_class(next(iter(towers_of(bare(lvlm)).values())))


def _has_class(tower: nn.Module) -> bool:
    return any(path.rpartition(".")[2] in CLASS_TOKEN for path, _ in tower.named_parameters())


def before_patches(tower: nn.Module) -> int:
    """How many tokens of a tower come before its patches: [CLS] and registers."""
    return int(_has_class(tower)) + getattr(tower.config, "num_register_tokens", 0)


def tower_layers(tower: nn.Module) -> nn.ModuleList:
    """The layers of a vision tower: its longest list of modules. ValueError if it has none."""
    lists = [part for part in tower.modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(tower).__name__} has no list of layers, so its attention cannot be used here.")
    return max(lists, key=len)


@dataclass
class Picture:
    """One picture, tile or frame as a tower saw it.

    seen: name -> a tensor for every layer that was asked for. cls (heads, T): the row of [CLS]. received, given
    (heads, N): means over the patch queries, and over the patch keys, of the attention between patches (softmaxed over
    all keys). keys (heads, T, d); query (heads, d) of [CLS]; hidden (T, C) after the layer. T counts [CLS] and
    registers, which come first, where the tower has them. sums, entropy and variance (heads, T) are those of `stream`,
    over all tokens.
    features: what goes into the projector, one row for each of its tokens, where pictures come to it one by one.
    size: N. merged: whether the patches of a token follow each other (the packed towers), or all are in reading order.
    source: where a method merges patches inside the tower, which of its tokens each became part of, (N,).
    """

    tower: str
    seen: dict[str, list[Tensor]] = field(default_factory=dict)
    features: Tensor | None = None
    size: int = 0
    merged: bool = False
    source: Tensor | None = None


class Towers:
    """The `pictures` of the prompt that is read, in the order in which the towers got them.

    sees: name -> layer of the tower, counted like a list, or None for all layers. whole: a video that is packed counts
    as one picture, and a tower whose attention cannot be seen is left out. after: called when a tower is through.
    ValueError for what a tower does not have.
    """

    def __init__(
        self, session: Session, sees: Mapping[str, int | None], whole: bool = False,
        after: Callable[[str], None] = lambda tower: None,
    ):  # fmt: skip
        self.session, self.whole, self.after = session, whole, after
        self.pictures: list[Picture] = []
        self.hooks = ExitStack()
        family = family_of(session.model)
        for name, tower in towers_of(session.model).items():
            if whole or name not in family.unwatched:
                _Tower(self, name, tower, sees)
        if not whole:
            self.hooks.callback(session.hook(session.model.get_submodule(family.projector), self._features))
        session.parts.append(self)
        self.hooks.callback(session.parts.remove, self)

    def new_prompt(self) -> None:
        self.pictures = []

    def _features(self, projector: nn.Module, args: tuple, kwargs: dict) -> None:
        """What goes into the projector belongs to the pictures of the tower that ran last."""
        x = args[0] if len(args) == 1 else None  # DeepSeek-VL 7B gives those of two towers
        if isinstance(x, Tensor) and x.dim() == 3 and len(x) <= len(self.pictures):
            for picture, features in zip(self.pictures[-len(x) :], x, strict=True):
                if picture.features is None:  # later calls are a method's own
                    picture.features = features


class _Tower:
    """One tower, and what is seen of it in the pass that runs."""

    def __init__(self, towers: Towers, name: str, tower: nn.Module, sees: Mapping[str, int | None]):
        layers, kind = tower_layers(tower), type(tower).__name__
        self.towers, self.name, self.config = towers, name, tower.config
        self.has_class, self.before, self.calls = _has_class(tower), before_patches(tower), None
        if (lacking := OF_CLASS & set(sees)) and not self.has_class and not towers.whole:
            raise ValueError(f"{kind} has no [CLS] token, so there is no {' and '.join(sorted(lacking))} to see.")
        names = defaultdict(set)  # layer -> what is seen of it
        for one, layer in sees.items():
            if layer is not None and not -len(layers) <= layer < len(layers):
                raise ValueError(f"Layer {layer} of the vision tower: {kind} has {len(layers)} layers.")
            for number in range(len(layers)) if layer is None else [layer % len(layers)]:
                if self.has_class or one not in OF_CLASS:
                    names[number].add(one)
        hook, stack = towers.session.hook, towers.hooks
        stack.callback(hook(tower, self._start, self._finish))
        for number, wanted in names.items():
            if "hidden" in wanted:
                stack.callback(hook(layers[number], after=partial(self._hidden, number)))
            if wanted - {"hidden"}:
                stack.enter_context(intercept(partial(self._see, number, wanted), layers[number]))

    def _start(self, tower: nn.Module, args: tuple, kwargs: dict) -> None:
        self.grid, self.views, self.calls = kwargs.get("grid_thw"), Views(), defaultdict(list)

    def _hidden(self, layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        if self.calls is not None:
            x = output[0] if isinstance(output, tuple) else output
            self.calls["hidden", layer].append(x if x.dim() == 3 else x[None])

    def _see(self, layer: int, names: set[str], call: Call) -> None:
        if self.calls is None:  # the tower is through: a backward pass computes its attention once more
            return
        for one in call.unpacked():
            for name, value in self._values(one, names).items():
                self.calls[name, layer].append(value)

    def _values(self, call: Call, names: set[str]) -> dict[str, Tensor]:
        view, batch = self.views.of(call), len(call.query)
        first = torch.zeros(batch, dtype=torch.long, device=call.query.device)
        streamed = {name: one for name, one in OBSERVED.items() if name in names}
        values = stream(call.query, call.key, call.scale, view, set(streamed.values()))
        found = {name: values[one] for name, one in streamed.items()}
        found |= {"keys": call.key, "query": call.query[:, :, 0], "seers": view.seers[:, None].expand(batch, -1, -1)}
        if "cls" in names:
            found["cls"] = attention_row(call.query, call.key, call.scale, view, first)
        if {"received", "given"} & names:
            found["received"], found["given"] = self._between_patches(call, view)
        return {name: value for name, value in found.items() if name in names}

    @torch.no_grad()
    def _between_patches(self, call: Call, view: Visibility) -> Tensor:
        """received and given (2, ...); a few pictures at a time, so that memory is bounded for many tiles."""
        pictures, heads, tokens, _ = call.query.shape
        skip = self.before
        step = max(1, scores_of(call.query.device) // (heads * tokens * tokens))
        key = call.key.repeat_interleave(heads // call.key.shape[1], 1).float()
        parts = []
        for start in range(0, pictures, step):
            some = slice(start, start + step)
            scores = call.query[some].float() @ key[some].transpose(2, 3) * call.scale
            hidden = ~view.visible(0, tokens, prompts=some)[:, None]
            between = scores.masked_fill_(hidden, -torch.inf).softmax(-1).nan_to_num_()[..., skip:, skip:]
            parts.append(torch.stack([between.mean(2), between.mean(3)]))
        return torch.cat(parts, 1)

    def _finish(self, tower: nn.Module, args: tuple, output: Any) -> None:
        calls, self.calls = self.calls, None
        pictures: list[Picture] = []
        for (name, _), parts in sorted(calls.items()):
            values = self._by_picture(name, parts)
            pictures = pictures or [Picture(self.name, merged=self.grid is not None) for _ in values]
            for picture, value in zip(pictures, values, strict=True):
                picture.seen.setdefault(name, []).append(value)
                if name != "query":
                    picture.size = value.shape[AXIS.get(name, -1)]
                    picture.size -= 0 if name in ("received", "given") else self.before
        if not pictures and not self.towers.whole:
            raise ValueError(
                f"The attention of {type(tower).__name__} does not go through transformers' interface: "
                "methods that look at it cannot be used."
            )
        self.towers.pictures += pictures
        if pictures:
            self.towers.after(self.name)

    def _by_picture(self, name: str, calls: list[Tensor]) -> list[Tensor]:
        """One tensor a picture or frame. Packed towers get all in one row, in parts: pictures, frames or windows."""
        if self.grid is None:
            return [*torch.cat(calls)]
        axis = AXIS.get(name, -1)
        packed = torch.cat(calls, axis + 1 if axis >= 0 else axis)[0]
        packed = packed.movedim(axis, 0)[patch_order(self.config, self.grid)]
        sizes = [
            size for time, height, width in self.grid.tolist()
            for size in ([time * height * width] if self.towers.whole else [height * width] * time)
        ]  # fmt: skip
        return [part.movedim(0, axis) for part in packed.split(sizes)]


def patch_order(config: PreTrainedConfig, grid: Tensor) -> Tensor | slice:
    """Which place each patch, in the order of the processor, has in the tower: Qwen2.5-VL sorts them by window."""
    if not hasattr(config, "fullatt_block_indexes"):
        return slice(None)
    merge = config.spatial_merge_size
    side = config.window_size // config.patch_size // merge
    windows, before = [], 0
    for time, height, width in grid.tolist():
        sides = (torch.arange(n, device=grid.device) for n in (time, height // merge, width // merge))
        units = torch.cartesian_prod(*sides)
        keys = units // torch.tensor([1, side, side], device=grid.device)
        windows.append(torch.unique(keys, dim=0, return_inverse=True)[1] + before)
        before = int(windows[-1].max()) + 1
    place = torch.cat(windows).argsort(stable=True).argsort()
    return (place[:, None] * merge**2 + torch.arange(merge**2, device=grid.device)).flatten()
