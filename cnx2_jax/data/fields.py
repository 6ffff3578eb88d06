"""What an example can hold: each kind of field and what decoding, geometry and batching do to it.

A source declares its fields by name and reads their stored entries under the same names. A field knows how
its entry is decoded, moved by a geometry, padded, and which arrays of a batch it gives. Nothing else asks for
the kind of a field.

| kind            | stored entry                       | arrays of a batch of b examples                   |
|-----------------|------------------------------------|---------------------------------------------------|
| Image           | string: JPEG, PNG, WebP or GIF     | NAME uint8 [b, h, w, C]; on a canvas also         |
|                 |                                    | NAME_size int32 [b, 2], height and width          |
| bands.Bands     | string: an array of one form       | as Image, in uint8, uint16, int16, float16 or     |
|                 |                                    | float32                                           |
| Label           | int32                              | NAME int32 [b]                                    |
| MultiLabel      | int32 [k], any k                   | NAME float32 [b, classes], 0 or 1                 |
| Value           | float [size]                       | NAME float32 [b, size]                            |
| SegmentationMap | string: greyscale or palette PNG   | NAME uint8 [b, h, w]                              |
| Instances       | {"boxes": float32 [n, 4],          | boxes float32 [b, most, 4], classes int32         |
|                 | "classes": int32 [n], "masks":     | [b, most], masks uint8 [b, most, m, m],           |
|                 | string [n], "size": int32 [2]}     | NAME_valid bool [b, most]                         |
| Identifier      | string or integer                  | host/NAME [b]: NumPy, never on a device           |
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

from cnx2_jax.data import decoding
from cnx2_jax.data.encoded_masks import crop_masks
from cnx2_jax.data.geometry import Draw, Geometry, pad
from cnx2_jax.data.refusals import refuse_unless
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError
from cnx2_jax.types import HOST

Canvas: TypeAlias = tuple[int, int]
# A tensor or, for instances, a dictionary of tensors; as stored or decoded.
Entry: TypeAlias = Any
Entries: TypeAlias = Mapping[str, Entry]
Arrays: TypeAlias = dict[str, Any]


class Field:
    """A field of an example; the defaults are those of one tensor that has no place in the image.

    Attributes:
      host_only: whether its arrays stay on the host.
      aligned: whether it describes places in the image, and is wrong if the image alone is moved.
      eight_bit_colours: whether photometric operations mean something for it, or leave it alone.
      noun: what messages call an entry.
      readable: the form of an entry that can be decoded, and how a file may fall short of it.
    """

    host_only: bool = False
    aligned: bool = False
    noun: ClassVar[str] = "entry"
    readable: ClassVar[str] = "a readable record; it may be damaged"

    @property
    def eight_bit_colours(self) -> bool:
        return True

    def configured(self, config: Any) -> "Field":
        """Returns the field as a run reads it.

        Args:
          config: of the run; read are `data` and `model.in_chans`.

        Raises:
          UserError: the config does not fit what is stored.
        """
        del config
        return self

    def decode(self, stored: Entry) -> Entry:
        """Decodes the stored entry; may fail with tf.errors.OpError when it runs."""
        return stored

    def lead(self, stored: Entry, draw: Draw, *, partly: bool) -> tuple[Entry, Geometry]:
        """Decodes the stored entry and moves it by the geometry that `draw` returns for its size.

        Args:
          stored: the stored entry.
          draw: see `geometry.Draw`.
          partly: decode only the crop where the format allows it; damage outside of it goes unnoticed.

        Returns:
          The moved value and the geometry, for the other fields of the example.

        Raises:
          TypeError: the field has no size.
        """
        raise TypeError(f"{type(self).__name__} has no height and width; let an image decide the geometry")

    def moved(self, value: Entry, geometry: Geometry) -> Entry:
        """Applies a geometry to the decoded value."""
        del geometry
        return value

    def changed(self, value: Entry, photometric: Callable[[tf.Tensor], tf.Tensor]) -> Entry:
        """Applies a photometric operation to the decoded value."""
        del photometric
        return value

    def padded(self, value: Entry, canvas: Canvas) -> Entry:
        """Pads the decoded value at bottom and right to the height and width of `canvas`."""
        del canvas
        return value

    def arrays(self, name: str, value: Entry, canvas: Canvas | None) -> Arrays:
        """Returns what the field named `name` adds to an example, all of static shape.

        Args:
          name: of the field.
          value: decoded and moved.
          canvas: height and width that images and maps are padded to; None where all have one size already.
        """
        return {name: value if canvas is None else self.padded(value, canvas)}


class Picture(Field):
    """The base of images and arrays of bands, [h, w, channels]: both are moved, changed and padded alike."""

    def moved(self, value: Entry, geometry: Geometry) -> Entry:
        return geometry.image(value)

    def changed(self, value: Entry, photometric: Callable[[tf.Tensor], tf.Tensor]) -> Entry:
        return photometric(value)

    def padded(self, value: Entry, canvas: Canvas) -> Entry:
        """Pads with 0; a batch's NAME_size tells padding from black pixels."""
        return pad(value, canvas, 0, first_axis=0)

    def arrays(self, name: str, value: Entry, canvas: Canvas | None) -> Arrays:
        """Adds `NAME_size`, the height and width before padding, int32 [2], where there is a canvas."""
        if canvas is None:
            return {name: value}
        return {name: self.padded(value, canvas), f"{name}_size": tf.shape(value)[:2]}


