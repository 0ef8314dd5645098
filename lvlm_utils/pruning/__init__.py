"""The engine of pruning. The methods and `prune` are in lvlm_utils.methods, and may be named from here as well."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    return getattr(import_module("lvlm_utils.methods"), name)
