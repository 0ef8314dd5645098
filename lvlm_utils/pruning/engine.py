"""The one engine that drops or merges prompt tokens inside any LVLM; a `Method` only says which ones.

Before a layer at which a method chooses, the hidden states and rotary embeddings of the tokens that stay are gathered,
and for it and all later layers the library's own function builds the mask. The cache needs nothing: it holds a length
for every layer. In decode steps only masks (and renumbered positions) are replaced; where the decoder's own are right,
layers lose their hooks until the next prompt, so that a step costs what it costs without pruning.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from inspect import signature
from numbers import Integral
from typing import Any, Literal, Self, get_args
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from lvlm_utils.attention.equi import last_rows, positions_of
from lvlm_utils.attention.intercept import Call, intercept
from lvlm_utils.attention.streaming import stream
from lvlm_utils.attention.towers import SEEN, Towers
from lvlm_utils.attention.visibility import Views
from lvlm_utils.families import decoder_of
from lvlm_utils.models import LVLM
from lvlm_utils.pruning.keep import PRIME, mixed, top
from lvlm_utils.pruning.pictures import Pictures, look
from lvlm_utils.session import (
    LOCK,
    OPEN,
    OTHER_THREAD,
    Session,
    check_checkpointing,
    instead,
    is_prompt,
    joined,
    plain_arithmetic,
    read_by,
    session_of,
)
from lvlm_utils.token_groups import TokenGroups, is_visual

FROM = ("question", "context")  # attention received from the tokens of this group only
STATISTICS = ("last", "received", "received_mean", "equi", *FROM)
ONE_CACHE = "generate from the whole prompt, inside one lv.prune"
Statistic = str | Callable[["Tokens"], Tensor]
Positions = Literal["original", "contiguous"]  # of the tokens that stay
Group = Literal["system", "context", "question"]  # of text, which a method may protect
Chosen = Tensor | tuple[Tensor, Tensor]  # which tokens go on, bool; or that and their new hidden states


# The prompt on its way ------------------------------------------------------------------------------------------------
@dataclass
class Stage:
    """The prompt as it is from some layer on, one slot a token; rows that keep fewer begin with empty slots."""

    place: Tensor  # (batch, slots) the slot's column in the whole prompt
    alive: Tensor  # (batch, slots) bool; False is padding or an empty slot
    padded: bool  # whether any slot is not alive
    rotary: tuple[Tensor, Tensor] | None = None  # cosine and sine of the slots; only during the prefill
    next: Tensor | None = None  # (batch, 1) position of the first new token where positions were numbered anew


@dataclass
class Prefill:
    """One prompt on its way through the layers, and what its decode steps have to know."""

    model: PreTrainedModel
    stages: list[Stage]
    tokens: int  # columns of the whole prompt
    seen: int  # these and the tokens decoded since
    positions: Tensor  # as the decoder turns its tokens
    last: Tensor  # the last position, (batch, 1), or (3 or 4, batch, 1) on a grid
    ids: Tensor | None  # (batch, tokens)
    visual: Tensor | None  # (batch, tokens) bool
    groups: TokenGroups | None
    at: list[int] = field(default_factory=list)  # layer -> its stage
    statistics: dict[tuple[int, Statistic], Tensor] = field(default_factory=dict)  # (batch, heads, tokens)
    notes: dict[Any, Any] = field(default_factory=dict)
    views: Views = field(default_factory=Views)
    cache: "ref[DynamicCache] | None" = None
    done: bool = False
    continued: Tensor | None = None  # (rows, new) bool: where several prompts go on after this one, their real tokens

    @property
    def pruned(self) -> bool:
        return len(self.stages) > 1

    def since(self, new: int) -> Tensor | int:
        """How many tokens there are between the prompt and each of the `new` newest ones."""
        if self.continued is None:
            return self.seen - self.tokens - 1
        return (self.continued.cumsum(1) - 1).clamp(min=0)[:, -new:]

    def alive(self, stage: Stage) -> Tensor | None:
        """Which slots of a stage and of all that came since hold a token, (batch, slots + new); None if all do."""
        if self.continued is not None:
            return torch.cat([stage.alive.expand(len(self.continued), -1), self.continued.to(stage.alive.device)], 1)
        return pad(stage.alive, (0, self.seen - self.tokens), value=True) if stage.padded else None


@dataclass(frozen=True)
class Tokens:
    """The prompt's tokens that have come as far as `layer`, for a method to choose from.

    hidden (batch, slots, width): the hidden states that go into `layer`. alive (batch, slots): False where a slot holds
    no token (what is chosen there does not matter). place: the token's column in the whole prompt. rotary: cosine and
    sine (batch or 1, slots, width) of the slots' positions.
    """

    layer: int
    hidden: Tensor
    place: Tensor
    alive: Tensor
    prefill: Prefill
    rotary: tuple[Tensor, Tensor] | None = None
    towers: Towers | None = None  # of the method that chooses
    sees: Mapping[str, int] = field(default_factory=dict)

    @property
    def model(self) -> PreTrainedModel:
        return self.prefill.model

    @property
    def ids(self) -> Tensor:
        """Token ids (batch, slots). ValueError where the model was called without input_ids."""
        if self.prefill.ids is None:
            raise ValueError("Tokens are known by their ids: call the model with input_ids.")
        return self.here(self.prefill.ids)

    @property
    def groups(self) -> TokenGroups | None:
        """Groups of the prompt, where lv.generate or lv.forward asks; None where a bare model was called."""
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

    @property
    def notes(self) -> dict[Any, Any]:
        """What a method wants to remember of this prompt from one layer to a later one."""
        return self.prefill.notes

    def here(self, whole: Tensor) -> Tensor:
        """(batch, tokens) of the whole prompt -> (batch, slots). Rows are repeated for beams."""
        if whole.shape[1] != self.prefill.tokens or len(self.place) % len(whole):
            raise ValueError(
                f"Groups or masks are of {tuple(whole.shape)} (prompts, tokens), what is pruned is of "
                f"{(len(self.place), self.prefill.tokens)}: give those of this very prompt."
            )
        whole = whole.to(self.place.device).repeat_interleave(len(self.place) // len(whole), 0)
        return whole.gather(1, self.place)

    @cached_property
    def pictures(self) -> list[Pictures]:
        """The pictures, tiles and frames, those of equal size together. ValueError where there are none."""
        return look(self)

    @property
    def whole(self) -> "Tokens":
        """The same prompt as it was before anything was dropped: its slots are the columns. (`hidden` is not.)"""
        return self._in(self.prefill.stages[0])

    @property
    def at_start(self) -> Tensor:
        """Visual tokens (batch,) that went into layer 0: what shares in deeper layers are shares of."""
        first = self._in(self.prefill.stages[self.prefill.at[0]]) if self.prefill.at else self
        return first.visual.sum(1)

    def _in(self, stage: Stage) -> "Tokens":
        device = self.place.device
        return replace(self, place=stage.place.to(device), alive=stage.alive.to(device))

    def attention(self, statistic: Statistic, layer: int | None = None) -> Tensor:
        """A statistic that the method `needs` of a layer before this one, by default the latest that has it.

        Float32 (batch, heads, slots): "last", the row of the last token; "received" from all tokens, "received_mean"
        the same per token that sees it; "context", received from the context, "question", the mean row of the question;
        "equi", the last row with all visual keys at one position; for a function, received from its queries.
        """
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
            found, at = choice(pictures), (pictures.rows[:, None], pictures.slots)
            kept, merged = found if isinstance(found, tuple) else (found, None)
            if kept.dtype != torch.bool or kept.shape != pictures.slots.shape:
                wanted = f"bool {tuple(pictures.slots.shape)}"
                raise ValueError(f"Pictures are kept by {wanted}, not {kept.dtype} {tuple(kept.shape)}.")
            kept = kept.to(stay.device)  # a tower may be on another device
            stay = stay.index_put(at, kept)
            if merged is not None:
                new = merged.to(hidden.device, hidden.dtype)
                hidden = hidden.index_put(at, new.where(kept[..., None], hidden[at]))
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

    Implement `choose`; override the others only where your method needs them:

    choose(tokens): the tokens that are kept, bool (batch, slots); or (that, new hidden states) where it merges.
    layer: the layer before which `choose` is called.
    before: the layers, for a method that chooses several times; () where its options mean that nothing is dropped.
    positions: of the tokens that are kept: "original", or "contiguous", numbered anew from 0.
    needs: {layer: statistics of its attention that `choose` reads by `tokens.attention`}: names ("last", "received",
        "received_mean", "question", "context", "equi"), or functions from `Tokens` to queries, bool (batch, slots):
        the attention received from these.
    sees: {name: tower layer} of what `choose` reads of the vision tower by `tokens.pictures`; a negative layer counts
        from the end.
    within: hooks of the method's own, a context manager that is open for as long as the method prunes.
    fit: a copy with what depends on the model filled in (`filled`); ValueError where the method does not fit it.

    kind: "text", "visual, before the LLM" or "visual, inside the LLM".
    needs_cls: whether it works only with vision towers that have a [CLS] token.
    uses_question: False if the choice does not depend on the question and drops nothing of the question or the
        template: questions about one picture and context can then share a beginning that is read and pruned once.
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

    def fit(self, lvlm: LVLM | PreTrainedModel) -> Self:
        return self

    def filled(self, **values: Any) -> Self:
        """A copy with these attributes."""
        made = copy(self)
        vars(made).update(values)
        return made

    def before(self) -> tuple[int, ...]:
        return (self.layer,)

    def needs(self) -> Mapping[int, tuple[Statistic, ...]]:
        return {}

    def sees(self) -> Mapping[str, int]:
        return {}

    def within(self, model: PreTrainedModel) -> AbstractContextManager:
        return nullcontext()

    def choose(self, tokens: Tokens) -> Chosen:
        raise NotImplementedError(f"{type(self).__name__} has no choose(tokens).")


class PictureMethod(Method):
    """A method before the language model that chooses among the tokens of every picture, tile or frame by itself.

    Write `pick`(pictures), for pictures of equal size: which of their V tokens stay, bool (P, V); or (that, new hidden
    states (P, V, D)) where it merges. All text stays.
    """

    kind = "visual, before the LLM"
    uses_question = False

    def choose(self, tokens: Tokens) -> Chosen:
        return tokens.by_picture(self.pick)


class Trace:
    """What was kept in the latest prefill. Columns are those of input_ids; padding counts as not kept.

    Every method that prunes the model at the same time shares one trace. visual: bool (batch, tokens), which columns
    are visual tokens; None where the model was called without input_ids. kv_bytes: bytes of the key-value cache after
    the prefill, the whole batch with its padding; 0 without a cache.
    """

    kv_bytes: int = 0

    def __init__(self):
        self._kept: Tensor | None = None
        self.visual: Tensor | None = None

    def take(self, prefill: Prefill, cache: DynamicCache | None) -> None:
        """Replace what was kept, at the end of a prefill."""
        masks = [
            torch.zeros_like(s.alive[:, :1]).repeat(1, prefill.tokens).scatter(1, s.place, s.alive)
            for s in prefill.stages
        ]
        self._kept = torch.stack([masks[stage].to(masks[0].device) for stage in prefill.at])
        self.visual = prefill.visual
        self.kv_bytes = sum(one.keys.nbytes + one.values.nbytes for one in cache.layers) if cache is not None else 0

    @property
    def kept(self) -> Tensor:
        """bool (layers, batch, tokens): whether the token goes into the layer."""
        if self._kept is None:
            raise ValueError("There was no prefill yet: call the model inside `with lv.prune(...) as trace`.")
        return self._kept

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
        kept = self.kept
        if self.visual is None:
            raise ValueError("Visual tokens are not known: the model was called without input_ids.")
        return (kept & self.visual.to(kept.device)).sum(-1).double().mean().item()

    @property
    def mean_text(self) -> float:
        """All other tokens, mean over layers and samples."""
        return self.mean_tokens - self.mean_visual

    def __repr__(self) -> str:
        if self._kept is None:
            return "Trace of lv.prune: no prefill yet"
        layers = " ".join(f"{number:g}" for number in self.tokens_per_layer)
        return f"Trace of lv.prune: {self.mean_tokens:.1f} tokens a layer ({layers}), cache {self.kv_bytes} bytes"


# The engine -----------------------------------------------------------------------------------------------------------
@contextmanager
def pruning(model: PreTrainedModel, method: Method) -> Iterator[Trace]:
    """Run `method` in every prefill of `model` until the block ends; methods nest, and act in the order of nesting.

    ValueError where the method does not fit the model, and later for whatever cannot be pruned correctly.
    """
    run = _Run(method, decoder_of(model))
    with ExitStack() as stack:
        with LOCK:
            session = stack.enter_context(joined(model, run))
            if any(other.engine and other is not session for other in OPEN[model].values()):
                raise ValueError(OTHER_THREAD)
            run.engine = engine = session.engine = session.engine or Engine(session)
            engine.runs.append(run)
            stack.callback(engine.leave, run)
        if run.needs:
            layers = [engine.decoder.layers[number] for number in run.needs]
            stack.enter_context(intercept(partial(engine.see, run), *layers))
        if run.sees:
            run.towers = Towers(session, run.sees)
            stack.callback(run.towers.hooks.close)
        if run.choose:
            stack.enter_context(method.within(model))
        yield engine.trace


class _Run:
    """A method in one model; what does not fit is refused here."""

    def __init__(self, method: Method, decoder: nn.Module):
        config, layers = decoder.config, len(decoder.layers)
        self.method, self.choose, self.positions = method, tuple(method.before()), method.positions
        self.needs = dict(method.needs()) if self.choose else {}
        self.sees = dict(method.sees()) if self.choose else {}
        self.towers: Towers | None = None
        self.engine: Engine
        for layer in (*self.choose, *self.needs):
            if not isinstance(layer, Integral) or not 0 <= layer < layers:
                raise ValueError(f"Layer {layer} is out of range: the model has {layers} layers, 0 to {layers - 1}.")
        named = {name for names in self.needs.values() for name in names if not callable(name)}
        for given, known, what in ((named, STATISTICS, "needs"), (self.sees, SEEN, "sees")):
            if unknown := set(given) - set(known):
                raise ValueError(f"A method {what} {', '.join(sorted(unknown))}: there are only {', '.join(known)}.")
        if self.positions not in (known := get_args(Positions)):
            raise ValueError(f"positions={self.positions!r} is not one of {', '.join(known)}.")
        if self.positions == "contiguous" and "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
            raise ValueError(
                f"{config.model_type} has positions on a grid (mRoPE), which cannot be numbered anew: "
                'use positions="original".'
            )
        if odd := short_sighted(config):
            raise ValueError(f"{config.model_type} has layers of {', '.join(odd)}: only full attention can be pruned.")

    def new_prompt(self) -> None:
        self.engine.prefill = None


def short_sighted(config: PreTrainedConfig) -> list[str]:
    """Kinds of attention, among the layers of a decoder with this config, that do not see the whole past."""
    window = ["sliding_attention"] if getattr(config, "sliding_window", None) else []
    return sorted(set(getattr(config, "layer_types", None) or window) - {"full_attention"})


class Engine:
    """All methods that prune one model at the moment, and the hooks that carry them out."""

    def __init__(self, session: Session):
        self.session, self.model, self.decoder = session, session.model, decoder_of(session.model)
        self.runs: list[_Run] = []
        self.trace = Trace()
        self.prefill: Prefill | None = None
        self.by_column: dict[str, Any] = {}  # keywords of the model that name columns of the prompt
        self.masks: dict[Any, dict] = {}
        self.caches: WeakSet[DynamicCache] = WeakSet()  # that are pruned
        self.layer_hooks: list[Callable] = []
        self.hooks = ExitStack()
        self.hooks.callback(session.hook(self.model, self._before_model, self._after_model, always_call=True))
        self.hooks.callback(session.hook(self.decoder, self._before_decoder, self._after_decoder))
        if hasattr(self.decoder, "_deepstack_process"):
            self.hooks.callback(instead(self.decoder, "_deepstack_process", self._deepstack))

    def leave(self, run: _Run) -> None:
        self.runs.remove(run)
        if not self.runs:
            self._unhook()
            self.hooks.close()
            for cache in self.caches:
                cache.get_mask_sizes = _refuse_ended
            self.session.engine = None

    def _hook(self) -> None:
        if not self.layer_hooks:
            for number, layer in enumerate(self.decoder.layers):
                self.layer_hooks.append(self.session.hook(layer, partial(self._before_layer, number)))

    def _unhook(self) -> None:
        while self.layer_hooks:
            self.layer_hooks.pop()()

    def see(self, run: _Run, call: Call) -> None:
        """Keep the statistics that `run` needs of the layer that runs; slots become columns of the whole prompt."""
        prefill = self.prefill
        if prefill is None or prefill.done:
            return
        number = len(prefill.at) - 1
        for name, value in _statistics(call, run.needs[number], prefill, self.decoder).items():
            place = prefill.stages[-1].place.to(value.device)[:, None].expand_as(value)
            whole = value.new_zeros(*value.shape[:2], prefill.tokens)
            prefill.statistics[number, name] = whole.scatter(2, place, value)

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = kwargs if len(args) < 2 else signature(module.forward).bind_partial(*args, **kwargs).arguments
        self.by_column = {name: given[name] for name in ("labels", "logits_to_keep") if given.get(name) is not None}

    def _after_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.by_column = {}

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        self.masks = {}
        x = read_by(args, kwargs)
        if is_prompt(kwargs):
            _check_prefill(kwargs)
            if torch.is_grad_enabled() and any(run.sees for run in self.runs):
                check_checkpointing(self.model)
            self.prefill = self._begin(x, kwargs)
            self._hook()
            return None
        prefill = self.prefill
        _check_step(prefill, kwargs["past_key_values"], x.shape[1])
        prefill.seen += x.shape[1]
        if prefill.continued is not None:
            self._hook()
        if self._ours(0):  # transformers counts tokens in the cache of layer 0, which now may hold fewer
            first = prefill.stages[prefill.at[0]].next
            position = (prefill.last + 1 if first is None else first) + prefill.since(x.shape[1])
            kwargs = {**kwargs, "position_ids": position, "attention_mask": None}
        return args, kwargs

    def _begin(self, x: Tensor, kwargs: dict[str, Any]) -> Prefill:
        """The whole prompt, from what the decoder is called with: x (batch, tokens, ...) and its keywords."""
        batch, tokens = x.shape[:2]
        mask, position, ids = kwargs.get("attention_mask"), kwargs.get("position_ids"), self.session.ids
        place = torch.arange(tokens, device=x.device).expand(batch, -1)
        alive = torch.ones_like(place, dtype=torch.bool) if mask is None else mask.to(x.device).bool()
        # on a grid one for each axis, all the same after the text that ends it
        last = (place if position is None else position).amax(-1, keepdim=True)
        ids = ids if ids is not None and ids.shape == place.shape else None
        visual = None if ids is None else is_visual(self.model, ids.to(x.device))
        stage = Stage(place, alive, padded=not bool(alive.all()))
        positions = positions_of(kwargs, x)
        return Prefill(self.model, [stage], tokens, tokens, positions, last, ids, visual, self.session.groups)

    def _before_layer(self, number: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        prefill = self.prefill
        given = hidden = args[0] if args else kwargs["hidden_states"]
        if not prefill.done:
            rotary = kwargs["position_embeddings"]
            if number == 0:
                prefill.stages[0].rotary = rotary
                if (cache := kwargs.get("past_key_values")) is not None:
                    prefill.cache = ref(cache)
            for run in self.runs:
                if number in run.choose:
                    with plain_arithmetic(hidden.device):
                        hidden = self._choose(run, number, hidden)
            prefill.at.append(len(prefill.stages) - 1)
        if self._ours(number):
            kwargs = {**kwargs, **self._surroundings(number, hidden, kwargs)}
        elif hidden is given:
            return None
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _choose(self, run: _Run, number: int, hidden: Tensor) -> Tensor:
        """Ask the method, and begin a new stage if it drops anything; the hidden states that go on."""
        prefill, device, beams = self.prefill, hidden.device, self.session.beams
        stage = prefill.stages[-1]
        rotary = tuple(part.to(device) for part in stage.rotary)
        place, alive = stage.place.to(device), stage.alive.to(device)
        tokens = Tokens(number, hidden, place, alive, prefill, rotary, run.towers, run.sees)
        chosen = run.method.choose(tokens)
        keep, new = chosen if isinstance(chosen, tuple) else (chosen, hidden)
        if keep.dtype != torch.bool or keep.shape != alive.shape or new.shape != hidden.shape:
            raise ValueError(
                f"A method has to choose with bool {tuple(alive.shape)} (and hidden states as they came), "
                f"not {keep.dtype} {tuple(keep.shape)}."
            )
        keep = keep.to(device)[::beams].repeat_interleave(beams, 0) & alive  # the beams of a prompt keep the same
        found = _narrowed(tokens, keep, new, run.positions, self.decoder.rotary_emb)
        if found is None:
            return new
        prefill.stages.append(found[0])
        return found[1]

    def _ours(self, number: int) -> bool:
        """Whether mask and positions of a layer are made here: after a drop, or after a shared beginning."""
        return self.prefill.at[number] > 0 or self.prefill.continued is not None

    def _surroundings(self, number: int, hidden: Tensor, kwargs: dict) -> dict:
        """Mask and rotary embedding of a layer after a drop; one pair for all layers of a stage on a device."""
        prefill = self.prefill
        key = prefill.at[number], hidden.device
        if key not in self.masks:
            stage = prefill.stages[key[0]]
            mask = create_causal_mask(
                config=self.decoder.config, inputs_embeds=hidden, attention_mask=prefill.alive(stage),
                past_key_values=_of_layer(kwargs.get("past_key_values"), number),
            )  # fmt: skip
            if not prefill.done:
                rotary = tuple(part.to(hidden.device) for part in stage.rotary)
            elif stage.next is None:
                rotary = kwargs["position_embeddings"]
            else:
                position = stage.next + prefill.since(hidden.shape[1])
                rotary = self.decoder.rotary_emb(hidden, position_ids=position.to(hidden.device))
            self.masks[key] = {"attention_mask": mask, "position_embeddings": rotary, "position_ids": None}
        return self.masks[key]

    def _after_decoder(self, module: nn.Module, args: tuple, output: Any) -> None:
        prefill = self.prefill
        if prefill.done:
            if self.layer_hooks and self._plain():
                self._unhook()
            return
        prefill.done = True
        if not prefill.pruned:
            self._unhook()
        cache = prefill.cache() if prefill.cache is not None else None
        if cache is not None and prefill.pruned:
            self._own(cache)
        self.trace.take(prefill, cache)
        for run in self.runs:
            if run.towers is not None:
                run.towers.new_prompt()  # what the tower showed has been used
        prefill.statistics, prefill.notes, prefill.views = {}, {}, Views()
        for stage in prefill.stages:
            stage.rotary = None
        if prefill.pruned:
            _check_columns(self.by_column, prefill.stages[0].alive & ~self.trace.kept[-1])

    def _own(self, cache: DynamicCache) -> None:
        """A pruned cache: outside, its masks would be those of layer 0 everywhere, and so would those of a copy."""
        self.caches.add(cache)
        cache.get_mask_sizes = _Sizes(cache)

    def _plain(self) -> bool:
        """Whether every layer can take the mask and the positions that the decoder makes for the first."""
        prefill = self.prefill
        stages = [prefill.stages[number] for number in set(prefill.at)]
        ours = [layer["attention_mask"] for layer in self.masks.values()]
        masked = any(stage.padded for stage in stages) or any(mask is not None for mask in ours)
        return prefill.continued is None and not masked and (len(stages) == 1 or all(s.next is None for s in stages))

    def _deepstack(self, decoder: nn.Module, process: Callable, hidden: Tensor, visual: Tensor, features: Tensor):
        """Qwen3-VL adds features of its tower after the first layers: only those of visual tokens that are left."""
        if self.prefill is not None and self.prefill.pruned and not self.prefill.done:
            stage = self.prefill.stages[-1]
            place, visual = stage.place.to(features.device), visual.to(features.device)
            left = visual.gather(1, place) & stage.alive.to(features.device)
            rank = (visual.flatten().cumsum(0) - 1).view_as(visual)
            visual, features = left, features[rank.gather(1, place)[left]]
        return process(hidden, visual, features)


def towers_of_method(model: PreTrainedModel, method: Method) -> Towers:
    """What a method that prunes `model` sees of the vision towers."""
    return next(run.towers for run in session_of(model).engine.runs if run.method is method)


def stage_of(model: PreTrainedModel, layer: int) -> Stage | None:
    """The tokens that went into `layer` in the prefill that runs or ran last; None where the model is not pruned."""
    session = session_of(model)
    prefill = session and session.engine and session.engine.prefill
    return prefill.stages[prefill.at[layer]] if prefill else None


class Continuation:
    """`rows` prompts that share the beginning which `model` has just read, alone, into `cache`, inside lv.prune.

    Call it with the next tokens of each: the shorter ones begin with padding, and everything that is no padding is
    kept. The beginning stays as it is, for other continuations. ValueError for any other cache.
    """

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, rows: int):
        session = session_of(model)
        self.model, self.engine = model, session and session.engine
        prefill = self.engine and self.engine.prefill
        mine = prefill and prefill.cache and prefill.cache() is cache and prefill.seen == prefill.tokens
        if not mine or len(prefill.stages[0].place) != 1:
            raise ValueError("Only the latest prompt that was pruned, a single one with a cache, can be continued.")
        self.cache = DynamicCache([(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v, *_ in cache])
        none = prefill.stages[0].alive.new_zeros(rows, 0)
        self.beginning, self.prefill = prefill, replace(prefill, cache=ref(self.cache), continued=none)
        self.engine._own(self.cache)

    def __call__(self, ids: Tensor, real: Tensor) -> Tensor:
        """Logits (rows, vocabulary) after the next `ids` (rows, new), of which those that are `real` count."""
        self.prefill.continued = torch.cat([self.prefill.continued, real], 1)
        self.engine.prefill = self.prefill
        try:
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        finally:
            self.engine.prefill = self.beginning
        return out.logits[:, -1]


def _statistics(call: Call, wanted: tuple[Statistic, ...], prefill: Prefill, decoder: nn.Module) -> dict:
    """The `wanted` ones, float32 (batch, heads, slots), 0 for padding: see `Tokens.attention`.

    ValueError where the groups of the prompt are not known, and for a prompt without question.
    """
    view, angles = prefill.views.of(call), prefill.stages[0].rotary
    found = last_rows(call, view, wanted, decoder.rotary_emb, prefill.positions, angles, prefill.visual)
    sums = ("received",) if {"received", "received_mean"} & set(wanted) else ()
    groups = [name for name in wanted if callable(name) or name in FROM]
    rows = _queries(call, prefill, groups) if groups else None
    streamed = stream(call.query, call.key, call.scale, view, (*sums, *["received_from"] * bool(groups)), rows)
    if sums:
        found["received"] = streamed["received"]
        found["received_mean"] = streamed["received"] / view.seers[:, None].clamp(min=1)
    for number, name in enumerate(groups):
        found[name] = streamed["received_from"][:, :, number]
        if name == "question":
            found[name] = found[name] / rows[..., number].sum(1)[:, None, None]
    return {name: found[name] for name in wanted}


def _queries(call: Call, prefill: Prefill, groups: list[Statistic]) -> Tensor:
    """Which queries belong to each group, bool (batch, slots, groups)."""
    named = [name for name in groups if not callable(name)]
    if named and prefill.groups is None:
        raise ValueError(
            f"Which tokens are {' and '.join(named)} is not known here: ask with lv.forward or lv.generate."
        )
    stage, device = prefill.stages[-1], call.query.device
    place, alive = stage.place.to(device), stage.alive.to(device)
    tokens = Tokens(len(prefill.at) - 1, call.query, place, alive, prefill)
    rows = [name(tokens) if callable(name) else tokens.here(getattr(prefill.groups, name)) for name in groups]
    rows = torch.stack([row & alive for row in rows], 2)
    if "question" in groups and not rows[..., groups.index("question")].any(1).all():
        raise ValueError("A prompt has no question token left to read attention from: take another reading.")
    return rows


def _narrowed(
    tokens: Tokens, keep: Tensor, hidden: Tensor, positions: str, embedding: nn.Module
) -> tuple[Stage, Tensor] | None:
    """The stage of the slots that `keep` (batch, slots), with its part of the `hidden` states; None if all go on.

    ValueError if a last token is dropped. `embedding` makes the angles anew for contiguous positions.
    """
    alive, counts = tokens.alive, keep.sum(1)
    same, ends, least, most = torch.stack(
        [(keep == alive).all(), (keep | ~alive | ~tokens.last).all(), counts.min(), counts.max()]
    ).tolist()  # one wait for the device
    if same:
        return None
    if not ends:
        raise ValueError("The last token of a prompt was dropped: its prediction is the answer, so it has to stay.")
    order = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, -most:]  # empty slots to the left
    place, alive, hidden = tokens.place.gather(1, order), keep.gather(1, order), _gather(hidden, order)
    stage = Stage(place, alive, padded=least < most, next=tokens.prefill.stages[-1].next)
    if positions == "contiguous":
        stage.next = alive.sum(1, keepdim=True)
        stage.rotary = embedding(hidden, position_ids=(alive.cumsum(1) - 1).clamp(min=0))
    else:
        stage.rotary = tuple(_gather(part, order) for part in tokens.rotary)
    return stage, hidden


def _gather(x: Tensor, slots: Tensor) -> Tensor:
    """x (batch or 1, tokens, width) at slots (batch, kept)."""
    return x.expand(len(slots), -1, -1).gather(1, slots[..., None].expand(-1, -1, x.shape[-1]))


def _of_layer(cache: DynamicCache | None, number: int) -> DynamicCache | None:
    """A cache that holds this layer alone: masks are made for the length of the first one, and ours differ."""
    if cache is None or number >= len(cache.layers):  # layers come into a new cache one by one
        return None
    alone = DynamicCache()
    alone.layers = [cache.layers[number]]
    return alone


# What pruning cannot do is refused in one line, before it could give a wrong answer in silence ------------------------
def _check_prefill(kwargs: dict[str, Any]) -> None:
    """ValueError for arguments of the decoder that pruning could not follow."""
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if cache is not None and (type(cache) is not DynamicCache or getattr(cache, "offloading", False)):
        raise ValueError(
            f"Pruned layers keep different numbers of tokens, which a {type(cache).__name__} cannot hold: "
            "use the default DynamicCache (no cache_implementation)."
        )
    if kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError("Prompts packed one after the other in one row cannot be pruned: give a padded batch.")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise ValueError("Pruning builds its own masks: pass attention_mask as (batch, tokens), or none.")


def _check_step(prefill: Prefill | None, cache: Any, new: int) -> None:
    """ValueError for a decode step that does not continue the prefill that was pruned."""
    if prefill is None or not prefill.done or prefill.cache is None or prefill.cache() is not cache:
        raise ValueError(f"This cache was filled by another prompt, or outside lv.prune: {ONE_CACHE}.")
    announced = 1 if prefill.continued is None else prefill.tokens + prefill.continued.shape[1] - prefill.seen
    if new != announced:
        raise ValueError(
            f"{new} tokens at once on a pruned cache: a second prompt, assisted decoding and prefill in chunks do not "
            f"work with pruning; {ONE_CACHE}."
        )


def _check_columns(by_column: dict[str, Any], gone: Tensor) -> None:
    """ValueError where columns of the prompt were asked for by their number, and some are `gone` (batch, tokens)."""
    count = by_column.get("logits_to_keep", 0)
    numbered = "labels" in by_column or not isinstance(count, int) or count < 0
    if numbered or (count > 1 and gone[:, -count:].any()):  # the last ones
        raise ValueError(
            f"{' and '.join(by_column)} address columns of the whole prompt, of which some were dropped: take the "
            "logits of the tokens that are left, and find their columns in trace.kept."
        )


class _Sizes:
    """The sizes of a pruned cache's masks; a copy of the cache has none."""

    def __init__(self, cache: DynamicCache):
        self.cache = ref(cache)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.cache()).get_mask_sizes(self.cache(), *args, **kwargs)

    def __reduce__(self) -> tuple:
        return partial, (_refuse_ended,)


def _refuse_ended(*args: Any, **kwargs: Any) -> None:
    raise ValueError(f"This cache was filled inside an lv.prune that has ended: {ONE_CACHE}.")
