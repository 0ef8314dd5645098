"""Textbook numbers, and a simulation: naive tests over-reject when questions share a picture, ours do not."""
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from lvlm_utils import stats


def results(correct, image_id, **columns) -> pd.DataFrame:
    n = len(correct)
    return pd.DataFrame({"sample": [f"s{i}" for i in range(n)], "image_id": image_id, "correct": correct,
                         "answer": ["yes"] * n, "error": [None] * n, **columns})


def test_wilson_textbook():
    # Newcombe 1998, Table I: 81 of 263 -> 0.2553 to 0.3662; 0 of 20 -> 0 to 0.1611
    estimate = stats.wilson(81, 263)
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (0.2553, 0.3662)
    zero = stats.wilson(0, 20)
    assert zero.low == pytest.approx(0, abs=1e-12) and round(zero.high, 4) == 0.1611
    for k, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="between 0 and n"):
            stats.wilson(k, n)


def test_accuracy_counts_and_intervals():
    frame = results([True] * 5 + [False] * 3, list("aabbccdd"), length=[0] * 4 + [500] * 4)
    frame["answer"] = ["yes", "no", "no", "no", "yes", None, None, "no"]
    frame.loc[6, "error"] = "corrupt picture"
    table = stats.accuracy(frame, "length").set_index("length")
    assert table["n"].tolist() == [4, 4] and table["clusters"].tolist() == [2, 2]
    assert table["accuracy"].tolist() == [1.0, 0.25] and table["yes_rate"].tolist() == [0.25, 0.5]
    assert table["unparsed"].tolist() == [0, 1] and table["errors"].tolist() == [0, 1]
    whole = stats.accuracy(frame)
    assert len(whole) == 1 and whole["accuracy"][0] == 0.625
    assert stats.accuracy(frame, ["length", "answer"])["n"].sum() == 8


def test_clustered_interval_is_plain_wilson_with_one_question_per_picture_and_wider_otherwise():
    rng = np.random.default_rng(0)
    right = rng.random(120) < 0.7
    alone = stats.accuracy(results(right, np.arange(120))).iloc[0]
    assert (alone["low"], alone["high"]) == (alone["wilson_low"], alone["wilson_high"]) and alone["test"] == "Wilson"
    same = stats.accuracy(results(np.repeat(right, 6), np.repeat(np.arange(120), 6))).iloc[0]
    # six copies of an answer carry the information of one
    assert same["high"] - same["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.03)
    perfect = stats.accuracy(results([True] * 12, np.repeat([0, 1, 2], 4))).iloc[0]
    assert perfect["low"] == pytest.approx(stats.wilson(3, 3).low)
    assert np.isnan(stats.accuracy(results([True, False], ["a", "a"])).iloc[0]["low"])


def test_missing_correct_is_an_error_and_not_left_out():
    with pytest.raises(ValueError, match="'correct': 1 of 2 values are missing"):
        stats.accuracy(results([True, None], ["a", "b"]))


def test_paired_is_mcnemar_with_one_question_per_picture():
    # 59 right in both, 6 lost, 16 gained, 80 wrong in both: exact p is the two-sided sign test of 6 in 22
    before = [True] * 65 + [False] * 96
    after = [True] * 59 + [False] * 6 + [True] * 16 + [False] * 80
    estimate = stats.paired(results(before, np.arange(161)), results(after, np.arange(161)).iloc[::-1])
    assert estimate.test == "paired, McNemar exact" and estimate.n == estimate.clusters == 161
    assert estimate.p == pytest.approx(scipy_stats.binomtest(6, 22).pvalue) == pytest.approx(0.0525, abs=1e-4)
    assert estimate.value == pytest.approx(10 / 161) and estimate.low < 0.0 + 0.01 and estimate.high > estimate.value


def test_paired_clustered_equals_the_t_test_of_equal_cluster_means():
    rng = np.random.default_rng(1)
    image, a, b = np.repeat(np.arange(30), 6), rng.random(180), rng.random(180) + 0.1
    estimate = stats.paired(results(a, image), results(b, image))
    means = pd.Series(b - a).groupby(image).mean()
    expected = scipy_stats.ttest_1samp(means, 0)
    # the sandwich's small-sample factor is m / (m - 1) * (n - 1) / (n - 1): exactly the t test for equal clusters
    assert estimate.value == pytest.approx(means.mean()) and estimate.p == pytest.approx(expected.pvalue, rel=1e-6)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(expected.confidence_interval()), rel=1e-6)


def test_paired_edge_cases():
    a = results([True] * 6, list("aabbcc"))
    same = stats.paired(a, a)
    assert (same.value, same.p) == (0.0, 1.0)
    lost = stats.paired(a, a.assign(correct=False))
    assert lost.value == -1 and lost.p == pytest.approx(0.25) and "sign test" in lost.test
    with pytest.raises(ValueError, match="must hold the same samples: 1 only in a"):
        stats.paired(a, a.iloc[1:])
    with pytest.raises(ValueError, match="results_b: sample 's0' appears twice"):
        stats.paired(a, pd.concat([a, a]))
    with pytest.raises(ValueError, match="only 1 cluster"):
        stats.paired(a.iloc[:2], a.iloc[:2])


