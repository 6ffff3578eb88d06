"""Configs: every key with its default, overrides, and the record in a workdir."""

import contextlib
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from cnx2_jax.errors import UserError, nearest

# A run may go on with other values of these: they change where, how and how often, not what is computed.
FREE_KEYS = (
    "mesh.",
    "model.layout",
    "model.remat",
    "model.scan",
    "log_steps",
    "profile_steps",
    "eval_epochs",
    "checkpoint_steps",
    "keep_checkpoints",
    "on_nonfinite",
    "max_nonfinite",
    "hang_seconds",
    "data.feature_cache",
)

# Least and greatest value of what is not checked by name elsewhere.
INFINITY = float("inf")
RANGES = {
    "seed": (-(2**31), 2**31 - 1),
    "batch_size": (1, 2**31 - 1),
    "accumulation_steps": (1, 2**31 - 1),
    "total_epochs": (0, 1e9),
    "total_steps": (0, 2**31 - 2),
    "log_steps": (1, INFINITY),
    "eval_epochs": (0, INFINITY),
    "checkpoint_steps": (1, INFINITY),
    "keep_checkpoints": (1, INFINITY),
    "max_nonfinite": (1, 2**31 - 1),
    "hang_seconds": (0, 1e6),
    "model.in_chans": (1, INFINITY),
    "model.patch_size": (1, 4),
    "model.mask_patch": (0, INFINITY),
    "model.decoder_dim": (1, INFINITY),
    "model.decoder_depth": (1, INFINITY),
    "model.head_init_scale": (0, 1e9),
    "data.val_fraction": (0, 0.999),
    "data.random_erasing": (0, 1),
    "data.max_unreadable": (0, 0.5),
    "data.eval_crop": (0.1, 1),
    "label_smoothing": (0, 0.999),
    "mixup": (0, 1e6),
    "cutmix": (0, 1e6),
    "optimizer.min_learning_rate": (0, INFINITY),
    "optimizer.warmup_epochs": (0, 1e9),
    "optimizer.weight_decay": (0, 1e9),
    "optimizer.b1": (0, 0.999999),
    "optimizer.b2": (0, 0.9999999),
    "optimizer.clip_norm": (0, 1e9),
    "optimizer.layer_decay": (0, 1),
    "ema_decay": (0, 0.999999999),
}


