"""The one context manager that drops or merges prompt tokens inside any LVLM; the methods only say which ones."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from lvlm_utils.attention.intercept import Call, intercept
from lvlm_utils.attention.record import Views
from lvlm_utils.parts import decoder_of, visual_ids
from lvlm_utils.pruning import guards
from lvlm_utils.pruning.statistics import statistics
from lvlm_utils.pruning.tokens import Plan, Prefill, Stage, Tokens, Trace

if TYPE_CHECKING:
    from lvlm_utils.token_groups import TokenGroups

ENGINES: "dict[PreTrainedModel, Engine]" = {}  # the models that are pruned right now


@contextmanager
def pruning(model: PreTrainedModel, plan: Plan) -> Iterator[Trace]:
    """Run `plan` in every prefill of `model` until the block ends; plans nest, and act in the order of nesting.

    ValueError where the plan does not fit the model, and later for whatever cannot be pruned correctly.
    """
    guards.check_plan(decoder_of(model), plan)
    with ExitStack() as stack:
        if model not in ENGINES:
            ENGINES[model] = Engine(model)
            stack.callback(ENGINES.pop, model)
            stack.enter_context(ENGINES[model].installed())
        engine = ENGINES[model]
        if plan.needs:
            layers = [engine.decoder.layers[number] for number in plan.needs]
            stack.enter_context(intercept(partial(engine.see, plan), *layers))
        engine.plans.append(plan)
        stack.callback(engine.plans.pop)
        yield engine.trace


@contextmanager
def told(model: PreTrainedModel, groups: "TokenGroups") -> Iterator[None]:
    """Let methods that prune `model` know the groups of the prompt that is about to be asked; else nothing happens."""
    engine = ENGINES.get(model)
    if engine is None:
        yield
        return
    before, engine.groups = engine.groups, groups
    try:
        yield
    finally:
        engine.groups = before


def standing(model: PreTrainedModel, layer: int) -> Stage | None:
    """The tokens that went into `layer` in the prefill that runs or ran last; None where the model is not pruned."""
    engine = ENGINES.get(model)
    prefill = engine and engine.prefill
    return prefill.stages[prefill.at[layer]] if prefill else None


class Engine:
    """All plans that prune one model at the moment, and the hooks that carry them out.

    Before a layer with a plan the hidden states and rotary embeddings are gathered, and for it and all later layers
    the library's own function builds the mask. The cache needs nothing: it holds a length per layer. In decode steps
    only masks (and renumbered positions) are replaced.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.decoder = model, decoder_of(model)
        self.plans: list[Plan] = []
        self.trace = Trace()
        self.prefill: Prefill | None = None
        self.groups: TokenGroups | None = None
        self.rows = 1
        self.ids: Tensor | None = None
        self.masks: dict[Any, dict] = {}
        self.views: Views | None = None
        self.caches: WeakSet[DynamicCache] = WeakSet()  # that are pruned

    @contextmanager
    def installed(self) -> Iterator[None]:
        base = getattr(self.model, self.model.base_model_prefix, self.model)
        hooked = [
            base.register_forward_pre_hook(self._before_model, with_kwargs=True),
            self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            self.decoder.register_forward_hook(self._after_decoder),
        ]
        for number, layer in enumerate(self.decoder.layers):
            hooked.append(layer.register_forward_pre_hook(partial(self._before_layer, number), with_kwargs=True))
        with ExitStack() as stack:
            for hook in hooked:
                stack.callback(hook.remove)
            stack.callback(lambda: [guards.close_cache(cache) for cache in self.caches])
            stack.enter_context(guards.guarded(self.model, partial(setattr, self, "rows")))
            if (process := getattr(self.decoder, "_deepstack_process", None)) is not None:
                stack.enter_context(
                    guards.replaced(self.decoder, "_deepstack_process", partial(self._deepstack, process))
                )
            yield

    def see(self, plan: Plan, call: Call) -> None:
        """Keep the statistics that `plan` needs of the layer that runs; slots become columns of the whole prompt."""
        prefill = self.prefill
        if prefill.done:
            return
        number = len(prefill.at) - 1
        for name, value in statistics(call, self.views, plan.needs[number]).items():
            place = prefill.stages[-1].place.to(value.device)[:, None].expand_as(value)
            whole = value.new_zeros(*value.shape[:2], prefill.tokens)
            prefill.statistics[number, name] = whole.scatter(2, place, value)

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.ids = kwargs.get("input_ids", args[0] if args else None)

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        ids, self.ids, self.masks = self.ids, None, {}
        x = kwargs.get("inputs_embeds")
        x = x if x is not None else kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            guards.check_prefill(kwargs)
            self.prefill, self.views = self._start(x, kwargs, ids), Views()
            return None
        guards.check_step(self.prefill, cache, x.shape[1])
        self.prefill.seen += 1
        if self.prefill.at[0]:  # transformers counts tokens in the cache of layer 0, which now holds fewer
            new = self.prefill.seen - self.prefill.tokens
            kwargs = {**kwargs, "position_ids": self.prefill.last + new, "attention_mask": None}
        return args, kwargs

    def _start(self, x: Tensor, kwargs: dict, ids: Tensor | None) -> Prefill:
        batch, tokens = x.shape[:2]
        mask, position = kwargs.get("attention_mask"), kwargs.get("position_ids")
        place = torch.arange(tokens, device=x.device).expand(batch, -1)
        alive = torch.ones_like(place, dtype=torch.bool) if mask is None else mask.to(x.device).bool()
        position = place if position is None else position
        last = position.amax(-1, keepdim=True)  # on a grid one for each axis, all the same behind the text that ends it
        known = ids is not None and ids.shape == place.shape
        visual = torch.isin(ids, torch.tensor(visual_ids(self.model), device=ids.device)) if known else None
        stage = Stage(place, alive, padded=not bool(alive.all()))
        return Prefill([stage], tokens, tokens, last, visual, self.groups)

    def _before_layer(self, number: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        prefill = self.prefill
        given = hidden = args[0] if args else kwargs["hidden_states"]
        if not prefill.done:
            if number == 0 and (cache := kwargs.get("past_key_values")) is not None:
                prefill.cache = ref(cache)
            for plan in self.plans:
                if number in plan.choose:
                    hidden = self._choose(plan, number, hidden, kwargs["position_embeddings"])
            prefill.at.append(len(prefill.stages) - 1)
        if prefill.at[number]:
            kwargs = {**kwargs, **self._surroundings(number, hidden, kwargs)}
        elif hidden is given:
            return None
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _choose(self, plan: Plan, number: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Ask the plan, and begin a new stage if it drops anything; the hidden states that go on."""
        prefill = self.prefill
        before = prefill.stages[-1]
        place, alive = before.place.to(hidden.device), before.alive.to(hidden.device)
        tokens = Tokens(number, hidden, place, alive, prefill)
        chosen = plan.choose[number](tokens)
        keep, hidden = chosen if isinstance(chosen, tuple) else (chosen, hidden)
        keep = guards.check_choice(keep, hidden, tokens)[:: self.rows].repeat_interleave(self.rows, 0) & alive
        counts = keep.sum(1)
        same, ends, least, most = torch.stack(
            [(keep == alive).all(), (keep | ~alive | ~tokens.last).all(), counts.min(), counts.max()]
        ).tolist()  # one wait for the device
        if same:
            return hidden
        if not ends:
            raise ValueError("The last token of a prompt was dropped: its prediction is the answer, so it has to stay.")
        order = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, -most:]  # empty slots to the left
        place, alive = place.gather(1, order), keep.gather(1, order)
        hidden = _gather(hidden, order)
        stage = Stage(place, alive, padded=least < most, next=before.next)
        if plan.positions == "contiguous":
            stage.next = alive.sum(1, keepdim=True)
            stage.rotary = self.decoder.rotary_emb(hidden, position_ids=(alive.cumsum(1) - 1).clamp(min=0))
        else:
            stage.rotary = tuple(_gather(part.to(order.device), order) for part in before.rotary or rotary)
        prefill.stages.append(stage)
        return hidden

    def _surroundings(self, number: int, hidden: Tensor, kwargs: dict) -> dict:
        """Mask and rotary embedding of a layer behind a drop; one pair for all layers of a stage on a device."""
        prefill = self.prefill
        key = prefill.at[number], hidden.device
        if key not in self.masks:
            stage, new = prefill.stages[key[0]], prefill.seen - prefill.tokens
            mask = create_causal_mask(
                config=self.decoder.config, inputs_embeds=hidden, layer_idx=number,
                attention_mask=pad(stage.alive, (0, new), value=True) if stage.padded else None,
                past_key_values=kwargs.get("past_key_values"),
            )  # fmt: skip
            if not prefill.done:
                rotary = tuple(part.to(hidden.device) for part in stage.rotary)
            elif stage.next is None:
                rotary = kwargs["position_embeddings"]
            else:
                rotary = self.decoder.rotary_emb(hidden, position_ids=stage.next.to(hidden.device) + new - 1)
            self.masks[key] = {"attention_mask": mask, "position_embeddings": rotary, "position_ids": None}
        return self.masks[key]

    def _after_decoder(self, module: nn.Module, args: tuple, output: Any) -> None:
        prefill = self.prefill
        if prefill.done:
            return
        prefill.done, self.views = True, None
        if prefill.cache is not None:
            cache = prefill.cache()
            prefill.kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            if prefill.pruned:
                self.caches.add(cache)
        prefill.statistics.clear()
        for stage in prefill.stages:
            stage.rotary = None
        self.trace.latest = prefill

    def _deepstack(self, process: Any, hidden: Tensor, visual: Tensor, features: Tensor) -> Tensor:
        """Qwen3-VL adds features of its tower behind the first layers: only those of visual tokens that are left."""
        stage = self.prefill.stages[-1]
        if self.prefill.pruned:
            place, visual = stage.place.to(features.device), visual.to(features.device)
            left = visual.gather(1, place) & stage.alive.to(features.device)
            rank = (visual.flatten().cumsum(0) - 1).view_as(visual)
            visual, features = left, features[rank.gather(1, place)[left]]
        return process(hidden, visual, features)


def _gather(x: Tensor, slots: Tensor) -> Tensor:
    """x (batch or 1, tokens, width) at slots (batch, kept)."""
    return x.expand(len(slots), -1, -1).gather(1, slots[..., None].expand(-1, -1, x.shape[-1]))
