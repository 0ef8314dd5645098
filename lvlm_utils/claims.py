"""The claims of three papers: what each says (data/claims.toml), what a notebook found, and one rule for the verdict.

A notebook calls `record` once for each of its claims and reads back `table` and `headline`; notebook 17 reads `ledger`.
What is measured, and on which questions, stays with the notebooks.
"""

import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy.stats import t
from statsmodels.stats.sandwich_covariance import cov_cluster, cov_cluster_2groups

from lvlm_utils import ROOT, stats
from lvlm_utils.results import atomic

TOML = ROOT / "data" / "claims.toml"
MISS = 1 - stats.LEVEL  # the share of intervals that may miss
DIRECTIONS = ("increase", "decrease", "above", "equal", "no loss")
SIZES = ("tiny", "smol", "7b")
TESTED_ON = {"range", "layer", "unit", "budget"}
COUNTS = ["n", "clusters", "seeds"]
MEASURED = ["estimate", "error", "df", *COUNTS, "lowest", "highest"]
COLUMNS = ["source", "statement", "number", "estimate", "unit", "low", "high", "adjusted_low", "adjusted_high", *COUNTS,
           "direction", "reference", "least", "verdict", "text", "error", "df", "lowest", "highest"]  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, as data/claims.toml has it; the head of that file says what its words mean.

    number: the paper's own number, with its model. tested_on: range, layer, unit and budget in the paper.
    quantity: the name of what is estimated, for sentences; statistic: how, in full; unit: of our estimate.
    direction: one of DIRECTIONS, counted from `reference`; least: the smallest effect that would matter, and why.
    testable: the smallest of SIZES that can be asked; reason: why no smaller one can.
    """

    id: str
    paper: str
    source: str
    statement: str
    number: str
    tested_on: dict[str, str]
    quantity: str
    statistic: str
    unit: str
    direction: str
    least: float
    why: str
    notebook: str
    testable: str
    reference: float = 0.0
    reason: str = ""

    def __post_init__(self):
        if set(self.tested_on) != TESTED_ON or not all([*self.tested_on.values(), self.statement, self.quantity]):
            raise ValueError(f"tested_on must hold {', '.join(sorted(TESTED_ON))}, and no field may be empty")
        for name, allowed in (("direction", DIRECTIONS), ("testable", SIZES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(allowed)}")
        if self.least <= 0:
            raise ValueError("least must be above 0: without a smallest effect that matters nothing can be absent")
        if (self.direction == "above") != bool(self.reference) and self.direction != "equal":
            raise ValueError("'above' needs a reference; besides it only 'equal' may have one")
        if bool(self.reason) == (self.testable == "tiny"):
            raise ValueError("a reason is needed where the smallest model cannot be asked, and only there")


@functools.cache
def read(path: Path = TOML) -> dict[str, Claim]:
    """The claims by id, in the order of the file. Raises ValueError that names the claim and what is wrong with it."""
    content, found = tomllib.loads(path.read_text(encoding="utf-8")), {}
    for place, entry in enumerate(content["claim"], 1):
        try:
            claim = Claim(**entry)
            for name, allowed in (("paper", content["papers"]), ("notebook", content["notebooks"])):
                if getattr(claim, name) not in allowed:
                    raise ValueError(f"{name} is {getattr(claim, name)!r}, but must be one of {', '.join(allowed)}")
            if claim.id in found:
                raise ValueError("this id is taken")
        except (TypeError, ValueError) as error:  # TypeError: a field is missing, unknown or of another type
            raise ValueError(f"{path.name}: claim {entry.get('id', place)!r}: {error}") from error
        found[claim.id] = claim
    return found


# Estimates -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Estimate:
    """A number and what its interval at any level needs. `mean` makes one of values, `computed` one of arithmetic.

    value, error: the estimate and its standard error, e.g. of a bootstrap over pictures; an error of 0 says that all
        values were equal, NaN that nothing was sampled
    df: degrees of freedom of Student's t, as a rule the number of pictures less 1
    n, clusters, seeds: number of values, of pictures and of trainings behind them
    lowest, highest: what the quantity could be at most; needed where all values are equal
    """

    value: float
    error: float
    df: float
    n: int | None
    clusters: int | None
    seeds: int | None = 1
    lowest: float = -np.inf
    highest: float = np.inf


def computed(value: float) -> Estimate:
    """A number that follows from sizes alone, such as operations or bytes: no sample, no interval, and no test."""
    return Estimate(value, np.nan, np.nan, None, None, None)


def mean(values: Sequence[float], pictures: Sequence, seeds: Sequence | None = None,
         group: Sequence[bool] | None = None, lowest: float = -1.0, highest: float = 1.0) -> Estimate:  # fmt: skip
    """Mean of values (of paired differences, as a rule), or its difference between two groups, clustered by picture.

    Where several seeds stand in `seeds`, the error holds both pictures and seeds (two-way clustered: Cameron, Gelbach
    and Miller 2011) and is never below that of one of them; degrees of freedom are Satterthwaite's. Where values are
    -1, 0 or 1, as changes of answers are, one imagined change in each direction is added to the variance (Agresti and
    Min 2005): few changes would else give intervals that are too narrow.
    values: one per question (and seed); pictures, seeds: what each belongs to
    group: True for the values whose mean comes first, False for those whose mean is subtracted
    lowest, highest: what one value can be at most; -1 and 1 suit differences of answers and of shares
    """
    values, picture = np.asarray(values, dtype=float), np.unique(np.asarray(pictures), return_inverse=True)[1]
    if not ((lowest <= values) & (values <= highest)).all():
        raise ValueError(f"a value is missing or not within {lowest} to {highest}: give lowest and highest of a value")
    first = np.ones(len(values), dtype=bool) if group is None else np.asarray(group, dtype=bool)
    parts = [first] if group is None else [first, ~first]
    trials = min(len(np.unique(picture[part])) for part in parts)
    if trials < 2:
        raise ValueError(f"{trials} pictures in a group say nothing about other pictures; at least 2 are needed")
    fit = sm.OLS(values, np.ones(len(values)) if group is None else sm.add_constant(first.astype(float))).fit()
    seed = np.zeros(len(values), dtype=int) if seeds is None else np.unique(np.asarray(seeds), return_inverse=True)[1]
    if seed.max() == 0:
        variance, df = cov_cluster(fit, picture)[-1, -1], trials - 1
    else:
        both, of_pictures, of_seeds = (cov[-1, -1] for cov in cov_cluster_2groups(fit, picture, group2=seed))
        variance = max(both, of_pictures, of_seeds)
        df = variance**2 / max(of_pictures**2 / (trials - 1) + of_seeds**2 / seed.max(), 1e-99)
    if variance < 1e-18:  # rounding only: all values, or all pictures, are equal
        variance, df = 0.0, trials - 1
    elif np.isin(values, (-1, 0, 1)).all():
        variance += sum(2 / part.sum() ** 2 for part in parts)
    if group is not None:
        lowest, highest = lowest - highest, highest - lowest
    return Estimate(float(fit.params[-1]), float(variance**0.5), float(df), len(values), int(picture.max() + 1),
                    int(seed.max() + 1), lowest, highest)  # fmt: skip


def _of(estimate: stats.Estimate) -> Estimate:
    """The same with its standard error, read from an interval that is value +- t * error, as `stats.trend` gives."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if not low < high or not np.isclose(value - low, high - value, rtol=1e-6):
        raise ValueError(f"no standard error follows from {value} [{low}, {high}]: give the values to lv.claims.mean")
    df = estimate.clusters - 1
    return Estimate(value, (high - low) / 2 / t.ppf((1 + stats.LEVEL) / 2, df), df, estimate.n, estimate.clusters)