@dataclasses.dataclass(frozen=True)
class Image(Picture):
    """A picture: uint8 [h, w, channels].

    Attributes:
      channels: 1 or 3; others are converted.
    """

    channels: int = 3
    noun = "image"
    readable = "a readable JPEG, PNG or WebP image; it may be truncated or animated"

    def configured(self, config: Any) -> "Image":
        """Returns the field with the channels of the model.

        Raises:
          UserError: these are not 1 or 3, or the config is one of arrays.
        """
        data, channels = config.data, config.model.in_chans
        if channels not in (1, 3):
            raise UserError(
                f"model.in_chans {channels}: image files are read with 1 or 3 channels; data.source=arrays "
                "reads any number of bands"
            )
        if data.dtype != "uint8" or data.use_bands:
            raise UserError(
                f"data.dtype '{data.dtype}' and data.use_bands '{data.use_bands}' are of arrays, but the "
                "images are read with 8 bits; set data.source=arrays or leave them out"
            )
        return Image(channels)

    def decode(self, stored: Entry) -> Entry:
        return decoding.decode(stored, self.channels)

    def lead(self, stored: Entry, draw: Draw, *, partly: bool) -> tuple[Entry, Geometry]:
        if not partly:
            image = self.decode(stored)
            drawn = draw(*tf.unstack(tf.shape(image)[:2]))
            return drawn.image(image), drawn
        image, size = decoding.decode_crop(
            stored, self.channels, lambda height, width: draw(height, width).box
        )
        drawn = draw(size[0], size[1])
        return drawn.cropped_image(image), drawn


@dataclasses.dataclass(frozen=True)
class Label(Field):
    """One class per example, int32.

    Attributes:
      class_names: the name of each class; empty for images without labels, whose entries are all 0.
    """

    class_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MultiLabel(Field):
    """Any number of classes per example."""

    class_names: tuple[str, ...]

    def decode(self, stored: Entry) -> Entry:
        return tf.reduce_max(tf.one_hot(tf.concat([stored, [-1]], axis=0), len(self.class_names)), axis=0)


@dataclasses.dataclass(frozen=True)
class Value(Field):
    """Regression targets: `size` numbers per example, float32.

    Attributes:
      size: how many.
      names: what each is called; empty if nothing needs their names.
    """

    size: int = 1
    names: tuple[str, ...] = ()

    def decode(self, stored: Entry) -> Entry:
        return tf.ensure_shape(tf.cast(stored, tf.float32), [self.size])


