"""Configs: overrides, recipe arguments, the named recipes against the paper, the record in a workdir."""

import json
import re
import resource
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from cnx2_jax import configuration
from cnx2_jax.bands import take_statistics
from cnx2_jax.configuration import flatten, load_config, load_module, override
from cnx2_jax.errors import UserError
from cnx2_jax.models.state import split
from cnx2_jax.tasks import defaults, make_task
from cnx2_jax.tasks.base import Described
from cnx2_jax.train.loop import fit
from cnx2_jax.train.terms import mean_of
from cnx2_jax.workdir import FREE_KEYS, make_workdir, read_config, record_config

CONFIGS = Path(__file__).parents[1] / "configs"
VARIANTS = ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "huge")
LARGER = ("nano", "tiny", "base", "large", "huge")
RECIPES = [
    f"{file}.py:{name}"
    for file, names in {
        "pretrain": (*VARIANTS, "digits", "scenes"),
        "finetune": (*VARIANTS, "digits"),
        "finetune_22k": LARGER,
        "finetune_22k_1k": LARGER,
        "linear_probe": (*VARIANTS, "digits"),
        "scratch": VARIANTS,
        "detect": (*VARIANTS, "digits"),
        "multilabel": (*VARIANTS, "digits"),
        "regress": (*VARIANTS, "digits"),
        "small": (*VARIANTS, "digits"),
        "segment": (*VARIANTS, "base_22k", "large_22k", "huge_22k", "digits"),
    }.items()
    for name in (*names, "smoke")
]


def changed(task="pretrain", *arguments):
    """The defaults with overrides."""
    return override(defaults(task), [f"--config.{argument}" for argument in arguments])


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("batch_size=64", 64),
        ("seed=-1", -1),
        ("total_epochs=3", 3.0),
        ("optimizer.base_learning_rate=1e-3", 1e-3),
        ("data.flip=false", False),
        ("data.flip=1", True),
        ("image_size=(160,224)", (160, 224)),
        ("image_size=64,96", (64, 96)),
        ("image_size=64", (64,)),
        ("model.dims=(8, 16, 24, 32)", (8, 16, 24, 32)),
        ("data.mean=(0, 0.5, 1)", (0, 0.5, 1)),
        ("data.root=/some/where=odd", "/some/where=odd"),
        ("data.root=123", "123"),
        ("data.root=", ""),
    ],
)
def test_override_has_the_type_of_its_key(argument, value):
    key = argument.partition("=")[0]
    found = flatten(changed("pretrain", argument))[key]
    assert found == value
    assert type(found) is type(value)


def test_override_leaves_everything_else():
    before, after = flatten(defaults("pretrain")), flatten(changed("pretrain", "model.mask_ratio=0.75"))
    assert {key for key in before if before[key] != after[key]} == {"model.mask_ratio"}
    assert before.keys() == after.keys()


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("batchsize=3", ["batchsize", "did you mean 'batch_size'"]),
        ("model.mask_ration=0.5", ["model.mask_ration", "did you mean 'model.mask_ratio'"]),
        ("optimizer=3", ["unknown config key 'optimizer'"]),
        ("zzz", ["unknown config key 'zzz'"]),
        ("batch_size", ["'batch_size' needs a value", "--config.batch_size=VALUE"]),
        ("batch_size=many", ["batch_size=many"]),
        ("batch_size=1.5", ["batch_size=1.5"]),
        ("batch_size=", ["batch_size="]),
        ("total_epochs=long", ["total_epochs=long"]),
        ("data.flip=maybe", ["data.flip=maybe"]),
        ("image_size=nine", ["image_size", "nine", "whole numbers"]),
        ("image_size=16.5", ["image_size", "16.5", "whole numbers"]),
        ("model.dims=(8,8,8,x)", ["model.dims", "whole numbers"]),
        ("data.mean=(a,b,c)", ["data.mean", "numbers"]),
    ],
)
def test_wrong_override_is_one_line_that_names_it(argument, parts):
    with pytest.raises(UserError) as raised:
        changed("pretrain", argument)
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_task_knows_its_own_keys_only():
    with pytest.raises(UserError, match="mask_ratio"):
        changed("classify", "model.mask_ratio=0.5")
    with pytest.raises(UserError, match="label_smoothing"):
        changed("pretrain", "label_smoothing=0.1")


