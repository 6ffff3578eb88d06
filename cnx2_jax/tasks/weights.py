"""Models from checkpoints, and what a run starts from."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.configuration import from_json
from cnx2_jax.errors import UserError
from cnx2_jax.models.state import Params, merge, split
from cnx2_jax.tasks.base import TASKS, Described, Task
from cnx2_jax.tasks.stem import adapt


def load(path: Path) -> tuple[Any, ConfigDict, tuple[str, ...]]:
    """Loads a model with its config and class names from a checkpoint (see `checkpoint.find`).

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """
    model, task = load_task(path)
    return model, task.config, task.class_names


def load_task(path: Path) -> tuple[Any, Task]:
    """Loads a model from a checkpoint, with the task that it was trained for, whose data stays closed.

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """
    folder = checkpoint.find(path)
    metadata = checkpoint.read_metadata(folder)
    try:
        config, class_names = from_json(metadata["config"]), tuple(metadata["class_names"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"checkpoint '{path}' is damaged: its config cannot be read ({error})") from None
    task = TASKS[config.task](config, data=Described(class_names=class_names))
    task.adopt(metadata)
    graph, like = split(nnx.eval_shape(lambda: task.init(nnx.Rngs(0))))
    params = checkpoint.read_params(folder)
    check_params(params, like, str(path))
    return merge(graph, params), task


def check_params(params: Params, like: Params, source: str) -> None:
    """Raises UserError unless `params` has the names of `like`, no others, and the same shapes."""
    for name, leaf in like.items():
        if name not in params:
            raise UserError(f"checkpoint '{source}' has no parameter '{name}': it is of another model")
        if params[name].shape != leaf.shape:
            raise UserError(
                f"checkpoint '{source}' is of another model: '{name}' is {params[name].shape} there and "
                f"{leaf.shape} here; check model.variant, depths, dims, in_chans and patch_size"
            )
    surplus = sorted(params.keys() - like.keys())
    if surplus:
        raise UserError(f"checkpoint '{source}' is of another model: '{surplus[0]}' has no place here")


def check_class_names(theirs: dict, ours: dict, source: str) -> None:
    """Raises UserError unless both metadata name the same classes, or the checkpoint names none."""
    stored, here = theirs.get("class_names"), ours["class_names"]
    if stored and here and stored != here:
        place = next(
            (i for i, pair in enumerate(zip(stored, here, strict=False)) if pair[0] != pair[1]), None
        )
        difference = f"{len(stored)} classes there, {len(here)} here"
        if place is not None:
            difference = f"class {place} is '{stored[place]}' there and '{here[place]}' here"
        raise UserError(f"checkpoint '{source}' was trained on other classes: {difference}; check data.root")


def starting_params(
    path: Path,
    config: ConfigDict,
    fresh: Params,
    class_names: tuple[str, ...] = (),
    *,
    encoder_prefix: str = "",
    heads: tuple[str, ...] = ("head.",),
) -> Params:
    """Returns `fresh` with arrays of the same meaning taken from a checkpoint of any task.

    From a checkpoint of the same kind of model, everything is taken but heads of another number of classes,
    or of classes of other names than `class_names`. From any other kind only the encoder is taken.

    Args:
      path: see `checkpoint.find`.
      config: of the run that starts.
      fresh: by dotted name.
      class_names: of the run that starts.
      encoder_prefix: what precedes the encoder's names in `fresh`.
      heads: what the names of the layers begin with whose results are one per class.

    Raises:
      UserError: there is no checkpoint, it is of another variant, or of images with another number of bands
        than the run's without a choice in `init_bands` (see `stem.adapted`).
    """
    folder = checkpoint.find(path)
    metadata = checkpoint.read_metadata(folder)
    theirs, ours = metadata["config"]["model"]["variant"], config.model.variant
    if theirs != ours:
        raise UserError(
            f"checkpoint '{path}' holds variant '{theirs}', the config asks for '{ours}'; "
            f"set model.variant={theirs} or choose another init_from"
        )
    stored = checkpoint.read_params(folder)
    their_prefix = _encoder_prefix(stored, path)
    # A segmenter's encoder has the same prefix as a detector's.
    if their_prefix == encoder_prefix and _parts(stored) <= _parts(fresh):
        others = bool(class_names and metadata["class_names"])
        others = others and tuple(metadata["class_names"]) != class_names
        kept = {
            name
            for name in fresh
            if name.startswith(heads)
            and (others or name not in stored or stored[name].shape != fresh[name].shape)
        }
        taken = {name: leaf for name, leaf in stored.items() if name not in kept}
    else:
        kept = {name for name in fresh if not _is_encoder(name, encoder_prefix)}
        taken = {
            encoder_prefix + name.removeprefix(their_prefix): leaf
            for name, leaf in stored.items()
            if _is_encoder(name, their_prefix)
        }
    stem = encoder_prefix + _STEM
    taken[stem] = adapt(taken[stem], fresh[stem], str(path), config.init_bands, config.data)
    check_params(taken, {name: leaf for name, leaf in fresh.items() if name not in kept}, str(path))
    return {name: leaf if name in kept else jax.device_get(taken[name]) for name, leaf in fresh.items()}


_STEM = "downsample_layers.0.0.kernel"


def _encoder_prefix(params: Params, path: Path) -> str:
    """Returns what precedes the encoder's names."""
    for name in params:
        if name.endswith(_STEM):
            return name.removesuffix(_STEM)
    raise UserError(f"checkpoint '{path}' has no encoder: no parameter's name ends in '{_STEM}'")


def _parts(params: Params) -> set[str]:
    """Returns the names of the modules that a model consists of."""
    return {name.partition(".")[0] for name in params}


def _is_encoder(name: str, prefix: str) -> bool:
    return name.startswith((f"{prefix}downsample_layers.", f"{prefix}stages."))
