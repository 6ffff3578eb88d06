"""The command line: the whole way from training to prediction, and one line for every mistake."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from cnx2_jax.cli import VERBS, main

ROOT = Path(__file__).parents[1]
PRETRAIN, FINETUNE = ROOT / "configs" / "pretrain.py", ROOT / "configs" / "finetune.py"
COMMAND = Path(sys.executable).with_name("cnx2")

# Overrides that make a recipe run in seconds.
SMALL = [
    "--config.total_steps=4",
    "--config.batch_size=8",
    "--config.log_steps=2",
    "--config.eval_epochs=0",
    "--config.model.variant=custom",
    "--config.model.depths=(1,1,1,1)",
    "--config.model.dims=(4,4,8,8)",
]
SMALL_DIGITS = [*SMALL, "--config.image_size=16"]
SMALL_PRETRAIN = [*SMALL_DIGITS, "--config.model.decoder_dim=8"]


pytestmark = [pytest.mark.usefixtures("compile_quickly", "no_progress_lines"), pytest.mark.slow]


def run_process(*arguments, **environment):
    """Runs the installed command as a user does, who has not set what the tests set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    return subprocess.run(
        [str(COMMAND), *map(str, arguments)],
        env={**kept, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def run(*arguments):
    """Runs the command in this process; argparse leaves by SystemExit."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def snapshot(folder):
    """Every file below a folder with its content."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def save_broken_jpeg(path):
    """As a copy that was interrupted leaves it."""
    save_image(path, size=(64, 64))
    path.write_bytes(path.read_bytes()[:1500])


def save_image(path, seed=0, size=(40, 30), mode="RGB"):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A workdir, made by the installed command, and what the command said."""
    workdir = tmp_path_factory.mktemp("runs") / "deep" / "pretrained"
    done = run_process("train", "--config", f"{PRETRAIN}:digits", "--workdir", workdir, *SMALL_PRETRAIN)
    assert done.returncode == 0, done.stderr
    return workdir, done


@pytest.fixture(scope="module")
def finetuned(pretrained, tmp_path_factory):
    """A workdir of a classifier that started from `pretrained`."""
    workdir = tmp_path_factory.mktemp("runs") / "finetuned"
    init_from = f"--config.init_from={pretrained[0]}"
    assert run("train", "--config", f"{FINETUNE}:digits", "--workdir", workdir, init_from, *SMALL_DIGITS) == 0
    return workdir


@pytest.fixture(scope="module")
def exported(finetuned, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "exported"
    assert run("export", "--checkpoint", finetuned, "--format", "orbax", "--out", out) == 0
    return out


# Help.


def test_help_lists_every_verb_on_one_line(capsys):
    assert run("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    modules = {path.stem for path in (ROOT / "cnx2_jax" / "commands").glob("*.py")} - {"__init__"}
    assert modules == set(VERBS)
    for verb, line in VERBS.items():
        (found,) = [text for text in lines if re.match(rf"\s+{verb}\s", text)]
        assert found.split(maxsplit=1)[1] == line
        assert len(found) <= 80


def test_help_does_not_wait_for_jax_or_tensorflow():
    code = (
        "import sys\nfrom cnx2_jax.cli import main\n"
        "try:\n  main(['--help'])\nexcept SystemExit as end:\n  assert end.code == 0\n"
        "slow = {'jax', 'tensorflow', 'flax', 'orbax', 'sklearn', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(verb, capsys):
    assert run(verb, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: cnx2 {verb} ")


# The whole way.


def test_train_says_what_it_did(pretrained):
    workdir, done = pretrained
    (line,) = done.stdout.splitlines()
    metrics = json.loads(line)
    assert metrics.keys() == {"step", "loss"}
    assert metrics["step"] == 4
    # Progress is on standard error, and no library speaks there.
    lines = done.stderr.splitlines()
    assert lines[0].startswith("pretrain custom, ")
    # On a busy machine an evaluation reports its progress.
    expected = r"step \d+(/4 \(\d+%\), loss |: val loss )|evaluating at step 4: \d+ of 359 images"
    assert all(re.match(expected, text) for text in lines[1:-2])
    assert lines[-2].startswith("goodput ")
    assert lines[-1] == f"done after step 4; the best checkpoint by loss is {workdir}/checkpoints/4"

    rows = [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["split"]) for row in rows] == [(2, "train"), (4, "train"), (4, "val")]
    keys = {"step", "split", "loss", "learning_rate", "images_per_sec", "grad_norm"}
    assert rows[0].keys() == rows[1].keys() >= keys
    assert rows[2]["loss"] == metrics["loss"]
    assert json.loads((workdir / "config.json").read_text())["model"]["dims"] == [4, 4, 8, 8]
    assert json.loads((workdir / "result.json").read_text()) == metrics
    assert sorted(path.name for path in workdir.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "reconstructions",
        "result.json",
        "tensorboard",
    ]
    assert [path.name for path in (workdir / "reconstructions").iterdir()] == ["00000004.png"]


def test_a_finished_run_is_not_run_again(pretrained, capfd):
    workdir, done = pretrained
    before = snapshot(workdir / "checkpoints")
    code = run("train", "--config", f"{PRETRAIN}:digits", "--workdir", workdir, *SMALL_PRETRAIN)
    assert code == 0
    assert capfd.readouterr().out == done.stdout
    assert snapshot(workdir / "checkpoints") == before


@pytest.mark.parametrize("kind", ["pretrained", "finetuned"])
def test_evaluate_repeats_the_evaluation_of_the_run(kind, pretrained, finetuned, capfd):
    workdir = {"pretrained": pretrained[0], "finetuned": finetuned}[kind]
    assert run("evaluate", "--workdir", workdir) == 0
    captured = capfd.readouterr()
    metrics = json.loads(captured.out.splitlines()[-1])
    assert captured.err == ""
    assert metrics.pop("checkpoint") == str(workdir / "checkpoints" / "4")
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    expected = {name: value for name, value in last.items() if name not in ("step", "split")}
    assert metrics == pytest.approx(expected, rel=1e-5)
    names = {"pretrained": {"loss"}, "finetuned": {"accuracy", "top5_accuracy", "loss"}}
    assert metrics.keys() == names[kind]


def test_evaluate_takes_another_checkpoint_and_overrides(finetuned, exported, capfd):
    arguments = ["--workdir", finetuned, "--checkpoint", exported, "--config.batch_size", "90"]
    assert run("evaluate", *arguments) == 0
    metrics = json.loads(capfd.readouterr().out)
    assert metrics["checkpoint"] == str(exported)
    last = json.loads((finetuned / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["accuracy"] == last["accuracy"]


def test_reconstruct_draws_validation_images_or_given_ones(pretrained, tmp_path, capfd):
    workdir, _ = pretrained
    out = tmp_path / "new" / "grid.png"
    assert run("reconstruct", "--workdir", workdir, "--out", out) == 0
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == (f"{out}\n", "")
    validation = np.asarray(Image.open(out))
    # The very picture that training drew.
    np.testing.assert_array_equal(validation, Image.open(workdir / "reconstructions" / "00000004.png"))

    images = [save_image(tmp_path / f"{i}.png", seed=i, mode="L") for i in range(2)]
    exported = tmp_path / "exported"
    assert run("export", "--checkpoint", workdir, "--format", "orbax", "--out", exported) == 0
    before = out.read_bytes()
    assert run("reconstruct", "--workdir", exported, "--out", out, *images) == 2
    assert "exists already; nothing was overwritten" in capfd.readouterr().err
    assert out.read_bytes() == before
    other = tmp_path / "other.png"
    assert run("reconstruct", "--workdir", exported, "--out", other, "--seed", 5, *images) == 0
    own = np.asarray(Image.open(other))
    assert own.shape[1:] == validation.shape[1:]
    assert own.shape[0] < validation.shape[0]


def test_export_and_predict(finetuned, exported, tmp_path, capfd):
    digits = load_digits()
    images = []
    for index in range(3):
        pixels = np.uint8(np.round(digits.images[index] * (255 / 16)))
        images.append(tmp_path / f"{index}{('.png', '.jpg', '.webp')[index]}")
        Image.fromarray(pixels).resize((32, 32)).save(images[-1])
    assert run("predict", "--checkpoint", exported, *images) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert len(lines) == 3 * 6
    for index, image in enumerate(images):
        path, *classes = lines[6 * index : 6 * index + 6]
        assert path == str(image)
        matches = [re.fullmatch(r"  (\d)  {1,3}(\d+\.\d\d)%", line) for line in classes]
        assert all(matches), classes
        assert len({match[1] for match in matches}) == 5
        shares = [float(match[2]) for match in matches]
        assert shares == sorted(shares, reverse=True)
        assert 50 <= sum(shares) <= 100.03  # five of ten classes, the largest

    assert run("predict", "--checkpoint", finetuned, *images) == 0  # a workdir does as well
    assert capfd.readouterr().out == captured.out


def test_pretraining_on_a_folder_of_ones_own(tmp_path, capfd):
    for index in range(12):
        name = f"{index}.{('jpg', 'png', 'JPEG')[index % 3]}"
        save_image(tmp_path / "images" / name, seed=index, size=(40 + 9 * index, 100 - 5 * index))
    root = f"--config.data.root={tmp_path / 'images'}"
    small = [*SMALL, "--config.image_size=64", "--config.total_steps=2", "--config.model.decoder_dim=8"]
    assert run("train", "--config", f"{PRETRAIN}:tiny", root, "--workdir", tmp_path / "run", *small) == 0
    captured = capfd.readouterr()
    assert np.isfinite(json.loads(captured.out)["loss"])
    assert "Traceback" not in captured.err
    assert len(list((tmp_path / "run" / "reconstructions").glob("*.png"))) == 1


# Mistakes.


def fails_with_one_line(code, err, *parts):
    assert code == 2
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("cnx2: error: ")
    for part in parts:
        assert str(part) in lines[0]


@pytest.fixture
def places(pretrained, finetuned, exported, tmp_path):
    """Names for the paths that a mistake needs."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    save_broken_jpeg(tmp_path / "broken.jpg")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.py").write_text("")
    save_image(tmp_path / "fine.png")
    save_image(tmp_path / "loose" / "b" / "1.png")
    save_image(tmp_path / "loose" / "2.png")
    return {
        "tmp": tmp_path,
        "pretrained": pretrained[0],
        "finetuned": finetuned,
        "exported": exported,
        "PRETRAIN": PRETRAIN,
        "FINETUNE": FINETUNE,
    }


PRETRAINING = "train --config {PRETRAIN}:digits --workdir {tmp}/run"
FINETUNING = "train --config {FINETUNE}:digits --workdir {tmp}/run"
ON_FOLDER = "train --config {PRETRAIN}:tiny --workdir {tmp}/run"
NAMED = "--config.model.depths=() --config.model.dims=()"

MISTAKES = {
    # What the command line itself finds.
    "no verb": ("", ["VERB"]),
    "unknown verb": ("trian", ["'trian'", "train"]),
    "missing option": ("train --workdir {tmp}/run", ["--config"]),
    "no image": ("predict --checkpoint {exported}", ["IMAGE"]),
    "unknown option": (PRETRAINING + " --epochs 3", ["--epochs"]),
    "unknown format": ("export --checkpoint {exported} --format onyx --out {tmp}/x", ["onyx", "orbax"]),
    "override where there is none": (
        "predict --checkpoint {exported} --config.seed=1 {tmp}/fine.png",
        ["predict takes no --config.seed"],
    ),
    # Configs.
    "unknown key": (PRETRAINING + " --config.batchsize=3", ["'batchsize'", "did you mean 'batch_size'"]),
    "bad value": (PRETRAINING + " --config.batch_size=many", ["batch_size=many"]),
    "value forgotten": (PRETRAINING + " --config.batch_size", ["batch_size"]),
    "unknown recipe": (
        "train --config {PRETRAIN}:digts --workdir {tmp}/run",
        ["'digts'", "did you mean 'digits'"],
    ),
    "missing config": (
        "train --config {tmp}/nowhere.py:a --workdir {tmp}/run",
        ["nowhere.py' does not exist"],
    ),
    "config without get_config": (
        "train --config {tmp}/empty.py --workdir {tmp}/run",
        ["has no function get_config"],
    ),
    "unknown variant": (
        PRETRAINING + " --config.model.variant=tinny " + NAMED,
        ["'tinny'", "did you mean 'tiny'"],
    ),
    "unknown dtype": (PRETRAINING + " --config.model.dtype=float23", ["did you mean 'float32'"]),
    "unknown source": (PRETRAINING + " --config.data.source=digit", ["did you mean 'digits'"]),
    "size of no whole strides": (PRETRAINING + " --config.image_size=30", ["30x30", "stride 8", "32x32"]),
    "batch over accumulation": (
        PRETRAINING + " --config.batch_size=64 --config.accumulation_steps=3",
        ["batch_size 64 does not divide", "3 accumulation step(s)", "multiple of 3"],
    ),
    "mesh of other devices": (PRETRAINING + " --config.mesh.data=2", ["data=2", "1 device(s)"]),
    "steps below zero": (PRETRAINING + " --config.total_steps=-1", ["total_steps -1"]),
    "no logging": (PRETRAINING + " --config.log_steps=0", ["log_steps 0"]),
    "no learning rate": (
        PRETRAINING + " --config.optimizer.base_learning_rate=0",
        ["base_learning_rate 0.0"],
    ),
    "ratio that is no number": (PRETRAINING + " --config.model.mask_ratio=nan", ["mask_ratio nan"]),
    "epochs without end": (PRETRAINING + " --config.total_epochs=inf", ["total_epochs inf"]),
    "no epochs": (PRETRAINING + " --config.total_steps=0 --config.total_epochs=0", ["nothing to do"]),
    "stem of no size": (PRETRAINING + " --config.model.patch_size=0", ["model.patch_size 0"]),
    "crop of nothing": (PRETRAINING + " --config.data.eval_crop=0", ["data.eval_crop 0.0"]),
    "no decoder": (PRETRAINING + " --config.model.decoder_depth=-1", ["model.decoder_depth -1"]),
    "seed of too many digits": (PRETRAINING + " --config.seed=99999999999999999999", ["seed 9999"]),
    "task of another file": (PRETRAINING + " --config.task=classify", ["'task' is fixed"]),
    "workdir that takes no files": (
        PRETRAINING.replace("{tmp}/run", "/proc/self"),
        ["cannot write to workdir"],
    ),
    "everything hidden": (PRETRAINING + " --config.model.mask_ratio=1", ["mask_ratio 1.0", "leaves 0 of"]),
    # Images.
    "no root": (ON_FOLDER, ["data.root is not set"]),
    "missing folder": (ON_FOLDER + " --config.data.root={tmp}/nowhere", ["{tmp}/nowhere' is not a folder"]),
    "empty folder": (ON_FOLDER + " --config.data.root={tmp}/empty", ["no images", "{tmp}/empty"]),
    "loose image": (ON_FOLDER + " --config.data.root={tmp}/loose", ["{tmp}/loose/2.png"]),
    "broken image": ("predict --checkpoint {exported} {tmp}/fine.png {tmp}/broken.jpg", ["{tmp}/broken.jpg"]),
    "text for image": ("predict --checkpoint {exported} {tmp}/text.png", ["{tmp}/text.png"]),
    "missing image": ("predict --checkpoint {exported} {tmp}/none.png", ["{tmp}/none.png' does not exist"]),
    "broken image to reconstruct": (
        "reconstruct --workdir {pretrained} --out {tmp}/x.png {tmp}/broken.jpg",
        ["{tmp}/broken.jpg"],
    ),
    # Workdirs and checkpoints.
    "workdir of another run": (
        PRETRAINING.replace("{tmp}/run", "{pretrained}") + " --config.seed=5",
        ["{pretrained}' holds another run", "batch_size = 8 there"],
    ),
    "workdir of another task": (
        FINETUNING.replace("{tmp}/run", "{pretrained}"),
        ["{pretrained}' holds another run"],
    ),
    "workdir below a file": (
        PRETRAINING.replace("{tmp}/run", "{tmp}/file/run"),
        ["cannot write to workdir '{tmp}/file/run'"],
    ),
    "workdir is a file": (
        PRETRAINING.replace("{tmp}/run", "{tmp}/file"),
        ["cannot write to workdir '{tmp}/file'"],
    ),
    "evaluate no workdir": ("evaluate --workdir {tmp}/empty", ["{tmp}/empty' is not a workdir"]),
    "evaluate another checkpoint": (
        "evaluate --workdir {pretrained} --checkpoint {finetuned}",
        ["of another model"],
    ),
    "evaluate unknown key": ("evaluate --workdir {pretrained} --config.sed=1", ["did you mean 'seed'"]),
    "predict missing checkpoint": (
        "predict --checkpoint {tmp}/nowhere {tmp}/fine.png",
        ["{tmp}/nowhere' does not exist"],
    ),
    "predict no checkpoint": ("predict --checkpoint {tmp}/empty {tmp}/fine.png", ["no checkpoint in"]),
    "predict on pretraining": (
        "predict --checkpoint {pretrained} {tmp}/fine.png",
        ["{pretrained}' is of pretraining", "fine-tune it"],
    ),
    "reconstruct on a classifier": (
        "reconstruct --workdir {finetuned} --out {tmp}/x.png",
        ["{finetuned}' is a 'classify' run without a decoder"],
    ),
    "reconstruct into a file": (
        "reconstruct --workdir {pretrained} --out {tmp}/file/x.png {tmp}/fine.png",
        ["cannot write '{tmp}/file/x.png'"],
    ),
    "reconstruct to no picture": (
        "reconstruct --workdir {pretrained} --out {tmp}/x.docx {tmp}/fine.png",
        ["'{tmp}/x.docx' does not end in the suffix of an image format"],
    ),
    "export nothing": (
        "export --checkpoint {tmp}/empty --format orbax --out {tmp}/x",
        ["no checkpoint in '{tmp}/empty'"],
    ),
    "export onto something": (
        "export --checkpoint {finetuned} --format orbax --out {tmp}/file",
        ["{tmp}/file' exists already"],
    ),
    "export onto itself": (
        "export --checkpoint {finetuned} --format orbax --out {finetuned}",
        ["{finetuned}' exists already"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_and_exit_status_2(name, places, capfd):
    line, parts = MISTAKES[name]
    folders = [places["tmp"], places["pretrained"], places["finetuned"], places["exported"]]
    before = [snapshot(folder) for folder in folders]
    capfd.readouterr()
    code = run(*[word.format(**places) for word in line.split()])
    captured = capfd.readouterr()
    fails_with_one_line(code, captured.err, *[part.format(**places) for part in parts])
    assert captured.out == ""
    assert [snapshot(folder) for folder in folders] == before
    assert not (places["tmp"] / "run").exists()


def test_init_from_another_variant_leaves_the_workdir_to_the_next(places, capfd):
    workdir = places["tmp"] / "run"
    arguments = ["train", "--config", f"{FINETUNE}:digits", "--workdir", workdir, "--config.image_size=16"]
    named = ["--config.model.variant=atto", *NAMED.split(), f"--config.init_from={places['pretrained']}"]
    fails_with_one_line(
        run(*arguments, *named), capfd.readouterr().err, "holds variant 'custom'", "asks for 'atto'"
    )
    missing = [*SMALL_DIGITS, "--config.init_from=nowhere"]
    fails_with_one_line(run(*arguments, *missing), capfd.readouterr().err, "'nowhere' does not exist")
    assert snapshot(workdir) == {}
    fails_with_one_line(  # and not "another run"
        run(*arguments, *missing, "--config.seed=3"), capfd.readouterr().err, "'nowhere' does not exist"
    )
    deeper = [*SMALL_DIGITS, f"--config.init_from={places['pretrained']}", "--config.model.depths=(1,1,1,2)"]
    fails_with_one_line(run(*arguments, *deeper), capfd.readouterr().err, "is of another model")
    assert snapshot(workdir) == {}


def test_unreadable_image_in_training_is_named(tmp_path):
    for index in range(4):
        save_image(tmp_path / "images" / f"{index}.png", seed=index)
    save_broken_jpeg(tmp_path / "images" / "broken.jpg")
    root = ["--config.data.root", tmp_path / "images", "--config.image_size=64"]
    done = run_process("train", "--config", f"{PRETRAIN}:tiny", "--workdir", tmp_path / "run", *SMALL, *root)
    first, *rest = done.stderr.splitlines()
    assert first.startswith("pretrain custom, ")  # the run had begun
    fails_with_one_line(done.returncode, "\n".join(rest), tmp_path / "images" / "broken.jpg")
    assert done.stdout == ""
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_no_library_speaks_beside_an_error(tmp_path):
    arguments = ["train", "--config", f"{PRETRAIN}:digits", "--workdir", tmp_path / "run"]
    done = run_process(*arguments, "--config.batchsize=3")
    fails_with_one_line(done.returncode, done.stderr, "did you mean 'batch_size'")
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_batch_that_does_not_divide_over_devices(tmp_path):
    arguments = ["train", "--config", f"{PRETRAIN}:digits", "--workdir", tmp_path / "run"]
    flags = "--xla_force_host_platform_device_count=8"
    done = run_process(*arguments, "--config.batch_size=12", XLA_FLAGS=flags)
    fails_with_one_line(done.returncode, done.stderr, "batch_size 12 does not divide over 8 device(s)")
    assert list(tmp_path.iterdir()) == []
