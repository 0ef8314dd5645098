"""Pruning: `lv.prune` runs one of METHODS inside any LVLM; each method is one file with a pure function `select`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from lvlm_utils.models import LVLM, bare
from lvlm_utils.pruning import (
    cdpruner,
    context,
    divprune,
    downsample,
    fastervlm,
    fastv,
    fopru,
    ltp,
    prumerge,
    prumerge_plus,
    pyramiddrop,
    random,
    sparsevlm,
    spatten,
    tome,
    visionzip,
    vispruner,
)
from lvlm_utils.pruning.engine import pruning
from lvlm_utils.pruning.tokens import Plan, Tokens, Trace

METHODS = {
    "context": context, "spatten": spatten, "ltp": ltp, "vispruner": vispruner, "fastervlm": fastervlm, "fopru": fopru,
    "prumerge": prumerge, "prumerge_plus": prumerge_plus, "visionzip": visionzip, "tome": tome, "divprune": divprune,
    "cdpruner": cdpruner, "fastv": fastv, "sparsevlm": sparsevlm, "pyramiddrop": pyramiddrop, "random": random,
    "downsample": downsample,
}  # fmt: skip
__all__ = ["METHODS", "Plan", "Tokens", "Trace", "prune"]


@contextmanager
def prune(lvlm_or_model: LVLM | PreTrainedModel, name: str | Plan, **options: Any) -> Iterator[Trace]:
    """Prune every prompt that the model reads inside the block, by forward or by generate, and yield the trace.

        with lv.prune(lvlm, "fastv", keep=0.5) as trace:
            text = lv.generate(lvlm, prompt)

    `name` is one of METHODS, whose function `plan` says which `options` it has; or a Plan of your own. Blocks nest:
    the methods act in the order of nesting, and share the trace. Logits of a forward pass are those of the tokens
    that are left; the last one is always that of the last prompt token. A cache filled inside the block ends with it.
    ValueError for an unknown name, for options that do not fit the model or the prompt, and for everything that cannot
    be pruned correctly.
    """
    model = bare(lvlm_or_model)
    if isinstance(name, str):
        if name not in METHODS:
            raise ValueError(f"{name!r} is no pruning method. There are: {', '.join(sorted(METHODS))}.")
        plan = METHODS[name].plan(lvlm_or_model, **options)
    elif options:
        raise ValueError(f"A Plan has its own options: {', '.join(options)} cannot be given with it.")
    else:
        plan = name
    with pruning(model, plan) as trace:
        yield trace
