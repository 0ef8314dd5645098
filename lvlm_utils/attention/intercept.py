"""See every attention call of chosen modules, whatever implementation is active, and change nothing.

Transformers looks the implementation up by name in `ALL_ATTENTION_FUNCTIONS` at every call. While `intercept` is open,
the names in use lead to a function that calls the same implementation and then shows what went in and came out. No
config changes, so masks, the choice of kernels and the outputs stay as they are, bit by bit; modules of other models
pass through. "eager" is not in the table: its function stands beside the module's class, where the library takes it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BENT = ("softcap", "s_aux", "position_bias")  # options under which the scores are not just scale q k^T


@dataclass(frozen=True)
class Call:
    """One call of an attention function.

    query (batch, heads, queries, width) after rotation; key and value (batch, key heads, keys, width), with what was
    cached; scale multiplies query times key; mask as the implementation takes it, None where only `causal` counts;
    output (batch, queries, heads, width).
    """

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    causal: bool
    lengths: torch.Tensor | None  # 0 and the ends of pictures packed one behind the other; None: not packed
    output: torch.Tensor

    def unpacked(self) -> list["Call"]:
        """One call for each picture, where several were packed one behind the other."""
        if self.lengths is None:
            return [self]
        sizes = self.lengths.diff().tolist()
        parts = zip(*(t.split(sizes, 2) for t in (self.query, self.key, self.value)), self.output.split(sizes, 1))
        return [replace(self, query=q, key=k, value=v, output=o, lengths=None) for q, k, v, o in parts]


@contextmanager
def intercept(see: Callable[[Call], None], *modules: nn.Module) -> Iterator[None]:
    """Call `see` after every attention call made by `modules` or parts of them. Contexts nest.

    NotImplementedError where the scores of a call are bent (soft cap, sink, bias), or a window is not in its mask.
    """
    watched = {id(part) for module in modules for part in module.modules()}
    configs = [part.config for module in modules for part in module.modules() if hasattr(part, "config")]
    names = {name for config in configs if (name := getattr(config, "_attn_implementation", None))}
    before = {name: ALL_ATTENTION_FUNCTIONS.get(name) for name in names}
    try:
        for name, function in before.items():
            ALL_ATTENTION_FUNCTIONS[name] = _shown(function, see, watched)
        yield
    finally:
        for name, function in before.items():
            del ALL_ATTENTION_FUNCTIONS[name]
            if function is not ALL_ATTENTION_FUNCTIONS.get(name):  # it had itself been set, not registered
                ALL_ATTENTION_FUNCTIONS[name] = function


def _shown(function: Callable | None, see: Callable[[Call], None], watched: set[int]) -> Callable:
    def attention(module, query, key, value, attention_mask, *args, **kwargs):
        run = function or _eager(module)
        out = run(module, query, key, value, attention_mask, *args, **kwargs)
        if id(module) in watched:
            odd = [name for name in BENT if kwargs.get(name) is not None]
            if getattr(attention_mask, "ndim", 0) < 4 and (kwargs.get("sliding_window") or key.shape[2]) < key.shape[2]:
                odd.append("sliding_window")
            if odd:
                raise NotImplementedError(f"{type(module).__name__} uses {', '.join(odd)}, which cannot be observed.")
            scale, causal = kwargs.get("scaling"), kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            lengths = kwargs.get("cu_seq_lens_q")
            see(Call(module, query, key, value, attention_mask, scale, causal, lengths, out[0]))
        return out

    return attention


def _eager(module: nn.Module) -> Callable:
    """The eager attention of a module: defined in the file of its class, or of one it inherits from."""
    for kind in type(module).__mro__:
        if found := getattr(sys.modules[kind.__module__], "eager_attention_forward", None):
            return found
    raise NotImplementedError(f"No eager attention was found for {type(module).__name__}.")