@dataclasses.dataclass(frozen=True)
class SegmentationMap(Field):
    """The class of each pixel, uint8 [h, w].

    Attributes:
      class_names: the name of each class.
      ignore: the value of pixels without a class, and of padding.
      unlabelled_first: whether stored maps have 0 for pixels without a class and k for class k - 1.

    Raises:
      UserError: a pixel cannot hold that many classes, or `ignore` is not a pixel value beside theirs.
    """

    class_names: tuple[str, ...]
    ignore: int = 255
    unlabelled_first: bool = False
    aligned = True
    noun = "map"
    readable = "a readable PNG; it may be truncated"

    def __post_init__(self) -> None:
        count = len(self.class_names)
        if count > 255:
            raise UserError(f"{count} classes are more than the 255 that a map of 8 bits holds; merge some")
        if not count <= self.ignore <= 255:
            raise UserError(
                f"data.ignore {self.ignore} must be from {count}, the number of classes, to 255; 255 is usual"
            )

    def decode(self, stored: Entry) -> Entry:
        """Raises tf.errors.OpError when it runs, also if a pixel is neither of a class nor ignored."""
        values = decoding.decode_map(stored)
        if self.unlabelled_first:
            values = tf.where(values == 0, tf.constant(self.ignore, tf.uint8), values - 1)
        ignored = values == self.ignore
        highest = tf.reduce_max(tf.where(ignored, tf.constant(0, tf.uint8), values))
        count = len(self.class_names)
        stored_highest = tf.cast(highest, tf.int32) + int(self.unlabelled_first)
        reason = tf.strings.format(
            f"has the value {{}}, but there are {count} classes, from {int(self.unlabelled_first)} on, and "
            f"data.ignore is {self.ignore}; check data.classes and data.ignore",
            stored_highest,
        )
        return refuse_unless(highest < count, reason, values)

    def moved(self, value: Entry, geometry: Geometry) -> Entry:
        """Raises tf.errors.InvalidArgumentError when it runs, if the map has another size than the image."""
        size, expected = tf.shape(value), tf.convert_to_tensor(geometry.source)
        reason = tf.strings.format(
            "has {} x {} pixels (height x width), but its map {} x {}; make both the same size",
            (expected[0], expected[1], size[0], size[1]),
        )
        return geometry.map(refuse_unless(tf.reduce_all(size == expected), reason, value))

    def padded(self, value: Entry, canvas: Canvas) -> Entry:
        return pad(value, canvas, self.ignore, first_axis=0)


