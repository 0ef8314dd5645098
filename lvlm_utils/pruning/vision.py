"""What methods see of the vision towers while a prompt's pictures run through them: attention, keys, features."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lvlm_utils.attention.intercept import Call, intercept
from lvlm_utils.attention.record import CLASS_TOKEN, Views, patch_order
from lvlm_utils.attention.streaming import attention_row, scores_of
from lvlm_utils.families import family_of, towers_of
from lvlm_utils.models import LVLM, bare

SEEN = ("cls", "received", "given", "keys", "query", "hidden")
OF_CLASS = {"cls", "query"}  # what only a tower with [CLS] has


def has_cls(lvlm_or_model: LVLM | PreTrainedModel) -> bool:
    """Whether the vision tower has a [CLS] token (CLIP, InternVL have one; SigLIP and the Qwen kind do not)."""
    return _has_class(next(iter(towers_of(bare(lvlm_or_model)).values())))


def tower_layers(tower: nn.Module) -> nn.ModuleList:
    """The layers of a vision tower: its longest list of modules. ValueError if it has none."""
    lists = [part for part in tower.modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(tower).__name__} has no list of layers, so its attention cannot be used here.")
    return max(lists, key=len)


def _has_class(tower: nn.Module) -> bool:
    return any(path.rpartition(".")[2] in CLASS_TOKEN for path, _ in tower.named_parameters())


class Sight:
    """What the towers showed of the prompt that runs: `pictures`, in the order in which the towers got them.

    Each is a mapping from (name, layer as the plan gave it) to a tensor of that picture, tile or frame:

    cls (heads, 1 + N) row of [CLS]; received, given (heads, N) means over the patch queries, over the patch keys, of
    the attention between patches (softmaxed over all keys); keys (heads, T, d); query (heads, d) of [CLS]; hidden
    (T, C) behind the layer. T counts [CLS], which comes first, where the tower has one. ("features", None) is what
    goes into the projector, one row for each of its tokens, where pictures come to it one by one. ("size", None) is N,
    and whether patches stand together as they are merged (the packed towers) or in reading order.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.pictures: list[dict[Any, Tensor]] = []
        self.done = True  # the decoder has got the pictures seen so far

    @contextmanager
    def watching(self, sees: Mapping[str, int]) -> Iterator[None]:
        """Record what `sees` names, name -> layer of the tower counted like a list; ValueError where it has none."""
        with ExitStack() as stack:
            for name, tower in towers_of(self.model).items():
                if name != "high_res":  # DeepSeek-VL's second tower for the same tokens, whose attention is its own
                    stack.enter_context(_Watch(self, tower, sees).installed())
            projector = self.model.get_submodule(family_of(self.model).projector)
            stack.enter_context(projector.register_forward_pre_hook(self._features))
            yield

    def prompt_done(self) -> None:
        self.done = True

    def starts(self) -> None:
        """A tower begins: its pictures are of a new prompt, if the decoder has had those before."""
        if self.done:
            self.pictures, self.done = [], False

    def _features(self, projector: nn.Module, args: tuple) -> None:
        """What goes into the projector belongs to the pictures of the tower that ran last."""
        x = args[0] if len(args) == 1 else None  # DeepSeek-VL 7B gives those of two towers
        if not isinstance(x, Tensor) or x.dim() != 3 or len(x) > len(self.pictures):
            return
        for picture, features in zip(self.pictures[-len(x) :], x, strict=True):
            picture.setdefault(("features", None), features)  # later calls are a method's own


