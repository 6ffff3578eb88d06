"""Configs: every key with its default and range, loading, and overrides."""

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from cnx2_jax.bands import take_statistics
from cnx2_jax.errors import UserError, nearest

# The recipes that come with the package. In a checkout, this is a link to the folder at the top.
RECIPES = Path(__file__).parent / "configs"

# Least and greatest values of the numbers that no other module checks.
INFINITY = float("inf")
RANGES = {
    "seed": (-(2**31), 2**31 - 1),
    "batch_size": (1, 2**31 - 1),
    "accumulation_steps": (1, 2**31 - 1),
    "total_epochs": (0, 1e9),
    "total_steps": (0, 2**31 - 2),
    "log_steps": (1, INFINITY),
    "eval_epochs": (0, INFINITY),
    "early_stopping_patience": (0, INFINITY),
    "checkpoint_steps": (1, INFINITY),
    "keep_checkpoints": (1, INFINITY),
    "max_nonfinite": (1, 2**31 - 1),
    "hang_seconds": (0, 1e6),
    "model.in_chans": (1, INFINITY),
    "model.patch_size": (1, 4),
    "data.val_fraction": (0, 0.999),
    "data.random_erasing": (0, 1),
    "data.time_masks": (0, 100),
    "data.time_mask_width": (0, INFINITY),
    "data.frequency_masks": (0, 100),
    "data.frequency_mask_width": (0, INFINITY),
    "data.max_unreadable": (0, 0.5),
    "data.eval_crop": (0.1, 1),
    "optimizer.min_learning_rate": (0, INFINITY),
    "optimizer.warmup_epochs": (0, 1e9),
    "optimizer.warmup_steps": (0, 2**31 - 2),
    "optimizer.weight_decay": (0, 1e9),
    "optimizer.b1": (0, 0.999999),
    "optimizer.b2": (0, 0.9999999),
    "optimizer.clip_norm": (0, 1e9),
    "optimizer.layer_decay": (0, 1),
    "ema_decay": (0, 0.999999999),
}


AddKeys = Callable[[ConfigDict], None]
TASK_KEYS: dict[str, AddKeys] = {}