# The verdict ---------------------------------------------------------------------------------------------------------
def verdict(value: float, low: float, high: float, direction: str, least: float, reference: float = 0.0) -> str:
    """What an estimate and its adjusted interval say of a claim; effects count from `reference`, as the claim points.

    increase, decrease, above: *holds* where the interval excludes 0 and the estimate is at least `least`; *opposite*
    where the same is true of the other direction; *no effect as large as claimed* where the whole interval lies below
    `least`. equal: *holds* where the whole interval lies within -least ... least, *opposite* where it excludes 0 and
    the estimate is at least `least` away. no loss: the same, but a gain of any size holds. Else *undecided*, with the
    half-width of the interval: an effect of that size could have been told from 0.
    """
    value, low, high = value - reference, low - reference, high - reference
    if direction == "decrease":
        value, low, high = -value, -high, -low
    rises, falls = low > 0 and value >= least, high < 0 and value <= -least
    if direction in ("equal", "no loss"):
        holds, opposite, small = low > -least, falls, False
        if direction == "equal":
            holds, opposite = holds and high < least, falls or rises
    else:
        holds, opposite, small = rises, falls, high < least
    seen = _number((high - low) / 2, low, high).removeprefix("0")
    undecided = f"undecided (could have seen {seen})"
    return "holds" if holds else "opposite" if opposite else "no effect as large as claimed" if small else undecided


