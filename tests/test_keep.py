"""keep and drop: what is a budget, how many tokens it is, and which are then the best."""

from collections.abc import Collection
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
import torch

from lvlm_utils.pruning.keep import check_drop, check_keep, check_options, everything, kept, numbers, top

INF = float("inf")


@pytest.mark.parametrize("keep, of, wanted", [
    (0.5, 9, 4), (0.5, 1, 1), (1.0, 7, 7), (1e-9, 7, 1), (3, 9, 3), (1, 9, 1), (9, 9, 9), (np.int64(3), 9, 3),
    (np.uint8(9), 9, 9), (np.float32(0.5), 9, 4), (np.float64(1), 9, 9), (0.29, 100, 28),
])  # fmt: skip
def test_how_many_stay(keep, of, wanted):
    check_keep(keep)
    assert kept(keep, of) == wanted and type(kept(keep, of)) is int
    assert numbers(keep, torch.tensor([of, of])).tolist() == [wanted, wanted]
    assert top(torch.arange(of)[None].float(), keep).sum() == wanted
    assert everything(keep) == (float(keep) == 1.0 and isinstance(keep, float | np.floating))


@pytest.mark.parametrize("keep", [
    0, 0.0, -1, -0.1, 1.1, 10.0, True, False, np.True_, float("nan"), INF, "0.5", None, [3], Fraction(1, 2), 1j,
    torch.tensor(3), np.array([0.5, 0.5]),
])  # fmt: skip
def test_what_is_no_budget(keep):
    with pytest.raises(ValueError, match="^keep=.* is neither a share in .* nor a number") as error:
        check_keep(keep)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("drop", [1, 1.0, -0.1, True, False, np.False_, float("nan"), "auto", None, [0.5], 1j])
def test_what_is_no_share_to_drop(drop):
    with pytest.raises(ValueError, match="^drop=.* is no share"):
        check_drop(drop)
    for right in (0, 0.0, 0.999, np.float32(0.3), np.int64(0)):
        check_drop(right)


def test_more_than_there_are_is_refused_for_any_prompt():
    with pytest.raises(ValueError, match="keep=5 is more than the 4 visual tokens there are"):
        numbers(5, torch.tensor([9, 4]))
    with pytest.raises(ValueError, match="No visual tokens to prune"):
        numbers(0.5, torch.tensor([9, 0]))


def test_the_best_are_among_the_candidates():
    score = torch.tensor([[3.0, -INF, 5, 5, 1], [-INF, -INF, 2, -1e30, 0], [1, 1, 1, 1, 1]])
    assert top(score, 0.5).tolist() == [
        [False, False, True, True, False], [False, False, True, False, False], [True, True, False, False, False],
    ]  # fmt: skip
    assert top(score, 3).sum(1).tolist() == [3, 3, 3] and top(score, 3)[1].tolist() == [False, False, True, True, True]
    assert top(score, torch.tensor([1, 9, 0])).sum(1).tolist() == [1, 3, 0]
    with pytest.raises(ValueError, match="more than the 3"):
        top(score, 4)


@dataclass
class Options:
    kind: Literal["a", "b"] = "a"
    kinds: Collection[Literal["a", "b"]] = ("a",)
    either: Literal["all"] | int | None = None
    keep: float | int | Literal["most"] = "most"
    drop: float | None = None
    free: dict = field(default_factory=dict)
    late: 'Literal["a"]' = "a"


@pytest.mark.parametrize("options", [
    {}, {"kind": "b"}, {"kinds": ()}, {"kinds": ["b", "a"]}, {"either": "all"}, {"either": 7}, {"keep": 0.5},
    {"drop": 0}, {"late": "z"}, {"free": "any"},
])  # fmt: skip
def test_options_that_are_right(options):
    check_options(Options(**options))
    check_options(object())


@pytest.mark.parametrize("options, says", [
    ({"kind": "c"}, "kind='c' is not one of a, b."), ({"kind": None}, "kind=None is not one of a, b."),
    ({"kinds": ("a", "c")}, "kinds='c' is not one of a, b."), ({"kinds": "ac"}, "kinds='c' is not one of a, b."),
    ({"either": "none"}, "either='none' is not one of all."), ({"keep": "few"}, "keep='few' is neither"),
    ({"keep": None}, "keep=None is neither"), ({"drop": 1.0}, "drop=1.0 is no share"),
])  # fmt: skip
def test_options_that_are_wrong(options, says):
    with pytest.raises(ValueError, match=says):
        check_options(Options(**options))