@dataclasses.dataclass(frozen=True)
class Instances(Field):
    """Objects: boxes float32 [n, 4], classes int32 [n] and masks.

    Boxes are y0, x0, y1, x1 in pixels. A geometry clips them to its result and drops the objects whose box is
    empty then, with their classes and masks.

    Masks are stored encoded (`encoded_masks`), for an image of height and width "size". A geometry crops each
    to its own box, 0 or 1, because full masks of all objects would take 100 MB per example. The boxes are
    then those of the moved masks, and objects without a pixel left are dropped too.

    Attributes:
      class_names: the name of each class.
      most: how many objects the arrays of an example hold. Of more, those with the largest boxes are kept (of
        boxes of one area the earlier ones), in their stored order.
      mask_side: the height and width of cropped masks, uint8 [n, mask_side, mask_side]; 0: no masks.
    """

    class_names: tuple[str, ...]
    most: int
    mask_side: int = 0
    aligned = True
    noun = "image"

    def decode(self, stored: Entry) -> Entry:
        names = ("boxes", "classes", *(["masks", "size"] if self.mask_side else []))
        return {name: stored[name] for name in names}

    def moved(self, value: Entry, geometry: Geometry) -> Entry:
        """Raises tf.errors.InvalidArgumentError when it runs, if masks are for another size of image."""
        boxes = geometry.boxes(value["boxes"])
        inside = tf.reduce_all(boxes[:, 2:] > boxes[:, :2], axis=1)
        rows = {name: tensor for name, tensor in value.items() if name != "size"}
        kept = {name: tf.boolean_mask(tensor, inside) for name, tensor in {**rows, "boxes": boxes}.items()}
        if not self.mask_side:
            return kept
        size, expected = value["size"], tf.convert_to_tensor(geometry.source)
        reason = tf.strings.format(
            "has {} x {} pixels (height x width), but its annotations are for {} x {}; correct either",
            (expected[0], expected[1], size[0], size[1]),
        )
        masks = refuse_unless(tf.reduce_all(size == expected), reason, kept["masks"])
        boxes, crops, found = tf.numpy_function(
            functools.partial(crop_masks, side=self.mask_side),
            [masks, size, *geometry.places()],
            [tf.float32, tf.uint8, tf.bool],
            stateful=False,
        )
        moved = {
            "boxes": geometry.turned_boxes(tf.ensure_shape(boxes, [None, 4])),
            "classes": kept["classes"],
            "masks": geometry.turned(tf.ensure_shape(crops, [None, *2 * [self.mask_side]]), (0, 2, 1)),
        }
        return {name: tf.boolean_mask(rows, tf.ensure_shape(found, [None])) for name, rows in moved.items()}

    def arrays(self, name: str, value: Entry, canvas: Canvas | None) -> Arrays:
        """Returns the objects, 0 beyond their number, and `NAME_valid`, bool [most]: true for objects."""
        del canvas
        height, width = tf.unstack(value["boxes"][:, 2:] - value["boxes"][:, :2], axis=1)
        count = tf.minimum(tf.size(height), self.most)
        largest = tf.sort(tf.math.top_k(height * width, count).indices)
        arrays = {entry: self._filled(tf.gather(rows, largest)) for entry, rows in value.items()}
        return {**arrays, f"{name}_valid": tf.range(self.most) < count}

    def _filled(self, rows: tf.Tensor) -> tf.Tensor:
        missing = tf.pad([[0, self.most - tf.shape(rows)[0]]], [[0, len(rows.shape) - 1], [0, 0]])
        return tf.ensure_shape(tf.pad(rows, missing), [self.most, *rows.shape[1:]])


@dataclasses.dataclass(frozen=True)
class Identifier(Field):
    """A name or number that evaluation needs and no device does, such as the id of an image."""

    host_only = True


def decode_moved(
    fields: Mapping[str, Field], record: Entries, draw: Draw, *, leader: str = "image", partly: bool = False
) -> dict[str, Entry]:
    """Decodes the entries of a record and moves all of them by one geometry.

    Args:
      fields: the fields to decode; other entries of the record are left out.
      record: stored entries by name.
      draw: draws the geometry for the height and width of the field `leader`, an image.
      leader: a name in `fields`.
      partly: decode only the crop of the leader, where its format allows it.

    Raises:
      tf.errors.OpError: when it runs, if an entry cannot be decoded.
    """
    lead, drawn = fields[leader].lead(record[leader], draw, partly=partly)
    others = {
        name: field.moved(field.decode(record[name]), drawn)
        for name, field in fields.items()
        if name != leader
    }
    return {leader: lead, **others}


def example_arrays(fields: Mapping[str, Field], values: Entries, canvas: Canvas | None = None) -> Arrays:
    """Returns the arrays of an example from its decoded values; those for the host under HOST.

    Args:
      fields: the fields of `values`.
      values: as from `decode_moved`.
      canvas: see `Field.arrays`.
    """
    arrays: Arrays = {}
    for name, field in fields.items():
        place = arrays.setdefault(HOST, {}) if field.host_only else arrays
        place.update(field.arrays(name, values[name], canvas))
    return arrays
