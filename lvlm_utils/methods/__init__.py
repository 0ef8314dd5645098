"""Pruning: `lv.prune` runs a method inside any LVLM. A method is a dataclass; each of ours is one file here."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel

from lvlm_utils.models import LVLM, bare
from lvlm_utils.pruning.engine import Method, Tokens, Trace, pruning

METHODS: dict[str, type[Method]] = {}
__all__ = ["METHODS", "Method", "Tokens", "Trace", "named", "prune"]


def named(name: str, **options: Any) -> Method:
    """The method of that name with these options. ValueError for an unknown name or option, with the known ones."""
    if name not in METHODS:
        raise ValueError(f"{name!r} is no pruning method. There are: {', '.join(sorted(METHODS))}.")
    known = [field.name for field in fields(METHODS[name]) if field.init]
    if unknown := set(options) - set(known):
        raise ValueError(f"{name} has no option {', '.join(sorted(unknown))}. There are: {', '.join(known)}.")
    return METHODS[name](**options)


@contextmanager
def prune(lvlm: LVLM | PreTrainedModel, method: str | Method, **options: Any) -> Iterator[Trace]:
    """Prune every prompt that the model reads inside the block, by forward or by generate, and yield the trace.

        with lv.prune(lvlm, lv.methods.FastV(keep=0.5)) as trace:
            text = lv.generate(lvlm, prompt)

    lvlm: what lv.load returns, or a bare transformers model.
    method: a Method, of METHODS or of your own; or the name of one in METHODS, with its fields as `options`.

    Blocks nest: the methods act in the order of nesting, and share the trace. Logits of a forward pass are those of the
    tokens that are left; the last one is always that of the last prompt token. A cache filled inside the block ends
    with it. ValueError for an unknown name or option, and for everything that cannot be pruned correctly.
    """
    if isinstance(method, str):
        method = named(method, **options)
    elif options:
        raise ValueError(f"A method has its own options: {', '.join(options)} cannot be given with it.")
    with pruning(bare(lvlm), method.fit(lvlm)) as trace:
        yield trace
