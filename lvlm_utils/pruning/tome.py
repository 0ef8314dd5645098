"""ToMe (Bolya et al., ICLR 2023, arXiv:2210.09461): merge the most similar tokens in every layer of the vision tower.

The matching is that of the official code (facebookresearch/ToMe, af95e4b): tokens at even places look for the most
similar one at odd places, by the keys of the layer (mean over heads), and the r most similar pairs become one token
each, weighted by the patches that it already stands for (proportional attention: log of that is added to the scores).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from lvlm_utils.attention.intercept import Call, intercept
from lvlm_utils.families import towers_of
from lvlm_utils.models import LVLM, bare
from lvlm_utils.pruning.budget import check_keep, kept
from lvlm_utils.pruning.engine import ENGINES
from lvlm_utils.pruning.tokens import Plan, Tokens
from lvlm_utils.pruning.vision import has_cls, tower_layers

KIND = "visual, before the LLM"
NEEDS_CLS = False
OFFICIAL = "facebookresearch/ToMe af95e4b"
DEVIATIONS = (
    "`reduce` matches, its order too. In a model tokens are merged behind a layer, not between its attention and MLP, "
    "up to the layer of the features, and stand in the LLM in the order of their first patches (the official order is "
    "that of the matching). `keep` spreads the merges evenly over the layers; the official code has r alone."
)
# Families whose visual tokens are the tower's patches one by one, with a projector that works token by token.
ONE_BY_ONE = (
    "llava", "vipllava", "llava_next", "llava_next_video", "llava_onevision", "video_llava", "deepseek_vl"
)  # fmt: skip


def match(metric: Tensor, r: int, class_token: bool = False) -> tuple[Tensor, int]:
    """Which merged token each token becomes part of, (batch, N), and how many there are: N less r, at most half."""
    batch, size, _ = metric.shape
    r = max(0, min(r, (size - class_token) // 2))
    if r == 0:
        return torch.arange(size, device=metric.device).expand(batch, -1), size
    unit = normalize(metric.float(), dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    if class_token:
        scores[:, 0] = -torch.inf
    best, into = scores.max(-1)
    stay = best.argsort(dim=1, descending=True)[:, r:]
    if class_token:
        stay = stay.sort(1).values
    place = torch.arange(size, device=metric.device).expand(batch, -1)
    evens = (into + stay.shape[1]).scatter(1, stay, place)
    source = torch.empty_like(place, memory_format=torch.contiguous_format)
    source[:, ::2], source[:, 1::2] = evens, place[:, : size // 2] + stay.shape[1]
    return source, size - r


def combine(tokens: Tensor, size: Tensor, source: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Means of what was merged, (batch, left, C), weighted by `size` (batch, N, 1), and their sizes."""
    at = source[..., None]
    sizes = size.new_zeros(len(size), left, 1).scatter_add(1, at, size)
    sums = size.new_zeros(len(size), left, tokens.shape[-1]).scatter_add(1, at.expand_as(tokens), tokens.float() * size)
    return (sums / sizes).to(tokens.dtype), sizes


