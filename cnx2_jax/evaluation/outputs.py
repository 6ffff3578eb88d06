"""The meaning of the numbers of a classifier's head, and their average over an image and its mirror image."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Numbers = Float[Array, "b outputs"]


@dataclasses.dataclass(frozen=True)
class Outputs:
    """A kind of head; hashable.

    Attributes:
      value: maps its numbers to probabilities or, in regression, to themselves.
      average: maps the numbers of two views of the images to those whose `value` is the mean of both.
    """

    value: Callable[[Numbers], Numbers]
    average: Callable[[Numbers, Numbers], Numbers]

    def of(self, model: Callable, images: Float[Array, "b height width c"], *, flip: bool) -> Numbers:
        """Returns the head's numbers; with `flip` those of the mean over the images and their mirror images.

        Args:
          model: maps normalised images to the numbers, as a `ConvNeXtV2` with a head does.
          images: normalised.
          flip: whether to average.
        """
        if not flip:
            return model(images)
        return self.average(model(images), model(images[:, :, ::-1]))


def _log_mean(one: Numbers, other: Numbers) -> Numbers:
    return jnp.logaddexp(one, other) - jnp.log(2.0)


def _average_softmax(one: Numbers, other: Numbers) -> Numbers:
    return _log_mean(jax.nn.log_softmax(one), jax.nn.log_softmax(other))


def _average_sigmoid(one: Numbers, other: Numbers) -> Numbers:
    yes = _log_mean(jax.nn.log_sigmoid(one), jax.nn.log_sigmoid(other))
    no = _log_mean(jax.nn.log_sigmoid(-one), jax.nn.log_sigmoid(-other))
    return yes - no


def _unchanged(numbers: Numbers) -> Numbers:
    return numbers


def _mean(one: Numbers, other: Numbers) -> Numbers:
    return (one + other) / 2


ONE_CLASS = Outputs(jax.nn.softmax, _average_softmax)
ANY_CLASSES = Outputs(jax.nn.sigmoid, _average_sigmoid)
VALUES = Outputs(_unchanged, _mean)
