"""Metrics of multi-label classification and regression equal scikit-learn's."""

import warnings

import numpy as np
import pytest
from sklearn import metrics as sklearn

from cnx2_jax.evaluation.labels import (
    MultiLabelScores,
    RegressionErrors,
    average_precision,
    best_threshold,
    f1,
    probabilities,
    regression_errors,
)


def random_case(seed):
    """Logits with many ties and targets; one class has no positive, one no negative."""
    rng = np.random.default_rng(seed)
    samples, classes = int(rng.integers(1, 60)), int(rng.integers(3, 7))
    logits = np.round(3 * rng.standard_normal((samples, classes)), int(rng.integers(0, 3)))
    targets = rng.random((samples, classes)) < rng.uniform(0.05, 0.7)
    targets[:, 0], targets[:, 1] = False, True
    return logits, targets


def literal_f1(probability, targets, threshold):
    present = targets.any(axis=0)
    predicted = (probability >= threshold)[:, present]
    return sklearn.f1_score(targets[:, present], predicted, average="macro", zero_division=0)


@pytest.mark.parametrize("seed", range(40))
def test_average_precision_and_f1(seed):
    logits, targets = random_case(seed)
    found = average_precision(logits, targets)
    present = targets.any(axis=0)
    assert not present[0] and np.isnan(found[~present]).all()
    for place in np.flatnonzero(present):
        expected = sklearn.average_precision_score(targets[:, place], logits[:, place])
        assert found[place] == pytest.approx(expected, abs=1e-9)
    predicted = logits > 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = sklearn.f1_score(targets, predicted, average=None, zero_division=0)
    np.testing.assert_allclose(f1(predicted, targets), np.atleast_1d(expected), atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_threshold_has_a_larger_f1(seed):
    logits, targets = random_case(seed)
    total = {"logit": logits.astype(np.float32), "target": targets.astype(np.float32)}
    result = MultiLabelScores().result(total)
    probability = probabilities(total["logit"].astype(np.float64))
    candidates = [literal_f1(probability, targets, each) for each in np.unique(probability)]
    assert result["f1"] == pytest.approx(max(candidates), abs=1e-9)
    assert result["f1"] == pytest.approx(literal_f1(probability, targets, result["threshold"]), abs=1e-9)
    assert np.abs(probability - result["threshold"]).min() > 0 or probability.min() == 0
    present = targets.any(axis=0)
    expected = sklearn.average_precision_score(targets[:, present], total["logit"][:, present])
    assert result["map"] == pytest.approx(expected, abs=1e-9)


def test_of_equally_good_thresholds_the_highest():
    logits = np.array([[3.0], [1.0], [-1.0]])
    assert best_threshold(logits, np.array([[True], [False], [False]])) == pytest.approx(
        probabilities(np.array([3.0, 1.0])).mean()
    )
    assert best_threshold(logits, np.zeros((3, 1), bool)) == 0.5
    # Everything is positive: everything has to be predicted.
    assert 0 < best_threshold(logits, np.ones((3, 1), bool)) < probabilities(np.array(-1.0))


def test_no_positive_and_no_number():
    total = {"logit": np.zeros((3, 2), np.float32), "target": np.zeros((3, 2), np.float32)}
    result = MultiLabelScores().result(total)
    assert np.isnan(result["map"]) and np.isnan(result["f1"]) and result["threshold"] == 0.5
    total = {"logit": np.float32([[np.nan], [0.0]]), "target": np.float32([[1], [0]])}
    assert MultiLabelScores().result(total)["map"] == 0.5  # it ranks last


@pytest.mark.parametrize("seed", range(20))
def test_columns_of_every_class(seed):
    logits, targets = random_case(seed)
    columns = MultiLabelScores().per_class({"logit": logits, "target": targets}, threshold=0.5)
    predicted = probabilities(logits) >= 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        precision, recall, score, support = sklearn.precision_recall_fscore_support(
            targets, predicted, zero_division=np.nan
        )
    present = targets.any(axis=0)
    np.testing.assert_allclose(columns["recall"][present], recall[present], atol=1e-9)
    np.testing.assert_allclose(columns["precision"][present], precision[present], atol=1e-9)
    np.testing.assert_allclose(columns["f1"][present], score[present], atol=1e-9)
    np.testing.assert_array_equal(columns["support"], support)
    assert np.isnan(columns["recall"][~present]).all() and np.isnan(columns["f1"][~present]).all()


@pytest.mark.parametrize("seed", range(20))
def test_regression_errors(seed):
    rng = np.random.default_rng(seed)
    samples = int(rng.integers(1, 30))
    target = np.round(rng.normal(100, 5, (samples, 4)), 1)
    predicted = np.round(target + rng.normal(0, 3, target.shape), 1)
    target[:, 1], target[:, 2] = 7, 8  # constant, and predicted with and without errors
    predicted[:, 2] = 8
    found = regression_errors(predicted, target)
    raw = {"multioutput": "raw_values"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        r2 = sklearn.r2_score(target, predicted, **raw)
    np.testing.assert_allclose(found["r2"], r2, atol=1e-9)
    np.testing.assert_allclose(found["mae"], sklearn.mean_absolute_error(target, predicted, **raw), atol=1e-9)
    expected = sklearn.root_mean_squared_error(target, predicted, **raw)
    np.testing.assert_allclose(found["rmse"], expected, atol=1e-9)


def test_several_targets_have_their_own_metrics_in_their_own_units():
    metric = RegressionErrors(("age", "mass"), (10.0, 0.0), (2.0, 1.0))
    total = {"predicted": np.float32([[0, 1], [1, 2]]), "target": np.float32([[10, 1], [13, 4]])}
    result = metric.result(total)
    assert result["mae_age"] == 0.5 and result["mae_mass"] == 1.0 and result["mae"] == 0.75
    assert result["rmse"] == (np.sqrt(0.5) + np.sqrt(2)) / 2
    assert result.keys() == {f"{name}{of}" for name in ("mae", "rmse", "r2") for of in ("", "_age", "_mass")}
    one = RegressionErrors(("age",), (10.0,), (2.0,))
    assert one.result({name: rows[:, :1] for name, rows in total.items()}).keys() == {"mae", "rmse", "r2"}
    assert metric != one and metric == RegressionErrors(("age", "mass"), (10.0, 0.0), (2.0, 1.0))
