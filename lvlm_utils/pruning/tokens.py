"""What pruning talks about: the plan of a method, the tokens it chooses from, and the trace of what was kept."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self
from weakref import ref

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from lvlm_utils.pruning.keep import PRIME, mixed, top
from lvlm_utils.pruning.pictures import Pictures, look

if TYPE_CHECKING:
    from lvlm_utils.models import LVLM
    from lvlm_utils.pruning.vision import Sight
    from lvlm_utils.token_groups import TokenGroups

Positions = Literal["original", "contiguous"]  # of the tokens that stay
Group = Literal["system", "context", "question"]  # the groups of text that a method may be told to protect
Chosen = Tensor | tuple[Tensor, Tensor]  # which tokens go on, bool; or that and their new hidden states


@dataclass
class Stage:
    """The prompt as it stands from some layer on, one slot a token; rows that keep fewer begin with empty slots."""

    place: Tensor  # (batch, slots) the slot's column in the whole prompt
    alive: Tensor  # (batch, slots) bool; False is padding or an empty slot
    padded: bool  # whether any slot is not alive
    rotary: tuple[Tensor, Tensor] | None = None  # cosine and sine of the slots; only during the prefill
    next: Tensor | None = None  # (batch, 1) position of the first new token where positions were numbered anew


@dataclass
class Prefill:
    """One prompt on its way through the layers, and what its decode steps have to know."""

    model: PreTrainedModel
    sight: "Sight"
    stages: list[Stage]
    tokens: int  # columns of the whole prompt
    seen: int  # these and the tokens decoded since
    last: Tensor  # the last position, (batch, 1), or (3 or 4, batch, 1) on a grid
    ids: Tensor | None  # (batch, tokens)
    visual: Tensor | None  # (batch, tokens) bool
    groups: "TokenGroups | None"
    at: list[int] = field(default_factory=list)  # layer -> its stage
    statistics: dict[tuple[int, str], Tensor] = field(default_factory=dict)  # (batch, heads, tokens); 0 if not there
    cache: "ref[DynamicCache] | None" = None
    done: bool = False
    kv_bytes: int = 0
    notes: dict = field(default_factory=dict)
    positions: Tensor | None = None  # as the decoder got them
    angles: tuple[Tensor, Tensor] | None = None  # cosine and sine of these
    rest: Tensor | None = None  # (rows, new) bool: where several prompts go on behind this one, what is no padding

    @property
    def pruned(self) -> bool:
        return len(self.stages) > 1

    def before(self, new: int) -> Tensor | int:
        """How many tokens there are between the prompt and each of the `new` newest ones."""
        if self.rest is None:
            return self.seen - self.tokens - 1
        return (self.rest.cumsum(1) - 1).clamp(min=0)[:, -new:]

    def alive(self, stage: Stage) -> Tensor | None:
        """Which slots of a stage and of all that came since hold a token, (batch, slots + new); None if all do."""
        if self.rest is not None:
            return torch.cat([stage.alive.expand(len(self.rest), -1), self.rest.to(stage.alive.device)], 1)
        return pad(stage.alive, (0, self.seen - self.tokens), value=True) if stage.padded else None


@dataclass(frozen=True)
class Tokens:
    """The prompt's tokens that have come as far as `layer`, for a method to choose from.

    `hidden` (batch, slots, width) are the hidden states that go into `layer`; `alive` (batch, slots) is False where a
    slot holds no token (what is chosen there does not matter); `place` is the token's column in the whole prompt.
    """

    layer: int
    hidden: Tensor
    place: Tensor
    alive: Tensor
    prefill: Prefill
    sees: Mapping[str, int] = field(default_factory=dict)  # of the plan that chooses
    rotary: tuple[Tensor, Tensor] | None = None  # cosine and sine (batch or 1, slots, width) of the slots' positions

    @property
    def ids(self) -> Tensor:
        """Token ids (batch, slots). ValueError where the model was called without input_ids."""
        if self.prefill.ids is None:
            raise ValueError("Tokens are known by their ids: call the model with input_ids.")
        return self.here(self.prefill.ids)

    @property
    def groups(self) -> "TokenGroups | None":
        """Groups of the prompt, where `lv.generate` asks; None where the model was called with bare tensors."""
        return self.prefill.groups

    @property
    def visual(self) -> Tensor:
        """Bool (batch, slots). ValueError where the model was called without input_ids."""
        if self.prefill.visual is None:
            raise ValueError("Visual tokens are found by their ids: call the model with input_ids.")
        return self.here(self.prefill.visual) & self.alive

    @property
    def last(self) -> Tensor:
        """Bool (batch, slots): the last token of every prompt, which has to stay."""
        slots = torch.arange(self.alive.shape[1], device=self.alive.device)
        return slots == (self.alive * slots).argmax(1, keepdim=True)

    def here(self, whole: Tensor) -> Tensor:
        """(batch, tokens) of the whole prompt -> (batch, slots). Rows are repeated for beams."""
        if whole.shape[1] != self.prefill.tokens or len(self.place) % len(whole):
            raise ValueError(
                f"Groups or masks are of {tuple(whole.shape)} (prompts, tokens), what is pruned is of "
                f"{(len(self.place), self.prefill.tokens)}: give those of this very prompt."
            )
        whole = whole.to(self.place.device).repeat_interleave(len(self.place) // len(whole), 0)
        return whole.gather(1, self.place)

    @property
    def model(self) -> PreTrainedModel:
        return self.prefill.model

    @property
    def notes(self) -> dict:
        """What methods want to remember of this prompt from one layer to a later one."""
        return self.prefill.notes

    @cached_property
    def pictures(self) -> "list[Pictures]":
        """The pictures, tiles and frames, those of equal size together. ValueError where there are none."""
        return look(self)

    @property
    def whole(self) -> "Tokens":
        """The same prompt as it was before anything was dropped: its slots are the columns. (`hidden` is not.)"""
        stage, device = self.prefill.stages[0], self.place.device
        return replace(self, place=stage.place.to(device), alive=stage.alive.to(device))

    @property
    def at_start(self) -> Tensor:
        """Visual tokens (batch,) that went into layer 0: what shares in deeper layers are shares of."""
        prefill = self.prefill
        if not prefill.at:
            return self.visual.sum(1)
        stage, visual = prefill.stages[prefill.at[0]], prefill.visual.to(self.place.device)
        return (visual.gather(1, stage.place.to(visual.device)) & stage.alive.to(visual.device)).sum(1)

    def attention(self, statistic: str | Callable[["Tokens"], Tensor], layer: int | None = None) -> Tensor:
        """A statistic that the method `needs` of a layer before this one (by default the latest that has it): float32
        (batch, heads, slots)."""
        if layer is None:
            layer = max((at for at, name in self.prefill.statistics if name == statistic), default=None)
        if (layer, statistic) not in self.prefill.statistics:
            name = getattr(statistic, "__name__", statistic)
            raise ValueError(f"{name!r} of layer {layer} was not measured: name it in the method's `needs`.")
        whole = self.prefill.statistics[layer, statistic].to(self.place.device)
        return whole.gather(2, self.place[:, None].expand(-1, whole.shape[1], -1))

    def only_visual(self, score: Tensor) -> Tensor:
        """A score (batch, slots) or (batch, heads, slots) with -inf where no visual token is: no candidate in `top`."""
        visual = self.visual if score.dim() == 2 else self.visual[:, None]
        return score.masked_fill(~visual, -torch.inf)

    def best(self, score: Tensor, keep: float | int) -> Tensor:
        """All text, and of every prompt's visual tokens the `keep` with the highest score (batch, slots)."""
        score = score.float().clamp(min=torch.finfo(torch.float32).min)  # a visual token stays a candidate at -inf
        return ~self.visual | top(self.only_visual(score), keep)

    def by_picture(self, choice: Callable[[Pictures], Chosen]) -> Chosen:
        """All text, and what `choice` keeps of the `pictures`: for those of equal size, bool (P, V), or that and their
        new hidden states (P, V, D). Visual tokens that are no patch go."""
        stay, hidden = self.alive & ~self.visual, self.hidden
        for pictures in self.pictures:
            found = choice(pictures)
            pictures.keep(*(found if isinstance(found, tuple) else (found,)))
            at = pictures.rows[:, None], pictures.slots
            stay = stay.index_put(at, pictures.kept)
            if pictures.merged is not None:
                new = pictures.merged.to(hidden.dtype)
                hidden = hidden.index_put(at, new.where(pictures.kept[..., None], hidden[at]))
        return stay if hidden is self.hidden else (stay, hidden)

    def droppable(self, protect: Collection[Group] = ("system", "question")) -> Tensor:
        """Text that may go, bool (batch, slots): nothing visual, not the last token, none of the groups in `protect`.

        ValueError where these are not known.
        """
        text = self.alive & ~self.visual & ~self.last
        if protect and self.groups is None:
            raise ValueError(
                f"Which tokens are {' and '.join(protect)} is not known here: ask with lv.forward or lv.generate, or "
                "give protect=()."
            )
        for name in protect:
            text = text & ~self.here(getattr(self.groups, name))
        return text

    def left_to_drop(self, share: float | Tensor, protect: Collection[Group]) -> Tensor:
        """How many `droppable` tokens (batch,) have to go now, so that `share` of those of the whole prompt is gone."""
        everything = self.whole.droppable(protect).sum(1)
        gone = (everything.double() * share).long()
        return (gone - everything + self.droppable(protect).sum(1)).clamp(min=0)

    def noise(self, seed: int) -> Tensor:
        """One pseudo-random number for every token, float64 (batch, slots), in [0, 1).

        It is a hash of `seed`, of all token ids of the prompt and of the token's place among its tokens. So a prompt
        has the same numbers in every batch, order, padding and on every device, and another question has others.
        """
        prompt = self.whole
        place = prompt.alive.cumsum(1)
        key = (mixed(mixed(prompt.ids) + place) * prompt.alive).sum(1, keepdim=True)
        return self.here(mixed(mixed(key + seed % PRIME) + place)).double() / PRIME