def defaults(task: str) -> ConfigDict:
    """Returns a config with every key that a run of this task reads; recipes change what they need to."""
    config = ConfigDict()
    config.task = task
    config.seed = 0
    config.batch_size = 256  # images per update, over all devices, hosts and accumulation steps
    config.accumulation_steps = 1
    config.image_size = (224, 224)  # height, width; one number makes a square
    config.total_epochs = 100.0
    config.total_steps = 0  # if not 0, instead of total_epochs
    config.log_steps = 50
    config.profile_steps = ""  # FIRST:LAST: writes a trace of these updates into the workdir's profile/
    config.eval_epochs = 10.0
    config.checkpoint_steps = 1000
    config.keep_checkpoints = 2  # the latest ones; the best is kept besides
    config.on_nonfinite = "stop"  # or skip: leave out an update that is not finite, counted in the metrics
    config.max_nonfinite = 10  # skipped updates in a row at which the run stops
    config.hang_seconds = 1800.0  # without a step after which the run shows its stacks and ends; 0: never
    config.ema_decay = 0.0  # of the exponential moving average of the parameters; 0: none is kept

    model = config.model = ConfigDict()
    model.variant = "tiny"  # or "custom", with depths and dims
    model.depths = ()
    model.dims = ()
    model.in_chans = 3
    model.patch_size = 4  # of the stem; the total stride is 8 times this
    model.drop_path = 0.0
    model.dtype = "float32"  # of the computation; parameters are always float32
    model.remat = "none"  # what the backward pass computes anew to save memory: none, dots or block
    model.scan = "auto"  # compile each stage's block once and loop over its parameters: on, off or auto

    data = config.data = ConfigDict()
    data.source = "folder"  # or tfds:NAME[/CONFIG]:SPLIT, synthetic[:RECORDS[:CLASSES]], digits
    data.root = ""  # of a folder's images, or of TFDS's data sets if not the usual place
    data.val_source = ""  # where validation images come from, if from elsewhere
    data.val_root = ""
    data.val_fraction = 0.1  # where the source has no validation images of its own
    data.train_per_class = 0  # if not 0, train on this many images of each class only
    data.crop_scale = (0.08, 1.0)  # share of the area that a random crop covers
    data.crop_ratio = (3 / 4, 4 / 3)
    data.flip = True
    data.augment = ""  # rand-m9-mstd0.5-inc1: RandAugment; jitter-0.4: colour jitter
    data.random_erasing = 0.0  # share of the images in which a box becomes noise
    data.unreadable = "error"  # or skip: another image stands in, counted in the metrics
    data.max_unreadable = 0.01  # share of all images at which skipping gives up
    data.eval_crop = 0.875
    data.mean = (0.485, 0.456, 0.406)  # of ImageNet, as shares of the full range
    data.std = (0.229, 0.224, 0.225)

    optimizer = config.optimizer = ConfigDict()
    optimizer.base_learning_rate = 1.5e-4  # for 256 images; scales with batch_size
    optimizer.min_learning_rate = 0.0
    optimizer.warmup_epochs = 0.0
    optimizer.weight_decay = 0.05
    optimizer.decay_grn = False  # also decay GRN and the mask token, as the official pretraining code does
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.clip_norm = 0.0  # 0: no clipping
    optimizer.layer_decay = 1.0  # factor on the learning rate from each layer to the one before it
    optimizer.layer_decay_type = "single"  # what counts as a layer: single blocks, or a group of them
    optimizer.trainable = ""  # a regular expression: train only parameters in whose names it is found

    mesh = config.mesh = ConfigDict()
    mesh.data = -1  # -1: all devices that are left
    mesh.fsdp = 1

    if task == "pretrain":
        model.layout = (
            "auto"  # how the masked map is held: masked, gathered, or what is fastest where it runs
        )
        model.mask_ratio = 0.6
        model.mask_patch = 0  # side of the hidden squares in pixels; 0: the total stride
        model.decoder_dim = 512
        model.decoder_depth = 1
    elif task == "classify":
        config.init_from = ""  # a checkpoint to start from; empty: from scratch
        model.head_init_scale = 1.0
        config.label_smoothing = 0.0
        # Alphas of the beta distributions that mixing coefficients are drawn from; 0: none. With both, each
        # batch draws which.
        config.mixup = 0.0
        config.cutmix = 0.0
    elif task == "probe":
        config.init_from = ""  # a checkpoint whose encoder is frozen; empty: a random one
        model.head_init_scale = 1.0
        data.feature_cache = ""  # a folder in which other runs find the features too
        optimizer.trainable = "^head\\."
    return config


