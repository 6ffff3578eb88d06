"""Finds, reads and writes checkpoint folders.

A run's checkpoint is a folder `checkpoints/STEP` with `params` (arrays by dotted name), `card` (their
metadata, as JSON), `opt_state` and, if the run has them, `variables`, `ema` (averaged parameters) and
`skipped` (the number of skipped updates). An exported checkpoint has `params` and `card` only;
one reader serves both.
"""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from cnx2_jax.checkpoints.metadata import METADATA_ITEM, check_format, is_saved
from cnx2_jax.errors import RunError, UserError
from cnx2_jax.files import check_new, client_errors, creating
from cnx2_jax.models.state import Params

FOREIGN = (".pt", ".pth", ".bin", ".safetensors")  # files that `cnx2 convert` reads


def find(path: Path) -> Path:
    """Returns the checkpoint folder, with `params` and `card`, that `path` refers to.

    Args:
      path: `checkpoints/STEP` of a run, an exported checkpoint, or a workdir: for the checkpoint of its
        `result.json`, which is the best one of a run that stopped early, or else for its latest one.

    Raises:
      UserError: there is no checkpoint.
    """
    if not path.exists():
        raise UserError(f"checkpoint '{path}' does not exist")
    if path.suffix in FOREIGN or (path / "model.safetensors").exists():
        raise UserError(f"'{path}' holds another library's weights; run `cnx2 convert` to make a checkpoint")
    if (path / "params").is_dir():
        return path
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    found = [p for p in folder.glob("*") if p.name.isdigit() and is_saved(p)] if folder.is_dir() else []
    steps = [int(p.name) for p in found]
    if not steps:
        raise UserError(
            f"no checkpoint in '{path}'; give a workdir, its checkpoints/STEP, or an exported checkpoint"
        )
    result = _result_step(folder.parent / "result.json")
    return folder / str(result if result in steps else max(steps))


def _result_step(path: Path) -> int | None:
    """Returns the step of a run's result, None if it has not ended or its result cannot be read."""
    try:
        return json.loads(path.read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_metadata(path: Path) -> dict:
    """Returns the metadata of the checkpoint folder `path` (see `find`).

    Raises:
      UserError: there is none, or this version does not read its format.
    """
    try:
        values = json.loads((path / METADATA_ITEM / "metadata").read_text())
        if not {"config", "class_names"} <= values.keys():
            raise ValueError("metadata of another program")
    except (OSError, ValueError, AttributeError):
        raise UserError(f"checkpoint '{path}' has no readable metadata; was it written by cnx2?") from None
    check_format(values.get("format"), path)
    return values


def read_params(path: Path, *, averaged: bool = True) -> Params:
    """Reads all arrays of a model from the checkpoint folder `path` (see `find`): parameters and variables.

    They are on this process's first device; floating-point arrays are converted to float32.

    Args:
      path: the folder.
      averaged: read the averaged parameters if the checkpoint has them; recipes report their accuracy.

    Raises:
      UserError: the arrays cannot be read.
    """
    if averaged and has_average(path):
        return _read_arrays(path, "ema")
    params = _read_arrays(path, "params")
    return {**params, **_read_arrays(path, "variables")} if (path / "variables").is_dir() else params


def _read_arrays(path: Path, item: str) -> Params:
    folder = str((path / item).absolute())
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(leaf) -> jax.ShapeDtypeStruct:
        dtype = np.float32 if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating) else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=device)

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata
            return checkpointer.restore(folder, {name: place(leaf) for name, leaf in dict(tree).items()})
    except client_errors(path) as error:
        raise RunError(f"the parameters in '{path}' cannot be read: {_first_line(error)}") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = _first_line(error)
        raise UserError(f"the parameters in '{path}' cannot be read: {reason}{_others(path)}") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _others(path: Path) -> str:
    """Returns a hint to another step of the same run, or the empty string."""
    steps = sorted(int(p.name) for p in path.parent.glob("*") if p.name.isdigit() and p.name != path.name)
    return f"; give another one, {path.parent / str(steps[-1])}" if path.name.isdigit() and steps else ""


def has_average(path: Path) -> bool:
    """Whether the checkpoint folder `path` also holds averaged parameters."""
    return (path / "ema").is_dir()


def write(path: Path, params: Params, metadata: dict) -> None:
    """Writes parameters and metadata as a new checkpoint folder; after an error there is no folder.

    Raises:
      UserError: `path` exists already or cannot be written.
    """
    check_new(path, "--out")
    with creating(path) as partial:
        (partial / METADATA_ITEM).mkdir(parents=True)
        (partial / METADATA_ITEM / "metadata").write_text(json.dumps(metadata))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((partial / "params").absolute(), params)