class _Watch:
    """One tower under one plan."""

    def __init__(self, sight: Sight, tower: nn.Module, sees: Mapping[str, int]):
        layers, kind = tower_layers(tower), type(tower).__name__
        if unknown := set(sees) - set(SEEN):
            raise ValueError(f"A plan sees {', '.join(sorted(unknown))}: there are only {', '.join(SEEN)}.")
        if odd := [layer for layer in sees.values() if not -len(layers) <= layer < len(layers)]:
            raise ValueError(f"Layer {odd[0]} of the vision tower: {kind} has {len(layers)} layers.")
        self.has_class = _has_class(tower)
        if (wanted := OF_CLASS & set(sees)) and not self.has_class:
            raise ValueError(f"{kind} has no [CLS] token, so there is no {' and '.join(sorted(wanted))} to see.")
        self.sight, self.tower, self.layers = sight, tower, layers
        self.names = defaultdict(set)  # layer -> what is seen of it
        for name, layer in sees.items():
            self.names[layer % len(layers)].add(name)
        self.given = {(name, layer % len(layers)): layer for name, layer in sees.items()}

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self.tower.register_forward_pre_hook(self._start, with_kwargs=True))
            stack.enter_context(self.tower.register_forward_hook(self._finish))
            for layer, names in self.names.items():
                if "hidden" in names:
                    stack.enter_context(self.layers[layer].register_forward_hook(partial(self._hidden, layer)))
                if names - {"hidden"}:
                    stack.enter_context(intercept(partial(self._see, layer), self.layers[layer]))
            yield

    def _start(self, tower: nn.Module, args: tuple, kwargs: dict) -> None:
        self.sight.starts()
        self.before = len(self.sight.pictures)
        self.grid, self.views, self.calls = kwargs.get("grid_thw"), Views(), defaultdict(list)

    def _hidden(self, layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        self.calls["hidden", layer].append(x if x.dim() == 3 else x[None])

    def _see(self, layer: int, call: Call) -> None:
        for one in call.unpacked():
            for name, value in self._values(one, self.names[layer]).items():
                self.calls[name, layer].append(value)

    def _values(self, call: Call, names: set[str]) -> dict[str, Tensor]:
        first = torch.zeros(len(call.query), dtype=torch.long, device=call.query.device)
        found = {}
        if "cls" in names:
            found["cls"] = attention_row(call.query, call.key, call.scale, self.views.of(call), first)
        if {"received", "given"} & names:
            found["received"], found["given"] = self._means(call)
        if "keys" in names:
            found["keys"] = call.key
        if "query" in names:
            found["query"] = call.query[:, :, 0]
        return {name: found[name] for name in names if name in found}

    @torch.no_grad()
    def _means(self, call: Call) -> tuple[Tensor, Tensor]:
        """received and given; a few pictures at a time, so that memory is bounded for many tiles."""
        pictures, heads, tokens, _ = call.query.shape
        view, skip = self.views.of(call), int(self.has_class)
        step = max(1, scores_of(call.query.device) // (heads * tokens * tokens))
        key = call.key.repeat_interleave(heads // call.key.shape[1], 1).float()
        parts = []
        for start in range(0, pictures, step):
            some = slice(start, start + step)
            scores = call.query[some].float() @ key[some].transpose(2, 3) * call.scale
            hidden = ~view.visible(0, tokens, prompts=some)[:, None]
            between = scores.masked_fill_(hidden, -torch.inf).softmax(-1).nan_to_num_()[..., skip:, skip:]
            parts.append(torch.stack([between.mean(2), between.mean(3)]))
        received, given = torch.cat(parts, 1)
        return received, given

    def _finish(self, tower: nn.Module, args: tuple, output: Any) -> None:
        pictures = self.sight.pictures[self.before :]  # there already if another plan watches the same tower
        for (name, layer), calls in self.calls.items():
            values = self._by_picture(name, calls)
            if not pictures:
                pictures = [{} for _ in values]
                self.sight.pictures += pictures
            for picture, value in zip(pictures, values, strict=True):
                picture[name, self.given[name, layer]] = value
        if not pictures:
            raise ValueError(
                f"The attention of {type(tower).__name__} does not go through transformers' interface: "
                "methods that look at it cannot be used."
            )
        for picture in pictures:
            picture["size", None] = self._size(picture), self.grid is not None
        self.calls = None

    def _size(self, picture: dict) -> int:
        """N, from whatever was seen."""
        seen = [(name, value) for (name, _), value in picture.items() if name in SEEN and name != "query"]
        if not seen:
            raise ValueError('A plan that sees the "query" of [CLS] has to see something of the patches too.')
        name, value = seen[0]
        tokens = value.shape[{"keys": 1, "hidden": 0}.get(name, -1)]
        return tokens - (self.has_class and name not in ("received", "given"))

    def _by_picture(self, name: str, calls: list[Tensor]) -> list[Tensor]:
        """One tensor a picture or frame. Packed towers get all in one row, in parts: pictures, frames or windows."""
        if self.grid is None:
            return [*torch.cat(calls)]
        axis = {"keys": 2, "hidden": 1}.get(name, -1)
        packed = torch.cat(calls, axis)[0]
        axis = axis - 1 if axis > 0 else axis
        packed = packed.movedim(axis, 0)[patch_order(self.tower.config, self.grid)]
        sizes = [size for time, height, width in self.grid.tolist() for size in [height * width] * time]
        return [part.movedim(0, axis) for part in packed.split(sizes)]
