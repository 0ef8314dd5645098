"""ToMe (Bolya et al., ICLR 2023, arXiv:2210.09461): merge the most similar tokens in every layer of the vision tower.

The matching is that of the official code (facebookresearch/ToMe, af95e4b): tokens at even places look for the most
similar one at odd places, by the keys of the layer (mean over heads), and the r most similar pairs become one token
each, weighted by the patches that it already stands for (proportional attention: log of that is added to the scores).
"""

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers.utils import ModelOutput

from lvlm_utils.attention.intercept import Call, intercept
from lvlm_utils.attention.towers import Towers, before_patches, tower_layers
from lvlm_utils.families import family_of, towers_of
from lvlm_utils.models import bare
from lvlm_utils.pruning.engine import PictureMethod, Positions, towers_of_method
from lvlm_utils.pruning.keep import in_float32, kept
from lvlm_utils.session import Session, session_of


@in_float32
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


def reduce(
    metric: Tensor, tokens: Tensor, r: int, class_token: bool = False, size: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge `r` of the `tokens` (batch, N, C), at most half, by `metric` (batch, N, d); [CLS] first is left alone.

    size (batch, N, 1): how many patches each token stands for already, which weighs it; by default one.
    Returns tokens (batch, N - r, C), how many each stands for (batch, N - r, 1), and which each went to (batch, N).
    """
    source, left = match(metric, r, class_token)
    at = source[..., None]
    size = torch.ones(*metric.shape[:2], 1, device=metric.device, dtype=torch.float32) if size is None else size
    sizes = size.new_zeros(len(size), left, 1).scatter_add(1, at, size)
    sums = size.new_zeros(len(size), left, tokens.shape[-1]).scatter_add(1, at.expand_as(tokens), tokens.float() * size)
    return (sums / sizes).to(tokens.dtype), sizes, source


def schedule(patches: int, layers: int, keep: int) -> list[int]:
    """How many to merge in each of `layers`, as evenly as halving at most allows, so that `keep` are left.

    ValueError if that many halvings leave more.
    """
    steps, left = [], patches
    for later in reversed(range(layers)):
        even = -(-(left - keep) // (later + 1))
        steps.append(min(left // 2, max(even, left - keep * 2**later)))
        left -= steps[-1]
    if left > keep:
        raise ValueError(f"ToMe at most halves {patches} patches in each of {layers} layers: keep={keep} is less.")
    return steps


class TowerMethod(PictureMethod):
    """A method that leaves fewer patches inside the vision tower itself.

    Write `inside`, which hooks one tower by `session.hook` (what removes the hooks goes on the stack) and returns an
    object whose `maps` says what became of its patches in the latest run: number of tokens -> (pictures, all tokens)
    which of them each became part of; the last is that of the features. The model gets as many tokens as ever, copies
    of these, and of each the first stays.
    """

    def inside(self, tower: nn.Module, skip: int, session: Session, stack: ExitStack) -> Any:
        """skip: how many tokens come before the patches, [CLS] first and then registers."""
        raise NotImplementedError

    def fit(self, lvlm):
        if family_of(model := bare(lvlm)).patches != 1:
            name, kind = type(self).__name__, model.config.model_type
            raise ValueError(f"{name} changes the patches inside the tower, which {kind} packs, or makes a visual "
                             "token of several: take vispruner or divprune.")  # fmt: skip
        return self

    def sees(self):
        return {"keys": 0}

    def pick(self, pictures):
        if not pictures.one_to_one:
            raise ValueError("Frames of this model are pooled after the tower: take divprune or vispruner.")
        sources = [view.picture.source[view.patches[:, 0]] for view in pictures.views]
        groups = torch.stack(sources).to(pictures.slots.device)
        place = torch.arange(groups.shape[1], device=groups.device).expand_as(groups)
        first = place.new_full((len(groups), pictures.views[0].size), groups.shape[1])
        return first.scatter_reduce(1, groups, place, "amin").gather(1, groups) == place

    @contextmanager
    def within(self, model):
        session, seen = session_of(model), towers_of_method(model, self)
        with ExitStack() as stack:
            for tower in towers_of(model).values():
                skip = before_patches(tower)
                hook = partial(_spread_out, seen, self.inside(tower, skip, session, stack), skip)
                stack.callback(session.hook(tower, after=hook))
            yield


def _spread_out(seen: Towers, run: Any, skip: int, tower: nn.Module, args: tuple, output: ModelOutput) -> ModelOutput:
    """A tower's output with as many tokens as without `run`."""

    def whole(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        source = run.maps[x.shape[1]].to(x.device)
        return x.take_along_dim(source[..., None], 1)

    output["last_hidden_state"] = whole(output["last_hidden_state"])
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(whole(x) for x in output["hidden_states"])
    source = list(run.maps.values())[-1][:, skip:] - skip
    for picture, of_it in zip(seen.pictures[-len(source) :], source, strict=True):
        picture.source, picture.size = of_it, len(of_it)
    return output


@dataclass
class ToMe(TowerMethod):
    """Merge the most similar tokens in every layer of the vision tower (ToMe).

    keep: share or number of each picture's patches that is left after the tower.
    r: in place of it, how many are merged in every layer that leads to the features, or a number for each (the code's
        `r`).
    proportional: whether a token counts in attention as often as it has patches, as in the code; that needs a mask,
        which flash attention does not take.
    positions: "contiguous" is our reading.
    """

    keep: float | int | None = None
    r: int | Sequence[int] | None = None
    proportional: bool = True
    positions: Positions = "contiguous"

    features = (-1,)  # layers of the tower
    official = "facebookresearch/ToMe af95e4b"
    deviations = (
        "`reduce` matches, its order too. In a model tokens are merged after a layer, not between its attention and "
        "MLP, up to the layer of the features, and come into the LLM in the order of their first patches (the official "
        "order is that of the matching). `keep` spreads the merges evenly over the layers; official is r alone."
    )

    def fit(self, lvlm):
        if (self.keep is None) == (self.r is None):
            raise ValueError("Give keep (what is left of each picture), or r (what is merged in every layer).")
        super().fit(lvlm)
        for tower in towers_of(bare(lvlm)).values():
            if self.proportional and "flash" in (name := tower.config._attn_implementation):
                raise ValueError(f"{name} takes no weights of tokens: proportional=False, or another attention.")
        layer = getattr(bare(lvlm).config, "vision_feature_layer", None)
        return self.filled(features=layer if isinstance(layer, list | tuple) else [-1 if layer is None else layer])

    def inside(self, tower, skip, session, stack):
        layers = tower_layers(tower)
        last = min(layer + len(layers) if layer < 0 else layer - 1 for layer in self.features)
        run = _Merging(self, skip, last + 1)
        stack.enter_context(intercept(run.see, *layers[: last + 1]))
        stack.callback(session.hook(tower, run.start))
        for number, layer in enumerate(layers):
            merge = partial(run.merge, number) if number <= last else None
            # prepend: before the library records the layer's output
            stack.callback(session.hook(layer, run.weigh, merge, prepend=True))
        return run

    def steps(self, patches: int, layers: int) -> list[int]:
        """How many to merge in each layer."""
        if self.keep is not None:
            return schedule(patches, layers, kept(self.keep, patches))
        steps = [self.r] * layers if isinstance(self.r, Integral) else list(self.r)
        if len(steps) != layers:
            raise ValueError(f"r has {len(steps)} numbers, but {layers} layers of the tower lead to its features.")
        return steps


class _Merging:
    """ToMe in one tower. Sizes and maps, by the number of tokens, stay for checkpointed layers, which run twice."""

    def __init__(self, method: ToMe, skip: int, layers: int):
        self.method, self.skip, self.layers = method, skip, layers

    def start(self, tower: nn.Module, args: tuple, kwargs: dict) -> None:
        self.sizes, self.maps = {}, {}

    def see(self, call: Call) -> None:
        self.metric = call.key.float().mean(1)

    def weigh(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        x = args[0] if args else kwargs["hidden_states"]
        tokens = x.shape[1]
        if not self.sizes:
            self.sizes[tokens] = torch.ones(*x.shape[:2], 1, device=x.device, dtype=torch.float32)
            self.maps[tokens] = torch.arange(tokens, device=x.device).expand(len(x), -1)
            self.steps = self.method.steps(tokens - self.skip, self.layers)
        if not self.method.proportional:
            return None
        mask = self.sizes[tokens].log().to(x.dtype).transpose(1, 2)[:, None]
        if len(args) > 1:
            return (x, mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    def merge(self, number: int, layer: nn.Module, args: tuple, x: Tensor) -> Tensor:
        tokens, registers = x.shape[1], slice(1, max(self.skip, 1))  # these stand aside while the others merge
        others = torch.ones(tokens, dtype=torch.bool, device=x.device)
        others[registers] = False
        before, r = self.sizes[tokens], self.steps[number]
        merged, size, source = reduce(self.metric[:, others], x[:, others], r, bool(self.skip), before[:, others])
        x = torch.cat([merged[:, :1], x[:, registers], merged[:, 1:]], 1)
        size = torch.cat([size[:, :1], before[:, registers], size[:, 1:]], 1)
        whole = torch.arange(tokens, device=x.device).repeat(len(x), 1)
        whole[:, others] = source + (source > 0) * (registers.stop - 1)
        self.sizes[x.shape[1]], self.maps[x.shape[1]] = size, whole.gather(1, self.maps[tokens])
        return x
