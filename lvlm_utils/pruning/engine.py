"""The one context manager that drops or merges prompt tokens inside any LVLM; the methods only say which ones."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from lvlm_utils.attention.intercept import Call, intercept
from lvlm_utils.attention.record import Views
from lvlm_utils.families import decoder_of
from lvlm_utils.pruning import guards
from lvlm_utils.pruning.stages import begin, deepstack, narrowed, of_layer, plain
from lvlm_utils.pruning.statistics import statistics
from lvlm_utils.pruning.tokens import Method, Plan, Prefill, Stage, Tokens, Trace
from lvlm_utils.pruning.vision import Sight

if TYPE_CHECKING:
    from lvlm_utils.token_groups import TokenGroups

ENGINES: "dict[PreTrainedModel, Engine]" = {}  # the models that are pruned right now


@contextmanager
def pruning(model: PreTrainedModel, plan: Plan) -> Iterator[Trace]:
    """Run `plan` in every prefill of `model` until the block ends; plans nest, and act in the order of nesting.

    ValueError where the plan does not fit the model, and later for whatever cannot be pruned correctly.
    """
    if isinstance(plan, Method):
        before = plan.before()
        plan = Plan(dict.fromkeys(before, plan.choose), plan.positions, plan.needs() if before else {},
                    plan.sees() if before else {}, plan.within, plan.uses_question)  # fmt: skip
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
        if plan.sees:
            stack.enter_context(engine.sight.watching(plan.sees))
        if plan.within is not None:
            stack.enter_context(plan.within(model))
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
    only masks (and renumbered positions) are replaced; where the decoder's own are right, layers lose their hooks until
    the next prompt, so that a step costs what it costs without pruning.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.decoder = model, decoder_of(model)
        self.plans: list[Plan] = []
        self.trace, self.sight = Trace(), Sight(model)
        self.prefill: Prefill | None = None
        self.groups: TokenGroups | None = None
        self.rows = 1
        self.ids: Tensor | None = None
        self.masks: dict[Any, dict] = {}
        self.views: Views | None = None
        self.caches: WeakSet[DynamicCache] = WeakSet()  # that are pruned
        self.hooks: list[RemovableHandle] = []  # of the layers
        self.rests = False  # what runs now is no prompt of ours

    @contextmanager
    def installed(self) -> Iterator[None]:
        base = getattr(self.model, self.model.base_model_prefix, self.model)
        hooked = [
            base.register_forward_pre_hook(self._before_model, with_kwargs=True),
            self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            self.decoder.register_forward_hook(self._after_decoder),
        ]
        with ExitStack() as stack:
            for hook in hooked:
                stack.callback(hook.remove)
            stack.callback(self._unhook)
            stack.callback(lambda: [guards.close_cache(cache) for cache in self.caches])
            stack.enter_context(guards.guarded(self.model, partial(setattr, self, "rows")))
            if (process := getattr(self.decoder, "_deepstack_process", None)) is not None:
                stack.enter_context(
                    guards.replaced(self.decoder, "_deepstack_process", partial(self._deepstack, process))
                )
            yield

    def _hook(self) -> None:
        if not self.hooks:
            for number, layer in enumerate(self.decoder.layers):
                hook = partial(self._before_layer, number)
                self.hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def _unhook(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()

    def see(self, plan: Plan, call: Call) -> None:
        """Keep the statistics that `plan` needs of the layer that runs; slots become columns of the whole prompt."""
        prefill = self.prefill
        if self.rests or prefill.done:
            return
        number = len(prefill.at) - 1
        for name, value in statistics(call, self.views, plan.needs[number], prefill, self.decoder).items():
            place = prefill.stages[-1].place.to(value.device)[:, None].expand_as(value)
            whole = value.new_zeros(*value.shape[:2], prefill.tokens)
            prefill.statistics[number, name] = whole.scatter(2, place, value)

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.ids = kwargs.get("input_ids", args[0] if args else None)

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        ids, self.ids, self.masks = self.ids, None, {}
        if self.rests:
            return None
        x = kwargs.get("inputs_embeds")
        x = x if x is not None else kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            guards.check_prefill(kwargs)
            self.prefill = begin(self.model, self.sight, x, ids, kwargs, self.groups)
            self.views = Views()
            self._hook()
            return None
        guards.check_step(self.prefill, cache, x.shape[1])
        self.prefill.seen += x.shape[1]
        if self.prefill.rest is not None:
            self._hook()
        if self._ours(0):  # transformers counts tokens in the cache of layer 0, which now may hold fewer
            first = self.prefill.stages[self.prefill.at[0]].next
            position = (self.prefill.last + 1 if first is None else first) + self.prefill.before(x.shape[1])
            kwargs = {**kwargs, "position_ids": position, "attention_mask": None}
        return args, kwargs

    def _before_layer(self, number: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if self.rests:
            return None
        prefill = self.prefill
        given = hidden = args[0] if args else kwargs["hidden_states"]
        if not prefill.done:
            if number == 0 and (cache := kwargs.get("past_key_values")) is not None:
                prefill.cache = ref(cache)
            if number == 0:
                prefill.angles = kwargs["position_embeddings"]
            for plan in self.plans:
                if number in plan.choose:
                    hidden = self._choose(plan, number, hidden, kwargs["position_embeddings"])
            prefill.at.append(len(prefill.stages) - 1)
        if self._ours(number):
            kwargs = {**kwargs, **self._surroundings(number, hidden, kwargs)}
        elif hidden is given:
            return None
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _choose(self, plan: Plan, number: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Ask the plan, and begin a new stage if it drops anything; the hidden states that go on."""
        prefill = self.prefill
        before, device = prefill.stages[-1], hidden.device
        tokens = Tokens(number, hidden, before.place.to(device), before.alive.to(device), prefill, plan.sees,
                        before.rotary or rotary)  # fmt: skip
        chosen = plan.choose[number](tokens)
        keep, hidden = chosen if isinstance(chosen, tuple) else (chosen, hidden)
        keep = guards.check_choice(keep, hidden, tokens)[:: self.rows].repeat_interleave(self.rows, 0) & tokens.alive
        found = narrowed(before, keep, tokens.last, hidden, plan.positions, rotary, self.decoder.rotary_emb)
        if found is None:
            return hidden
        stage, hidden = found
        prefill.stages.append(stage)
        return hidden

    def _ours(self, number: int) -> bool:
        """Whether mask and positions of a layer are made here: behind a drop, or behind a shared beginning."""
        return self.prefill.at[number] > 0 or self.prefill.rest is not None

    def _surroundings(self, number: int, hidden: Tensor, kwargs: dict) -> dict:
        """Mask and rotary embedding of a layer behind a drop; one pair for all layers of a stage on a device."""
        prefill = self.prefill
        key = prefill.at[number], hidden.device
        if key not in self.masks:
            stage = prefill.stages[key[0]]
            mask = create_causal_mask(
                config=self.decoder.config, inputs_embeds=hidden, attention_mask=prefill.alive(stage),
                past_key_values=of_layer(kwargs.get("past_key_values"), number),
            )  # fmt: skip
            if not prefill.done:
                rotary = tuple(part.to(hidden.device) for part in stage.rotary)
            elif stage.next is None:
                rotary = kwargs["position_embeddings"]
            else:
                position = stage.next + prefill.before(hidden.shape[1])
                rotary = self.decoder.rotary_emb(hidden, position_ids=position.to(hidden.device))
            self.masks[key] = {"attention_mask": mask, "position_embeddings": rotary, "position_ids": None}
        return self.masks[key]

    def _after_decoder(self, module: nn.Module, args: tuple, output: Any) -> None:
        prefill = self.prefill
        if self.rests:
            return
        if prefill.done:
            if self.hooks and plain(prefill, self.masks.values()):
                self._unhook()
            return
        if not prefill.pruned:
            self._unhook()
        prefill.done, self.views = True, None
        self.sight.prompt_done()
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
        if not self.rests and self.prefill.pruned:
            visual, features = deepstack(self.prefill.stages[-1], visual, features)
        return process(hidden, visual, features)
