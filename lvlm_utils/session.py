"""What observes or prunes a model right now, in one thread: where prompts begin, which groups they have, its hooks.

A session begins with the first `lv.observe` or `lv.prune` of a model in a thread and ends with the last. It decides
when a new prompt begins, so that nothing of a prompt that failed is left to the next one; it refuses what reads a
prompt in another way than in one forward pass; and its hooks do nothing in a copy of the model.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, update_wrapper
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from lvlm_utils.families import decoder_of, towers_of
from lvlm_utils.token_groups import TokenGroups, is_visual

LOCK = threading.RLock()
OPEN: "WeakKeyDictionary[PreTrainedModel, dict[int, Session]]" = WeakKeyDictionary()  # model -> thread -> session
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def session_of(model: PreTrainedModel) -> "Session | None":
    """The session of a model in this thread."""
    return OPEN.get(model, {}).get(threading.get_ident())


@contextmanager
def with_groups(model: PreTrainedModel, groups: TokenGroups | None) -> Iterator[None]:
    """Let what observes or prunes `model` know the groups of the prompts that are read inside the block."""
    session = session_of(model)
    if session is None:
        yield
        return
    before, session.groups = session.groups, groups
    try:
        yield
    finally:
        session.groups = before


@contextmanager
def joined(model: PreTrainedModel, part: Any) -> "Iterator[Session]":
    """The session of `model`, which calls `part.new_prompt()` where a prompt begins. Parts may leave in any order."""
    with LOCK:
        session = session_of(model) or OPEN.setdefault(model, {}).setdefault(threading.get_ident(), Session(model))
        session.parts.append(part)
    try:
        yield session
    finally:
        with LOCK:
            session.parts.remove(part)
            if not session.parts:
                session.hooks.close()
                del OPEN[model][session.thread]
                if not OPEN[model]:
                    del OPEN[model]


class Session:
    """One model in one thread."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.thread = model, threading.get_ident()
        self.parts: list[Any] = []  # what observes or prunes
        self.engine: Any = None  # what prunes: no other thread may then run the model
        self.groups: TokenGroups | None = None  # of the prompt that is read
        self.ids: Tensor | None = None  # its input_ids, where they are known
        self.beams = 1  # rows of the batch for each prompt: beams, or several answers
        self.generating = False
        self.prompts = 0  # that generate has read
        self.read = True  # the decoder has got the pictures that a tower has seen so far
        self.hooks = ExitStack()
        self.hooks.callback(instead(model, "generate", _generate))
        base = getattr(model, model.base_model_prefix, model)
        before = {base: self._before_model, decoder_of(model): self._before_decoder}
        before |= dict.fromkeys(towers_of(model).values(), self._before_tower)
        for module, function in before.items():
            self.hooks.callback(self.hook(module, function))
        self.hooks.callback(self.hook(base, after=self._after_model, always_call=True))

    def hook(
        self, module: nn.Module, before: Callable | None = None, after: Callable | None = None, **how: bool
    ) -> Callable[[], object]:
        """Register a forward pre-hook (called with keywords) and a forward hook; what is returned removes them.

        how: for `after`, always_call=True also where the module raised, prepend=True before other hooks.
        """
        handles = []
        if before is not None:
            handles.append(module.register_forward_pre_hook(_Hook(self, before), with_kwargs=True))
        if after is not None:
            handles.append(module.register_forward_hook(_Hook(self, after), **how))
        return lambda: [handle.remove() for handle in handles]

    def begin(self) -> None:
        """A prompt begins: nothing that was seen of another one counts any more."""
        self.read = False
        for part in self.parts:
            part.new_prompt()

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.ids = kwargs.get("input_ids", args[0] if args else None)
        pixels = any("pixel_values" in name and value is not None for name, value in kwargs.items())
        if pixels and not self.generating:  # generate() may have run the tower before
            self.begin()

    def _before_tower(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.read:
            self.begin()

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if is_prompt(kwargs):
            self.prompts += 1
            if self.generating and self.prompts > 1:
                raise ValueError("generate read a second prompt on its way, which is not the one that was asked.")
            if self.read or not self._shows_pictures():
                self.begin()
            self.read = True

    def _shows_pictures(self) -> bool:
        """Whether the prompt has visual tokens, as far as is known: a tower may have run for something else."""
        return self.ids is None or bool(is_visual(self.model, self.ids).any())

    def _after_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.read, self.ids = True, None


def is_prompt(kwargs: dict[str, Any]) -> bool:
    """Whether a decoder called with `kwargs` reads a prompt from its beginning: no cache, or an empty one."""
    cache = kwargs.get("past_key_values")
    return cache is None or cache.get_seq_length() == 0


def read_by(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What a decoder called so reads: embeddings (batch, tokens, width), or ids (batch, tokens)."""
    x = kwargs.get("inputs_embeds")
    return x if x is not None else kwargs.get("input_ids", args[0] if args else None)


class _Hook:
    """A hook that belongs to one session: it is not for other threads, and in a copy of the model it does nothing."""

    def __init__(self, session: Session, function: Callable):
        self.session, self.function = session, function

    def __call__(self, *args: Any) -> Any:
        if threading.get_ident() == self.session.thread:
            return self.function(*args)
        if self.session.engine is not None:
            raise ValueError(OTHER_THREAD)
        return None

    def __reduce__(self) -> tuple:
        return partial, (_ignore,)


OTHER_THREAD = (
    "This model is pruned by another thread: open lv.prune in the thread that runs the model, and take turns, or give "
    "every thread a model of its own."
)


def _ignore(*args: Any) -> None:
    return None


class _Instead:
    """Stands in for a method of one object. A copy of the object has its own method in this place."""

    def __init__(self, owner: Any, name: str, function: Callable):
        self.owner, self.name, self.function = owner, name, function
        self.own = vars(owner).get(name)  # of this object, if not of its class
        self.method, self.users = getattr(owner, name), 0
        update_wrapper(self, self.method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.owner, self.method, *args, **kwargs)

    def __reduce__(self) -> tuple:
        if self.own is not None:
            return partial, (self.own,)
        return getattr, (self.owner, self.name)  # while a copy is made, its class alone has the name


def instead(owner: Any, name: str, function: Callable) -> Callable[[], None]:
    """Call `function(owner, method, ...)` in place of a method of one object; what is returned takes it back."""
    with LOCK:
        now = vars(owner).get(name)
        if not isinstance(now, _Instead):
            now = _Instead(owner, name, function)
            setattr(owner, name, now)
        now.users += 1

    def undo() -> None:
        with LOCK:
            now.users -= 1
            if now.users or vars(owner).get(name) is not now:  # somebody put another there meanwhile
                return
            if now.own is not None:
                setattr(owner, name, now.own)
            else:
                delattr(owner, name)

    return undo


def _generate(model: PreTrainedModel, method: Callable, *args: Any, **kwargs: Any) -> Any:
    """`generate` of a model with sessions."""
    session = session_of(model)
    if session is None or session.generating:
        return method(*args, **kwargs)
    named = signature(method).bind(*args, **kwargs).arguments
    given = {**named.pop("kwargs", {}), **named}
    # what a given config leaves open is that of the model, as in the library
    settings = {**stated(model.generation_config), **stated(given.get("generation_config")), **given}
    _refuse(settings)
    session.beams = max(settings.get("num_beams") or 1, settings.get("num_return_sequences") or 1)
    session.generating, session.prompts = True, 0
    try:
        session.begin()
        return method(*args, **kwargs)
    finally:
        session.generating, session.beams, session.read = False, 1, True


def stated(config: GenerationConfig | None) -> dict[str, Any]:
    """What a generation config says; what it leaves open is not in it."""
    return {} if config is None else {name: value for name, value in config.to_dict().items() if value is not None}


def _refuse(settings: dict[str, Any]) -> None:
    """ValueError for options of `generate` under which a prompt is not read in one forward pass of its own."""
    get, cache = settings.get, settings.get("past_key_values")
    if get("use_cache") is False:
        raise ValueError("Generation without cache reads the prompt anew at every token: use_cache=True.")
    if get("prefill_chunk_size"):
        raise ValueError("prefill_chunk_size cuts the prompt into pieces: leave it out inside lv.observe and lv.prune.")
    if any(get(name) for name in ASSISTED):
        raise ValueError("Assisted decoding reads guesses as if they were the prompt: leave its options out.")
    if (get("guidance_scale") or 1) != 1:
        raise ValueError("guidance_scale reads a second prompt beside the first: leave it out.")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("past_key_values already hold tokens: generate from the whole prompt.")


def check_checkpointing(model: PreTrainedModel) -> None:
    """ValueError where layers would be run without a graph, so that gradients are lost without a word."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        reentrant = getattr(function, "keywords", {}).get("use_reentrant", False)
        if module.training and getattr(module, "gradient_checkpointing", False) and reentrant:
            raise ValueError(
                "Reentrant gradient checkpointing hides gradients from what watches the model: "
                'model.gradient_checkpointing_enable({"use_reentrant": False}), or model.eval().'
            )


def plain_arithmetic(device: torch.device) -> AbstractContextManager:
    """Arithmetic in the dtypes of its tensors, also inside torch.autocast."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
