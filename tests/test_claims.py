"""The file of claims is whole, verdicts follow their rule, and adjusted intervals cover as often as they say."""

import re
from collections import Counter
from itertools import permutations

import numpy as np
import pandas as pd
import pytest

from lvlm_utils import claims, stats

PICTURES = np.repeat(np.arange(34), 6)
RULE = dict(direction="increase", least=0.02, reference=0.0, lowest=-1.0, highest=1.0)
LONG, BLANK = "dependency.accuracy-falls", "dependency.picture-adds-less"  # both of notebook 02


def rows_of(estimate, error, df=33.0, **more) -> pd.DataFrame:
    return pd.DataFrame({"estimate": np.atleast_1d(estimate), "error": error, "df": df, **RULE, **more})


# The file ------------------------------------------------------------------------------------------------------------
def test_every_claim_can_be_read_and_says_what_is_tested():
    found = claims.read()
    assert len(found) >= 60
    assert Counter(claim.paper for claim in found.values()).keys() == {"dependency", "vispruner", "fopru"}
    assert sum(claim.testable != "7b" for claim in found.values()) >= 60
    for claim in found.values():
        assert re.fullmatch(rf"{claim.paper}\.[a-z0-9-]+", claim.id)
        assert claim.statement[-1] == "." and claim.statement.count(". ") == 0, f"{claim.id}: one sentence"
        assert not claim.quantity[0].isspace() and claim.quantity[-1] != "."
    assert len({claim.statement for claim in found.values()}) == len(found)
    assert len({claim.statistic for claim in found.values()}) == len(found)


def test_notebooks_are_numbered_in_order_and_each_that_measures_has_claims():
    names = claims.tomllib.loads(claims.TOML.read_text())["notebooks"]
    assert [int(name[:2]) for name in names] == list(range(18))
    without = {"00_start_here", "12_how_the_methods_choose", "17_findings"}  # a tour, equations, and the ledger
    assert {claim.notebook for claim in claims.read().values()} == set(names) - without


@pytest.mark.parametrize("old, new, message", [
    ('unit = "share of contexts"\n', "", "'dependency.no-leak': Claim.__init__() missing 1 required"),
    ('unit = "share of contexts"\n', 'unit = "share"\nunits = "share"\n', "unexpected keyword argument 'units'"),
    ('direction = "equal"\n', 'direction = "up"\n', "direction is 'up', but must be one of increase"),
    ('direction = "equal"\n', 'direction = "above"\n', "'above' needs a reference"),
    ('direction = "equal"\n', 'direction = "increase"\nreference = 0.1\n', "only 'equal' may have one"),
    ("least = 0.01\n", "least = 0.0\n", "least must be above 0"),
    ("least = 0.01\n", 'least = "small"\n', "'dependency.no-leak': '<=' not supported between"),
    ('testable = "tiny"\n', 'testable = "7b"\n', "a reason is needed"),
    ('testable = "tiny"\n', 'testable = "tiny"\nreason = "none"\n', "a reason is needed"),
    ('notebook = "01_long_context_dataset"\n', 'notebook = "01"\n', "notebook is '01'"),
    ('budget = "-"}\n', 'budget = ""}\n', "must hold budget, layer, range, unit, and no field may be empty"),
    ('quantity = "share of contexts that name the object asked for"', 'quantity = ""', "no field may be empty"),
])  # fmt: skip
def test_a_fault_in_the_file_is_named_with_its_claim(tmp_path, old, new, message):
    text = claims.TOML.read_text()
    assert old in text
    path = tmp_path / "claims.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=re.escape(message)):
        claims.read(path)


def test_an_id_stands_once(tmp_path):
    path = tmp_path / "claims.toml"
    path.write_text(claims.TOML.read_text().replace(f'id = "{BLANK}"', f'id = "{LONG}"'))
    with pytest.raises(ValueError, match=f"{LONG}': this id is taken"):
        claims.read(path)


