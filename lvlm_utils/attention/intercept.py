"""See every attention call of chosen modules, whatever implementation is active, and change nothing.

Transformers looks the implementation up by name in `ALL_ATTENTION_FUNCTIONS` at every call. The first time that a name
is watched, its function is wrapped there, once and for all: the wrapper calls the same function and then shows the call
to whoever watches the module in this thread. No config changes, so masks, kernels and outputs stay as they are, bit by
bit, and modules that nobody watches pass through. "eager" is not in the table: its function is in the file of the
module, where the library takes it from too.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import unwrap
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lvlm_utils.session import LOCK, plain_arithmetic

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
    lengths: torch.Tensor | None  # 0 and the ends of pictures packed one after the other; None: not packed
    output: torch.Tensor

    def unpacked(self) -> list["Call"]:
        """One call for each picture, where several were packed one after the other."""
        if self.lengths is None:
            return [self]
        sizes = self.lengths.diff().tolist()
        parts = zip(*(t.split(sizes, 2) for t in (self.query, self.key, self.value)), self.output.split(sizes, 1))
        return [replace(self, query=q, key=k, value=v, output=o, lengths=None) for q, k, v, o in parts]


Watcher = tuple[Callable[[Call], None], int]  # what sees the calls, and in which thread
WATCHED: "WeakKeyDictionary[nn.Module, tuple[Watcher, ...]]" = WeakKeyDictionary()  # module -> who watches it


@contextmanager
def intercept(see: Callable[[Call], None], *modules: nn.Module) -> Iterator[None]:
    """Call `see` after every attention call that `modules` or parts of them make in this thread.

    Contexts may end in any order. NotImplementedError where the scores of a call are bent (soft cap, sink, bias), or a
    window is not in its mask.
    """
    watcher = see, threading.get_ident()
    parts = dict.fromkeys(part for module in modules for part in module.modules())
    with LOCK:
        for part in parts:
            name = getattr(getattr(part, "config", None), "_attn_implementation", None)
            function = ALL_ATTENTION_FUNCTIONS.get(name)
            if name and not isinstance(function, _Shown):
                if function is AttentionInterface().get(name):  # of the library, or registered: as one may be later
                    AttentionInterface.register(name, _Shown(function))
                else:
                    ALL_ATTENTION_FUNCTIONS[name] = _Shown(function)
            WATCHED[part] = (*WATCHED.get(part, ()), watcher)
    try:
        yield
    finally:
        with LOCK:
            for part in parts:
                if left := tuple(other for other in WATCHED.pop(part) if other is not watcher):
                    WATCHED[part] = left


class _Shown:
    """An attention function, or None for that of each module, which shows its calls."""

    def __init__(self, function: Callable | None):
        self.function = function

    def __call__(self, module, query, key, value, attention_mask, *args, **kwargs):
        run = self.function or _eager(module)
        out = run(module, query, key, value, attention_mask, *args, **kwargs)
        here = threading.get_ident()
        watching = [see for see, thread in WATCHED.get(module, ()) if thread == here]
        if watching:
            call = _call(module, query, key, value, attention_mask, out[0], kwargs)
            with plain_arithmetic(query.device):
                for see in watching:
                    see(call)
        return out


def _call(module, query, key, value, mask, output, options: dict) -> Call:
    odd = [name for name in BENT if options.get(name) is not None]
    window = options.get("sliding_window")
    if getattr(mask, "ndim", 0) < 4 and window and window < key.shape[2]:
        odd.append("sliding_window")
    if odd:
        raise NotImplementedError(f"{type(module).__name__} uses {', '.join(odd)}, which cannot be observed.")
    scale, causal = options.get("scaling"), options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return Call(module, query, key, value, mask, scale, causal, options.get("cu_seq_lens_q"), output)


def _eager(module: nn.Module) -> Callable:
    """The eager attention that the `forward` of a module gives the library as its default."""
    for kind in type(module).__mro__:
        forward = unwrap(vars(kind).get("forward", _eager))
        names = [name for name in forward.__code__.co_names if name.endswith("eager_attention_forward")]
        if len(names) == 1:
            return forward.__globals__[names[0]]
    raise NotImplementedError(f"No eager attention was found for {type(module).__name__}.")
