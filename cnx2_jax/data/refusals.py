"""Records that can be read but break a rule: how the reason gets out of TensorFlow's graph."""

import re

from cnx2_jax.data.tensorflow import tf

# TensorFlow passes on nothing but the text of an error, wrapped in its own words.
_BEGIN, _END = "<<refused ", ">>"


def refuse_unless(condition: tf.Tensor, reason: tf.Tensor | str, value: tf.Tensor) -> tf.Tensor:
    """Returns `value`, or refuses the record that it comes from.

    Args:
      condition: scalar bool.
      reason: scalar string, ASCII without quotes: a predicate such as `is in RGB; convert it`, which follows
        the kind and the name of the entry in the message. It states the rule and the fix.
      value: what is fine if the condition holds.

    Raises:
      tf.errors.InvalidArgumentError: when it runs, if `condition` is false; `refusal` finds the reason in it.
    """
    check = tf.debugging.Assert(condition, [tf.strings.join([_BEGIN, reason, _END])])
    with tf.control_dependencies([check] if check is not None else []):
        return tf.identity(value)


def refused(reason: str) -> tf.errors.InvalidArgumentError:
    """Returns the error by which a Python function inside a graph refuses the record that it was given.

    Args:
      reason: see `refuse_unless`.
    """
    return tf.errors.InvalidArgumentError(None, None, f"{_BEGIN}{reason}{_END}")


def refusal(error: Exception) -> str | None:
    """Returns the reason that `refuse_unless` gave for this error; None for any other error."""
    found = re.search(f"{_BEGIN}(.*?){_END}", str(error), re.DOTALL)
    return found and found[1]
