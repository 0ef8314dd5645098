"""Observe and prune the attention of large vision-language models. Names are imported when first used."""

from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_FUNCTIONS = {
    "load": "models",
    "prompt": "prompts",
    "generate": "prompts",
    "forward": "prompts",
    "observe": "attention",
    "prune": "methods",
    "Method": "methods",
    "information_flow": "saliency",
    "answer": "evaluate",
    "summary": "evaluate",
    "measured": "results",
}
_MODULES = ("methods", "pruning", "samples", "efficiency", "stats", "figures", "claims")
__all__ = ["ROOT", *_FUNCTIONS, *_MODULES]


def __getattr__(name: str):
    if name in _FUNCTIONS:
        return getattr(import_module(f"lvlm_utils.{_FUNCTIONS[name]}"), name)
    if name in _MODULES:
        return import_module(f"lvlm_utils.{name}")
    raise AttributeError(f"module 'lvlm_utils' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