def load_config(location: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads `FILE.py[:ARGUMENT]`, applies `--config.KEY=VALUE` overrides and locks the result.

    Raises:
      UserError: no such file, no `get_config` in it, an argument it does not know, or a bad override.
    """
    path, _, argument = location.partition(":")
    if not Path(path).is_file():
        raise UserError(f"config file '{path}' does not exist; give FILE.py:NAME, see configs/")
    spec = importlib.util.spec_from_file_location("cnx2_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file '{path}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"config file '{path}' is not valid Python: {error}") from None
    if not hasattr(module, "get_config"):
        raise UserError(f"config file '{path}' has no function get_config")
    config = module.get_config(argument) if argument else module.get_config()
    return override(config, overrides)


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Applies `--config.KEY=VALUE` arguments in place, type-checked by the key's value; locks the config.

    Raises:
      UserError: an unknown key, with the nearest known one, or a value of another type.
    """
    known = _flatten(config.to_dict())
    # absl would append the values of a tuple that is given twice; here the last one counts.
    last = {argument.partition("=")[0]: argument for argument in overrides}
    overrides = list(last.values())
    for argument in overrides:
        key, equals, _ = argument.removeprefix("--config.").partition("=")
        if key == "task":
            raise UserError("config key 'task' is fixed by the config file; choose another --config")
        if key not in known:
            raise UserError(f"unknown config key '{key}'{nearest(key, known)}")
        if not equals:
            raise UserError(f"config key '{key}' needs a value: --config.{key}=VALUE")
    # absl keeps flags in a registry; a private one, so that commands can run one after another.
    values = flags.FlagValues()
    argv = ["cnx2", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            values(argv)
    except flags.Error as error:
        text = str(error).replace("flag --config.", "config key ").splitlines()[0]
        raise UserError(text) from None
    for key, value in _flatten(config.to_dict()).items():
        if isinstance(value, tuple):  # which absl fills with anything
            # Tuples that are empty by default, such as dims, are of whole numbers.
            kinds = (int,) if all(isinstance(item, int) for item in known[key]) else (int, float)
            if not all(type(item) in kinds for item in value):
                kind = "whole numbers" if kinds == (int,) else "numbers"
                raise UserError(f"config key {key}={value} must be {kind}, such as {key}=(1,2)")
    check_ranges(config)
    config.lock()
    return config


def check_ranges(config: ConfigDict) -> None:
    """Raises UserError if a number is out of its range, or no number at all (NaN)."""
    flat = _flatten(config.to_dict())
    for key, (least, greatest) in RANGES.items():
        if key in flat and not least <= flat[key] <= greatest:
            most = "" if greatest == INFINITY else f" and at most {greatest}"
            raise UserError(f"{key} {flat[key]} must be at least {least}{most}")
    if not config.total_steps and not config.total_epochs:
        raise UserError("total_steps and total_epochs are both 0: there is nothing to do; set one of them")


def image_hw(config: ConfigDict) -> tuple[int, int]:
    """Returns (height, width) of `config.image_size`.

    Raises:
      UserError: it is not one or two positive numbers.
    """
    size = tuple(config.image_size)
    if len(size) not in (1, 2) or min(size) < 1:
        raise UserError(f"image_size {size} must be one or two positive numbers: height, width")
    return size[0], size[-1]


def total_steps(config: ConfigDict, num_train: int) -> int:
    """Returns the length of the run in updates."""
    return config.total_steps or in_steps(config.total_epochs, config, num_train)


def in_steps(epochs: float, config: ConfigDict, num_train: int) -> int:
    """Converts epochs over `num_train` images to updates; 0 stays 0, and anything more is at least 1."""
    return max(1, round(epochs * num_train / config.batch_size)) if epochs else 0


def passes(epochs: float, step: int, config: ConfigDict, num_train: int) -> bool:
    """Says whether update number `step` completes another `epochs` epochs; never, if that is 0."""
    if not epochs or not step:
        return False
    # Divided last: 49 * (1 / 49) is less than 1.
    done, before = ((n * config.batch_size) // (epochs * num_train) for n in (step, step - 1))
    return done > before


def make_workdir(config: ConfigDict, workdir: Path) -> None:
    """Makes the workdir, or checks that the `config.json` of the one there is of the same run.

    Raises:
      UserError: the workdir cannot be made, or belongs to a run with another config.
    """
    if (workdir / "config.json").exists():
        old, new = _flatten(read_config(workdir).to_dict()), _flatten(config.to_dict())
        changed = [
            f"{key} = {_shown(old, key)} there, {_shown(new, key)} here"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not key.startswith(FREE_KEYS)
        ]
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"workdir '{workdir}' holds another run ({'; '.join(changed[:3])}{more}); "
                "use another workdir, or the same config to go on"
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise _cannot_write(workdir, error) from None


def record_config(config: ConfigDict, workdir: Path) -> None:
    """Writes `config.json` into the workdir.

    Raises:
      UserError: see `make_workdir`.
    """
    make_workdir(config, workdir)
    path = workdir / "config.json"
    try:
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        os.replace(partial, path)  # whole or not at all, whenever the process dies
    except OSError as error:
        raise _cannot_write(workdir, error) from None


def _cannot_write(workdir: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to workdir '{workdir}': {error.strerror}; choose another --workdir")


def read_config(workdir: Path) -> ConfigDict:
    """Reads the config of the run in a workdir.

    Raises:
      UserError: there is none, or it is not readable as one.
    """
    path = workdir / "config.json"
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict) or "task" not in values:
            raise ValueError("it is no config of a run")
        return from_json(values)
    except OSError:
        raise UserError(f"'{workdir}' is not a workdir: it has no config.json") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"'{path}' is damaged: {error}") from None


def from_json(values: Mapping) -> ConfigDict:
    """Returns the config whose JSON this is; lists become tuples again.

    Keys that it lacks, being older than they are, get their defaults.

    Raises:
      ValueError, TypeError, KeyError: it is no config of a run.
    """

    def tuples(value):
        if isinstance(value, Mapping):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(value) if isinstance(value, list) else value

    config = defaults(values["task"])
    for key, default in config.items():
        if isinstance(default, ConfigDict) and not isinstance(values.get(key, {}), Mapping):
            raise ValueError(f"'{key}' is {values[key]!r}, not a group of keys")
    config.update(tuples(values))
    return config


def _shown(values: Mapping, key: str) -> str:
    return str(values.get(key, "unset")) or "''"


def _flatten(values: Mapping, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