def test_locked_after_overriding():
    config = changed("pretrain", "model.variant=atto")
    with pytest.raises(AttributeError):
        config.new = 1
    with pytest.raises(AttributeError):
        config.model.new = 1
    config.batch_size = 8  # a known key may still be set
    assert config.batch_size == 8


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("tinny", ["'tinny'", "did you mean 'tiny'", "atto"]),
        ("tiny,epoch=3", ["'epoch=3'", "did you mean 'epochs'"]),
        ("tiny,epochs=many", ["'epochs=many'", "float"]),
        ("tiny,epochs", ["'epochs'", "float"]),
        ("digits,labels=1.5", ["'labels=1.5'", "int"]),
        ("tiny,", ["unknown config argument ''"]),
    ],
)
def test_wrong_recipe_argument(argument, parts):
    with pytest.raises(UserError) as raised:
        load_config(f"{CONFIGS}/finetune.py:{argument}")
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_recipe_arguments_are_read_as_their_types():
    config = load_config(f"{CONFIGS}/finetune.py:digits,epochs=3,labels=10")
    assert (config.total_epochs, config.data.train_per_class) == (3.0, 10)
    assert load_config(f"{CONFIGS}/pretrain.py:base,epochs=1600").total_epochs == 1600.0


def test_recipe_without_a_name_is_the_default():
    assert load_config(f"{CONFIGS}/pretrain.py").model.variant == "tiny"


