"""ImageNet-1K's classes: in the order of its labels, each with a name of its own."""

import re
from importlib import resources

import pytest

from cnx2_jax.data.imagenet import CLASS_IDS, describe


def test_a_thousand_ids_in_order():
    assert len(CLASS_IDS) == 1000
    assert list(CLASS_IDS) == sorted(set(CLASS_IDS))
    assert all(re.fullmatch(r"n\d{8}", name) for name in CLASS_IDS)


def test_labels_are_those_of_tensorflow_datasets():
    labels = resources.files("tensorflow_datasets") / "datasets" / "imagenet2012" / "labels.txt"
    assert tuple(labels.read_text().split()) == CLASS_IDS


def test_no_two_names_are_alike():
    names = [describe(name) for name in CLASS_IDS]
    assert all(re.fullmatch(r"[A-Za-z][A-Za-z'(). -]*[A-Za-z)]", name) for name in names)
    assert len({name.lower() for name in names}) == 1000


@pytest.mark.parametrize(
    ("label", "class_id", "name"),
    [
        (0, "n01440764", "tench"),
        (134, "n02012849", "crane (bird)"),
        (264, "n02113186", "Cardigan Welsh corgi"),
        (281, "n02123045", "tabby"),
        (474, "n02963159", "cardigan"),
        (517, "n03126707", "crane (machine)"),
        (638, "n03710637", "maillot"),
        (639, "n03710721", "tank suit"),
        (999, "n15075141", "toilet tissue"),
    ],
)
def test_known_classes(label, class_id, name):
    assert CLASS_IDS[label] == class_id
    assert describe(class_id) == name


def test_other_names_stay_as_they_are():
    for name in ("7", "tabby", "n00000000", ""):
        assert describe(name) == name
