"""Shares and numbers of tokens: what `keep` and `drop` mean, the same in every method."""


def check_keep(keep: float | int) -> None:
    """ValueError unless `keep` is a share (a float above 0, at most 1.0) or a number of tokens (an int from 1)."""
    share = isinstance(keep, float) and 0 < keep <= 1
    number = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    if not share and not number:
        raise ValueError(f"keep={keep!r} is neither a share in (0, 1] nor a number of tokens: 0.5 is half, 64 is 64.")


def kept(keep: float | int, tokens: int) -> int:
    """How many of `tokens` stay: `keep` itself, or that share of them, rounded down, at least one."""
    check_keep(keep)
    if not tokens:
        raise ValueError("No visual tokens to prune: a prompt has no picture, or all its tokens were dropped before.")
    if isinstance(keep, int):
        if keep > tokens:
            raise ValueError(f"keep={keep} is more than the {tokens} visual tokens there are.")
        return keep
    return max(1, int(tokens * keep))


def check_drop(drop: float) -> None:
    """ValueError unless `drop` is a share from 0 (nothing is dropped) to below 1."""
    if isinstance(drop, bool) or not isinstance(drop, int | float) or not 0 <= drop < 1:
        raise ValueError(f"drop={drop!r} is no share in [0, 1): 0.3 drops 30%.")
