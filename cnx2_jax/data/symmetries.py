"""Mirroring and quarter turns: which symmetries of the square an example is shown in."""

import dataclasses
from typing import Any, NamedTuple, TypeAlias

from cnx2_jax.configuration import image_hw
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError

Chance: TypeAlias = tf.Tensor | bool  # a scalar; Python's False costs the graph nothing


class Symmetry(NamedTuple):
    """One of the eight symmetries of a square: mirrored, then flipped, then transposed.

    Attributes:
      mirrored: whether left and right are exchanged.
      flipped: whether top and bottom are exchanged.
      transposed: whether rows become columns.
    """

    mirrored: Chance = False
    flipped: Chance = False
    transposed: Chance = False


@dataclasses.dataclass(frozen=True)
class Symmetries:
    """The symmetries that training examples are drawn in, all of those that are on independently.

    Attributes:
      flip: whether half of the examples are mirrored left to right.
      vflip: whether half of them are mirrored top to bottom.
      quarter_turns: whether they are turned by 0, 90, 180 or 270 degrees, each a quarter of them.
    """

    flip: bool = False
    vflip: bool = False
    quarter_turns: bool = False

    @classmethod
    def of(cls, config: Any) -> "Symmetries":
        """Returns those of a config: `flip`, `vflip` and `quarter_turns` of its `data`.

        Raises:
          UserError: quarter turns of oblong images, whose sides a turn would exchange.
        """
        data, (height, width) = config.data, image_hw(config)
        if data.quarter_turns and height != width:
            raise UserError(
                f"data.quarter_turns exchanges the sides of images, but image_size ({height}, {width}) is "
                "not a square; set data.quarter_turns=false, and data.vflip=true if top and bottom are alike"
            )
        return cls(data.flip, data.vflip, data.quarter_turns)

    @property
    def draws(self) -> int:
        """How many random numbers an example takes; one always, so that `flip` changes no other draw."""
        return 1 + self.vflip + self.quarter_turns

    def drawn(self, draws: tf.Tensor) -> Symmetry:
        """Returns the symmetry of an example.

        Args:
          draws: float32 [draws], uniform in [0, 1).
        """
        mirrored = draws[0] < 0.5 if self.flip else False
        flipped = draws[1] < 0.5 if self.vflip else False
        if not self.quarter_turns:
            return Symmetry(mirrored, flipped)
        # A turn by 90 degrees mirrors and transposes, one by 270 flips and transposes.
        turns = tf.cast(4 * draws[-1], tf.int32)
        return Symmetry(
            tf.math.logical_xor(mirrored, (turns == 1) | (turns == 2)),
            tf.math.logical_xor(flipped, turns >= 2),
            turns % 2 == 1,
        )
