"""Intervals and tests for answers to questions of which several share one picture (statsmodels and scipy do the work).

Answers about one picture are not independent: a naive paired test rejects a true null far too often, so everything
here is clustered by picture. Each result carries n, the number of clusters, its interval and the name of its test.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

LEVEL = 0.95
CLUSTER = "image_id"


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval; p is None where nothing was tested. `caption` prints it."""

    value: float
    low: float
    high: float
    n: int
    test: str
    clusters: int | None = None
    p: float | None = None


def wilson(k: float, n: float) -> Estimate:
    """Wilson interval of k successes among n independent trials."""
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"k must lie between 0 and n, and n above 0: found k={k}, n={n}")
    low, high = proportion_confint(k, n, alpha=1 - LEVEL, method="wilson")
    return Estimate(k / n, float(low), float(high), n, "Wilson")


def proportion(values: Sequence[float], clusters: Sequence) -> Estimate:
    """Share of true values with a Wilson interval at the effective sample size n / design effect.

    The design effect is the clustered variance of the mean over the binomial one, never taken below 1, and the
    interval is widened from z to t for few clusters (Korn and Graubard 1998). With one value per cluster this is
    plain Wilson. If all values agree no design effect can be seen, and each cluster counts as one trial.
    """
    values, clusters = np.asarray(values, dtype=float), np.asarray(clusters)
    n, p = len(values), values.mean()
    _, code = np.unique(clusters, return_inverse=True)
    m = code.max() + 1
    if m == n:
        return replace(wilson(values.sum(), n), clusters=m)
    test = "Wilson, clustered"
    if m == 1:  # one cluster says nothing about the spread between clusters
        return Estimate(p, np.nan, np.nan, n, test, m)
    effective = float(m)
    if 0 < p < 1:
        totals = np.bincount(code, values - p)
        effect = max(m / (m - 1) * (totals**2).sum() / (n * p * (1 - p)), 1.0)
        few = stats.norm.ppf((1 + LEVEL) / 2) / stats.t.ppf((1 + LEVEL) / 2, m - 1)
        effective = n / effect * few**2
    low, high = proportion_confint(p * effective, effective, alpha=1 - LEVEL, method="wilson")
    return Estimate(p, float(low), float(high), n, test, m)


def accuracy(results: pd.DataFrame, by: str | Sequence[str] = ()) -> pd.DataFrame:
    """One row per group: n, clusters, accuracy, low, high (clustered, see `proportion`), wilson_low, wilson_high (as if
    independent), yes_rate (among parsed answers), unparsed and errors (counts; both are wrong answers here), test."""
    by, rows = [by] if isinstance(by, str) else list(by), []
    groups = results.groupby(by, sort=False, dropna=False) if by else [((), results)]
    for key, group in groups:
        correct = _numbers(group, "correct")
        estimate, naive = proportion(correct, group[CLUSTER]), wilson(correct.sum(), len(group))
        failed = group["error"].notna() if "error" in group else pd.Series(False, group.index)
        answered = group["parsed"].astype(bool) if "parsed" in group else group["answer"].isin(["yes", "no"])
        rows.append({**dict(zip(by, key)), "n": estimate.n, "clusters": estimate.clusters, "accuracy": estimate.value,
                     "low": estimate.low, "high": estimate.high, "wilson_low": naive.low, "wilson_high": naive.high,
                     "yes_rate": (group["answer"] == "yes").sum() / answered.sum() if answered.any() else np.nan,
                     "unparsed": int((~answered & ~failed).sum()), "errors": int(failed.sum()), "test": estimate.test})
    return pd.DataFrame(rows)


def paired(results_a: pd.DataFrame, results_b: pd.DataFrame, value: str = "correct") -> Estimate:
    """Mean of `value` in b minus a on the same samples (matched by "sample").

    Interval and p come from the mean of the differences with cluster-robust variance and t over the clusters. With one
    question per cluster and a yes/no value, p is McNemar's exact one. value: a column, e.g. "correct" or "margin"; a
    column of booleans made by the caller, e.g. said_yes, tests a change of bias.
    Raises ValueError when the samples differ or appear twice (filter length and condition first).
    """
    a, b = (frame.set_index("sample") for frame in (results_a, results_b))
    for name, frame in (("a", a), ("b", b)):
        if frame.index.has_duplicates:
            raise ValueError(f"results_{name}: sample {frame.index[frame.index.duplicated()][0]!r} appears twice; "
                             "keep one length and one condition")
    if set(a.index) != set(b.index) or a.empty:
        raise ValueError(f"the two results must hold the same samples: {len(set(a.index) - set(b.index))} only in a, "
                         f"{len(set(b.index) - set(a.index))} only in b, {len(set(a.index) & set(b.index))} in both")
    b = b.loc[a.index]
    before, after = _numbers(a, value), _numbers(b, value)
    _, code = np.unique(a[CLUSTER].to_numpy(), return_inverse=True)
    difference, n, m = after - before, len(a), int(code.max() + 1)
    mean = float(difference.mean())
    if m < 2:
        raise ValueError(f"only {m} cluster ({CLUSTER}): nothing can be said about other ones")
    if np.ptp(difference) == 0:  # no variance to estimate: the sign test over clusters is exact
        p = 1.0 if mean == 0 else 2 * 0.5**m
        return Estimate(mean, mean, mean, n, f"sign test over {CLUSTER}, all differences equal", m, p)
    fit = sm.OLS(difference, np.ones(n)).fit(cov_type="cluster", cov_kwds={"groups": code}, use_t=True)
    low, high = fit.conf_int(1 - LEVEL)[0]
    p, test = float(fit.pvalues[0]), f"paired, clustered by {CLUSTER}"
    if m == n and set(np.unique([before, after])) <= {0.0, 1.0}:
        table = [[((before == i) & (after == j)).sum() for j in (1, 0)] for i in (1, 0)]
        p, test = float(mcnemar(table, exact=True).pvalue), "paired, McNemar exact"
    return Estimate(mean, float(low), float(high), n, test, m, p)


