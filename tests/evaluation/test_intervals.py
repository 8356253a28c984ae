"""Intervals that hold the truth as often as they say, and p-values that are exact where they can be."""

import math

import numpy as np
import pytest

from medqa.evaluation.statistics import difference_figure, mean_figure, perplexity_figure


def test_a_mean_over_tokens_is_no_mean_of_means():
    found = mean_figure([10.0, 3.0], [10, 1])
    assert found["value"] == pytest.approx(13 / 11)
    assert found["low"] <= found["value"] <= found["high"]
    assert (found["low"], found["high"]) == (1.0, 3.0)  # of two rows, one of them twice


def test_95_percent_intervals_hold_the_mean_in_about_95_percent():
    random = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        tokens = random.integers(20, 200, 400)
        losses = random.gamma(4.0, 0.5, 400)  # mean 2, whatever the length
        found = mean_figure(losses * tokens, tokens)
        held += found["low"] <= 2.0 <= found["high"]
    assert 0.90 <= held / 200 <= 0.985


def test_intervals_follow_from_the_seed_alone():
    values = np.random.default_rng(0).normal(size=50)
    assert mean_figure(values, seed=1) == mean_figure(values, seed=1)
    assert mean_figure(values, seed=1) != mean_figure(values, seed=2)


def test_few_rows_have_exact_p_values():
    ours, theirs = np.arange(8.0), np.arange(8.0) + 1
    assert difference_figure(ours, theirs)["p_value"] == pytest.approx(2 / 2**8)
    assert difference_figure(ours, theirs)["value"] == -1.0
    assert difference_figure([1.0], [2.0]) == {"value": -1.0, "low": None, "high": None, "p_value": None, "rows": 1}
    assert difference_figure(ours, ours) == {"value": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0, "rows": 8}


def test_rows_are_compared_in_pairs():
    """Rows that differ widely, all of them a little better: clear in pairs, invisible without."""
    random = np.random.default_rng(1)
    theirs = random.normal(0, 10, 200)
    better, unrelated = theirs - 0.1, random.permutation(theirs) - 0.1
    assert difference_figure(better, theirs)["p_value"] <= 0.0002
    assert difference_figure(unrelated, theirs)["p_value"] > 0.05


def test_p_values_are_small_no_more_often_than_they_say():
    random = np.random.default_rng(2)
    found = []
    for _ in range(60):
        both = random.normal(size=(2, 9))  # few enough for the exact test
        found.append(difference_figure(*both)["p_value"])
    assert np.mean(np.array(found) <= 0.1) <= 0.2
    assert np.mean(found) == pytest.approx(0.5, abs=0.15)


def test_rows_without_a_token_do_not_count():
    assert mean_figure([5.0, 0.0, 7.0], [1, 0, 1]) == mean_figure([5.0, 7.0], [1, 1])
    assert mean_figure([0.0], [0]) is None
    assert mean_figure([], []) is None
    assert difference_figure([0.0], [0.0], [0]) is None
    assert mean_figure([3.0], [2]) == {"value": 1.5, "low": None, "high": None, "rows": 1}


def test_the_perplexity_of_a_figure():
    found = perplexity_figure({"value": 1.0, "low": 0.0, "high": None, "rows": 3})
    assert found == {"value": math.e, "low": 1.0, "high": None, "rows": 3}
    assert perplexity_figure(None) is None
