"""TensorFlow is needed to read images and to write a SavedModel; everything else works without it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("compile_quickly")

ROOT = Path(__file__).parents[1]
FOLDERS = ("cnx2_jax", "configs", "experiments")
# The one module that imports TensorFlow, and those that may import that module's `tf`.
DOOR = "cnx2_jax/data/tensorflow.py"
SAVED_MODEL = {"cnx2_jax.interop.savedmodel", "cnx2_jax.interop.tensorflow_operations"}
BEHIND_THE_DOOR = ("cnx2_jax/data/", *(f"{name.replace('.', '/')}.py" for name in sorted(SAVED_MODEL)))
# Modules of data that do not need it.
LIGHT_DATA = {"cnx2_jax.data", "cnx2_jax.data.imagenet", "cnx2_jax.data.mixing"}

# Python finds neither TensorFlow nor what is built on it, as if they were not installed.
HIDE = """
import sys
from importlib.machinery import PathFinder

class FindsNoTensorFlow(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.startswith("tensorflow") else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = FindsNoTensorFlow
"""

IMPORT_ALL = """
import importlib, json, pkgutil
import cnx2_jax

failed = {}
for module in pkgutil.walk_packages(cnx2_jax.__path__, "cnx2_jax."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        failed[module.name] = str(error)
for name in ("steps", "saving", "contestants", "pretraining", "segmentation"):
    try:
        importlib.import_module(f"experiments.benchmarks.{name}")
    except ImportError as error:
        failed[name] = str(error)
print(json.dumps(failed))
"""

# What `cnx2 preflight` does: a task's step compiled from shapes alone.
COMPILE = """
import json
from cnx2_jax.configuration import load_config
from cnx2_jax.tasks import make_task
from cnx2_jax.tasks.base import Described
from cnx2_jax.train import sharding
from cnx2_jax.train.program import make_program

found = {}
for recipe in ("pretrain:digits", "finetune:digits"):
    overrides = ["--config.model.depths=(1,1,1,1)", "--config.model.dims=(4,4,8,8)", "--config.batch_size=4"]
    config = load_config(recipe, overrides)
    task = make_task(config, data=Described(1000, class_names=("a", "b")))
    program = make_program(task, sharding.make_mesh(config.mesh))
    compiled = program.step.lower(program.like, task.batch_shapes()).compile()
    found[config.task] = compiled.memory_analysis().argument_size_in_bytes
print(json.dumps(found))
"""

# The whole loop, with its checkpoints and reports; then a train step of FCMAE, as the benchmarks time it.
TRAIN = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp
from flax import nnx
from cnx2_jax.models import FCMAE, EncoderConfig
from cnx2_jax.models.state import split
from cnx2_jax.train.loop import fit
from experiments.benchmarks.pretraining import train_step
from tiny_task import TinyTask

workdir = Path(sys.argv[1])
metrics = fit(TinyTask("total_steps=3"), workdir)

encoder = EncoderConfig((1, 1, 1, 1), (4, 4, 8, 8))
model = FCMAE(encoder, decoder_dim=8, layout="gathered", rngs=nnx.Rngs(0))
graph, params = split(model)
optimizer, step = train_step(graph)
images = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
keys = jax.random.split(jax.random.key(2), 2)
_, _, loss = jax.jit(step)(params, optimizer.init(params), images, keys)
print(json.dumps({"step": metrics["step"], "loss": float(loss)}))
"""


def run(program, *arguments):
    """Runs a program that cannot import TensorFlow, and returns what it printed last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", HIDE + program, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def imports(path):
    """The modules that a file imports, wherever in it, with the names taken from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def needs_tensorflow(module):
    """Whether a module is one that may fail to import where there is no TensorFlow."""
    if module.startswith("cnx2_jax.data"):
        return module not in LIGHT_DATA
    return module in SAVED_MODEL


def test_tensorflow_is_imported_in_one_place():
    seen = set()
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        direct = any(module.split(".")[0] == "tensorflow" for module in imports(path))
        assert direct == (name == DOOR), f"{name}: take `tf` from cnx2_jax.data.tensorflow"
        if any(module.startswith("cnx2_jax.data.tensorflow") for module in imports(path)):
            assert name.startswith(BEHIND_THE_DOOR), name
            seen.add(name)
    assert {"cnx2_jax/data/pipeline.py", "cnx2_jax/interop/savedmodel.py"} <= seen


def test_modules_import_without_tensorflow():
    failed = run(IMPORT_ALL)
    assert "cnx2_jax.data.pipeline" in failed, "TensorFlow was not hidden"
    assert {name: error for name, error in failed.items() if not needs_tensorflow(name)} == {}


@pytest.mark.slow
def test_training_works_without_tensorflow(tmp_path):
    result = run(TRAIN, tmp_path)
    assert result["step"] == 3
    assert 0 < result["loss"] < 100
    assert (tmp_path / "metrics.jsonl").exists()
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_step_compiles_from_shapes_without_tensorflow():
    found = run(COMPILE)
    assert found.keys() == {"pretrain", "classify"} and min(found.values()) > 1000