def test_config_file_missing_or_without_get_config(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.py' does not exist"):
        load_config(f"{tmp_path}/nowhere.py:tiny")
    with pytest.raises(UserError, match="does not exist"):
        load_config(str(tmp_path))  # a folder
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="has no function get_config"):
        load_config(f"{tmp_path}/empty.py:tiny")
    (tmp_path / "config.txt").write_text("")
    with pytest.raises(UserError, match="is not a Python file"):
        load_config(f"{tmp_path}/config.txt")


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS.glob("*.py")])
def test_recipes_of_the_package_have_names(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    module, argument = load_module(f"{name}:smoke,epochs=3")
    assert (module.__doc__, argument) == (load_module(f"{CONFIGS}/{name}.py")[0].__doc__, "smoke,epochs=3")
    assert load_module(name)[1] == ""
    assert flatten(load_config(f"{name}:smoke")) == flatten(load_config(f"{CONFIGS}/{name}.py:smoke"))


@pytest.mark.parametrize(
    ("name", "nearest"), [("pretrian", "; did you mean 'pretrain'?"), ("other", ""), ("", "")]
)
def test_unknown_name_names_the_nearest_and_the_known(name, nearest, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").write_text("")  # a config file's name ends in .py
    with pytest.raises(UserError) as raised:
        load_config(f"{name}:tiny")
    known = (
        "detect, finetune, finetune_22k, finetune_22k_1k, linear_probe, multilabel, pretrain, regress, "
        "scratch, segment, small"
    )
    assert str(raised.value) == f"unknown config '{name}'{nearest} (known: {known}; or give a FILE.py)"


def test_a_file_beside_a_recipe_of_the_same_name_needs_its_ending(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch.py").write_text(
        "from cnx2_jax.configuration import defaults\n\ndef get_config():\n  return defaults('probe')\n"
    )
    assert load_config("scratch.py").task == "probe"
    assert load_config("scratch").task == "classify"


def test_config_files_of_ones_own_load(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from cnx2_jax.configuration import defaults\n"
        "def get_config():\n  config = defaults('classify')\n  config.seed = 7\n  return config\n"
    )
    assert load_config(f"{tmp_path}/mine.py", ["--config.batch_size=2"]).seed == 7


@pytest.mark.parametrize(("size", "expected"), [((32, 48), (32, 48)), ((32,), (32, 32)), ([16, 8], (16, 8))])
def test_image_hw(size, expected):
    assert configuration.image_hw(ConfigDict({"image_size": size})) == expected


@pytest.mark.parametrize("size", [(), (1, 2, 3), (0,), (32, -32)])
def test_image_hw_of_no_size(size):
    with pytest.raises(UserError, match="image_size"):
        configuration.image_hw(ConfigDict({"image_size": size}))


def test_epochs_become_steps():
    config = ConfigDict({"batch_size": 64, "total_steps": 0, "total_epochs": 2.5})
    assert configuration.in_steps(1, config, 640) == 10
    assert configuration.in_steps(1, config, 670) == 10  # rounded
    assert configuration.in_steps(1, config, 680) == 11
    assert configuration.in_steps(0, config, 640) == 0
    assert configuration.in_steps(0.001, config, 640) == 1
    assert configuration.total_steps(config, 640) == 25
    config.total_steps = 7
    assert configuration.total_steps(config, 640) == 7


def test_passes_at_the_update_that_completes_the_epochs():
    config = ConfigDict({"batch_size": 3})
    # Seven images: epochs end within updates 3, 5, 7 (at image 7, 14, 21), 10 (28), ...
    assert [s for s in range(12) if configuration.passes(1, s, config, 7)] == [3, 5, 7, 10]
    assert [s for s in range(12) if configuration.passes(2, s, config, 7)] == [5, 10]
    assert not any(configuration.passes(0, s, config, 7) for s in range(12))
    config.batch_size = 1  # 49 * (1 / 49) is less than 1 in floating point
    assert [s for s in range(120) if configuration.passes(1, s, config, 49)] == [49, 98]
    config.batch_size = 32  # more than an epoch in each update, but none before the first
    assert [s for s in range(3) if configuration.passes(1, s, config, 7)] == [1, 2]


@pytest.mark.parametrize(
    "argument",
    [
        "total_steps=-1",
        "total_epochs=-1",
        "log_steps=0",
        "checkpoint_steps=0",
        "keep_checkpoints=0",
        "eval_epochs=-1",
    ],
)
def test_lengths_out_of_range(argument):
    key, _, value = argument.partition("=")
    with pytest.raises(UserError, match=f"{key} {value}"):
        configuration.check_ranges(changed("pretrain", argument))
    configuration.check_ranges(changed("pretrain"))


# The record in a workdir.


def test_workdir_is_recorded_and_recognised(tmp_path):
    workdir = tmp_path / "runs" / "a"
    config = changed("classify", "image_size=(32,48)", "data.root=x")
    record_config(config, workdir)
    text = (workdir / "config.json").read_text()
    assert flatten(json.loads(text))["data.root"] == "x"
    record_config(changed("classify", "image_size=(32,48)", "data.root=x"), workdir)
    assert (workdir / "config.json").read_text() == text
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_workdir_of_another_run_is_refused_and_kept(tmp_path):
    record_config(changed("pretrain"), tmp_path)
    text = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError) as raised:
        record_config(changed("pretrain", "model.mask_ratio=0.75", "seed=3"), tmp_path)
    message = str(raised.value)
    assert "\n" not in message
    assert "model.mask_ratio = 0.6 there, 0.75 here" in message
    assert "seed = 0 there, 3 here" in message
    with pytest.raises(UserError, match=r"class_weights = unset there, none here.* and .* more"):
        record_config(changed("classify"), tmp_path)
    assert (tmp_path / "config.json").read_text() == text


def test_free_keys_may_change_and_are_recorded(tmp_path):
    record_config(changed("pretrain"), tmp_path)
    new = {
        "mesh.data": 2,
        "mesh.fsdp": 4,
        "model.layout": "masked",
        "model.remat": "block",
        "model.scan": "off",
        "log_steps": 1,
        "profile_steps": "2:3",
        "eval_epochs": 2.0,
        "early_stopping_patience": 4,
        "checkpoint_steps": 3,
        "keep_checkpoints": 5,
        "on_nonfinite": "skip",
        "max_nonfinite": 3,
        "hang_seconds": 5.0,
    }
    # All keys that are free, and no others, are in this test.
    assert set(new) == {key for key in flatten(defaults("pretrain")) if key.startswith(FREE_KEYS)}
    record_config(changed("pretrain", *[f"{k}={v}" for k, v in new.items()]), tmp_path)
    recorded = flatten(json.loads((tmp_path / "config.json").read_text()))
    assert {key: recorded[key] for key in new} == new


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot write to workdir"):
            record_config(changed("pretrain"), workdir)
        with pytest.raises(UserError, match="cannot write to workdir"):
            make_workdir(changed("pretrain"), workdir)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_config_that_cannot_be_written_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write to workdir .*: File too large"):
            record_config(changed("pretrain"), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "run").iterdir()) == []


