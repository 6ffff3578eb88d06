"""Finds damaged checkpoints before a run resumes, and moves them aside."""

import json
from collections.abc import Iterable
from pathlib import Path

import tensorstore as ts

from cnx2_jax.checkpoints.metadata import METADATA_ITEM, is_saved
from cnx2_jax.errors import UserError
from cnx2_jax.files import exists
from cnx2_jax.observe.progress import say

ASIDE = "damaged-"


def latest_whole(directory: Path, items: Iterable[str]) -> int | None:
    """Returns the latest step whose checkpoint is complete, and renames later ones to `damaged-STEP`.

    Only one process may call this. It reads every array once, which finds truncated files.

    Args:
      directory: `workdir/checkpoints`; it may be missing.
      items: the items that a checkpoint must hold, such as `params`.

    Returns:
      The step, or None if there never was a checkpoint.

    Raises:
      UserError: there were checkpoints, but all are damaged: a run must not silently start from step 0.
    """
    # Orbax removes checkpoints whose saving was interrupted.
    found = [path for path in directory.glob("*") if path.name.isdigit() and is_saved(path)]
    steps = sorted((int(path.name) for path in found), reverse=True)
    for step in steps:
        reason = flaw(directory / str(step), items)
        if reason is None:
            return step
        aside = _free_name(directory, step)
        (directory / str(step)).rename(aside)
        say(f"warning: checkpoint {step} is damaged ({reason}); moved to '{aside}', using the one before it")
    damaged = sorted(path.name for path in directory.glob(f"{ASIDE}*"))
    if damaged:
        raise UserError(
            f"all checkpoints in '{directory}' are damaged: {', '.join(damaged)}; repair one and "
            "rename it to its step, or start again in another workdir"
        )
    return None


def flaw(checkpoint: Path, items: Iterable[str]) -> str | None:
    """Returns the reason why a checkpoint folder is damaged, or None if it is complete."""
    try:
        json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text())
        json.loads((checkpoint / METADATA_ITEM / "metadata").read_text())
        for item in items:
            _read(checkpoint / item)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return reason.partition(" [")[0]  # without TensorStore's details in brackets
    return None


def _read(item: Path) -> None:
    """Reads every array of an Orbax item, one at a time."""
    tree = json.loads((item / "_METADATA").read_text())["tree_metadata"]
    for leaf in tree.values():
        if leaf["value_metadata"]["skip_deserialize"]:
            continue  # the optimizer keeps no array here
        name = ".".join(key["key"] for key in leaf["key_metadata"])
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": item.absolute().as_uri() + "/", "path": f"{name}/"},
            "fill_missing_data_reads": False,
        }
        ts.open(spec, open=True, read=True).result().read().result()


def _free_name(directory: Path, step: int) -> Path:
    path, again = directory / f"{ASIDE}{step}", 1
    while exists(path):
        again += 1
        path = directory / f"{ASIDE}{step}-{again}"
    return path