# The verdict ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value, low, high, direction, least, reference, words", [
    (0.10, 0.04, 0.16, "increase", 0.05, 0, "holds"),
    (0.04, 0.01, 0.07, "increase", 0.05, 0, "undecided (could have seen .03)"),  # an effect, perhaps a small one
    (0.10, -0.01, 0.21, "increase", 0.05, 0, "undecided (could have seen .11)"),
    (0.02, 0.01, 0.03, "increase", 0.05, 0, "no effect as large as claimed"),  # an effect, surely a small one
    (0.00, -0.04, 0.04, "increase", 0.05, 0, "no effect as large as claimed"),
    (-0.02, -0.03, -0.01, "increase", 0.05, 0, "no effect as large as claimed"),
    (-0.10, -0.16, -0.04, "increase", 0.05, 0, "opposite"),
    (-0.10, -0.16, -0.04, "decrease", 0.05, 0, "holds"),
    (0.10, 0.04, 0.16, "decrease", 0.05, 0, "opposite"),
    (0.33, 0.28, 0.38, "above", 0.05, 0.25, "holds"),
    (0.27, 0.25, 0.29, "above", 0.05, 0.25, "no effect as large as claimed"),
    (0.01, -0.02, 0.04, "equal", 0.05, 0, "holds"),
    (0.01, -0.05, 0.07, "equal", 0.05, 0, "undecided (could have seen .06)"),
    (0.06, 0.02, 0.10, "equal", 0.05, 0, "opposite"),
    (-0.06, -0.10, -0.02, "equal", 0.05, 0, "opposite"),
    (0.75, 0.72, 0.78, "equal", 0.1, 0.8, "holds"),
    (0.20, 0.10, 0.30, "no loss", 0.05, 0, "holds"),
    (-0.01, -0.04, 0.02, "no loss", 0.05, 0, "holds"),
    (-0.03, -0.06, 0.00, "no loss", 0.05, 0, "undecided (could have seen .03)"),
    (-0.08, -0.12, -0.04, "no loss", 0.05, 0, "opposite"),
])  # fmt: skip
def test_verdicts_on_constructed_intervals(value, low, high, direction, least, reference, words):
    assert claims.verdict(value, low, high, direction, least, reference) == words


def test_one_test_alone_is_not_adjusted_and_undecided_ones_make_the_decided_wider():
    alone, miss = claims.verdicts(rows_of(0.1, 0.03))
    assert alone == ["holds"] and miss == pytest.approx(0.05)
    # four tests of which one is decided: the level is 1 - .05 * 1 / 4
    words, miss = claims.verdicts(rows_of([0.2, 0.04, 0.05, 0.05], 0.05))
    assert miss == pytest.approx(0.05 / 4) and words[0] == "holds" and all(w.startswith("undecided") for w in words[1:])
    # when all are decided none is adjusted
    assert claims.verdicts(rows_of([0.2] * 4, 0.05)) == (["holds"] * 4, pytest.approx(0.05))


def test_about_five_percent_of_the_decided_intervals_miss_and_far_more_without_adjustment():
    rng, truth = np.random.default_rng(0), np.r_[np.zeros(16), np.full(4, 0.2)]
    adjusted, plain = [], []
    for _ in range(300):
        family = rows_of(rng.normal(truth, 0.1), 0.1, df=1e6, lowest=-9, highest=9)
        ends = claims.intervals(family)
        alone = [claims.verdict(*row, "increase", 0.02) for row in zip(family["estimate"], *ends)]
        for (words, miss), kept in ((claims.verdicts(family), adjusted), ((alone, 0.05), plain)):
            low, high = claims.intervals(family, miss)
            missed = ((truth < low) | (truth > high))[[not word.startswith("undecided") for word in words]]
            kept.append(missed.mean() if len(missed) else 0.0)
    assert np.mean(adjusted) < 0.06
    assert np.mean(plain) > 0.12