class Method:
    """One way to prune prompts: a dataclass whose fields are its options.

    Write `choose`, and what it needs of the others:

    choose(tokens): the tokens that go on, bool (batch, slots); or (that, new hidden states) where it merges.
    layer: `choose` is called with the tokens that are about to go into this layer. `before` says so for several; none
        where the options mean that nothing goes.
    positions: of the tokens that stay: "original", or "contiguous", numbered anew from 0.
    needs: layer -> which statistics of its attention `tokens.attention` shall give: names ("last", "received",
        "received_mean", "question", "context", "equi"), or functions from `Tokens` to queries, bool (batch, slots):
        the attention received from these.
    sees: name -> tower layer (counted like a list) of what `tokens.pictures` shall give of the vision tower.
    within: hooks of the method's own, a context manager that is open for as long as the method prunes.
    fit: a copy with what depends on the model filled in (`filled`); ValueError where the method does not fit it.

    kind: "text", "visual, before the LLM" or "visual, inside the LLM".
    needs_cls: whether it works only with vision towers that have a [CLS] token.
    uses_question: False where the choice is the same for all questions about one picture and context and drops nothing
        of the question or the template; such questions can then share what is left.
    official, deviations: the official code that is matched, and where and why it is not.

    Options called `keep` and `drop`, and those whose type is Literal, are checked by lv.prune.
    """

    kind = "visual, inside the LLM"
    official = "none public"
    deviations = ""
    layer = 0
    positions = "original"
    needs_cls = False
    uses_question = True

    def fit(self, lvlm: "LVLM | PreTrainedModel") -> Self:
        return self

    def filled(self, **values: Any) -> Self:
        """A copy with these attributes."""
        made = copy(self)
        vars(made).update(values)
        return made

    def before(self) -> tuple[int, ...]:
        return (self.layer,)

    def needs(self) -> Mapping[int, tuple]:
        return {}

    def sees(self) -> Mapping[str, int]:
        return {}

    def within(self, model: PreTrainedModel) -> AbstractContextManager:
        return nullcontext()

    def choose(self, tokens: Tokens) -> Chosen:
        raise NotImplementedError