def reduce(metric: Tensor, tokens: Tensor, r: int, class_token: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Merge `r` of the `tokens` (batch, N, C), at most half, by `metric` (batch, N, d); [CLS] first is left alone.

    Returns tokens (batch, N - r, C), how many each stands for (batch, N - r, 1), and which each went to (batch, N).
    """
    source, left = match(metric, r, class_token)
    size = torch.ones(*metric.shape[:2], 1, device=metric.device)
    return *combine(tokens, size, source, left), source


def schedule(patches: int, layers: int, keep: int) -> list[int]:
    """How many to merge in each of `layers`, as evenly as halving at most allows, so that `keep` are left.

    ValueError if that many halvings leave more.
    """
    steps, left = [], patches
    for behind in reversed(range(layers)):
        even = -(-(left - keep) // (behind + 1))
        steps.append(min(left // 2, max(even, left - keep * 2**behind)))
        left -= steps[-1]
    if left > keep:
        raise ValueError(
            f"ToMe halves {patches} patches at most in each of {layers} layers: keep={keep} is below that."
        )
    return steps


def plan(
    lvlm_or_model: LVLM | PreTrainedModel,
    keep: float | int | None = None,
    r: int | Sequence[int] | None = None,
    proportional: bool = True,
    positions: str = "contiguous",
) -> Plan:
    """`keep` of each picture's patches are left behind the tower; or `r` are merged in every layer (or r of each).

    `proportional` lets a token count in attention as often as it has patches, which needs a mask that flash attention
    does not take. ValueError for that, for both or none of `keep` and `r`, and where tokens are no patches.
    """
    if (keep is None) == (r is None):
        raise ValueError("Give keep (what is left of each picture), or r (what is merged in every layer of the tower).")
    if keep is not None:
        check_keep(keep)
    model = check(lvlm_or_model, "ToMe")
    flash = [name for tower in towers_of(model).values() if "flash" in (name := tower.config._attn_implementation)]
    if flash and proportional:
        raise ValueError(f"{flash[0]} takes no weights of tokens: proportional=False, or another attention.")
    features = getattr(model.config, "vision_feature_layer", None)
    features = features if isinstance(features, list | tuple) else [-1 if features is None else features]
    merging = partial(_merging, keep=keep, r=r, proportional=proportional, features=features)
    return Plan({0: representatives}, positions, sees={"keys": 0}, within=merging, asks=False)


def check(lvlm_or_model: LVLM | PreTrainedModel, method: str) -> PreTrainedModel:
    """The transformers model. ValueError where its visual tokens are not the tower's patches one by one."""
    model = bare(lvlm_or_model)
    if model.config.model_type not in ONE_BY_ONE:
        raise ValueError(
            f"{method} changes the patches inside the tower, which {model.config.model_type} packs, or makes a visual "
            "token of several: take a method that selects behind the tower, such as divprune or vispruner."
        )
    return model


def representatives(tokens: Tokens) -> Tensor:
    """Choose: of the visual tokens that are copies of one, the first."""
    for pictures in tokens.pictures:
        if not pictures.one_to_one:
            raise ValueError("Frames of this model are pooled behind the tower: take divprune or vispruner.")
        groups = [view.picture["source", None][view.patches[:, 0].to(tokens.hidden.device)] for view in pictures.views]
        groups = torch.stack(groups)
        place = torch.arange(groups.shape[1], device=groups.device).expand_as(groups)
        first = place.new_full((len(groups), pictures.views[0].size), groups.shape[1])
        pictures.keep(first.scatter_reduce(1, groups, place, "amin").gather(1, groups) == place)
    return tokens.chosen()


def behind(model: PreTrainedModel, output: ModelOutput, maps: dict[int, Tensor], skip: int) -> ModelOutput:
    """A tower's output with as many tokens as it has without merging: each is a copy of what it became part of.

    `maps`: number of tokens -> (pictures, all tokens) which of them each is; the last is that of the features.
    `skip` tokens in front ([CLS]) are no patch.
    """

    def whole(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        source = maps[x.shape[1]].to(x.device)
        return x.gather(1, source[..., None].expand(-1, -1, x.shape[-1]))

    output["last_hidden_state"] = whole(output["last_hidden_state"])
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(whole(x) for x in output["hidden_states"])
    source = list(maps.values())[-1][:, skip:] - skip
    for picture, of_it in zip(ENGINES[model].sight.pictures[-len(source) :], source, strict=True):
        picture["source", None] = of_it
        picture["size", None] = len(of_it), False
    return output


@contextmanager
def _merging(model: PreTrainedModel, keep, r, proportional: bool, features: Sequence[int]) -> Iterator[None]:
    with ExitStack() as stack:
        for tower in towers_of(model).values():
            layers = tower_layers(tower)
            last = min(f + len(layers) if f < 0 else f - 1 for f in features)
            steps = partial(_steps, layers=last + 1, keep=keep, r=r)
            run = _Merging(model, int(has_cls(model)), steps)
            stack.enter_context(intercept(run.see, *layers[: last + 1]))
            stack.enter_context(tower.register_forward_pre_hook(run.start))
            stack.enter_context(tower.register_forward_hook(run.finish))
            for number, layer in enumerate(layers):
                stack.enter_context(layer.register_forward_pre_hook(partial(run.weigh, proportional), with_kwargs=True))
                if number <= last:  # before the library records the layer's output
                    stack.enter_context(layer.register_forward_hook(partial(run.merge, number), prepend=True))
        yield


def _steps(patches: int, layers: int, keep: float | int | None, r: int | Sequence[int] | None) -> list[int]:
    if keep is not None:
        return schedule(patches, layers, kept(keep, patches))
    steps = [r] * layers if isinstance(r, int) else list(r)
    if len(steps) != layers:
        raise ValueError(f"r has {len(steps)} numbers, but {layers} layers of the tower lead to its features.")
    return steps


class _Merging:
    """ToMe in one tower."""

    def __init__(self, model: PreTrainedModel, skip: int, steps: Callable[[int], list[int]]):
        self.model, self.skip, self.steps = model, skip, steps

    def start(self, tower: nn.Module, args: tuple) -> None:
        self.size = self.source = self.now = None
        self.maps: dict[int, Tensor] = {}

    def see(self, call: Call) -> None:
        self.metric = call.key.float().mean(1)

    def weigh(self, proportional: bool, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        x = args[0] if args else kwargs["hidden_states"]
        if self.size is None:
            self.size = torch.ones(*x.shape[:2], 1, device=x.device)
            self.source = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
            self.maps, self.now = {x.shape[1]: self.source}, self.steps(x.shape[1] - self.skip)
        if not proportional:
            return None
        mask = self.size.log().to(x.dtype).transpose(1, 2)[:, None]
        if len(args) > 1:
            return (x, mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    def merge(self, number: int, layer: nn.Module, args: tuple, x: Tensor) -> Tensor:
        source, left = match(self.metric, self.now[number], bool(self.skip))
        x, self.size = combine(x, self.size, source, left)
        self.source = source.gather(1, self.source)
        self.maps[left] = self.source
        return x

    def finish(self, tower: nn.Module, args: tuple, output: Any) -> ModelOutput:
        return behind(self.model, output, self.maps, self.skip)
