"""Compares the results of two runtimes: arrays value by value, detections object by object."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from cnx2_jax.interop.inference import Results


class Difference(NamedTuple):
    """How far results are from those expected.

    Attributes:
      most: the largest difference; of detections, among those that are alike.
      largest: the largest expected value, to compare it with.
      objects: how many detections the images have; None for other results.
      alike: the share of the detections that are alike; 1 for other results and where there are none.
    """

    most: float
    largest: float
    objects: int | None = None
    alike: float = 1.0


def difference(found: Results, expected: Results, bound: float) -> Difference:
    """Compares results of the same images and of the same shapes.

    Logits and features are compared value by value. Detections are paired: two are alike if they have the
    same image and class, scores and masks that differ by at most `bound`, and boxes that differ by at most
    `bound` times the largest coordinate. Their order does not matter, because rounding decides between equal
    scores.

    Args:
      found: to compare.
      expected: of the reference.
      bound: on the relative difference of two detections.
    """
    if not isinstance(expected, Mapping):
        return Difference(float(np.abs(found - expected).max()), float(np.abs(expected).max()))
    objects = int(max(found["count"].sum(), expected["count"].sum()))
    scale = max(1.0, float(expected["boxes"].max()))
    images = range(len(expected["count"]))
    alike = np.concatenate([_alike(_row(found, i), _row(expected, i), scale, bound) for i in images])
    return Difference(alike.max(initial=0).item(), 1.0, objects, len(alike) / objects if objects else 1.0)


def _row(results: Mapping[str, np.ndarray], image: int) -> dict[str, np.ndarray]:
    """Returns the objects of one image."""
    count = int(results["count"][image])
    return {name: array[image, :count] for name, array in results.items() if name != "count"}


def _alike(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], scale: float, bound: float
) -> Float[np.ndarray, " pairs"]:
    """Returns the relative difference of every pair of detections that are alike."""
    free = np.ones(len(found["scores"]), bool)
    pairs = []
    for row, score in enumerate(expected["scores"]):
        apart = np.stack(
            [
                np.where(found["classes"] == expected["classes"][row], 0, np.inf),
                np.where(free, 0, np.inf),
                np.abs(found["scores"] - score),
                np.abs(found["boxes"] - expected["boxes"][row]).max(axis=1) / scale,
                np.abs(found["masks"] - expected["masks"][row]).max(axis=(1, 2)),
            ]
        ).max(axis=0)
        apart = np.where(apart <= bound, apart, np.inf)  # NaN is not alike either
        if len(apart) and apart.min() <= bound:
            free[apart.argmin()] = False
            pairs.append(apart.min())
    return np.array(pairs, np.float64)
