"""What `answer(prune=...)` means: methods with their options as JSON, and what they keep of every prompt."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lvlm_utils.models import LVLM
from lvlm_utils.pruning import METHODS, Trace, prune
from lvlm_utils.pruning.beginning import first_choice

if TYPE_CHECKING:
    from lvlm_utils.token_groups import TokenGroups

USAGE = 'give {"name": "fastv", "keep": 0.5}, that is a method of lv.prune with its options, or a list of such.'

# tokens that go into a layer, mean over the layers of one prompt, and into its last layer
MEASURED = ("mean_tokens", "mean_visual", "mean_text", "final_visual", "final_text", "final_context")


@dataclass(frozen=True)
class Pruned:
    """Methods in the order of nesting, each with its options; none where nothing is pruned.

    `name`, `keep` and `options` are what results say: the names joined by "+", the `keep` of the last method that has
    one (else 1.0), and all options as JSON, of one method an object, of several a list. `asks` tells whether the choice
    of any method depends on the question, and `alike` up to which layer prompts with one beginning are then the same.
    """

    methods: tuple[tuple[str, dict[str, Any]], ...]
    name: str
    keep: float
    options: str
    asks: bool
    alike: int | None = None

    @contextmanager
    def running(self, lvlm: LVLM) -> Iterator[Trace | None]:
        """Prune inside the block; None where there is nothing to prune."""
        with ExitStack() as stack:
            traces = [stack.enter_context(prune(lvlm, name, **options)) for name, options in self.methods]
            yield traces[0] if traces else None


def read(lvlm: LVLM, given: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> Pruned:
    """The methods that `prune=` names. ValueError for what concerns every prompt: unknown names, options that are
    wrong, do not fit the model or cannot be written as JSON."""
    if given is None:
        return Pruned((), "none", 1.0, "{}", False)
    several = [given] if isinstance(given, Mapping) else given
    proper = isinstance(several, list | tuple) and all(isinstance(one, Mapping) for one in several)
    if not proper or not several or not all(isinstance(one.get("name"), str) for one in several):
        raise ValueError(f"prune={given!r}: {USAGE}")
    methods, stated, plans = [], [], []
    for one in several:
        name = one["name"]
        if name not in METHODS:
            raise ValueError(f"{name!r} is no pruning method. There are: {', '.join(sorted(METHODS))}.")
        options = {key: _plain(name, key, value) for key, value in one.items() if key != "name"}
        methods.append((name, options))
        stated.append(_stated(lvlm, name, options))
        plans.append(METHODS[name].plan(lvlm, **options))
    shares = [float(options["keep"]) for options in stated if isinstance(options.get("keep"), int | float)]
    text = json.dumps(stated if len(stated) > 1 else stated[0], sort_keys=True)
    return Pruned(tuple(methods), "+".join(name for name, _ in methods), [1.0, *shares][-1], text,
                  any(plan.asks for plan in plans), first_choice(plans))  # fmt: skip


def counts(trace: Trace, groups: "TokenGroups") -> list[dict[str, float]]:
    """MEASURED of every prompt in the latest prefill."""
    kept = trace.kept
    total, visual, context = (
        (kept & mask.to(kept.device)).sum(-1).double()
        for mask in (torch.ones_like(groups.visual), groups.visual, groups.context)
    )
    text = total - visual
    found = [total.mean(0), visual.mean(0), text.mean(0), visual[-1], text[-1], context[-1]]
    return [dict(zip(MEASURED, row, strict=True)) for row in torch.stack(found, 1).tolist()]


def _plain(method: str, option: str, value: Any) -> Any:
    """The value as JSON can hold it: ranges, tuples and sets become lists, numpy's numbers plain ones."""
    try:
        if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
            raise TypeError("its keys are not text")
        return json.loads(json.dumps(value, default=_listed, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Option {option} of {method} is {value!r}, which cannot be kept with the results as JSON ({error}): "
            "give numbers, text or lists of them."
        ) from error


def _listed(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return sorted(value) if isinstance(value, set | frozenset) else list(value)


def _stated(lvlm: LVLM, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """All options with which the method runs, so that results stay apart when a default changes."""
    known = signature(METHODS[name].plan)
    _, *own = known.parameters.values()
    if unknown := set(options) - {one.name for one in own}:
        raise ValueError(
            f"{name} has no option {', '.join(sorted(unknown))}. There are: {', '.join(one.name for one in own)}."
        )
    chosen = {one.name: options.get(one.name, one.default) for one in own}
    chosen = {key: value.__name__ if value is known.parameters[key].default and callable(value) else value
              for key, value in chosen.items() if value is not known.empty}  # fmt: skip
    stated = {key: _plain(name, key, value) for key, value in chosen.items()}
    if missing := [one.name for one in own if one.name not in stated]:
        raise ValueError(f"{name} needs its option {', '.join(missing)}.")
    return {one.name: stated[one.name] for one in own if stated[one.name] is not None or one.default is not None}