def test_make_workdir_records_nothing(tmp_path):
    make_workdir(changed("pretrain"), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("text", ['{"task": "pretr', "[1, 2]", "{}", ""])
def test_damaged_config_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json' is damaged"):
        read_config(tmp_path)
    with pytest.raises(UserError, match=r"config\.json' is damaged"):
        record_config(changed("pretrain"), tmp_path)
    assert (tmp_path / "config.json").read_text() == text


def test_no_workdir(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"is not a workdir: it has no config\.json"):
            read_config(path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads_and_survives_json(recipe, tmp_path):
    config = load_config(f"{CONFIGS}/{recipe}")
    name = recipe.split(":")[1]
    custom = {"digits": "custom", "scenes": "custom", "smoke": "atto"}
    assert config.model.variant == custom.get(name, name.removesuffix("_22k"))
    record_config(config, tmp_path)
    again = read_config(tmp_path)
    assert flatten(again) == flatten(config)
    assert {k: type(v) for k, v in flatten(again).items()} == {k: type(v) for k, v in flatten(config).items()}


def test_the_test_knows_every_recipe():
    for file in CONFIGS.glob("*.py"):
        with pytest.raises(UserError) as raised:
            load_config(f"{file}:?")
        known = re.search(r"\(known: (.*)\)", str(raised.value)).group(1).split(", ")
        assert {f"{file.name}:{name}" for name in known} <= set(RECIPES)


# Recipes, copied once more from the paper and TRAINING.md (shared/reference/recipes.md).


def published(table, column):
    """A column of a table as printed, by the rows' names."""
    rows = [line for line in table.splitlines() if line.strip()][1:]
    return {line[:18].strip(): float(line[18:].split()[column]) for line in rows}


IMAGENET = {"data.mean": (0.485, 0.456, 0.406), "data.std": (0.229, 0.224, 0.225), "data.flip": True}
AUGMENTED = {**IMAGENET, "data.augment": "rand-m9-mstd0.5-inc1", "data.random_erasing": 0.25}


@pytest.mark.parametrize("name", VARIANTS)
def test_pretraining_is_as_published(name):
    values = flatten(load_config(f"{CONFIGS}/pretrain.py:{name}"))
    expected = {
        "task": "pretrain",
        "optimizer.base_learning_rate": 1.5e-4,
        "optimizer.min_learning_rate": 0.0,
        "optimizer.weight_decay": 0.05,
        "optimizer.b1": 0.9,
        "optimizer.b2": 0.95,
        "optimizer.warmup_epochs": 40.0,
        "batch_size": 4096,
        "total_epochs": 800.0,
        "total_steps": 0,
        "image_size": (224, 224),
        "model.variant": name,
        "model.mask_ratio": 0.6,
        "model.decoder_dim": 512,
        "model.decoder_depth": 1,
        "model.in_chans": 3,
        "data.crop_scale": (0.2, 1.0),
        **IMAGENET,
    }
    assert {key: values[key] for key in expected} == expected
    # Patches of 32 x 32 pixels.
    assert (values["model.mask_patch"] or 8 * values["model.patch_size"]) == 32


@pytest.mark.parametrize("name", VARIANTS)
def test_small_recipes_of_as_many_images_as_imagenet_are_as_published(name):
    published = flatten(load_config(f"{CONFIGS}/finetune.py:{name}"))
    values = flatten(load_config(f"{CONFIGS}/small.py:{name},images=1281167"))
    free = {"eval_epochs", "early_stopping_patience", "ema_decay"}
    assert {key for key in values if values[key] != published[key]} <= free
    assert values["ema_decay"] == pytest.approx(0.9999, abs=1e-6)
    values = flatten(load_config(f"{CONFIGS}/pretrain.py:{name},images=1281167"))
    assert values == flatten(load_config(f"{CONFIGS}/pretrain.py:{name}"))


@pytest.mark.parametrize("start", ["pretrain", "converted", "scratch"])
def test_small_recipes_change_steadily_with_the_number_of_images(start):
    numbers = (100, 1000, 3000, 10_000, 50_000, 1_281_167)
    found = [flatten(load_config(f"{CONFIGS}/small.py:tiny,images={n},from={start}")) for n in numbers]
    peaks = [each["optimizer.base_learning_rate"] * each["batch_size"] for each in found]
    shown = [each["total_epochs"] * number for each, number in zip(found, numbers, strict=True)]
    for rising in (
        peaks,
        shown,
        *([each[key] for each in found] for key in ("batch_size", "mixup", "cutmix")),
    ):
        assert rising == sorted(rising)
    for falling in ("model.drop_path", "optimizer.weight_decay"):
        values = [each[falling] for each in found]
        assert values == sorted(values, reverse=falling == "model.drop_path" or start != "converted")
    few = found[0]
    assert (few["batch_size"], few["mixup"], few["early_stopping_patience"]) == (32, 0.0, 10)
    assert few["optimizer.layer_decay"] == {"pretrain": 0.9, "converted": 0.8, "scratch": 1.0}[start]
    assert few["total_epochs"] == {"pretrain": 1000, "converted": 300, "scratch": 1000}[start]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("tiny,images=-5", "config argument 'images=-5': -5 must be above 0"),
        ("tiny,from=scrach", "unknown start 'from=scrach'; did you mean 'scratch'"),
        ("tiny,images=1.5", "'images=1.5': '1.5' is not of type int"),
    ],
)
def test_wrong_argument_of_a_small_recipe(argument, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(f"{CONFIGS}/small.py:{argument}")


def test_small_digits_are_as_many_as_asked_for():
    config = load_config(f"{CONFIGS}/small.py:digits,images=100")
    assert (config.data.train_per_class, config.batch_size, config.total_epochs) == (10, 32, 1000.0)
    assert load_config(f"{CONFIGS}/small.py:digits").data.train_per_class == 0


@pytest.mark.parametrize(
    ("recipe", "images", "official_epoch"),
    [
        ("pretrain:tiny", 1_281_167, 1_281_167 // 4096),
        ("finetune:tiny", 1_281_167, 1_281_167 // 1024),
        ("finetune_22k_1k:base", 1_281_167, 1_281_167 // 512),
    ],
)
def test_cards_state_how_many_steps_a_run_has(recipe, images, official_epoch):
    """Ours, of every image, and the official code's, which drops the incomplete batch of each epoch."""
    file, _, name = recipe.partition(":")
    config = load_config(f"{CONFIGS}/{file}.py:{name}")
    card = (CONFIGS / f"{file}.py").read_text()
    steps = configuration.total_steps(config, images), int(config.total_epochs) * official_epoch
    assert steps[0] != steps[1]
    for number in steps:
        assert f"{number:,}" in card


FINETUNING = """
                  A     F     P     N     T     B        L        H
base lr           2e-4  2e-4  2e-4  2e-4  8e-4  6.25e-4  6.25e-4  1.25e-3
wd                .3    .05   .3    .3    .05   .05      .05      .05
warmup            0     0     0     0     40    20       20       10
epochs            600   600   600   600   300   100      100      50
label smoothing   .2    .2    .2    .2    .1    .1       .1       .1
drop path         .1    0     0     .1    .2    .1       .2       .3
layer decay       .9    .9    .9    .9    .9    .6       .6       .75
mixup             0     .3    .3    .5    .8    .8       .8       .8
cutmix            0     .3    .3    .5    1     1        1        1
"""


@pytest.mark.parametrize("column", range(8))
def test_finetuning_is_as_published(column):
    table = published(FINETUNING, column)
    name = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")[column]
    values = flatten(load_config(f"{CONFIGS}/finetune.py:{name}"))
    expected = {
        "task": "classify",
        "optimizer.base_learning_rate": table["base lr"],
        "optimizer.weight_decay": table["wd"],
        "optimizer.warmup_epochs": table["warmup"],
        "total_epochs": table["epochs"],
        "label_smoothing": table["label smoothing"],
        "model.drop_path": table["drop path"],
        "optimizer.layer_decay": table["layer decay"],
        "optimizer.layer_decay_type": "single" if column < 5 else "group",
        "mixup": table["mixup"],
        "cutmix": table["cutmix"],
        "ema_decay": 0.9999,
        "model.variant": name,
        "optimizer.b1": 0.9,
        "optimizer.b2": 0.999,
        "optimizer.min_learning_rate": 1e-6,
        "batch_size": 1024,
        "model.head_init_scale": 0.001,
        "total_steps": 0,
        "data.train_per_class": 0,
        "image_size": (224, 224),
        "model.patch_size": 4,
        **AUGMENTED,
    }
    assert {key: values[key] for key in expected} == expected


FINETUNING_22K = """
                  N     T     B     L     H
layer decay       .9    .9    .8    .8    .8
drop path         0     0     .1    .1    .3
"""


@pytest.mark.parametrize("column", range(5))
def test_intermediate_finetuning_is_as_published(column):
    table = published(FINETUNING_22K, column)
    values = flatten(load_config(f"{CONFIGS}/finetune_22k.py:{LARGER[column]}"))
    expected = {
        "optimizer.base_learning_rate": 2.5e-4,
        "optimizer.weight_decay": 0.05,
        "optimizer.warmup_epochs": 5.0,
        "optimizer.layer_decay": table["layer decay"],
        "model.drop_path": table["drop path"],
        "batch_size": 4096,
        "total_epochs": 90.0,
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
        "ema_decay": 0.0,
        "model.head_init_scale": 0.001,
        "model.variant": LARGER[column],
        **AUGMENTED,
    }
    assert {key: values[key] for key in expected} == expected


FINETUNING_22K_1K = """
                  N       T       B       L       H
layer decay       .9      .9      .8      .8      .85
epochs            90      90      30      30      30
drop path         .1      .1      .2      .3      .5
ema               .9999   .9999   .9999   .9999   0
"""


@pytest.mark.parametrize("column", range(5))
@pytest.mark.parametrize("size", [224, 384, 512])
def test_finetuning_after_22k_is_as_published(column, size):
    table = published(FINETUNING_22K_1K, column)
    values = flatten(load_config(f"{CONFIGS}/finetune_22k_1k.py:{LARGER[column]},image_size={size}"))
    expected = {
        "optimizer.base_learning_rate": 2.5e-5,
        "optimizer.weight_decay": 1e-8,
        "optimizer.warmup_epochs": 0.0,
        "optimizer.layer_decay": table["layer decay"],
        "total_epochs": table["epochs"],
        "model.drop_path": table["drop path"],
        "ema_decay": table["ema"],
        "batch_size": 512,
        "mixup": 0.0,
        "cutmix": 0.0,
        "label_smoothing": 0.1,
        "model.head_init_scale": 0.001,
        "image_size": (size, size),
        "model.variant": LARGER[column],
        **AUGMENTED,
    }
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "drop_path", "side"),
    [
        ("tiny", 0.4, 512),
        ("small", 0.3, 512),
        ("base", 0.4, 512),
        ("large", 0.4, 512),
        ("large_22k", 0.4, 640),
    ],
)
def test_segmentation_is_as_published(name, drop_path, side):
    """Values from ConvNeXt's configs `upernet_convnext_*_160k_ade20k.py`."""
    values = flatten(load_config(f"{CONFIGS}/segment.py:{name}"))
    expected = {
        "batch_size": 16,
        "total_steps": 160_000,
        "image_size": (side, side),
        "optimizer.base_learning_rate": 1e-4 * 256 / 16,
        "optimizer.schedule": "poly",
        "optimizer.warmup_steps": 1500,
        "optimizer.min_learning_rate": 0.0,
        "optimizer.weight_decay": 0.05,
        "optimizer.b1": 0.9,
        "optimizer.b2": 0.999,
        "optimizer.layer_decay": 0.9,
        "optimizer.layer_decay_type": "stage",
        "model.drop_path": drop_path,
        "model.channels": 512,
        "model.auxiliary_channels": 256,
        "model.pool_scales": (1, 2, 3, 6),
        "model.dropout": 0.1,
        "auxiliary_weight": 0.4,
        "data.source": "ade20k",
        "data.augment": "distort",
        "data.ratio_range": (0.5, 2.0),
        "data.class_share": 0.75,
        "data.resize_long": 4 * side,
        "data.resize_short": side,
        "data.eval_long": 4 * side,
        "data.eval_short": side,
        "data.ignore": 255,
    }
    assert {key: values[key] for key in expected} == expected
    window, stride = make_task(load_config(f"segment:{name}"), data=Described(class_names=("a", "b"))).window
    assert (window, stride) == ((side, side), ({512: 341, 640: 426}[side],) * 2)


@pytest.mark.parametrize("name", ["tiny", "base"])
def test_detection_is_as_published(name):
    """Values from mmdetection's `mask-rcnn_convnext-v2-b_fpn_lsj-3x-fcmae_coco.py`, for tiny ConvNeXt's."""
    values = flatten(load_config(f"{CONFIGS}/detect.py:{name}"))
    expected = {
        "batch_size": 32,
        "total_epochs": 36.0,
        "image_size": (1024, 1024),
        "optimizer.base_learning_rate": 1e-4 * 256 / 32,
        "optimizer.schedule": "step",
        "optimizer.warmup_steps": 1000,
        "optimizer.weight_decay": 0.05,
        "optimizer.b1": 0.9,
        "optimizer.b2": 0.999,
        "optimizer.clip_norm": 0.0,
        "optimizer.layer_decay": 0.95,
        "optimizer.layer_decay_type": "layer_wise",
        "ema_decay": 0.0,
        "model.drop_path": 0.4,
        "model.channels": 256,
        "model.fc_channels": 1024,
        "model.train_candidates": 2000,
        "model.train_proposals": 1000,
        "model.candidates": 1000,
        "model.proposals": 1000,
        "model.rpn_samples": 256,
        "model.roi_samples": 512,
        "model.detections": 100,
        "data.source": "coco",
        "data.augment": "",
        "data.ratio_range": (0.1, 2.0),
        "data.eval_long": 1333,
        "data.eval_short": 800,
        **IMAGENET,
    }
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_key_and_learning_rate_is_as_recorded(path):
    """What `python tests/make_recipe_golden.py` wrote: a change of a recipe shows there."""
    golden = runpy.run_path(str(Path(__file__).parent / "make_recipe_golden.py"))
    assert golden["dump"](path) == (golden["GOLDEN"] / f"{path.stem}.txt").read_text()


# Every key is read by something.


class Counter(nnx.Module):
    encoder_prefix = ""

    def __init__(self):
        def layer():
            return nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))

        self.downsample_layers = nnx.List([nnx.List([layer()])])
        self.stages = nnx.List([nnx.List([layer()])])
        self.head = layer()


