"""The field of arrays: images of any number of bands and any depth."""

import dataclasses
import shlex
from typing import Any

import numpy as np

from cnx2_jax.bands import BYTE_RANGE, all_names, batch_dtype, places_of, split_names
from cnx2_jax.data.array_files import Form, Read
from cnx2_jax.data.fields import Entry, Picture
from cnx2_jax.data.geometry import Draw, Geometry
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Choice:
    """The bands that a run uses, and how it replaces bad values.

    Attributes:
      places: of the bands that are used.
      no_data: the value of missing pixels; None if there is none.
      fill: of each used band, what replaces values that are `no_data` or not finite: the band's mean, which
        normalisation maps to 0 (integers: to at most half a unit from it).
    """

    places: tuple[int, ...]
    no_data: float | None
    fill: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Bands(Picture):
    """An array of bands: [h, w, bands], stored as a string.

    As a source declares it, the field decodes arrays bit for bit, in their own dtype. With a choice it gives
    batches the used bands without bad values, in `batch_dtype`: those of at most 16 bits as they are, because
    a host then ships at most half the bytes of float32, and wider ones as float32.

    Attributes:
      form: dtype and number of bands of the stored arrays.
      read: maps the stored entry to the array.
      place: what messages call the source.
      choice: what a run uses; None for everything.
    """

    form: Form
    read: Read
    place: str
    choice: Choice | None = None
    noun = "array"
    readable = "a readable array; it may be truncated"

    @property
    def eight_bit_colours(self) -> bool:
        bands = len(self.choice.places) if self.choice else self.form.bands
        return self.form.dtype == np.uint8 and bands in (1, 3)

    def __str__(self) -> str:
        bands = len(self.choice.places) if self.choice else self.form.bands
        return str(Form(self.form.dtype, bands))

    def configured(self, config: Any) -> "Bands":
        """Returns the field of a run; see `Field.configured`.

        Raises:
          UserError: names or numbers of bands that do not fit each other; a `no_data` that the dtype does not
            have; or more than 8 bits without statistics.
        """
        data, channels = config.data, config.model.in_chans
        names = all_names(data, self.form.bands)
        used = split_names(data.use_bands, "data.use_bands") or names
        places = places_of(used, names, "data.use_bands")
        if len(used) != channels:
            raise UserError(
                f"model.in_chans is {channels}, but {len(used)} of the {len(names)} bands of '{self.place}' "
                f"are used; set model.in_chans={len(used)}, or choose {channels} with data.use_bands"
            )
        dtype = batch_dtype(self.form.dtype.name)
        if dtype != data.dtype:
            raise UserError(
                f"arrays of {self.form.dtype} in '{self.place}' are not normalised by the mean and deviation "
                f"of {data.dtype}: run `{statistics_command(data)}`, then set data.statistics=bands.json"
            )
        unit = BYTE_RANGE if dtype == "uint8" else 1
        fill = tuple(unit * float(mean) for mean in data.mean)
        return dataclasses.replace(self, choice=Choice(places, self.no_data(data), fill))

    def no_data(self, data: Any) -> float | None:
        """Returns the number in `data.no_data`, None if it is empty.

        Raises:
          UserError: it is not a number, or not one of the dtype.
        """
        if not data.no_data:
            return None
        try:
            value = float(data.no_data)
            fits = self.form.dtype.kind == "f" or (
                value.is_integer() and np.iinfo(self.form.dtype).min <= value <= np.iinfo(self.form.dtype).max
            )
        except ValueError:
            fits = False
        if not fits:
            raise UserError(f"data.no_data '{data.no_data}' is not a number of {self.form.dtype}; correct it")
        return value

    def decode(self, stored: Entry) -> Entry:
        image = tf.ensure_shape(self.read(stored), [None, None, self.form.bands])
        if self.choice is None:
            return image
        if self.choice.places != tuple(range(self.form.bands)):
            image = tf.gather(image, self.choice.places, axis=-1)
        moved = tf.cast(image, batch_dtype(self.form.dtype.name))
        return self._without_bad(image, moved, self.choice)

    def _without_bad(self, image: tf.Tensor, moved: tf.Tensor, choice: Choice) -> tf.Tensor:
        bad = []
        if moved.dtype.is_floating:
            bad.append(~tf.math.is_finite(moved))
        if choice.no_data is not None:
            bad.append(image == tf.constant(self.form.dtype.type(choice.no_data)))
        if not bad:
            return moved
        fill = np.array(choice.fill)
        if moved.dtype.is_integer:
            fill = np.clip(np.round(fill), moved.dtype.min, moved.dtype.max)
        return tf.where(bad[0] | bad[-1], tf.constant(fill.astype(moved.dtype.as_numpy_dtype)), moved)

    def lead(self, stored: Entry, draw: Draw, *, partly: bool) -> tuple[Entry, Geometry]:
        """See `Field.lead`; arrays are always decoded whole."""
        del partly
        image = self.decode(stored)
        drawn = draw(*tf.unstack(tf.shape(image)[:2]))
        return drawn.image(image), drawn


_READING_KEYS = ("source", "root", "layout", "array", "bands", "no_data")


def statistics_command(data: Any) -> str:
    """Returns the command that computes the statistics of the source of `config.data`."""
    given = {key: data[key] for key in _READING_KEYS if data[key] and (key, data[key]) != _DEFAULT}
    keys = (f"--config.data.{key}={shlex.quote(str(value))}" for key, value in given.items())
    return " ".join(("cnx2 data --config pretrain:tiny --statistics bands.json", *keys))


_DEFAULT = ("layout", "channels_last")
