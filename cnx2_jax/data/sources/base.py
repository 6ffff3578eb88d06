"""What a source is: records by index, and how some of them are held out."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable

import numpy as np

from cnx2_jax.data.tensorflow import tf


@dataclasses.dataclass(frozen=True)
class Source:
    """Records in a fixed order that is the same on every host.

    Attributes:
      num_records: how many there are; a val split may have none.
      class_names: the name of each label; empty when the images carry no labels (all are then 0).
      labels: int32 [num_records], or None where they are only known by reading the records.
      read: scalar int64 index -> {"bytes": encoded image, scalar string; "label": scalar int32}.
        Runs eagerly and inside tf.data.
      describe: index -> the file's path or the record's name, for error messages.
    """

    num_records: int
    class_names: tuple[str, ...]
    labels: np.ndarray | None
    read: Callable[[tf.Tensor], dict[str, tf.Tensor]]
    describe: Callable[[int], str]

    def only(self, chosen: np.ndarray) -> "Source":
        """The records where `chosen`, boolean [num_records], is true, in their order."""
        indices = np.flatnonzero(chosen)
        there = tf.constant(indices, tf.int64)
        return Source(
            num_records=len(indices),
            class_names=self.class_names,
            labels=None if self.labels is None else self.labels[indices],
            read=lambda index: self.read(there[index]),
            describe=lambda index: self.describe(int(indices[index])),
        )

    def all_labels(self) -> np.ndarray:
        """Returns the label of every record, int32 [num_records]; reads the records if it has to."""
        if self.labels is not None:
            return self.labels
        labels = tf.data.Dataset.range(self.num_records).map(lambda index: self.read(index)["label"])
        return np.fromiter(labels.as_numpy_iterator(), np.int32)

    def relabelled(self, table: np.ndarray) -> "Source":
        """The same records with label `table[label]`, table being int32."""
        there = tf.constant(table)

        def read(index: tf.Tensor) -> dict[str, tf.Tensor]:
            record = self.read(index)
            return {**record, "label": there[record["label"]]}

        labels = None if self.labels is None else table[self.labels]
        return dataclasses.replace(self, labels=labels, read=read)


def held_out(names: Iterable[bytes], labels: np.ndarray | None, fraction: float) -> np.ndarray:
    """Which records are val, boolean [n]: about `fraction` of each class, by a hash of the name.

    A class of two or more gets at least one val record and keeps at least one for training. With a
    hash, adding files to a folder hardly moves the others between train and val. Where labels are
    not known, all records count as one class.
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
    """The `share[c]` records of lowest rank in each class c, as a boolean array [n]."""
    order = np.lexsort((ranks, labels))
    counts = np.bincount(labels, minlength=len(share))
    starts = np.cumsum(counts) - counts
    sorted_labels = labels[order]
    place_in_class = np.arange(len(labels)) - starts[sorted_labels]
    chosen = np.zeros(len(labels), bool)
    chosen[order] = place_in_class < share[sorted_labels]
    return chosen