def trend(results: pd.DataFrame, y: str = "correct") -> Estimate:
    """Slope of the log-odds of `y` per 1,000 tokens of `length`: logistic regression with cluster-robust variance.

    NaN with the reason in `test` when all answers are the same or the length does not vary: there is no slope to fit.
    """
    values, code = _numbers(results, y), np.unique(results[CLUSTER].to_numpy(), return_inverse=True)[1]
    n, m, test = len(results), int(code.max() + 1), f"logit, clustered by {CLUSTER}"
    distances = results["length"].to_numpy(dtype=float) / 1000
    if np.ptp(values) == 0 or np.ptp(distances) == 0 or m < 3:
        why = "all answers alike" if np.ptp(values) == 0 else "length does not vary" if m > 2 else f"{m} clusters"
        return Estimate(np.nan, np.nan, np.nan, n, f"{test}: no slope, {why}", m, np.nan)
    model = sm.GLM(values, sm.add_constant(distances), family=sm.families.Binomial())
    fit = model.fit(cov_type="cluster", cov_kwds={"groups": code}, use_t=True)
    # statsmodels would take t with n - 2 degrees of freedom; the clusters are what is independent
    slope, error = float(fit.params[1]), float(fit.bse[1])
    reach = float(stats.t.ppf((1 + LEVEL) / 2, m - 1)) * error
    return Estimate(slope, slope - reach, slope + reach, n, test, m, float(2 * stats.t.sf(abs(slope / error), m - 1)))


def benjamini_hochberg(p: Sequence[float]) -> np.ndarray:
    """Adjusted p values (false discovery rate) in the shape of `p`; NaN stays NaN and is not counted as a test."""
    p = np.asarray(p, dtype=float)
    adjusted, known = np.full(p.shape, np.nan), ~np.isnan(p)
    if known.any():
        adjusted[known] = multipletests(p[known], method="fdr_bh")[1]
    return adjusted


def verdict(estimate: Estimate | Mapping, direction: str, least: float = 0.0) -> str:
    """Does a claim hold here? direction: "up" or "down" (of the estimate, beyond `least`), or "same" (within `least`).

    up: "holds" when the whole interval lies above `least`, "does not hold" when all of it lies below `least` (so an
    effect as large as claimed is excluded), else "undecided". down: the same of the negated estimate. same: "holds"
    when the whole interval lies within -least ... least, "does not hold" when all of it lies outside.
    A missing interval is undecided.
    """
    low, high = (float(_field(estimate, side)) for side in ("low", "high"))
    if direction not in ("up", "down", "same"):
        raise ValueError(f"direction must be up, down or same, found {direction!r}")
    if direction == "same" and least <= 0:
        raise ValueError("a claim of no difference needs least > 0: the difference that would matter")
    if np.isnan(low) or np.isnan(high):
        return "undecided"
    if direction == "same":
        holds, fails = -least <= low and high <= least, low > least or high < -least
    else:
        low, high = (low, high) if direction == "up" else (-high, -low)
        holds, fails = low > least, high < least
    return "holds" if holds else "does not hold" if fails else "undecided"


def caption(row: Estimate | Mapping) -> str:
    """"0.912 [0.881, 0.936], n=600 in 100 pictures, Wilson, clustered" of an Estimate or of a row of `accuracy`."""
    value = _field(row, "value") if hasattr(row, "value") or "value" in row else _field(row, "accuracy")
    clusters, p = _field(row, "clusters"), _field(row, "p")
    parts = [f"{value:.3f} [{_field(row, 'low'):.3f}, {_field(row, 'high'):.3f}]",
             f"n={int(_field(row, 'n'))}" + ("" if clusters is None else f" in {int(clusters)} pictures")]
    if p is not None:
        parts.append("p<0.0001" if p < 0.0001 else f"p={p:.2g}")
    return ", ".join([*parts, str(_field(row, "test"))])


def _field(row: Estimate | Mapping, name: str):
    return getattr(row, name) if isinstance(row, Estimate) else row.get(name)


def _numbers(frame: pd.DataFrame, column: str) -> np.ndarray:
    """A column as floats. Raises ValueError when a value is missing: leaving rows out would hide failures."""
    values = pd.to_numeric(frame[column].astype(object), errors="coerce").to_numpy(dtype=float)
    if np.isnan(values).any():
        raise ValueError(f"column {column!r}: {int(np.isnan(values).sum())} of {len(values)} values are missing or no "
                         "numbers; decide how to count them first")
    return values
