"""Weighted k-NN equals its definition and scikit-learn's, for any division into parts."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from cnx2_jax.data.images import ImageData
from cnx2_jax.errors import UserError
from cnx2_jax.evaluation import neighbours
from cnx2_jax.recipes import use_digits
from cnx2_jax.tasks import defaults

CLASSES = 12


def clouds(count, seed, spread=1.3):
    """Vectors of many lengths around a direction for each class, and their classes."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((CLASSES, 16))
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    vectors = centres[labels] + spread * rng.standard_normal((count, 16))
    return (vectors * rng.uniform(0.1, 10, (count, 1))).astype(np.float32), labels


BANK, QUERIES = clouds(700, seed=1), clouds(150, seed=2)


def literal(bank, bank_labels, queries, labels, num_classes, k):
    """The definition written out in float64."""
    top1 = top5 = 0
    for query, label in zip(queries.astype(np.float64), labels, strict=True):
        rows = bank.astype(np.float64)
        similar = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
        votes = np.zeros(num_classes)
        for place in np.argsort(-similar)[:k]:
            votes[bank_labels[place]] += np.exp(similar[place] / 0.07)
        order = [place for place in np.argsort(-votes) if votes[place]]
        top1 += label in order[:1]
        top5 += label in order[:5]
    return {"accuracy": top1 / len(labels), "top5_accuracy": top5 / len(labels)}


@pytest.mark.parametrize("k", [1, 5, 20, 700])
def test_equals_the_definition(k):
    found = neighbours.score(*BANK, *QUERIES, num_classes=CLASSES, k=k)
    assert found == literal(*BANK, *QUERIES, CLASSES, k)
    assert 0.3 < found["accuracy"] < 1  # nothing is right by itself


def test_equals_scikit_learn():
    model = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    accuracy = model.fit(*BANK).score(*QUERIES)
    found = neighbours.score(*BANK, *QUERIES, num_classes=CLASSES, k=20)
    assert found["accuracy"] == pytest.approx(accuracy, abs=1e-9)


@pytest.mark.parametrize(("queries", "bank"), [(1, 700), (7, 33), (150, 699), (64, 10), (512, 1)])
def test_parts_do_not_change_the_result(monkeypatch, queries, bank):
    whole = neighbours.score(*BANK, *QUERIES, num_classes=CLASSES, k=20)
    monkeypatch.setattr(neighbours, "_QUERIES", queries)
    monkeypatch.setattr(neighbours, "_BANK", bank)
    assert neighbours.score(*BANK, *QUERIES, num_classes=CLASSES, k=20) == whole


def test_weights_decide_over_counts():
    # One neighbour in the query's very direction outweighs two of another class at an angle.
    bank = np.float32([[1, 0], [1, 1], [1, -1]])
    query, label = np.float32([[2, 0]]), np.int32([0])
    labels = np.int32([0, 1, 1])
    assert neighbours.score(bank, labels, query, label, num_classes=2, k=3)["accuracy"] == 1
    bank[1:] = [[1, 0.01], [1, -0.01]]  # but not at none
    assert neighbours.score(bank, labels, query, label, num_classes=2, k=3)["accuracy"] == 0


def test_a_class_without_votes_is_never_right():
    bank, query = np.float32([[1, 0], [0, 1]]), np.float32([[1, 0]])
    found = neighbours.score(bank, np.int32([1, 0]), query, np.int32([0]), num_classes=2, k=1)
    assert found == {"accuracy": 0, "top5_accuracy": 0}
    found = neighbours.score(bank, np.int32([1, 0]), query, np.int32([0]), num_classes=2, k=2)
    assert found == {"accuracy": 0, "top5_accuracy": 1}


def test_vectors_that_are_no_numbers_are_never_right():
    vectors, labels = QUERIES
    found = neighbours.score(*BANK, vectors * np.float32(np.nan), labels, num_classes=CLASSES, k=20)
    assert found == {"accuracy": 0, "top5_accuracy": 0}


@pytest.mark.parametrize("k", [0, 1439])
def test_as_many_neighbours_as_there_are(k):
    config = defaults("pretrain")
    use_digits(config)
    with pytest.raises(UserError, match=f"--knn {k} must be at least 1 and at most 1000"):
        neighbours.evaluate(None, config, ImageData(config), k, None)