def intervals(tests: pd.DataFrame, miss: float = MISS) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends for rows with MEASURED, each missing the truth with probability `miss`.

    Student's t. Where all values were equal an error cannot be seen, and each picture counts as one trial that did not
    differ: at most 1 - (miss / 2) ** (1 / pictures) of all pictures do (Clopper and Pearson; at 95% about 3.7 /
    pictures), by as much as lowest and highest allow. That is wider than after one change of an answer, which shows
    that changes come singly; without any, they might come for all questions of a picture at once.
    """
    value, error, df, lowest, highest = (tests[name].to_numpy(dtype=float) for name in
                                         ("estimate", "error", "df", "lowest", "highest"))  # fmt: skip
    reach, differ = t.ppf(1 - miss / 2, df) * error, 1 - (miss / 2) ** (1 / (df + 1))
    low = np.where(error > 0, value - reach, (1 - differ) * value + differ * lowest)
    high = np.where(error > 0, value + reach, (1 - differ) * value + differ * highest)
    return np.maximum(low, lowest), np.minimum(high, highest)


def verdicts(tests: pd.DataFrame) -> tuple[list[str], float]:
    """The verdicts on a family of tests, and the share `miss` at which their adjusted intervals may miss.

    Of m intervals at 95% that are all looked at, 5% miss; of those that are picked because they decide something, many
    more may. False-coverage-adjusted intervals (Benjamini and Yekutieli 2005) make the picked ones wider: R picked of m
    tests get the level 1 - .05 R / m, and then on average at most 5% of the picked intervals miss. Picked is what is
    decided, and R is the largest number for which at least R tests are decided at that level (with one test this is
    the plain 95%). Proven for tests that are independent or move together; those of one notebook share their pictures.
    """
    rule, picked, decided = [tests[name] for name in ("direction", "least", "reference")], len(tests) + 1, len(tests)
    while decided < picked:  # fewer are decided by wider intervals, so that this ends at the largest R
        picked = decided
        miss = MISS * max(picked, 1) / max(len(tests), 1)
        found = [verdict(*row) for row in zip(tests["estimate"], *intervals(tests, miss), *rule)]
        decided = sum(not words.startswith("undecided") for words in found)
    return found, miss


# What was found ------------------------------------------------------------------------------------------------------
def record(id: str, estimate: Estimate | stats.Estimate | str, model: str, root: str | Path | None = None) -> str:
    """Keep what a notebook found for a claim in figures/<model>/NN_claims.csv; returns the sentence `headline` gives.

    The file holds one row per claim of the notebook. It depends on what was recorded last for each, not on the order,
    and is replaced as a whole. All adjusted intervals in it change when a claim joins the family.
    id: of a claim in data/claims.toml
    estimate: from `mean` or `computed`, an Estimate of your own, a slope from `stats.trend`; or a sentence that says
        why this model cannot be asked, by a rule that was fixed before looking
    model: as given to `load`
    root: folder of figures/, the repository's if none
    """
    claim = _claim(id)
    if not _testable(claim, model):
        raise ValueError(f"{id} is not testable on {model} ({claim.reason}): leave it out, its row is written anyway")
    if isinstance(estimate, str):
        row = {"verdict": f"not testable here: {estimate.removesuffix('.')}"}
    else:
        if isinstance(estimate, stats.Estimate):
            estimate = _of(estimate)
        if np.isnan(estimate.value) or estimate.error < 0 or not (np.isnan(estimate.error) or estimate.df > 0):
            raise ValueError(f"{id}: not an estimate, or one without a spread over pictures: {estimate}")
        # Rounded as in the file, so that reading it back changes nothing.
        row = {name: value if name in COUNTS else float(f"{value:.4g}") for name, value in
               zip(MEASURED, vars(estimate).values())}  # fmt: skip
    rows = _rows(claim.notebook, model, root, {id: row})
    with atomic(_path(claim.notebook, model, root)) as part:
        rows.to_csv(part, float_format="%.4g", lineterminator="\n", encoding="utf-8")
    return rows.loc[id, "text"]


def table(notebook: str, model: str, root: str | Path | None = None) -> pd.DataFrame:
    """The claims of a notebook ("08", or its name) with what a model says of them, for people; the index is the id."""
    rows = _rows(notebook, model, root)
    sampled = rows["adjusted_low"].notna()
    ends = zip(rows["estimate"], rows["adjusted_low"], rows["adjusted_high"])
    shown = [["" if np.isnan(x) else _number(x, *interval) for x in (value, *interval)] for value, *interval in ends]
    return pd.DataFrame({
        "source": rows["source"], "claim": rows["statement"], "in the paper": rows["number"],
        "here": [f"{value} {unit}" if value else "" for (value, _, _), unit in zip(shown, rows["unit"])],
        "adjusted interval": [f"{low} to {high}" if low else "" for _, low, high in shown],
        "n (pictures)": [f"{n} ({m})" if known else "" for n, m, known in zip(rows["n"], rows["clusters"], sampled)],
        "verdict": rows["verdict"]}, index=rows.index)  # fmt: skip


def ledger(root: str | Path | None = None) -> pd.DataFrame:
    """One row per claim: paper, source, statement, and the verdict of each model that has run (has claims files)."""
    folder = Path(ROOT if root is None else root) / "figures"
    ledger = pd.DataFrame([vars(claim) for claim in read().values()]).set_index("id")[["paper", "source", "statement"]]
    for model in sorted({file.parent.name for file in folder.glob("*/[0-9][0-9]_claims.csv")}):
        told = {claim.id: "not measured" if _testable(claim, model) else f"not testable here: {claim.reason}"
                for claim in read().values()}  # fmt: skip
        for file in sorted((folder / model).glob("[0-9][0-9]_claims.csv")):
            told |= _rows(file.name[:2], model, root)["verdict"].to_dict()
        ledger[model] = pd.Series(told)
    return ledger


def headline(id: str, model: str, root: str | Path | None = None) -> str:
    """What a model says of a claim in one sentence, with number, interval and verdict."""
    rows = _rows(_claim(id).notebook, model, root)
    if id not in rows.index:
        raise ValueError(f"{model} has no result for {id}: run notebook {_claim(id).notebook} with it")
    return rows.loc[id, "text"]


def _claim(id: str) -> Claim:
    if id not in read():
        raise ValueError(f"data/claims.toml has no claim {id!r}")
    return read()[id]


def _testable(claim: Claim, model: str) -> bool:
    """Whether a model is large enough for a claim: tiny-llava..., smol-llava..., and any other counts as one of 7b."""
    name = Path(model).name
    size = "tiny" if name.startswith("tiny-llava") else "smol" if name.startswith("smol-llava") else "7b"
    return SIZES.index(size) >= SIZES.index(claim.testable)


def _path(notebook: str, model: str, root: str | Path | None) -> Path:
    return Path(ROOT if root is None else root) / "figures" / Path(model).name / f"{notebook[:2]}_claims.csv"


def _rows(notebook: str, model: str, root: str | Path | None, new: Mapping[str, dict] | None = None) -> pd.DataFrame:
    """One row (COLUMNS) for each claim of a notebook that was recorded or cannot be tested, in the order of the toml.

    Only what was measured (MEASURED, and a reason of the notebook's own) is taken from the file, and `new` on top of
    it; all else follows anew from that and the toml.
    """
    path, found = _path(notebook, model, root), {}
    if path.exists():
        found = pd.read_csv(path, index_col="id")[[*MEASURED, "verdict"]].to_dict("index")
    elif new is None:
        raise FileNotFoundError(f"{path} is missing: run notebook {notebook} with {model} first")
    here = {claim.id: claim for claim in read().values() if claim.notebook[:2] == notebook[:2]}
    if gone := sorted(set(found) - set(here)):
        raise ValueError(f"{path} holds {gone[0]!r}, which data/claims.toml does not have there: delete the file and "
                         f"run notebook {notebook[:2]} again")  # fmt: skip
    found = {id: row for id, row in (found | (new or {})).items() if _testable(here[id], model)}
    shown = [claim for claim in here.values() if claim.id in found or not _testable(claim, model)]
    rows = pd.DataFrame([vars(claim) | found.get(claim.id, {}) for claim in shown]).set_index("id")
    rows = rows.reindex(columns=[*rows.columns.union([*MEASURED, "verdict"])]).astype(dict.fromkeys(MEASURED, float))
    tests = rows[rows["error"].notna()]
    words, miss = verdicts(tests)
    for low, high, share in (("low", "high", MISS), ("adjusted_low", "adjusted_high", miss)):
        rows[[low, high]] = pd.DataFrame(dict(zip((low, high), intervals(tests, share))), index=tests.index)
    words = dict(zip(tests.index, words))
    for id, row in rows.iterrows():
        if not _testable(here[id], model):
            words[id] = f"not testable here: {row.reason}"
        elif np.isnan(row.estimate):  # the notebook said why not
            words[id] = row.verdict
        elif np.isnan(row.error):  # computed
            words[id] = verdict(*[row.estimate] * 3, row.direction, row.least, row.reference)
    rows["verdict"] = pd.Series(words)
    rows["text"] = [_sentence(row, len(tests)) for row in rows.itertuples()]
    return rows.astype(dict.fromkeys(COUNTS, "Int64"))[COLUMNS]


def _sentence(row, tests: int) -> str:
    if np.isnan(row.estimate):
        return f"{row.statement} {row.verdict[0].upper()}{row.verdict[1:]}."
    value, low, high = (_number(x, row.adjusted_low, row.adjusted_high) for x in
                        (row.estimate, row.adjusted_low, row.adjusted_high))  # fmt: skip
    sample = f"{row.n:.0f} values from {row.clusters:.0f} pictures"
    sample += f" and {row.seeds:.0f} seeds" if row.seeds > 1 else ""
    known = f"95% interval {low} to {high}, adjusted for {tests} {'test' if tests == 1 else 'tests'}; {sample}"
    known = "computed, not sampled" if np.isnan(row.error) else known
    return f"The {row.quantity} is {value} ({row.unit}; {known}). Verdict: {row.verdict}."


def _number(value: float, low: float, high: float) -> str:
    """A number with as many digits as its interval allows: two of the half-width if it begins with 1, else one."""
    half = (high - low) / 2
    if not 0 < half < np.inf:
        return f"{value:.3g}"
    return f"{value:z.{min(max(int(-np.floor(np.log10(half / 2))), 0), 6)}f}"