# Estimates -----------------------------------------------------------------------------------------------------------
def test_mean_agrees_with_the_paired_difference_of_stats():
    rng = np.random.default_rng(1)
    before, after = rng.random(204), rng.random(204)
    frames = [pd.DataFrame({"sample": range(204), "image_id": PICTURES, "margin": v}) for v in (before, after)]
    paired = stats.paired(*frames, value="margin")
    estimate = claims.mean(after - before, PICTURES)
    low, high = claims.intervals(rows_of(estimate.value, estimate.error))
    assert (estimate.n, estimate.clusters, estimate.seeds) == (204, 34, 1)
    assert [low[0], high[0]] == pytest.approx([paired.low, paired.high])
    assert claims._of(paired).error == pytest.approx(estimate.error)


def test_where_all_values_are_equal_the_interval_is_that_of_clopper_and_pearson():
    same = claims.mean(np.zeros(204), PICTURES)
    assert same.error == 0
    low, high = claims.intervals(rows_of(same.value, same.error, df=same.df))
    exact = stats.proportion_confint(0, 34, method="beta")[1]
    assert [low[0], high[0]] == pytest.approx([-exact, exact])
    perfect = claims.mean(np.ones(204), PICTURES, lowest=0)
    row = rows_of(perfect.value, perfect.error, df=perfect.df).assign(lowest=perfect.lowest)
    assert np.ravel(claims.intervals(row)) == pytest.approx([1 - exact, 1])
    # pictures whose means are all equal show no spread between pictures either
    level = claims.mean(np.tile([0.5, -0.5], 102), PICTURES)
    assert level.error == 0 and np.ptp(np.ravel(claims.intervals(rows_of(0.0, 0.0, df=level.df)))) > 0.2


def test_rare_changes_of_answers_are_covered():
    rng, hits, plain = np.random.default_rng(2), 0, 0
    pictures = np.repeat(np.arange(100), 6)
    for _ in range(300):
        changes = -(rng.random(600) < 0.005).astype(float)
        estimate = claims.mean(changes, pictures)
        low, high = claims.intervals(rows_of(estimate.value, estimate.error, df=estimate.df))
        hits += low[0] <= -0.005 <= high[0]
        cluster = changes.reshape(100, 6).mean(1)
        plain += abs(cluster.mean() + 0.005) <= 1.984 * cluster.std(ddof=1) / 10 or not changes.any()
    assert hits >= 285 and plain < 275


def test_intervals_hold_the_seeds_as_well_as_the_pictures():
    rng, hits = np.random.default_rng(3), {"both": 0, "pictures": 0}
    pictures, seeds = np.tile(PICTURES, 3), np.repeat([0, 1, 2], 204)
    for _ in range(200):
        values = rng.normal(0, 0.2, 34)[pictures] + rng.normal(0, 0.1, 3)[seeds] + rng.normal(0, 0.4, 612)
        for name, given in (("both", seeds), ("pictures", None)):
            estimate = claims.mean(values, pictures, given, lowest=-9, highest=9)
            low, high = claims.intervals(rows_of(estimate.value, estimate.error, df=estimate.df))
            hits[name] += low[0] <= 0 <= high[0]
    assert hits["both"] >= 180 and hits["pictures"] < 170
    assert estimate.seeds == 1 and claims.mean(values, pictures, seeds, lowest=-9, highest=9).seeds == 3


def test_difference_of_two_groups():
    rng = np.random.default_rng(4)
    large = rng.random(204) < 0.3
    right = (rng.random(204) < np.where(large, 0.9, 0.6)).astype(float)
    estimate = claims.mean(right, PICTURES, group=large, lowest=0)
    assert estimate.value == pytest.approx(right[large].mean() - right[~large].mean())
    assert (estimate.lowest, estimate.highest) == (-1, 1) and 0.03 < estimate.error < 0.12
    assert claims.mean(np.ones(204), PICTURES, group=large, lowest=0).error == 0