def clustered_null(rng, pictures=50, questions=6):
    """No difference between conditions, but what a condition does to one question it does to its picture."""
    image = np.repeat(np.arange(pictures), questions)
    ability = rng.normal(0.8, 1.0, (2, pictures))[:, image]
    return image, *(scipy_stats.norm.cdf(ability) > rng.random((2, len(image))))


def test_under_clustering_a_naive_paired_test_over_rejects_and_ours_does_not():
    rng, naive, ours, covered = np.random.default_rng(7), 0, 0, 0
    runs = 300
    for _ in range(runs):
        image, a, b = clustered_null(rng)
        lost, gained = (a & ~b).sum(), (b & ~a).sum()
        naive += scipy_stats.binomtest(int(gained), int(lost + gained)).pvalue < 0.05
        estimate = stats.paired(results(a, image), results(b, image))
        ours += estimate.p < 0.05
        covered += estimate.low <= 0 <= estimate.high
    assert naive / runs > 0.10
    assert 0.02 <= ours / runs <= 0.09 and covered / runs >= 0.91


def test_under_clustering_wilson_covers_too_rarely_and_ours_does_not():
    rng, naive, ours, runs = np.random.default_rng(8), 0, 0, 300
    truth = scipy_stats.norm.cdf(0.8 / np.sqrt(2))  # of the mean over pictures
    for _ in range(runs):
        image, a, _ = clustered_null(rng)
        row = stats.accuracy(results(a, image)).iloc[0]
        naive += row["wilson_low"] <= truth <= row["wilson_high"]
        ours += row["low"] <= truth <= row["high"]
    assert naive / runs < 0.90 and ours / runs >= 0.92


def test_trend_finds_a_slope_and_its_null_is_kept():
    rng, rejected, runs = np.random.default_rng(9), 0, 200
    for _ in range(runs):
        image = np.repeat(np.arange(30), 6)
        ability, tilt = rng.normal(0.5, 1, 30)[image], rng.normal(0, 0.5, 30)[image]
        frames = [results(1 / (1 + np.exp(-ability - tilt * (x - 1.25))) > rng.random(180), image, length=x * 1000)
                  for x in (0, 1, 2.5)]
        rejected += stats.trend(pd.concat(frames)).p < 0.05
    assert rejected / runs <= 0.10
    frames = [results(1 / (1 + np.exp(-2 + 0.8 * x)) > rng.random(180), image, length=x * 1000) for x in (0, 1, 2, 2.5)]
    slope = stats.trend(pd.concat(frames))
    assert slope.low < -0.8 < slope.high < 0 and slope.p < 1e-4 and slope.n == 720 and slope.clusters == 30


def test_trend_without_a_slope_says_why():
    frame = results([True] * 4, list("abcd"), length=[0, 500, 1000, 1500])
    assert np.isnan(stats.trend(frame).value) and "all answers alike" in stats.trend(frame).test
    frame["correct"] = [True, False] * 2
    assert "length does not vary" in stats.trend(frame.assign(length=0)).test


def test_benjamini_hochberg_textbook():
    # Benjamini and Hochberg 1995, Sec. 3.1: 4 of 15 hypotheses are rejected at 0.05
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528,
         0.7590, 1.0]
    assert (stats.benjamini_hochberg(p) < 0.05).sum() == 4
    grid = np.array([[0.01, np.nan], [0.04, 0.03]])
    assert stats.benjamini_hochberg(grid) == pytest.approx(np.array([[0.03, np.nan], [0.04, 0.04]]), nan_ok=True)


@pytest.mark.parametrize("low, high, direction, least, answer", [
    (0.1, 0.3, "up", 0, "holds"), (-0.1, 0.3, "up", 0, "undecided"), (-0.3, -0.1, "up", 0, "does not hold"),
    (-0.3, -0.1, "down", 0, "holds"), (0.1, 0.3, "down", 0, "does not hold"), (0.1, 0.3, "up", 0.2, "undecided"),
    (0.01, 0.03, "up", 0.2, "does not hold"), (-0.01, 0.02, "same", 0.05, "holds"),
    (0.06, 0.1, "same", 0.05, "does not hold"), (0.0, 0.1, "same", 0.05, "undecided"),
    (np.nan, np.nan, "up", 0, "undecided")])
def test_verdict(low, high, direction, least, answer):
    estimate = stats.Estimate((low + high) / 2, low, high, 10, "Wilson")
    assert stats.verdict(estimate, direction, least) == answer == stats.verdict(asdict(estimate), direction, least)


def test_verdict_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="up, down or same"):
        stats.verdict(stats.wilson(1, 2), "falls")
    with pytest.raises(ValueError, match="needs least"):
        stats.verdict(stats.wilson(1, 2), "same")


def test_caption():
    assert stats.caption(stats.Estimate(0.912, 0.881, 0.936, 600, "Wilson", 100)) == (
        "0.912 [0.881, 0.936], n=600 in 100 pictures, Wilson")
    row = stats.accuracy(results([True, False, True, True], list("aabb"))).iloc[0]
    assert stats.caption(row).startswith("0.750 [")
    assert stats.caption(row).endswith("], n=4 in 2 pictures, Wilson, clustered")
    fall = stats.Estimate(-0.12, -0.18, -0.06, 300, "paired, clustered by image_id", 50, 0.00034)
    assert stats.caption(fall) == ("-0.120 [-0.180, -0.060], n=300 in 50 pictures, p=0.00034, "
                                   "paired, clustered by image_id")
