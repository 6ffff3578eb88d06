"""The metadata that travels with the weights: the config, the names of the classes, and its own format."""

import re
from pathlib import Path

from ml_collections import ConfigDict

from cnx2_jax.errors import UserError
from cnx2_jax.files import is_remote

METADATA_ITEM = "card"  # the folder of the metadata inside a checkpoint, as format 1 names it
COMMITTED = "commit_success.txt"  # Orbax's mark in object storage
FORMAT = 1  # raised when an older cnx2_jax would misread what a newer one writes


def is_saved(path: Path) -> bool:
    """Whether Orbax has finished saving the checkpoint of a step."""
    # On a disk it renames the finished folder. In object storage it writes this mark last.
    return (path / COMMITTED).exists() if is_remote(path) else path.is_dir()


def make_metadata(config: ConfigDict, class_names: tuple[str, ...]) -> dict:
    """Returns the metadata of a run's weights, as JSON."""
    return {"format": f"cnx2_jax {FORMAT}", "class_names": list(class_names), "config": config.to_dict()}


def check_format(stated: object, path: Path) -> None:
    """Raises UserError unless the metadata of checkpoint `path` states a format that this version reads."""
    match = re.fullmatch(r"cnx2_jax (\d+)", stated) if isinstance(stated, str) else None
    if match is None:
        raise UserError(
            f"checkpoint '{path}' states no format of cnx2_jax ({stated!r}); was it written by cnx2?"
        )
    if int(match[1]) > FORMAT:
        raise UserError(
            f"checkpoint '{path}' has metadata of format {match[1]}, and this cnx2_jax reads up to "
            f"{FORMAT}; install the version that wrote it, or export the weights with that one"
        )
