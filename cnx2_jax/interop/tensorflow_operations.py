"""TensorFlow's operations for a detector; see `operations.Operations`."""

import numpy as np

from cnx2_jax.data.tensorflow import tf
from cnx2_jax.interop.operations import Body, Tensor
from cnx2_jax.models.mask_rcnn.roi_align import CHUNK

FUNCTIONS = {
    "Abs": tf.abs,
    "Add": tf.add,
    "And": tf.logical_and,
    "Div": tf.divide,
    "Exp": tf.exp,
    "Greater": tf.greater,
    "GreaterOrEqual": tf.greater_equal,
    "Less": tf.less,
    "Max": tf.maximum,
    "Min": tf.minimum,
    "Mul": tf.multiply,
    "Sigmoid": tf.sigmoid,
    "Sqrt": tf.sqrt,
    "Sub": tf.subtract,
    "Where": tf.where,
}


class TensorFlowOperations:
    """Implements `operations.Operations` but for layers with weights; indices are int32."""

    def call(self, kind, *operands):
        return FUNCTIONS[kind](*operands)

    def as_float(self, x):
        return tf.cast(x, tf.float32)

    def as_int(self, x):
        return tf.cast(x, tf.int32)

    def as_index(self, x):
        return tf.cast(x, tf.int32)

    def reshape(self, x, shape):
        return tf.reshape(x, shape)

    def transpose(self, x, order):
        return tf.transpose(x, order)

    def stack(self, tensors):
        return tf.stack(tensors, axis=-1)

    def join(self, tensors):
        return tf.concat(tensors, axis=1)

    def column(self, x, index):
        return x[..., index]

    def first(self, x, count):
        return x[..., :count]

    def every_second(self, x):
        return x[:, ::2, ::2]

    def double(self, x):
        return tf.repeat(tf.repeat(x, 2, axis=1), 2, axis=2)

    def rows(self, table, index):
        return tf.gather(tf.constant(table), index)

    def take(self, x, index):
        return tf.gather(x, index, batch_dims=1)

    def top_k(self, x, count):
        return tf.math.top_k(x, count)

    def argmax(self, x):
        return tf.argmax(x, axis=-1, output_type=tf.int32)

    def maximum(self, x, axis):
        return tf.reduce_max(x, axis=axis)

    def total(self, x, axis):
        return tf.reduce_sum(x, axis=axis)

    def largest(self, x):
        return tf.reduce_max(x)

    def softmax(self, x):
        return tf.nn.softmax(x)

    def loop(
        self, body: Body, state: list[Tensor], trips: int | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        shapes = [x.shape for x in state]

        def step(again, trip, state, collected):
            decided, state, found = body(list(state))
            state = [tf.ensure_shape(x, shape) for x, shape in zip(state, shapes, strict=True)]
            collected = tuple(array.write(trip, x) for array, x in zip(collected, found, strict=True))
            return again if decided is None else decided, trip + 1, tuple(state), collected

        # Traced once more, to learn how many tensors are collected; what that leaves in the graph is pruned.
        count = 0 if trips is None else len(body(list(state))[2])
        arrays = tuple(tf.TensorArray(tf.float32, trips) for _ in range(count))
        _, _, state, collected = tf.while_loop(
            lambda again, *_: again,
            step,
            (tf.constant(True), tf.constant(0), tuple(state), arrays),
            maximum_iterations=trips,
        )
        return list(state), [array.stack() for array in collected]

    def regions(self, x, boxes, stride, bins):
        height, width, channels = x.shape[1:]
        count = boxes.shape[1]
        boxes = tf.pad(boxes, [[0, 0], [0, -count % CHUNK], [0, 0]])
        chunks = tf.reshape(boxes, [-1, boxes.shape[1] // CHUNK, CHUNK, 4])

        def of_chunk(boxes):
            weights = [
                _axis_weights(boxes[..., axis], boxes[..., axis + 2], stride, bins, side)
                for axis, side in enumerate((height, width))
            ]
            found = tf.einsum("brph,bhwc->brpwc", weights[0], x)
            return tf.einsum("brqw,brpwc->brpqc", weights[1], found)

        found = tf.map_fn(
            of_chunk,
            tf.transpose(chunks, [1, 0, 2, 3]),
            fn_output_signature=tf.TensorSpec([None, CHUNK, bins, bins, channels], tf.float32),
        )
        found = tf.transpose(found, [1, 0, 2, 3, 4, 5])
        return tf.reshape(found, [-1, boxes.shape[1], bins, bins, channels])[:, :count]


def _axis_weights(start: Tensor, end: Tensor, stride: int, bins: int, size: int) -> Tensor:
    """Returns the mean bilinear weights `[..., bins, size]` of an axis; see `roi_align.axis_weights`.

    Args:
      start, end: of the regions, in pixels.
      stride: pixels per position.
      bins: that a region is divided into.
      size: positions of the axis; all exist.
    """
    start, end = start / stride - 0.5, end / stride - 0.5
    length = end - start
    samples = tf.math.ceil(length / bins)
    above = tf.cast(samples * bins < length, tf.float32)
    samples = samples + above - tf.cast((samples - 1) * bins >= length, tf.float32)
    start, length, samples = (x[..., None, None] for x in (start, length, tf.maximum(samples, 0)))
    width = length / bins
    step = tf.where((width > 0) & (samples > 0), width / tf.maximum(samples, 1), 1)
    first = start + tf.range(bins, dtype=tf.float32)[:, None] * width + 0.5 * step
    edges = np.arange(-1, size + 1, dtype=np.float32)
    before = tf.clip_by_value(tf.math.ceil((edges - first) / step), 0, samples)
    up_to = tf.clip_by_value(tf.math.floor((edges - first) / step) + 1, 0, samples)
    before = tf.where(edges == size, up_to, before)
    low, middle, high = before[..., :-2], before[..., 1:-1], before[..., 2:]
    centre = edges[1:-1]
    rising = (first + step * 0.5 * (low + middle - 1) - (centre - 1)) * (middle - low)
    falling = (centre + 1 - (first + step * 0.5 * (middle + high - 1))) * (high - middle)
    rising = tf.where(centre == 0, middle - low, rising)
    falling = tf.where(centre == size - 1, high - middle, falling)
    return (rising + falling) / tf.maximum(samples, 1)