class PictureMethod(Method):
    """A method before the language model that chooses among the tokens of every picture, tile or frame by itself.

    Write `pick`(pictures), for pictures of equal size: which of their V tokens stay, bool (P, V); or (that, new hidden
    states (P, V, D)) where it merges. All text stays.
    """

    kind = "visual, before the LLM"
    uses_question = False

    def pick(self, pictures: Pictures) -> Chosen:
        raise NotImplementedError

    def choose(self, tokens: Tokens) -> Chosen:
        return tokens.by_picture(self.pick)


@dataclass(frozen=True)
class Plan:
    """What a method does in one model.

    `choose[layer]` is called in the prefill with the `Tokens` before `layer` and returns which of them go on into it:
    bool (batch, slots), or (that, new hidden states) where it merges. The tokens that stay have their "original"
    `positions`, or "contiguous" ones, numbered anew from 0. `needs[layer]` names the attention statistics of `layer`
    that `Tokens.attention` shall give, and `sees[name]` the tower layer of what `Tokens.pictures` shall give; nothing
    else is computed. `within` adds hooks of the method's own, for as long as it prunes. `asks` is False where the
    choice does not depend on the question and drops nothing of it, nor of the template: questions about one picture and
    context can then share what is left.
    """

    choose: Mapping[int, Callable[[Tokens], Tensor | tuple[Tensor, Tensor]]]
    positions: str = "original"
    needs: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    sees: Mapping[str, int] = field(default_factory=dict)
    within: Callable[[PreTrainedModel], AbstractContextManager] | None = None
    asks: bool = True


