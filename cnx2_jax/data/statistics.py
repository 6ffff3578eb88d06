"""Statistics of the bands of a source, over a sample of its images, in one pass and little memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from cnx2_jax.bands import BandStatistics, all_names
from cnx2_jax.data import pipeline
from cnx2_jax.data.bands import Bands
from cnx2_jax.data.sources import Source
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError

PERCENTILES = (2, 98)
COLOURS = {1: ("grey",), 3: ("red", "green", "blue")}
# Values per band that percentiles of wide dtypes are taken of; all values count for 8 and 16 bits.
_KEPT = 2**20
_WIDE = 2**16


def sample_arrays(source: Source, config: Any, sample: int) -> Iterator[np.ndarray]:
    """Yields up to `sample` decoded images, [h, w, bands] with all bands, spread evenly over the source.

    Raises:
      UserError: from the iterator, an image cannot be read.
    """
    field = source.fields["image"]
    field = field if isinstance(field, Bands) else field.configured(config)
    chosen = np.unique(
        np.linspace(0, source.num_records - 1, min(sample, source.num_records)).astype(np.int64)
    )

    @tf.autograph.experimental.do_not_convert
    def decoded(index: tf.Tensor) -> tf.Tensor:
        return field.decode(source.read(index)["image"])

    threads = pipeline.usable_cores()
    arrays = tf.data.Dataset.from_tensor_slices(chosen).map(decoded, threads, deterministic=True)
    iterator = arrays.prefetch(1).as_numpy_iterator()
    for index in chosen:
        try:
            yield next(iterator)
        except pipeline.FAILURES as error:
            try:
                decoded(tf.constant(index, tf.int64))
            except pipeline.FAILURES as own:
                raise pipeline.unreadable(source.describe(int(index)), own, field) from own
            raise error


def measure(source: Source, config: Any, arrays: Iterator[np.ndarray]) -> BandStatistics:
    """Returns the statistics of arrays from `sample_arrays`.

    Mean and deviation are of all values that are finite and not `data.no_data`, exact up to rounding in
    float64. Percentiles are exact for dtypes of 8 and 16 bits, and of a random million values otherwise.

    Raises:
      UserError: a band has no value, or `data.bands` has another number of names.
    """
    field = source.fields["image"]
    no_data = field.no_data(config.data) if isinstance(field, Bands) else None
    bands: list[_Band] = []
    images, dtype = 0, np.dtype(np.uint8)
    for array in arrays:
        images, dtype = images + 1, array.dtype
        bands = bands or [_Band(dtype, place) for place in range(array.shape[-1])]
        for place, band in enumerate(bands):
            band.add(array[..., place].ravel(), no_data)
    names = COLOURS[len(bands)] if not isinstance(field, Bands) else all_names(config.data, len(bands))
    empty = next((name for name, band in zip(names, bands, strict=True) if not band.count), None)
    if empty is not None:
        raise UserError(
            f"band '{empty}' of '{source.describe(0)}' and others has no value that is finite and not "
            "data.no_data; check data.no_data, or leave the band out of the files"
        )
    percentiles = [band.percentiles() for band in bands]
    return BandStatistics(
        dtype=dtype.name,
        names=tuple(names),
        images=images,
        mean=tuple(band.mean for band in bands),
        std=tuple(float(np.sqrt(band.squares / band.count)) for band in bands),
        low=tuple(low for low, _ in percentiles),
        high=tuple(high for _, high in percentiles),
        least=tuple(band.least for band in bands),
        most=tuple(band.most for band in bands),
        bad=tuple(band.bad / (band.bad + band.count) for band in bands),
    )


class _Band:
    """The running statistics of one band; `squares` is the sum of squared distances from the mean."""

    def __init__(self, dtype: np.dtype, seed: int):
        self.count, self.bad, self.mean, self.squares = 0, 0, 0.0, 0.0
        self.least, self.most = np.inf, -np.inf
        self._lowest: int | None = np.iinfo(dtype).min if dtype.kind in "iu" and dtype.itemsize <= 2 else None
        self._counts = np.zeros(_WIDE, np.int64)
        self._kept, self._ranks = np.empty(0), np.empty(0)
        self._random = np.random.default_rng(seed)

    def add(self, values: np.ndarray, no_data: float | None) -> None:
        good = np.isfinite(values)
        if no_data is not None:
            good &= values != values.dtype.type(no_data)
        values, total = values[good].astype(np.float64), values.size
        count = values.size
        self.bad += total - count
        if not count:
            return
        # Chan, Golub and LeVeque's merge of two sets, which loses no digits to large means.
        mean = values.mean()
        both, apart = self.count + count, mean - self.mean
        self.squares += float(np.square(values - mean).sum()) + apart**2 * self.count * count / both
        self.mean = float(self.mean + apart * count / both)
        self.count = both
        self.least, self.most = min(self.least, float(values.min())), max(self.most, float(values.max()))
        if self._lowest is not None:
            places = values.astype(np.int64) - self._lowest
            self._counts += np.bincount(places, minlength=_WIDE)
            return
        # The values of the lowest random ranks are a uniform sample of all.
        kept = np.concatenate([self._kept, values])
        ranks = np.concatenate([self._ranks, self._random.random(count)])
        if kept.size > _KEPT:
            chosen = np.argpartition(ranks, _KEPT)[:_KEPT]
            kept, ranks = kept[chosen], ranks[chosen]
        self._kept, self._ranks = kept, ranks

    def percentiles(self) -> tuple[float, float]:
        """Returns those of PERCENTILES, between neighbouring values as NumPy's."""
        if self._lowest is None:
            low, high = np.percentile(self._kept, PERCENTILES)
            return float(low), float(high)
        ends, lowest = np.cumsum(self._counts), self._lowest

        def at(percent: float) -> float:
            place = percent / 100 * (self.count - 1)
            below, above = (
                int(np.searchsorted(ends, rank, side="right")) + lowest
                for rank in (np.floor(place), np.ceil(place))
            )
            return float(below + (above - below) * (place - np.floor(place)))

        low, high = map(at, PERCENTILES)
        return low, high
