"""Folders of image files: which files are records, their classes, and which are held out."""

import os
from collections.abc import Iterator, Sequence

import numpy as np

from cnx2_jax.data.fields import Image, Label
from cnx2_jax.data.sources.base import Source, held_out
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError

IMAGE_ENDINGS = (".jpeg", ".jpg", ".png", ".webp")
Endings = tuple[str, ...]


def open_folder(root: str, split: str, val_fraction: float, endings: Endings = IMAGE_ENDINGS) -> Source:
    """Opens `root/train` or `root/val`; without `val`, a share of `root/train`, or else of `root`.

    Each sub-folder is a class with all images below it. Images without any sub-folder are unlabelled. Names
    of images end in one of `endings`, in small or capital letters.

    Raises:
      UserError: the folder is missing, empty, cannot be listed, or is laid out inconsistently.
    """
    root = existing_folder(root, "data.root")
    train, val = os.path.join(root, "train"), os.path.join(root, "val")
    has_train, has_val = os.path.isdir(train), os.path.isdir(val)
    if has_val and not has_train:
        raise UserError(f"'{root}' has a folder 'val' but no 'train'; add it or rename 'val'")
    base = train if has_train else root
    class_names = _sub_folders(base)
    if has_val and split == "val":
        return _list_records(val, class_names, endings)
    source = _list_records(base, class_names, endings)
    assert source.labels is not None
    present = np.bincount(source.labels, minlength=len(class_names)) > 0
    if not present.all():
        empty = os.path.join(base, class_names[int(np.argmin(present))])
        raise UserError(f"class folder '{empty}' has no {image_kinds(endings)}; add some or remove it")
    if has_val:
        return source
    if not 0 <= val_fraction < 1:
        raise UserError(f"data.val_fraction {val_fraction} is not in [0, 1)")
    # Relative names, so that a data set that moves to another disk keeps its split.
    start = len(os.path.join(base, ""))
    names = (os.fsencode(source.describe(index)[start:]) for index in range(source.num_records))
    chosen = held_out(names, source.labels, val_fraction)
    return source.only(chosen if split == "val" else ~chosen)


def open_whole_folder(root: str, endings: Endings = IMAGE_ENDINGS) -> Source:
    """Opens all images of a folder, whose sub-folders are the classes.

    Raises:
      UserError: as `open_folder`.
    """
    root = existing_folder(root, "data.val_root")
    return _list_records(root, _sub_folders(root), endings)


def open_files(paths: Sequence[str], endings: Endings = IMAGE_ENDINGS) -> Source:
    """Opens files, whatever their names end in, and all images below folders; unlabelled.

    They keep the order given; the images of a folder are sorted by path.

    Raises:
      UserError: a path does not exist, or a folder has no images or cannot be listed.
    """
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            names = sorted(image_names(path, endings=endings))
            if not names:
                raise UserError(f"no {image_kinds(endings)} in '{path}'; check the path")
            found.extend(os.path.join(path, name) for name in names)
        elif os.path.lexists(path):
            found.append(path)
        else:
            raise UserError(f"image '{path}' does not exist; check the path or restore it")
    return _records_of("", found, (), np.zeros(len(found), np.int32))


def existing_folder(root: str, key: str) -> str:
    """Returns the path that the config key `key` holds, with `~` expanded.

    Raises:
      UserError: the key is empty, or the path is not a folder.
    """
    root = os.path.expanduser(root)
    if not root:
        raise UserError(f"{key} is not set; pass --config.{key}=FOLDER with your images")
    if not os.path.isdir(root):
        raise UserError(f"{key} '{root}' is not a folder; check the path")
    return root


def _list_records(folder: str, class_names: Sequence[str], endings: Endings) -> Source:
    """Returns all images below `folder`, sorted by path, labelled by the sub-folder they lie in."""
    unknown = sorted(set(_sub_folders(folder)) - set(class_names))
    if unknown:
        raise UserError(f"class '{unknown[0]}' is only in '{folder}'; add it to train or remove it")
    # Sorted: the order in which a file system lists differs between machines.
    names = sorted(image_names(folder, endings=endings))
    if not names:
        raise UserError(f"no {image_kinds(endings)} in '{folder}'; check the path")
    if class_names:
        loose = next((name for name in names if "/" not in name), None)
        if loose is not None:
            raise UserError(
                f"image '{os.path.join(folder, loose)}' lies beside or instead of class folders; "
                "move it into one"
            )
        label_of = {name: label for label, name in enumerate(class_names)}
        labels = np.fromiter((label_of[name.split("/", 1)[0]] for name in names), np.int32)
    else:
        labels = np.zeros(len(names), np.int32)
    return _records_of(os.path.join(folder, ""), names, class_names, labels)


def _records_of(top: str, names: Sequence[str], class_names: Sequence[str], labels: np.ndarray) -> Source:
    """Returns a source of the files `top + name`."""
    # An array of fixed width, because 14 million Python strings would take several times its memory.
    paths = np.array([os.fsencode(name) for name in names], np.bytes_)
    encoded_paths, numbers = tf.constant(paths, tf.string), tf.constant(labels)

    def read(index: tf.Tensor) -> dict[str, tf.Tensor]:
        path = tf.strings.join([os.fsencode(top), encoded_paths[index]])
        return {"image": tf.io.read_file(path), "label": numbers[index]}

    return Source(
        num_records=len(names),
        fields={"image": Image(), "label": Label(tuple(class_names))},
        labels=labels,
        read=read,
        describe=lambda index: top + os.fsdecode(paths[index]),
    )


def _sub_folders(folder: str) -> tuple[str, ...]:
    return tuple(sorted(name for name, is_folder in _listed(folder) if is_folder))


def image_names(folder: str, prefix: str = "", endings: Endings = IMAGE_ENDINGS) -> Iterator[str]:
    """Yields the images below a folder, as paths relative to the top folder, in no particular order."""
    for name, is_folder in _listed(folder):
        if is_folder:
            yield from image_names(os.path.join(folder, name), f"{prefix}{name}/", endings)
        elif name.lower().endswith(endings):
            yield prefix + name


def _listed(folder: str) -> list[tuple[str, bool]]:
    """Returns the names of all entries that are not hidden, and whether they are folders."""
    try:
        with os.scandir(folder) as entries:
            return [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:  # such as symbolic links in a circle
        raise UserError(f"cannot list '{error.filename or folder}': {error.strerror}") from error


def image_kinds(endings: Endings = IMAGE_ENDINGS) -> str:
    """Returns what error messages call the files that `image_names` looks for."""
    return f"images ({', '.join(endings)})"
