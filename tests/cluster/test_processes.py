"""Evaluation in several real processes and on several devices counts each image once."""

import json
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forked import Process

from cnx2_jax.data.images import preprocess_files
from cnx2_jax.models.pixels import normalise

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("compile_quickly")]

# In HELPER: batches of 48 of 359 images, which neither 8 devices, nor 2 processes, nor the batch divide.

PROGRAM = """
import json, sys
import jax
address, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if count > 1:
    jax.distributed.initialize(address, count, index)
import numpy as np
from tests_helper import task_and_model
from cnx2_jax.train import sharding
from cnx2_jax.models.state import merge, split
task, model = task_and_model()
mesh = sharding.make_mesh(task.config.mesh)
graph, params = split(model)
model = merge(graph, sharding.put_params(params, mesh))
batches = task.data.eval_batches(process_index=jax.process_index(), process_count=jax.process_count())
metrics = task.evaluate(model, sharding.put_batches(batches, mesh))
print(json.dumps({"devices": jax.device_count(), "processes": jax.process_count(), **metrics}))
"""

HELPER = """
import jax.numpy as jnp
import numpy as np
from flax import nnx
from cnx2_jax.configuration import override
from cnx2_jax.tasks import defaults
from cnx2_jax.recipes import use_digits
from cnx2_jax.tasks import make_task
from cnx2_jax.models.state import merge, split


def task_and_model():
    config = defaults("classify")
    use_digits(config)
    config.image_size = (16, 16)
    config.model.depths, config.model.dims = (1, 1, 1, 1), (8, 8, 16, 16)
    task = make_task(override(config, ["--config.batch_size=48"]))
    graph, like = split(nnx.eval_shape(lambda: task.init(nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    draws = {name: 0.3 * rng.standard_normal(leaf.shape) for name, leaf in sorted(like.items())}
    return task, merge(graph, {name: jnp.float32(value) for name, value in draws.items()})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    (folder / "tests_helper.py").write_text(HELPER)
    (folder / "program.py").write_text(PROGRAM)
    return folder


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def evaluate(folder, devices, processes) -> list[dict]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    address = f"127.0.0.1:{free_port()}"
    running = [
        Process([folder / "program.py", address, processes, index], XLA_FLAGS=flags)
        for index in range(processes)
    ]
    results = []
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        results.append(json.loads(out.splitlines()[-1]))
    return results


@pytest.fixture(scope="module")
def expected(folder):
    """Accuracies of a plain NumPy loop over the validation images, one at a time."""
    namespace: dict = {}
    exec(HELPER, namespace)
    task, model = namespace["task_and_model"]()
    forward = jax.jit(lambda images: model(normalise(images, task.config.data.mean, task.config.data.std)))
    correct, top5, count = 0, 0, 0
    for index in range(task.data.num_val):
        record = task.data.val.read(index)
        path = folder / "image.png"
        path.write_bytes(record["image"].numpy())
        image = preprocess_files([path], task.config)
        logits = np.asarray(forward(jnp.asarray(image)))[0]
        order = np.argsort(-logits, kind="stable")
        label = int(record["label"])
        correct += order[0] == label
        top5 += label in order[:5]
        count += 1
    assert count == 359 and 0 < correct < top5 < count
    return {"accuracy": correct / count, "top5_accuracy": top5 / count}


@pytest.mark.parametrize(("devices", "processes"), [(1, 1), (8, 1), (1, 2)])
def test_accuracy_is_a_plain_loops_to_the_last_digit(folder, expected, devices, processes):
    results = evaluate(folder, devices, processes)
    assert len(results) == processes
    for result in results:
        assert result["devices"] == devices * processes and result["processes"] == processes
        for name, value in expected.items():
            assert result[name] == value, name