def register_task(name: str, add_keys: AddKeys, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Makes a task's name and its own keys known to configs.

    Args:
      name: what `config.task` holds.
      add_keys: adds the task's keys with their defaults to a config that has the common ones.
      ranges: least and greatest value of these keys.
    """
    TASK_KEYS[name] = add_keys
    RANGES.update(ranges)


def defaults(task: str) -> ConfigDict:
    """Returns a config with every key that a run of this task reads; recipes change what they need to.

    Raises:
      UserError: no task of that name is registered.
    """
    check_task(task)
    config = ConfigDict()
    config.task = task  # the job, such as pretrain; fixed by the config file
    config.seed = 0  # of weights, order, augmentation, masks and dropout; the same seed repeats a run
    config.batch_size = 256  # images per update, over all devices, hosts and accumulation steps
    config.accumulation_steps = 1  # parts that a batch is computed in, one after another, to save memory
    config.image_size = (224, 224)  # height, width; one number makes a square
    config.total_epochs = 100.0  # passes over the training images
    config.total_steps = 0  # replaces total_epochs unless 0
    config.log_steps = 50  # updates from one line of metrics to the next
    config.profile_steps = ""  # FIRST:LAST writes a trace of these updates to the workdir's profile/
    config.eval_epochs = 10.0  # from one evaluation to the next; 0: only at the end
    config.early_stopping_patience = 0  # end after this many evaluations without a better one; 0: never
    config.checkpoint_steps = 1000  # updates from one checkpoint to the next
    config.keep_checkpoints = 2  # the latest ones; the best one is kept as well
    config.on_nonfinite = "stop"  # or skip: leave out non-finite updates and count them in the metrics
    config.max_nonfinite = 10  # the run stops after this many skipped updates in a row
    config.hang_seconds = 1800.0  # without a step: then the run prints its stacks and exits; 0: never
    config.ema_decay = 0.0  # of the exponential moving average of the parameters; 0: no average

    model = config.model = ConfigDict()
    model.variant = "tiny"  # or "custom", with depths and dims
    model.depths = ()  # blocks in each of the four stages, for custom
    model.dims = ()  # channels of each of the four stages, for custom
    model.in_chans = 3  # channels, or bands, of the images
    model.patch_size = 4  # of the stem; the total stride is 8 times as large
    model.drop_path = 0.0  # the last block's probability of stochastic depth; rises linearly from 0
    model.dtype = "float32"  # of the computation; parameters are always float32
    model.remat = "none"  # what the backward pass recomputes to save memory: none, dots or block
    model.scan = "auto"  # compile one block per stage and loop over the parameters: on, off or auto

    data = config.data = ConfigDict()
    data.source = "folder"  # or arrays, tfds:NAME[/CONFIG]:SPLIT, synthetic[:RECORDS[:CLASSES]], digits
    data.root = ""  # the folder of images, folder or file of arrays, or TFDS's data_dir if not the default
    data.val_source = ""  # another source for the validation images
    data.val_root = ""  # the same as root for val_source
    data.val_fraction = 0.1  # held out if the source has no validation images
    data.train_per_class = 0  # train on only this many images of each class; 0: on all
    data.crop_scale = (0.08, 1.0)  # the share of the image's area that a random crop covers
    data.crop_ratio = (3 / 4, 4 / 3)  # the crop's least and greatest width over height
    data.flip = True  # mirror half of the training images left to right; false for spectrograms and digits
    data.vflip = False  # mirror half of them top to bottom
    data.quarter_turns = False  # turn them by 0, 90, 180 or 270 degrees; image_size must be a square
    data.augment = ""  # rand-m9-mstd0.5-inc1: RandAugment; jitter-0.4: colour jitter; distort
    data.random_erasing = 0.0  # the probability that a box of the image becomes noise
    data.time_masks = 0  # SpecAugment: bars of columns that become the mean; 0: none
    data.time_mask_width = 0  # the most columns that one covers, of image_size
    data.frequency_masks = 0  # SpecAugment: bars of rows that become the mean; 0: none
    data.frequency_mask_width = 0  # the most rows that one covers, of image_size
    data.unreadable = "error"  # or skip: use another image instead and count it in the metrics
    data.max_unreadable = 0.01  # the run stops if a larger share of all images is skipped
    data.eval_crop = 0.875  # the side of the centre crop, over the shorter side of the resized image
    data.mean = (0.485, 0.456, 0.406)  # of ImageNet, for pixels from 0 to 1; raw values unless uint8
    data.std = (0.229, 0.224, 0.225)  # the standard deviations that go with mean
    data.statistics = ""  # a file of `cnx2 data --statistics`: sets bands, dtype, mean and std
    data.dtype = "uint8"  # of batches of images; others for arrays
    data.layout = "channels_last"  # of .npy, .npz and zarr; or channels_first, also of TIFFs of several pages
    data.array = ""  # the name of the array in .npz files of several
    data.bands = ""  # names of all bands of the arrays, with commas; empty: those of statistics, or 1,2,...
    data.use_bands = ""  # names of those that the network gets, in its order; empty: all
    data.show_bands = ""  # the three that pictures show as red, green and blue; empty: a false-colour rule
    data.no_data = ""  # the number that stands for a missing value in arrays

    optimizer = config.optimizer = ConfigDict()
    optimizer.base_learning_rate = 1.5e-4  # for a batch of 256; scales with batch_size
    optimizer.min_learning_rate = 0.0  # at the end of cosine and poly; does not scale with batch_size
    optimizer.schedule = "cosine"  # or poly: linear in the step; or step: a tenth after 3/4 and 11/12 of it
    optimizer.warmup_epochs = 0.0  # in which the learning rate rises linearly
    optimizer.warmup_steps = 0  # replaces warmup_epochs unless 0
    optimizer.weight_decay = 0.05  # of kernels; see decay_grn
    optimizer.decay_grn = False  # also decay GRN and the mask token, as the official pretraining code does
    optimizer.b1 = 0.9  # AdamW's decay of the mean of gradients
    optimizer.b2 = 0.999  # AdamW's decay of the mean of squared gradients
    optimizer.clip_norm = 0.0  # the greatest norm of a gradient, over all parameters; 0: no clipping
    optimizer.layer_decay = 1.0  # multiplies the learning rate once per layer below the head
    optimizer.layer_decay_type = "single"  # what a layer is: single, group, layer_wise or stage
    optimizer.trainable = ""  # a regular expression: train only parameters whose names contain a match

    mesh = config.mesh = ConfigDict()
    mesh.data = -1  # groups of devices that each hold a copy of the parameters; -1: all that fsdp leaves
    mesh.fsdp = 1  # devices over which each copy of the parameters is divided

    TASK_KEYS[task](config)
    return config


def check_task(task: str) -> None:
    """Makes sure that a task is registered; one named `MODULE:CLASS` registers when its module is imported.

    Raises:
      UserError: there is no such task.
    """
    module, colon, _ = task.partition(":")
    if colon and task not in TASK_KEYS:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"task '{task}' cannot be imported: {error}; install its package or set PYTHONPATH"
            ) from None
    if task not in TASK_KEYS:
        raise UserError(f"unknown task '{task}'{nearest(task, TASK_KEYS)} (known: {', '.join(TASK_KEYS)})")


def load_config(location: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads a config, applies `--config.KEY=VALUE` overrides and locks the result.

    Args:
      location: see `load_module`; the argument after the colon is the recipe's name and options.
      overrides: see `override`.

    Raises:
      UserError: see `load_module`, `override` and `take_statistics`, or the module rejects the argument.
    """
    module, argument = load_module(location)
    config = override(module.get_config(argument) if argument else module.get_config(), overrides)
    # Not when a run's own config is read again: it has the values, and the file may be gone.
    take_statistics(config.data)
    return config


def load_module(location: str) -> tuple[ModuleType, str]:
    """Loads the module of a config.

    Args:
      location: `NAME[:ARGUMENT]` for a config that comes with the package, such as `pretrain:tiny`, or
        `FILE.py[:ARGUMENT]` for any other.

    Returns:
      The module and the argument, which is empty if there is none.

    Raises:
      UserError: there is no such config, it is not valid Python, or it has no `get_config`.
    """
    name, _, argument = location.partition(":")
    path = _config_file(name)
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
    return module, argument


def _config_file(name: str) -> Path:
    if {".", "/"} & set(name):
        if not Path(name).is_file():
            raise UserError(
                f"config file '{name}' does not exist; give a FILE.py, or a NAME such as pretrain"
            )
        return Path(name)
    known = {path.stem: path for path in sorted(RECIPES.glob("*.py"))}
    if name not in known:
        names = ", ".join(known)
        raise UserError(f"unknown config '{name}'{nearest(name, known)} (known: {names}; or give a FILE.py)")
    return known[name]


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Applies `--config.KEY=VALUE` arguments in place, type-checked by the key's value; locks the config.

    Raises:
      UserError: an unknown key, with the nearest known one, or a value of another type.
    """
    known = flatten(config)
    # absl would append the values of a tuple that is given twice; here the last one wins.
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
    # absl keeps flags in a global registry; a private one lets a process run several commands.
    values = flags.FlagValues()
    argv = ["cnx2", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            values(argv)
    except flags.Error as error:
        text = str(error).replace("flag --config.", "config key ").splitlines()[0]
        raise UserError(text) from None
    for key, value in flatten(config).items():
        if isinstance(value, tuple):  # absl accepts any items in it
            if known[key] and all(isinstance(item, str) for item in known[key]):
                if not all(isinstance(item, str) for item in value):
                    raise UserError(f'config key {key}={value} must be names, such as {key}=\'("a","b")\'')
                continue
            # Tuples that are empty by default, such as dims, hold whole numbers.
            kinds = (int,) if all(isinstance(item, int) for item in known[key]) else (int, float)
            if not all(type(item) in kinds for item in value):
                kind = "whole numbers" if kinds == (int,) else "numbers"
                raise UserError(f"config key {key}={value} must be {kind}, such as {key}=(1,2)")
    check_ranges(config)
    config.lock()
    return config


def check_ranges(config: ConfigDict) -> None:
    """Raises UserError if a number is out of its range or NaN."""
    flat = flatten(config)
    for key, (least, greatest) in RANGES.items():
        if key in flat and not least <= flat[key] <= greatest:
            most = "" if greatest == INFINITY else f" and at most {greatest}"
            raise UserError(f"{key} {flat[key]} must be at least {least}{most}")
    if not config.total_steps and not config.total_epochs:
        raise UserError("total_steps and total_epochs are both 0, so there is nothing to do; set one of them")
    if config.early_stopping_patience and not config.eval_epochs:
        raise UserError(
            f"early_stopping_patience {config.early_stopping_patience} counts evaluations, and eval_epochs "
            "is 0; set eval_epochs too, or early_stopping_patience=0"
        )


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


def warmup_steps(config: ConfigDict, num_train: int) -> int:
    """Returns the length of the warm-up in updates."""
    return config.optimizer.warmup_steps or in_steps(config.optimizer.warmup_epochs, config, num_train)


def in_steps(epochs: float, config: ConfigDict, num_train: int) -> int:
    """Converts epochs over `num_train` images to updates: 0 for 0 epochs, otherwise at least 1."""
    return max(1, round(epochs * num_train / config.batch_size)) if epochs else 0


def passes(epochs: float, step: int, config: ConfigDict, num_train: int) -> bool:
    """Returns whether update number `step` completes another `epochs` epochs; False if that is 0."""
    if not epochs or not step:
        return False
    # One division, of whole products: 49 * (1 / 49) is less than 1 in floating point.
    done, before = ((n * config.batch_size) // (epochs * num_train) for n in (step, step - 1))
    return done > before


def from_json(values: Mapping) -> ConfigDict:
    """Returns the config that was written as this JSON; lists become tuples again.

    Keys that are newer than the JSON get their defaults.

    Raises:
      ValueError, TypeError, KeyError: it is not the config of a run.
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


def flatten(values: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of a config or nested dict by dotted path, such as `model.depths`."""
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