def test_what_is_no_estimate_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not within -1.0 to 1.0"):
        claims.mean([0.5, 2.0], [0, 1])
    with pytest.raises(ValueError, match="a value is missing"):
        claims.mean([0.5, np.nan], [0, 1])
    with pytest.raises(ValueError, match="1 pictures in a group say nothing"):
        claims.mean([0.5, 0.2], [0, 0])
    with pytest.raises(ValueError, match="give the values to lv.claims.mean"):
        claims.record(LONG, stats.wilson(3, 10), model="tiny-llava", root=tmp_path)
    with pytest.raises(ValueError, match="not an estimate, or one without a spread over pictures"):
        claims.record(LONG, claims.Estimate(np.nan, 0.1, 3, 10, 4), model="tiny-llava", root=tmp_path)
    with pytest.raises(ValueError, match="no claim 'dependency.nothing'"):
        claims.record("dependency.nothing", claims.computed(1), model="tiny-llava", root=tmp_path)
    with pytest.raises(ValueError, match="not testable on tiny-llava .tiny-llava knows single pictures only"):
        claims.record("vispruner.tiles-keep-most", claims.computed(1), model="tiny-llava", root=tmp_path)


# What was found ------------------------------------------------------------------------------------------------------
FOUND = {
    "fopru.beats-fastv": claims.Estimate(1 / 30, 0.012345678, 33, 204, 34),
    "vispruner.keeps-all-at-128": claims.mean(np.zeros(204), PICTURES),
    "fopru.reordering": claims.Estimate(-0.0123456, 0.02, 21.98765, 612, 34, 3),
    "vispruner.random-degrades": claims.Estimate(-0.3, 0.02, 33, 204, 34),
    "vispruner.tiles-keep-most": "with all tokens its answers in tiles are at chance",
}


def recorded(root, order=tuple(FOUND)) -> bytes:
    for id in order:
        claims.record(id, FOUND[id], model="some/where/smol-llava", root=root)
    return (root / "figures/smol-llava/13_claims.csv").read_bytes()


def test_the_file_depends_on_neither_order_nor_repetition(tmp_path):
    once = recorded(tmp_path / "a")
    assert recorded(tmp_path / "a") == once
    for place, order in enumerate(list(permutations(FOUND))[::40]):
        assert recorded(tmp_path / str(place), order) == once
    assert [file.name for file in (tmp_path / "a/figures/smol-llava").iterdir()] == ["13_claims.csv"]


def test_the_file_has_four_digits_whole_counts_and_one_row_per_claim(tmp_path):
    recorded(tmp_path)
    rows = pd.read_csv(tmp_path / "figures/smol-llava/13_claims.csv", index_col="id", dtype=str)
    assert rows.columns.tolist() == claims.COLUMNS
    columns = ["estimate", "low", "high", "adjusted_low", "adjusted_high", "error", "df", "least"]
    numbers = rows[columns].stack().dropna()
    assert len(numbers) > 20
    for number in numbers:
        assert len(re.sub(r"e.*|[-.]", "", number).lstrip("0")) <= 4, number
    assert rows.loc["fopru.reordering", ["n", "clusters", "seeds"]].tolist() == ["612", "34", "3"]
    untestable = {claim.id for claim in claims.read().values() if claim.notebook[:2] == "13" and claim.testable == "7b"}
    assert set(rows.index) == untestable | set(FOUND)
    assert set(rows.loc[list(untestable), "verdict"].str[:20]) == {"not testable here: i", "not testable here: n"}
    assert rows.loc["fopru.beats-fastv", "estimate"] == "0.03333"
    # a decided test lets fewer than all miss: one of four, or two
    assert float(rows.loc["fopru.beats-fastv", "adjusted_low"]) < float(rows.loc["fopru.beats-fastv", "low"])


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    before = recorded(tmp_path)

    def half(self, path, **options):
        path.write_text("id,sour")
        raise OSError("no space left")

    monkeypatch.setattr(pd.DataFrame, "to_csv", half)
    with pytest.raises(OSError, match="no space"):
        claims.record("fopru.beats-fastv", claims.Estimate(0.5, 0.1, 33, 204, 34), model="smol-llava", root=tmp_path)
    files = list((tmp_path / "figures/smol-llava").iterdir())
    assert [file.name for file in files] == ["13_claims.csv"] and files[0].read_bytes() == before


