"""What prunes: the engine and what methods are written in. The methods themselves, and `prune`, are in `methods`."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any


def __getattr__(name: str) -> Any:
    """`lv.pruning` stays a name for prune, METHODS and the methods' modules."""
    if name.startswith("__") or find_spec(f"{__name__}.{name}"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("lvlm_utils.methods"), name)
