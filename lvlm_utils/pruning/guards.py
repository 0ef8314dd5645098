"""What pruning cannot do is refused in one line, before it could give a wrong answer in silence."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lvlm_utils.pruning.statistics import STATISTICS
from lvlm_utils.pruning.tokens import Plan, Prefill, Tokens

POSITIONS = ("original", "contiguous")
ONE_CACHE = "generate from the whole prompt, inside one lv.prune"


def check_plan(decoder: nn.Module, plan: Plan) -> None:
    """ValueError where the plan does not fit the model, or the model's layers cannot be pruned."""
    config, layers = decoder.config, len(decoder.layers)
    for layer in (*plan.choose, *plan.needs):
        if not 0 <= layer < layers:
            raise ValueError(f"Layer {layer} is out of range: the model has {layers} layers, 0 to {layers - 1}.")
    if unknown := {name for names in plan.needs.values() for name in names if not callable(name)} - set(STATISTICS):
        raise ValueError(f"A plan needs {', '.join(sorted(unknown))}: there are only {', '.join(STATISTICS)}.")
    if plan.positions not in POSITIONS:
        raise ValueError(f"positions={plan.positions!r} is not one of {', '.join(POSITIONS)}.")
    if plan.positions == "contiguous" and "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        raise ValueError(
            f"{config.model_type} has positions on a grid (mRoPE), which cannot be numbered anew: "
            'use positions="original".'
        )
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention"] if getattr(config, "sliding_window", None) else []
    if odd := sorted(set(kinds) - {"full_attention"}):
        raise ValueError(f"{config.model_type} has layers of {', '.join(odd)}: only full attention can be pruned.")


def check_prefill(kwargs: dict[str, Any]) -> None:
    """ValueError for arguments of the decoder that pruning could not follow."""
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if cache is not None and not isinstance(cache, DynamicCache):
        raise ValueError(
            f"Pruned layers keep different numbers of tokens, which a {type(cache).__name__} cannot hold: "
            "use the default DynamicCache (no cache_implementation)."
        )
    if kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError("Prompts packed one behind the other in one row cannot be pruned: give a padded batch.")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise ValueError("Pruning builds its own masks: pass attention_mask as (batch, tokens), or none.")


def check_choice(keep: Tensor, hidden: Tensor, tokens: Tokens) -> Tensor:
    """What a method chose, on the device of the hidden states; ValueError where it has the wrong shape or type."""
    if keep.dtype != torch.bool or keep.shape != tokens.alive.shape or hidden.shape != tokens.hidden.shape:
        raise ValueError(
            f"A method has to choose with bool {tuple(tokens.alive.shape)} (and hidden states as they came), "
            f"not {keep.dtype} {tuple(keep.shape)}."
        )
    return keep.to(hidden.device)


def check_step(prefill: Prefill | None, cache: Any, new: int) -> None:
    """ValueError for a decode step that does not continue the prefill that was pruned."""
    if prefill is None or not prefill.done or prefill.cache is None or prefill.cache() is not cache:
        raise ValueError(f"This cache was filled by another prompt, or outside lv.prune: {ONE_CACHE}.")
    announced = 1 if prefill.rest is None else prefill.tokens + prefill.rest.shape[1] - prefill.seen
    if new != announced:
        raise ValueError(
            f"{new} tokens at once on a pruned cache: a second prompt, assisted decoding and prefill in chunks do not "
            f"work with pruning; {ONE_CACHE}."
        )


def _refuse(settings: dict[str, Any]) -> None:
    """ValueError for options of `generate` under which the prefill is not one forward pass over the prompt."""
    get = settings.get
    assisted = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    if get("use_cache") is False:
        raise ValueError("Generation without cache would prune anew at every token: use_cache=True.")
    if get("prefill_chunk_size"):
        raise ValueError("prefill_chunk_size cuts the prompt into pieces, which cannot be pruned: leave it out.")
    if any(get(name) for name in assisted):
        raise ValueError("Assisted decoding does not work with pruning: leave its options out.")
    if get("cache_implementation") not in (None, "dynamic"):
        raise ValueError(
            f"cache_implementation={get('cache_implementation')!r}: pruned layers keep different numbers of tokens, "
            "use the default dynamic cache."
        )
    cache = get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(f"past_key_values already hold tokens, so the prompt cannot be pruned: {ONE_CACHE}.")


def close_cache(cache: DynamicCache) -> None:
    """Let no model go on with a pruned cache: outside lv.prune its masks would be those of layer 0 everywhere."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError(f"This cache was filled inside an lv.prune that has ended: {ONE_CACHE}.")

    cache.get_mask_sizes = refuse


@contextmanager
def guarded(model: PreTrainedModel, rows: Callable[[int], None]) -> Iterator[None]:
    """Refuse options of `model.generate` that do not work with pruning; tell `rows` how many rows a sample has."""
    if not hasattr(model, "generate"):
        yield
        return
    generate = model.generate

    @wraps(generate)
    def checked(*args: Any, **kwargs: Any) -> Any:
        named = signature(generate).bind(*args, **kwargs).arguments
        given = {**named.pop("kwargs", {}), **named}
        settings = {**(given.get("generation_config") or model.generation_config).to_dict(), **given}
        _refuse(settings)
        rows(max(settings.get("num_beams") or 1, settings.get("num_return_sequences") or 1))
        try:
            return generate(*args, **kwargs)
        finally:
            rows(1)

    with replaced(model, "generate", checked):
        yield


@contextmanager
def replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of this one object; what was there before comes back."""
    own = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)
