"""RoIAlign as products with matrices along each axis (arXiv 1703.06870; mmcv's `aligned=True`, ratio 0).

A bin is the mean of bilinear samples on a regular grid. Sampling is separable, so a region of a map F is
`Wy F Wx^T`, where a row of W has the mean weights of one bin's samples. The products run on matrix units; a
gather of 4 neighbours of every sample would run row by row on TPUs, and the number of samples is not static.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cnx2_jax.models.mask_rcnn.boxes import area

# Regions per product: it makes an array [batch, regions, bins, columns, channels] between its two steps.
CHUNK = 32
FINEST_SIDE = 14  # positions; a region of up to twice this side belongs to the finest level


def samples_per_bin(length: Float[Array, "*r"], bins: int) -> Float[Array, "*r"]:
    """Returns the whole number of samples along a side of each bin: length / bins, rounded up.

    Args:
      length: of the region, in pixels of what is sampled.
      bins: that the region is divided into.
    """
    count = jnp.ceil(length / bins)
    # XLA multiplies by 1 / bins instead of dividing, which may step over a whole number.
    return count + (count * bins < length) - ((count - 1) * bins >= length)


def axis_weights(
    start: Float[Array, "*r"],
    length: Float[Array, "*r"],
    samples: Float[Array, "*r"],
    bins: int,
    size: int,
    limit: Float[Array, "*r"] | None = None,
) -> Float[Array, "*r bins size"]:
    """Returns the mean bilinear weights of every position of an axis in every bin of a region.

    A bin's samples have equal distances, so those between two neighbouring positions form an arithmetic
    progression: their number and their mean give the sum of their weights, whatever the number of samples.

    Args:
      start: begin of the region; position i of the axis has its centre at i.
      length: of the region, in positions.
      samples: per bin, a whole number; 0 or less gives weights of 0.
      bins: that the region is divided into.
      size: positions of the axis.
      limit: positions that exist, at most `size`. Samples up to 1 before the first or after the last of them
        take that position's value, and those beyond are 0. None makes everything outside of the axis 0.
    """
    samples = jnp.maximum(samples, 0)[..., None, None]
    width = length[..., None, None] / bins
    step = jnp.where((width > 0) & (samples > 0), width / jnp.maximum(samples, 1), 1)
    first = start[..., None, None] + jnp.arange(bins)[:, None] * width + 0.5 * step
    edges = jnp.arange(-1, size + 1, dtype=start.dtype)
    before = jnp.clip(jnp.ceil((edges - first) / step), 0, samples)  # samples before each edge
    if limit is not None:
        limit = limit[..., None, None]
        up_to = jnp.clip(jnp.floor((edges - first) / step) + 1, 0, samples)
        before = jnp.where(edges == limit, up_to, before)

    low, middle, high = before[..., :-2], before[..., 1:-1], before[..., 2:]
    centre = edges[1:-1]
    rising = (first + step * 0.5 * (low + middle - 1) - (centre - 1)) * (middle - low)
    falling = (centre + 1 - (first + step * 0.5 * (middle + high - 1))) * (high - middle)
    if limit is not None:
        rising = jnp.where(centre == 0, middle - low, rising)
        falling = jnp.where(centre == limit - 1, high - middle, falling)
    weights = (rising + falling) / jnp.maximum(samples, 1)
    return weights if limit is None else jnp.where(centre < limit, weights, 0)


def levels_of(boxes: Float[Array, "*n 4"], finest: int, count: int) -> Int[Array, "*n"]:
    """Returns the level of the pyramid that each region is cut from, 0 being the finest.

    The level rises by one for every doubling of the square root of the area from `FINEST_SIDE` strides
    (arXiv 1612.03144, equation 1; constants as in mmdetection).

    Args:
      boxes: in pixels.
      finest: stride of level 0, in pixels.
      count: number of levels.
    """
    side = jnp.sqrt(area(boxes))
    level = jnp.floor(jnp.log2(side / (FINEST_SIDE * finest) + 1e-6))
    return jnp.clip(level, 0, count - 1).astype(jnp.int32)


def roi_align(
    maps: Sequence[Float[Array, "b _h _w c"]],
    boxes: Float[Array, "b r 4"],
    sizes: Int[Array, "b 2"],
    *,
    finest: int,
    bins: int,
) -> Float[Array, "b r bins bins c"]:
    """Cuts a `bins` x `bins` map of every region from the level of the pyramid that it belongs to.

    Every region is multiplied with all levels; the weights of all but its own are 0. Per region and channel
    that takes 8/3 bins H W FLOPs for the first product, H and W being those of the finest map: at 1024 pixels
    and 256 channels 0.31 GFLOP with 7 bins, thus 160 GFLOP for 512 regions. No gradient flows to the boxes.

    Args:
      maps: each half as fine as the one before; all in one dtype.
      boxes: in pixels.
      sizes: height and width of each image in pixels, multiples of the coarsest stride. What a map has
        beyond them does not exist: samples there take the value at the border.
      finest: stride of the first map, in pixels.
      bins: along each side of the result.

    Returns:
      The regions, in the dtype of the maps; 0 for empty boxes.
    """
    boxes = jax.lax.stop_gradient(boxes)
    levels = levels_of(boxes, finest, len(maps))

    def one(region: tuple[Array, Array]) -> Array:
        box, level = region  # one box of each image
        result = jnp.zeros((), maps[0].dtype)
        for index, x in enumerate(maps):
            stride = finest * 2**index
            weights = []
            for axis in range(2):
                start, end = box[:, axis] / stride - 0.5, box[:, axis + 2] / stride - 0.5
                length, limit = end - start, (sizes[:, axis] // stride).astype(box.dtype)
                along = axis_weights(
                    start, length, samples_per_bin(length, bins), bins, x.shape[1 + axis], limit
                )
                weights.append(jnp.where((level == index)[:, None, None], along, 0).astype(x.dtype))
            # HIGHEST: the default precision would round float32 values to bfloat16 on TPUs.
            rows = jnp.einsum("bph,bhwc->bpwc", weights[0], x, precision=jax.lax.Precision.HIGHEST)
            result += jnp.einsum("bqw,bpwc->bpqc", weights[1], rows, precision=jax.lax.Precision.HIGHEST)
        return result

    regions = jax.lax.map(one, (boxes.swapaxes(0, 1), levels.T), batch_size=CHUNK)
    return regions.swapaxes(0, 1)
