"""Pruning: `lv.prune` runs a method inside any LVLM. A method is a dataclass; each of ours is one file here."""

from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel

from lvlm_utils.attention.towers import has_cls
from lvlm_utils.methods.cdpruner import CDPruner
from lvlm_utils.methods.context import Context
from lvlm_utils.methods.divprune import DivPrune
from lvlm_utils.methods.downsample import Downsample
from lvlm_utils.methods.fastervlm import FasterVLM
from lvlm_utils.methods.fastv import FastV
from lvlm_utils.methods.fopru import FoPru
from lvlm_utils.methods.ltp import LTP
from lvlm_utils.methods.prumerge import PruMerge
from lvlm_utils.methods.prumerge_plus import PruMergePlus
from lvlm_utils.methods.pyramiddrop import PyramidDrop
from lvlm_utils.methods.random import Random
from lvlm_utils.methods.sparsevlm import SparseVLM
from lvlm_utils.methods.spatten import SpAtten
from lvlm_utils.methods.tome import ToMe
from lvlm_utils.methods.visionzip import VisionZip
from lvlm_utils.methods.vispruner import VisPruner
from lvlm_utils.models import LVLM, bare
from lvlm_utils.pruning.engine import Method, PictureMethod, Tokens, Trace, pruning
from lvlm_utils.pruning.keep import check_options

METHODS: dict[str, type[Method]] = {
    "context": Context, "spatten": SpAtten, "ltp": LTP, "vispruner": VisPruner, "fastervlm": FasterVLM,
    "fopru": FoPru, "prumerge": PruMerge, "prumerge_plus": PruMergePlus, "visionzip": VisionZip, "tome": ToMe,
    "divprune": DivPrune, "cdpruner": CDPruner, "fastv": FastV, "sparsevlm": SparseVLM, "pyramiddrop": PyramidDrop,
    "random": Random, "downsample": Downsample,
}  # fmt: skip
__all__ = ["METHODS", "Method", "PictureMethod", "Tokens", "Trace", "fitted", "named", "prune"]
__all__ += [method.__name__ for method in METHODS.values()]


def named(name: str, **options: Any) -> Method:
    """The method of that name with these options. ValueError for an unknown name or option, with the known ones."""
    if name not in METHODS:
        raise ValueError(f"{name!r} is no pruning method. There are: {', '.join(sorted(METHODS))}.")
    known = [field.name for field in fields(METHODS[name]) if field.init]
    if unknown := set(options) - set(known):
        raise ValueError(f"{name} has no option {', '.join(sorted(unknown))}. There are: {', '.join(known)}.")
    return METHODS[name](**options)


def fitted(lvlm: LVLM | PreTrainedModel, method: str | Method, **options: Any) -> Method:
    """The method as `prune` runs it: its options checked, and what depends on the model filled in.

    ValueError for a wrong option, and where the method does not fit the model.
    """
    if isinstance(method, str):
        method = named(method, **options)
    elif not isinstance(method, Method):
        raise ValueError(f"{method!r} is no method: give a name, or a Method with its options, as FastV(keep=0.5).")
    elif options:
        raise ValueError(f"A method has its own options: {', '.join(options)} cannot be given with it.")
    check_options(method)
    if method.needs_cls and not has_cls(lvlm):
        kind = type(method).__name__
        raise ValueError(f"{kind} needs a [CLS] token, which this vision tower has not: take vispruner or divprune.")
    return method.fit(lvlm)


def prune(lvlm: LVLM | PreTrainedModel, method: str | Method, **options: Any) -> AbstractContextManager[Trace]:
    """Prune every prompt that the model reads inside the block, by forward or by generate; the block gets the trace.

        with lv.prune(lvlm, lv.methods.FastV(keep=0.5)) as trace:
            text = lv.generate(lvlm, prompt)

    lvlm: what lv.load returns, or a bare transformers model.
    method: a Method, of METHODS or of your own; or the name of one in METHODS, with its fields as `options`.

    Blocks nest: the methods act in the order of nesting, and share the trace. Logits of a forward pass are those of the
    tokens that are left; the last one is always that of the last prompt token. A cache that was filled inside the block
    cannot be used after it. ValueError for an unknown name or option, and for everything that cannot be pruned
    correctly.
    """
    return pruning(bare(lvlm), fitted(lvlm, method, **options))