class CheapTask:
    """A task over another one's data, with a model that compiles at once."""

    best = ("loss", "min")

    def __init__(self, task):
        self.config, self.data = task.config, task.data

    def init(self, rngs):
        return Counter()

    def start(self, arrays):
        return arrays

    def adopt(self, metadata):
        pass

    def begin(self, arrays):
        pass

    def prepare(self, batch, key):
        return batch

    def loss(self, model, batch, keys):
        return {"loss": mean_of((model.head.kernel[...].sum() - 1) ** 2)}, {}

    def evaluate(self, model, batches):
        return {"loss": float(sum(batch["mask"].sum() for batch in batches))}

    def pictures(self, model):
        return {}

    def metadata(self):
        return {}


@pytest.fixture
def reads(monkeypatch):
    """Keys read from ConfigDicts as (id of the dict, key), but not by copying a whole config."""
    seen, copying = set(), []
    get, copy = ConfigDict.__getitem__, ConfigDict.to_dict

    def __getitem__(self, key):  # noqa: N807
        if not copying:
            seen.add((id(self), key))
        return get(self, key)

    def to_dict(self, *arguments, **options):
        copying.append(True)
        try:
            return copy(self, *arguments, **options)
        finally:
            copying.pop()

    monkeypatch.setattr(ConfigDict, "__getitem__", __getitem__)
    monkeypatch.setattr(ConfigDict, "to_dict", to_dict)
    return seen