class Trace:
    """What was kept in the latest prefill. Columns are those of input_ids; padding counts as not kept.

    Every method that prunes the model at the same time shares one trace.
    """

    latest: Prefill | None = None

    @property
    def prefill(self) -> Prefill:
        if self.latest is None:
            raise ValueError("There was no prefill yet: call the model inside `with lv.prune(...) as trace`.")
        return self.latest

    @property
    def kept(self) -> Tensor:
        """bool (layers, batch, tokens): whether the token goes into the layer."""
        prefill = self.prefill
        masks = [
            torch.zeros_like(s.alive[:, :1]).repeat(1, prefill.tokens).scatter(1, s.place, s.alive)
            for s in prefill.stages
        ]
        return torch.stack([masks[stage].to(masks[0].device) for stage in prefill.at])

    @property
    def tokens_per_layer(self) -> list[float]:
        """Tokens that go into each layer, mean over the samples."""
        return self.kept.sum(-1).double().mean(1).tolist()

    @property
    def mean_tokens(self) -> float:
        """Mean over layers and samples."""
        return self.kept.sum(-1).double().mean().item()

    @property
    def mean_visual(self) -> float:
        """Visual tokens, mean over layers and samples."""
        if self.prefill.visual is None:
            raise ValueError("Visual tokens are not known: the model was called without input_ids.")
        return (self.kept & self.prefill.visual.to(self.kept.device)).sum(-1).double().mean().item()

    @property
    def mean_text(self) -> float:
        """All other tokens, mean over layers and samples."""
        return self.mean_tokens - self.mean_visual

    @property
    def kv_bytes(self) -> int:
        """Bytes of the key-value cache after the prefill, the whole batch with its padding; 0 without a cache."""
        return self.prefill.kv_bytes
