"""Prompts that share a beginning, but not what is pruned of it: the tower and the layers before any choice run once.

There every token but the last few is the same, and so are its keys and values. From the first layer that chooses, each
prompt runs by itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from lvlm_utils.families import decoder_of
from lvlm_utils.pruning.engine import ENGINES
from lvlm_utils.pruning.guards import replaced
from lvlm_utils.pruning.stages import of_layer
from lvlm_utils.pruning.tokens import Plan

OF_THE_END = {"last", "question"}  # statistics for which only queries behind the beginning count


def first_choice(plans: Sequence[Plan]) -> int | None:
    """The first layer that has to see each whole prompt by itself; None if a plan looks at every prompt's tower."""
    if any(plan.sees for plan in plans):
        return None
    choose = [layer for plan in plans for layer in plan.choose]
    whole = [layer for plan in plans for layer, names in plan.needs.items() if set(names) - OF_THE_END]
    return min([*choose, *whole], default=None)


class _Read(Exception):
    """The beginning has been read as far as needed."""


class Beginning:
    """The first tokens of some prompts, `ids`, with their pictures' tensors `extras`, as they go into layer `layer`.

    Whoever prunes `model` sees nothing of how it is read.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], extras: dict[str, Tensor], layer: int):
        self.decoder, self.layer, self.cache = decoder_of(model), layer, DynamicCache()
        tokens = torch.tensor([list(ids)], device=model.device)
        with ExitStack() as stack:
            if (engine := ENGINES.get(model)) is not None:
                stack.enter_context(replaced(engine, "rests", True))
            for number in {0, layer}:
                hook = partial(self._note, number)
                stack.callback(self.decoder.layers[number].register_forward_pre_hook(hook, with_kwargs=True).remove)
            with suppress(_Read):
                model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **extras)

    def _note(self, number: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if number == 0:
            self.embedded = hidden
        if number == self.layer:
            self.hidden = hidden
            raise _Read

    @contextmanager
    def under(self, mask: Tensor, cuts: Sequence[int]) -> Iterator[None]:
        """Inside, the next prefill of the model computes only what is behind the beginning, up to the layer.

        Its prompts are left-padded as `mask` (prompts, tokens) says, and share their first `cuts` tokens, no more than
        the beginning has. No picture is to be given with them.
        """
        prefill = _Prefill(self, mask, cuts)
        with ExitStack() as stack:
            for number, layer in enumerate(self.decoder.layers[: self.layer + 1]):
                hook = partial(prefill.before_layer, number)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove)
            yield


class _Prefill:
    """One batch on its way to the layer. Only its last `new` columns run; some of them may be of the beginning."""

    def __init__(self, shared: Beginning, mask: Tensor, cuts: Sequence[int]):
        self.shared, self.done = shared, False
        self.alive = None if bool(mask.all()) else mask
        lengths = mask.sum(1).tolist()
        self.tokens = mask.shape[1]
        self.spans = [(self.tokens - length, cut) for length, cut in zip(lengths, cuts, strict=True)]
        self.new = max(length - cut for length, cut in zip(lengths, cuts, strict=True))
        self.masks: dict[torch.device, Tensor | None] = {}

    def before_layer(self, number: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if self.done:
            return None
        shared, hidden = self.shared, args[0] if args else kwargs["hidden_states"]
        if number == 0:
            hidden = self._with_beginning(shared.embedded, hidden)
        if number == shared.layer:
            self.done = True
            if number > 0:
                hidden = pad(hidden, (0, 0, self.tokens - self.new, 0))
                hidden = self._with_beginning(shared.hidden, hidden)
        else:
            hidden = hidden[:, -self.new :]
            kwargs = {**kwargs, **self._surroundings(number, hidden, kwargs)}
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _with_beginning(self, beginning: Tensor, hidden: Tensor) -> Tensor:
        """hidden (prompts, tokens, width) with each prompt's share of the beginning (1, tokens, width) in its place."""
        hidden = hidden.clone()
        for row, (start, cut) in zip(hidden, self.spans, strict=True):
            row[start : start + cut] = beginning[0, :cut].to(hidden.device)
        return hidden

    def _surroundings(self, number: int, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        """What goes with the new columns into a layer, whose cache gets the columns before them."""
        cache, device = kwargs["past_key_values"], hidden.device
        layer = self.shared.cache.layers[number]
        cache.update(self._columns(layer.keys), self._columns(layer.values), number)
        if device not in self.masks:
            alive = None if self.alive is None else self.alive.to(device)
            self.masks[device] = create_causal_mask(
                config=self.shared.decoder.config, inputs_embeds=hidden, attention_mask=alive,
                past_key_values=of_layer(cache, number),
            )  # fmt: skip
        rotary = tuple(part[:, -self.new :] for part in kwargs["position_embeddings"])
        return {"attention_mask": self.masks[device], "position_embeddings": rotary, "position_ids": None}

    def _columns(self, x: Tensor) -> Tensor:
        """Keys or values (1, heads, tokens, width) of the beginning -> (prompts, heads, tokens - new, width)."""
        before = self.tokens - self.new
        ends = [(min(start, before), max(before - start, 0)) for start, _ in self.spans]
        return torch.cat([pad(x[:, :, :length], (0, 0, empty, 0)) for empty, length in ends])