@pytest.mark.parametrize("name", ["pretrain", "classify", "probe"])
def test_every_key_is_read(name, tmp_path, reads):
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(4):
            image = Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8))
            image.save(tmp_path / "images" / label / f"{index}.png")
    config = defaults(name)
    config.update(image_size=(32, 32), batch_size=4, total_epochs=1.0, log_steps=1, checkpoint_steps=1)
    config.data.root = config.data.val_root = str(tmp_path / "images")
    config.data.source = config.data.val_source = "arrays"  # they read more keys than images
    config.data.unreadable = "skip"
    config.model.variant = "atto"
    config.model.patch_size = 2
    config.ema_decay = config.optimizer.layer_decay = 0.9
    config.model.nobody_reads_this = 1
    prefixes = {
        id(config): "",
        **{id(v): f"{k}." for k, v in config.items() if isinstance(v, ConfigDict)},
    }
    reads.clear()

    take_statistics(config.data)  # as `load_config` does
    task = make_task(config)
    task.start(split(task.init(nnx.Rngs(0)))[1])
    batch = next(task.data.train_batches(0))
    next(iter(task.images.eval_batches()))
    model = nnx.eval_shape(lambda: task.init(nnx.Rngs(0)))
    keys = jax.random.split(jax.random.key(0), 4)
    nnx.eval_shape(lambda m, b, k: task.loss(m, task.prepare(b, k[0]), k)[0], model, batch, keys)
    nnx.eval_shape(lambda m, b: task.score(m, b, np.arange(4)), model, batch)
    fit(CheapTask(task), tmp_path / "run")

    read = {prefixes[place] + key for place, key in reads if place in prefixes}
    assert set(flatten(config)) - read == {"model.nobody_reads_this"}


