"""Folders of image files with a table of labels (`data.labels`) instead of one sub-folder per class."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from cnx2_jax.data import csv_labels
from cnx2_jax.data.csv_labels import Table
from cnx2_jax.data.fields import Entry, Field, Label, MultiLabel, Value
from cnx2_jax.data.sources.arrays import open_array_files
from cnx2_jax.data.sources.base import Source, held_out, stored_sets
from cnx2_jax.data.sources.folder import existing_folder, open_files
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError


def open_labelled(data: Any, split: str, wanted: str) -> Source:
    """Opens one split of the files below `data.root`, each with its row of the CSV file `data.labels`.

    The splits are those of the column `split`; or of the folders `train` and `val`, if all images lie in
    these; or else a share of `data.val_fraction` is held out, of each class where images have one.

    Args:
      data: `config.data`. Read here: `source`, `root`, `labels`, `val_fraction`, and what `wanted` needs:
        `classes` for "label" and "labels", `targets` for "value".
      split: "train" or "val".
      wanted: the field that the table gives: "label" (`Label`), "labels" (`MultiLabel`) or "value" (`Value`).

    Raises:
      UserError: see `csv_labels`, `open_files` and `open_array_files`.
    """
    if data.source not in ("folder", "arrays"):
        raise UserError(
            f"data.labels '{data.labels}' is for the files of a folder, not for data.source "
            f"'{data.source}'; set one of them to its default"
        )
    root = existing_folder(data.root, "data.root")
    files = open_files([root]) if data.source == "folder" else open_array_files(data, [root])
    start = len(os.path.join(root, ""))
    names = [files.describe(index)[start:] for index in range(files.num_records)]
    table = csv_labels.read_table(data.labels).ordered(names)
    source = _with_field(files, table, data, wanted)
    val = csv_labels.read_split(table)
    if val is None and all(name.startswith(("train/", "val/")) for name in names):
        val = np.array([name.startswith("val/") for name in names])
    if val is None:
        val = held_out(map(os.fsencode, names), source.labels, data.val_fraction)
    if val.all():
        raise UserError(f"all images of '{table.path}' are for validation; there must be some for training")
    return source.only(val if split == "val" else ~val)


def _with_field(files: Source, table: Table, data: Any, wanted: str) -> Source:
    """Returns the images with the field that the table gives."""
    if wanted == "label":
        labels, names = csv_labels.read_label(table, data.classes)
        return _joined(files, wanted, Label(names), tf.constant(labels), labels=labels)
    if wanted == "labels":
        chosen, names = csv_labels.read_labels(table, data.classes)
        sets = stored_sets(chosen)
        targets = {wanted: chosen.astype(np.float64)}
        return _joined(files, wanted, MultiLabel(names), sets, targets=targets)
    values = csv_labels.read_values(table, data.targets)
    field = Value(len(data.targets), tuple(data.targets))
    return _joined(files, wanted, field, tf.constant(values), targets={wanted: values})


def _joined(
    files: Source,
    name: str,
    field: Field,
    entries: Entry,
    *,
    labels: np.ndarray | None = None,
    targets: Mapping[str, np.ndarray] | None = None,
) -> Source:
    return dataclasses.replace(
        files,
        fields={"image": files.fields["image"], name: field},
        labels=labels,
        targets=targets or {},
        read=lambda index: {"image": files.read(index)["image"], name: entries[index]},
    )