def test_read_back_as_sentence_table_and_ledger(tmp_path):
    for model, value in (("tiny-llava", -0.12), ("smol-llava", -0.01)):
        sentence = claims.record(LONG, claims.Estimate(value, 0.02, 99, 600, 100), model=model, root=tmp_path)
        assert sentence == claims.headline(LONG, model, tmp_path)
    assert claims.headline(LONG, "tiny-llava", tmp_path) == (
        "The accuracy at 2,500 tokens minus accuracy at 500 tokens is -0.12 (share of questions; 95% interval -0.16 to "
        "-0.08, adjusted for 1 test; 600 values from 100 pictures). Verdict: holds.")  # fmt: skip
    claims.record("vispruner.flops-95", claims.computed(0.905), model="tiny-llava", root=tmp_path)
    assert claims.headline("vispruner.flops-95", "tiny-llava", tmp_path) == (
        "The share of LLaVA-1.5-7B's operations saved with 32 of 576 visual tokens is 0.905 (share of operations; "
        "computed, not sampled). Verdict: opposite.")  # fmt: skip
    table = claims.table("02_context_length", "tiny-llava", tmp_path)
    assert table.equals(claims.table("02", "tiny-llava", tmp_path)) and len(table.columns) <= 7
    assert table.loc[LONG, "adjusted interval"] == "-0.16 to -0.08" and table.loc[LONG, "n (pictures)"] == "600 (100)"
    assert table.loc["dependency.deepseek-falls-28", "verdict"].startswith("not testable here: the claim names a")
    ledger = claims.ledger(tmp_path)
    assert ledger.index.tolist() == list(claims.read()) and ledger.columns.tolist()[3:] == ["smol-llava", "tiny-llava"]
    assert ledger.loc[LONG].tolist()[3:] == ["no effect as large as claimed", "holds"]
    assert ledger.loc[BLANK].tolist()[3:] == ["not measured"] * 2
    assert ledger.loc["vispruner.tiles-keep-most"].tolist()[3:] == [
        "not measured", "not testable here: tiny-llava knows single pictures only"]  # fmt: skip
    with pytest.raises(ValueError, match=f"has no result for {BLANK}: run notebook 02_context_length"):
        claims.headline(BLANK, "tiny-llava", tmp_path)
    with pytest.raises(FileNotFoundError, match="run notebook 03 with tiny-llava first"):
        claims.table("03", "tiny-llava", tmp_path)


def test_a_slope_of_stats_can_be_recorded(tmp_path):
    rng = np.random.default_rng(5)
    length = np.tile([500, 1000, 1500, 2000, 2500, 500], 34)
    right = rng.random(204) < 0.95 - length / 10_000
    slope = stats.trend(pd.DataFrame({"length": length, "correct": right, "image_id": PICTURES}))
    claims.record(LONG, slope, model="tiny-llava", root=tmp_path)
    row = pd.read_csv(tmp_path / "figures/tiny-llava/02_claims.csv", index_col="id").loc[LONG]
    assert [row["low"], row["high"]] == pytest.approx([slope.low, slope.high], rel=2e-3)


def test_a_file_with_a_claim_that_is_gone_is_refused(tmp_path):
    recorded(tmp_path)
    path = tmp_path / "figures/smol-llava/13_claims.csv"
    path.write_text(path.read_text().replace("fopru.reordering,", "fopru.forgotten,"))
    with pytest.raises(ValueError, match="holds 'fopru.forgotten', which data/claims.toml does not have there"):
        claims.ledger(tmp_path)