@pytest.mark.parametrize(
    ("value", "names"), [("age", ("age",)), ('("age","mass")', ("age", "mass")), ("(1,)", None)]
)
def test_names_are_given_one_or_several(value, names):
    if names:
        assert changed("regress", f"data.targets={value}").data.targets == names
    else:
        with pytest.raises(UserError, match=r"data\.targets=\(1,\) must be names, such as data\.targets="):
            changed("regress", f"data.targets={value}")


def test_of_an_override_that_is_given_twice_the_last_counts():
    arguments = [
        "--config.image_size=24",
        "--config.seed=3",
        "--config.image_size=(32,16)",
        "--config.seed=4",
    ]
    config = configuration.override(configuration.defaults("pretrain"), arguments)
    assert (config.image_size, config.seed) == ((32, 16), 4)


def test_older_configs_get_the_defaults_of_newer_keys(tmp_path):
    values = defaults("pretrain").to_dict()
    del values["model"]["layout"], values["model"]["scan"]
    values["model"]["mask_ratio"] = 0.7
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_config(tmp_path)
    assert (config.model.layout, config.model.scan, config.model.mask_ratio) == ("auto", "auto", 0.7)


def test_a_config_whose_group_is_no_group_is_damaged(tmp_path):
    (tmp_path / "config.json").write_text('{"task": "pretrain", "model": 3}')
    with pytest.raises(UserError, match="damaged: 'model' is 3, not a group of keys"):
        read_config(tmp_path)
