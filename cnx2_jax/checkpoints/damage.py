"""Checkpoints that are not whole: found before a run goes on, and set aside."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import tensorstore as ts

from cnx2_jax.errors import UserError
from cnx2_jax.observe.progress import say

ASIDE = "damaged-"


def latest_whole(directory: Path, items: Iterable[str]) -> int | None:
    """Returns the latest step whose checkpoint is whole; later ones become `damaged-STEP`.

    One process does this for all. Every array is read once, which is what finds a file that was cut off.

    Args:
      directory: `workdir/checkpoints`; it need not be there.
      items: what a checkpoint must hold, such as `params`.

    Returns:
      The step, or None where there never was a checkpoint.

    Raises:
      UserError: there were some, and none is whole: a run does not begin anew without being told to.
    """
    steps = sorted((int(path.name) for path in directory.glob("*") if path.name.isdigit()), reverse=True)
    for step in steps:
        reason = flaw(directory / str(step), items)
        if reason is None:
            return step
        aside = _free_name(directory, step)
        os.rename(directory / str(step), aside)
        say(f"warning: checkpoint {step} is damaged ({reason}); moved to '{aside}', using the one before")
    damaged = sorted(path.name for path in directory.glob(f"{ASIDE}*"))
    if damaged:
        raise UserError(
            f"no checkpoint in '{directory}' is whole, only {', '.join(damaged)} are there: repair one and "
            "rename it to its step, or begin anew in another workdir"
        )
    return None


def flaw(checkpoint: Path, items: Iterable[str]) -> str | None:
    """Returns what is wrong with a checkpoint folder, None if it is whole."""
    try:
        json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text())
        json.loads((checkpoint / "card" / "metadata").read_text())
        for item in items:
            _read(checkpoint / item)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return reason.partition(" [")[0]  # without all that TensorStore knows of the place
    return None


def _read(item: Path) -> None:
    """Reads every array of an Orbax item, one after another, and drops it."""
    tree = json.loads((item / "_METADATA").read_text())["tree_metadata"]
    for leaf in tree.values():
        if leaf["value_metadata"]["skip_deserialize"]:
            continue  # the place of an array that an optimizer does not keep
        name = ".".join(key["key"] for key in leaf["key_metadata"])
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": item.absolute().as_uri() + "/", "path": f"{name}/"},
            "fill_missing_data_reads": False,
        }
        ts.open(spec, open=True, read=True).result().read().result()


def _free_name(directory: Path, step: int) -> Path:
    path, again = directory / f"{ASIDE}{step}", 1
    while os.path.lexists(path):
        again += 1
        path = directory / f"{ASIDE}{step}-{again}"
    return path
