"""A source: records by index, the fields they have, and how some of them are held out."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from cnx2_jax.data.annotations import Annotations
from cnx2_jax.data.fields import Entry, Field, Label
from cnx2_jax.data.tensorflow import tf


@dataclasses.dataclass(frozen=True)
class Source:
    """Records in a fixed order that is the same on every host.

    Attributes:
      num_records: how many there are; a val split may have none.
      fields: the fields of a record by name. Images without labels have a `Label` without class names, and
        all their labels are 0.
      labels: int32 [num_records], the entries of the field "label"; None if the source has no such field or
        if they are only known by reading the records.
      read: maps a scalar int64 index to the stored entries of the record by name, one per field; see
        `fields` for their form. Runs eagerly and inside tf.data.
      describe: maps an index to the path of the file or the name of the record, for error messages.
      describe_entry: the same for one field, by its name, where records consist of several files.
      annotations: the objects of all images, where they have any, as detections are compared with them.
      targets: float64 [num_records, n] by the name of a field: 0 or 1 for each of n classes of a multi-label
        field, or n values. Training learns from them, before it begins, what the field is like.
    """

    num_records: int
    fields: Mapping[str, Field]
    labels: np.ndarray | None
    read: Callable[[tf.Tensor], dict[str, Entry]]
    describe: Callable[[int], str]
    describe_entry: Callable[[int, str], str] | None = None
    annotations: Annotations | None = None
    targets: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def name_of(self, index: int, field: str) -> str:
        """Returns what an error message calls the entry of one field."""
        return self.describe_entry(index, field) if self.describe_entry else self.describe(index)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, or values, of the first field that has any; empty if no field has."""
        named = (
            getattr(field, "class_names", ()) or getattr(field, "names", ()) for field in self.fields.values()
        )
        return next(filter(None, named), ())

    def only(self, chosen: np.ndarray) -> "Source":
        """Returns the records where `chosen`, boolean [num_records], is true, in their order."""
        indices = np.flatnonzero(chosen)
        places = tf.constant(indices, tf.int64)
        return dataclasses.replace(
            self,
            num_records=len(indices),
            labels=None if self.labels is None else self.labels[indices],
            read=lambda index: self.read(places[index]),
            describe=lambda index: self.describe(int(indices[index])),
            describe_entry=lambda index, field: self.name_of(int(indices[index]), field),
            annotations=self.annotations and self.annotations.only(indices),
            targets={name: rows[indices] for name, rows in self.targets.items()},
        )

    def all_labels(self) -> np.ndarray:
        """Returns the label of every record, int32 [num_records]; reads the records if it has to."""
        if self.labels is not None:
            return self.labels
        labels = tf.data.Dataset.range(self.num_records).map(lambda index: self.read(index)["label"])
        return np.fromiter(labels.as_numpy_iterator(), np.int32)

    def relabelled(self, table: np.ndarray, class_names: tuple[str, ...]) -> "Source":
        """Returns the same records with label `table[label]`, an index into `class_names`.

        Args:
          table: int32 [classes of this source].
          class_names: the names of the new labels.
        """
        new_label = tf.constant(table)

        def read(index: tf.Tensor) -> dict[str, Entry]:
            record = self.read(index)
            return {**record, "label": new_label[record["label"]]}

        labels = None if self.labels is None else table[self.labels]
        fields = {**self.fields, "label": Label(class_names)}
        return dataclasses.replace(self, fields=fields, labels=labels, read=read)


def held_out(names: Iterable[bytes], labels: np.ndarray | None, fraction: float) -> np.ndarray:
    """Returns which records are val, boolean [n]: about `fraction` of each class, by a hash of the name.

    A class of two or more records gets at least one val record and keeps at least one for training. Thanks to
    the hash, adding files to a folder hardly moves the others between train and val. Where labels are not
    known, all records count as one class.
    """
    digests = b"".join(hashlib.blake2b(name, digest_size=8, key=b"cnx2 val").digest() for name in names)
    ranks = np.frombuffer(digests, ">u8")
    labels = np.zeros(len(ranks), np.int32) if labels is None else labels
    if not fraction:
        return np.zeros(len(labels), bool)
    counts = np.bincount(labels)
    share = np.where(counts < 2, 0, np.clip(np.round(fraction * counts), 1, counts - 1))
    return first_of_each_class(labels, ranks, share)


def first_of_each_class(labels: np.ndarray, ranks: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Returns the `share[c]` records of lowest rank in each class c, as a boolean array [n]."""
    order = np.lexsort((ranks, labels))
    counts = np.bincount(labels, minlength=len(share))
    starts = np.cumsum(counts) - counts
    sorted_labels = labels[order]
    place_in_class = np.arange(len(labels)) - starts[sorted_labels]
    chosen = np.zeros(len(labels), bool)
    chosen[order] = place_in_class < share[sorted_labels]
    return chosen


def stored_sets(chosen: np.ndarray) -> tf.RaggedTensor:
    """Returns the stored entries of a `MultiLabel`, int32 [records, any], from bool [records, classes]."""
    rows, classes = np.nonzero(chosen)
    return tf.RaggedTensor.from_value_rowids(
        tf.constant(classes, tf.int32), tf.constant(rows, tf.int64), nrows=len(chosen)
    )
