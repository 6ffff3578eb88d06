"""A classifier's report: calibration and per-class scores against literal code and scikit-learn."""

import warnings

import numpy as np
import pytest
from sklearn import metrics as sklearn

from cnx2_jax.evaluation.outcomes import (
    MOST_CONFUSIONS,
    Outcomes,
    calibration,
    outcome_report,
    per_class,
    worst_mistakes,
)


def random_outcomes(seed, classes=6):
    """Confidences on a grid, so that many lie on the edges of bins; the last class never occurs."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 200))
    return {
        "label": rng.integers(0, classes - 1, count),
        "predicted": rng.integers(0, classes - 1, count),
        "confidence": np.round(rng.random(count), int(rng.integers(1, 3))),
        "position": rng.permutation(count),
    }


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("bins", [10, 15])
def test_calibration_error_is_that_of_a_loop(seed, bins):
    total = random_outcomes(seed)
    correct = total["label"] == total["predicted"]
    expected, largest = 0.0, 0.0
    for place in range(bins):
        # Of whole thousandths, so that an edge is exact.
        inside = [
            place * 1000 < round(1000 * sure) * bins <= (place + 1) * 1000 or (place == 0 and sure == 0)
            for sure in total["confidence"]
        ]
        if any(inside):
            apart = abs(correct[inside].mean() - total["confidence"][inside].mean())
            expected += apart * sum(inside) / len(inside)
            largest = max(largest, apart)
    found = calibration(total["confidence"], correct, bins)
    assert found.expected == pytest.approx(expected, abs=1e-9)
    assert found.largest == pytest.approx(largest, abs=1e-9)
    assert found.counts.sum() == len(correct)


def test_calibration_of_nothing_and_of_no_number():
    nothing = calibration(np.zeros(0), np.zeros(0, bool))
    assert np.isnan(nothing.expected) and np.isnan(nothing.largest)
    assert calibration(np.array([np.nan]), np.array([False])).expected == 0


@pytest.mark.parametrize("seed", range(20))
def test_scores_of_every_class(seed):
    total = random_outcomes(seed)
    columns = per_class(total["label"], total["predicted"], 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        precision, recall, score, support = sklearn.precision_recall_fscore_support(
            total["label"], total["predicted"], labels=range(6), zero_division=np.nan
        )
    np.testing.assert_array_equal(columns["support"], support)
    np.testing.assert_allclose(columns["precision"], precision, atol=1e-9)
    np.testing.assert_allclose(columns["recall"], recall, atol=1e-9)
    np.testing.assert_allclose(columns["f1"][support > 0], score[support > 0], atol=1e-9)
    assert np.isnan(columns["f1"][support == 0]).all()


def test_the_worst_mistakes_come_first():
    total = {
        "label": np.array([0, 1, 2, 0]),
        "predicted": np.array([0, 2, 1, 1]),
        "confidence": np.array([0.99, 0.5, 0.9, 0.5]),
    }
    assert worst_mistakes(total, 2).tolist() == [2, 1]
    assert worst_mistakes(total, 9).tolist() == [2, 1, 3]


def test_a_report_holds_tables_and_plots():
    total = random_outcomes(3)
    report = outcome_report(total, [*"abcdef"])
    assert report.tables.keys() == {"classes", "calibration", "confusions"}
    assert report.plots.keys() == {"classes", "calibration", "confusion"}
    assert [row[0] for row in report.tables["classes"].rows] == [*"abcdef"]
    rows = report.tables["confusions"].rows
    wrong = int((total["label"] != total["predicted"]).sum())
    assert sum(row[2] for row in rows) == wrong and len(rows) <= MOST_CONFUSIONS
    assert [row[2] for row in rows] == sorted((row[2] for row in rows), reverse=True)
    assert Outcomes().result(total).keys() == {"ece", "mce"}
    assert "confusion" not in outcome_report(total, [str(n) for n in range(1001)]).plots
