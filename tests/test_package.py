"""The package without a checkout: a wheel built from the tree, installed, and used from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from PIL import Image

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("compile_quickly")]

ROOT = Path(__file__).parents[1]
SIZE = [
    f"--config.{key}"
    for key in (
        "image_size=16",
        "batch_size=64",
        "total_steps=2",
        "log_steps=1",
        "model.depths=(1,1,1,1)",
        "model.dims=(4,8,8,16)",
    )
]
# The demo's commands; each prints its result last.
COMMANDS = """
import json, sys
from cnx2_jax.cli import main
for command in json.loads(sys.stdin.read()):
    print("$", *command, flush=True)
    status = main(command)
    if status:
        sys.exit(status)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tree, for which nothing is downloaded."""
    tree, out = (tmp_path_factory.mktemp(name) for name in ("tree", "wheel"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("cnx2_jax", "configs"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    call(
        sys.executable,
        *["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w"],
        out,
        tree,
    )
    (built,) = out.glob("cnx2_jax-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An environment of its own that holds the wheel, and sees the packages that these tests use."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    (packages,) = (folder / "lib").glob("python*/site-packages")
    # Folders in a .pth file come last, and .pth files inside them (an editable install's) are ignored.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(paths)))
    call(
        sys.executable, "-m", "pip", "--python", python, *["install", "-q", "--no-deps", "--no-index"], wheel
    )
    return folder


def call(*command, cwd=None, stdin=""):
    """Runs a program outside the checkout's reach and returns what it printed."""
    settings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=settings, input=stdin, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder, pattern):
    """The files below a folder, links followed, by their paths there."""
    found = {path.relative_to(folder) for path in folder.rglob(pattern)}
    return {str(path) for path in found if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_recipe(environment):
    (installed,) = (environment / "lib").glob("python*/site-packages/cnx2_jax")
    recipes = {f"configs/{name}" for name in files(ROOT / "configs", "*.py")}
    assert len(recipes) >= 6
    assert files(installed, "*.py") == files(ROOT / "cnx2_jax", "*.py") | recipes
    assert files(installed, "*.txt") == files(ROOT / "cnx2_jax", "*.txt") != set()
    (information,) = installed.parent.glob("cnx2_jax-*.dist-info")
    assert (information / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (ROOT / "README.md").read_text().strip() in (information / "METADATA").read_text()


@pytest.mark.slow
@pytest.mark.processes
def test_the_demos_commands_work_from_an_empty_folder(environment, tmp_path):
    python, empty = environment / "bin" / "python", tmp_path / "empty"
    empty.mkdir()
    where = "import cnx2_jax, cnx2_jax.configs.pretrain as p; print(cnx2_jax.__file__, p.__file__, sep='\\n')"
    for path in call(python, "-c", where, cwd=empty).split():
        assert Path(path).is_relative_to(environment)

    pretrain = ["train", "--config", "pretrain:digits", "--workdir", "pretrained", *SIZE]
    pretrained = call(environment / "bin" / "cnx2", *pretrain, cwd=empty)
    assert json.loads(pretrained.splitlines()[-1])["step"] == 2
    Image.new("L", (8, 8), 128).save(tmp_path / "digit.png")
    commands = [
        ["train", "--config=finetune:digits", "--workdir=finetuned", "--config.init_from=pretrained", *SIZE],
        ["evaluate", "--workdir", "finetuned"],
        ["reconstruct", "--workdir", "pretrained", "--out", "reconstructions.png"],
        ["export", "--checkpoint", "finetuned", "--format", "orbax", "--out", "exported"],
        ["predict", "--checkpoint", "exported", "--json", "../digit.png"],
    ]
    printed = call(python, "-c", COMMANDS, cwd=empty, stdin=json.dumps(commands))
    results = [part.splitlines()[-1] for part in printed.split("$ ")[1:]]
    finetuned, evaluated, picture, exported, predicted = results
    assert json.loads(evaluated)["accuracy"] == json.loads(finetuned)["accuracy"]
    assert (empty / picture).read_bytes().startswith(b"\x89PNG")
    assert json.loads(exported)["out"] == "exported"
    assert len(json.loads(predicted)["predictions"]) == 5
    assert {path.name for path in empty.iterdir()} == {"pretrained", "finetuned", "exported", picture}
