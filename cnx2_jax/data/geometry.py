"""Crop, resize, window, mirror and turn: one geometry per example, applied to every field by its kind.

Coordinates are (y, x) in pixels with the origin at the top left corner of the top left pixel: pixel i of an
axis covers [i, i + 1) and its centre is at i + 0.5. Images, maps, points and boxes follow this one
convention, so a place marked in each of them stays the same place in all of them.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

from cnx2_jax.data import resizing
from cnx2_jax.data.tensorflow import tf

# Height and width: Python integers where they are known before the graph runs, else int32 [2].
Size: TypeAlias = tuple[int, int] | tf.Tensor


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Takes a box of the source, resizes it, takes a window of the result, and may mirror and transpose that.

    Attributes:
      source: height and width of what the geometry is applied to.
      size: height and width to which the box is resized.
      crop: the box in the source, int32 [4]: top, left, height, width; None takes the whole source.
      offset: top and left of the window in the resized box, int32 [2]; None takes all of it.
      visible: height and width of the window; given if and only if `offset` is.
      mirrored: scalar bool; whether the window is mirrored left to right.
      flipped: scalar bool; whether it is mirrored top to bottom.
      transposed: scalar bool; whether its rows become columns, last of all.
      kernel: the filter that images are resized with.
    """

    source: Size
    size: Size
    crop: tf.Tensor | None = None
    offset: tf.Tensor | None = None
    visible: Size | None = None
    mirrored: tf.Tensor | bool = False
    flipped: tf.Tensor | bool = False
    transposed: tf.Tensor | bool = False
    kernel: resizing.Kernel = resizing.BICUBIC

    @property
    def result(self) -> Size:
        """Height and width of the result."""
        size = self._shown
        if self.transposed is False or (isinstance(size, tuple) and size[0] == size[1]):
            return size
        size = tf.convert_to_tensor(size)
        return tf.where(self.transposed, size[::-1], size)

    @property
    def box(self) -> tf.Tensor:
        """The crop as int32 [4], also where it is the whole source."""
        return tf.concat([[0, 0], self.source], axis=0) if self.crop is None else self.crop

    def image(self, image: tf.Tensor) -> tf.Tensor:
        """Returns [height, width, C] of [*source, C], of the same dtype, resized with `kernel`."""
        if self.crop is not None:
            top, left, height, width = tf.unstack(self.crop)
            image = image[top : top + height, left : left + width]
        return self.cropped_image(image)

    def cropped_image(self, image: tf.Tensor) -> tf.Tensor:
        """Does to the pixels of the crop alone, [h, w, C], what `image` does after cropping."""
        resized = resizing.resize(
            image,
            self.size,
            window=self._window(),
            mirrored=self.mirrored,
            flipped=self.flipped,
            kernel=self.kernel,
        )
        turned = self.turned(resized, (1, 0, 2))
        return tf.ensure_shape(turned, [*self._static_result(), image.shape[-1]])

    def map(self, values: tf.Tensor) -> tf.Tensor:
        """Returns [..., height, width] of [..., *source], any type: each pixel takes its nearest value.

        Sampling moves edges by up to half a pixel, so give an example one geometry instead of resizing twice.
        """
        if self.crop is not None:
            top, left, height, width = tf.unstack(self.crop)
            values = values[..., top : top + height, left : left + width]
        resized = resizing.resize_nearest(
            values, self.size, window=self._window(), mirrored=self.mirrored, flipped=self.flipped
        )
        first = range(len(values.shape) - 2)
        turned = self.turned(resized, (*first, len(first) + 1, len(first)))
        return tf.ensure_shape(turned, [*values.shape[:-2], *self._static_result()])

    def turned(self, values: tf.Tensor, axes: tuple[int, ...]) -> tf.Tensor:
        """Returns values with their axes in this order if the geometry transposes, else as they are."""
        if self.transposed is False:
            return values
        transposed = tf.convert_to_tensor(self.transposed)
        return tf.cond(transposed, lambda: tf.transpose(values, axes), lambda: values)

    def places(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the rows and the columns of the source that `map` takes values from, int32 [n] each.

        Those of the window before it is transposed.
        """
        box = self.box
        rows, columns = resizing.nearest_places(
            box[2:], self.size, window=self._window(), mirrored=self.mirrored, flipped=self.flipped
        )
        return box[0] + rows, box[1] + columns

    def points(self, points: tf.Tensor) -> tf.Tensor:
        """Returns where float32 [..., 2] points of the source end; some may be outside of the result."""
        box = tf.cast(self.box, tf.float32)
        moved = (points - box[:2]) * (tf.cast(self.size, tf.float32) / box[2:])
        if self.offset is not None:
            moved -= tf.cast(self.offset, tf.float32)
        y, x = tf.unstack(moved, axis=-1)
        height, width = tf.unstack(tf.cast(self._shown, tf.float32))
        x = tf.where(self.mirrored, width - x, x)
        y = tf.where(self.flipped, height - y, y)
        moved = tf.stack([y, x], axis=-1)
        return tf.where(self.transposed, moved[..., ::-1], moved)

    def turned_boxes(self, boxes: tf.Tensor) -> tf.Tensor:
        """Returns boxes of the window, [n, 4], as boxes of the result, which may be transposed."""
        return tf.where(self.transposed, tf.gather(boxes, [1, 0, 3, 2], axis=1), boxes)

    def boxes(self, boxes: tf.Tensor) -> tf.Tensor:
        """Returns where float32 [n, 4] boxes (y0, x0, y1, x1) end, clipped to the result.

        A box that lies outside of the result ends with a height or a width of 0.
        """
        corners = self.points(tf.reshape(boxes, [-1, 2, 2]))
        corners = tf.clip_by_value(corners, 0.0, tf.cast(self.result, tf.float32))
        return tf.concat([tf.reduce_min(corners, axis=1), tf.reduce_max(corners, axis=1)], axis=1)

    @property
    def _shown(self) -> Size:
        """Height and width of the window."""
        return self.size if self.visible is None else self.visible

    def _window(self) -> tf.Tensor | None:
        return None if self.offset is None else tf.concat([self.offset, self._shown], axis=0)

    def _static_result(self) -> tuple[int | None, int | None]:
        return self.result if isinstance(self.result, tuple) else (None, None)


# Draws the geometry for a source of this height and width, scalar int32 both. It may be called more than once
# for an example and must return the same geometry every time.
Draw: TypeAlias = Callable[[tf.Tensor, tf.Tensor], Geometry]


def pad(values: tf.Tensor, canvas: tuple[int, int], fill: int, *, first_axis: int) -> tf.Tensor:
    """Pads the axes `first_axis` and `first_axis + 1` of an array at bottom and right to `canvas`.

    Raises:
      tf.errors.InvalidArgumentError: when it runs, if the array is larger than the canvas.
    """
    rank = len(values.shape)
    axis = first_axis % rank
    missing = tf.constant(canvas) - tf.shape(values)[axis : axis + 2]
    after = tf.pad(missing, [[axis, rank - axis - 2]])
    padded = tf.pad(values, tf.stack([tf.zeros_like(after), after], axis=1), constant_values=fill)
    return tf.ensure_shape(padded, [*values.shape[:axis], *canvas, *values.shape[axis + 2 :]])
