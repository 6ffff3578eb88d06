"""`cnx2 preflight`: the train step's collectives, finding a batch, and errors for bad arguments."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from cnx2_jax import cli
from cnx2_jax.preflight import topologies
from cnx2_jax.preflight.compile import FINENESS, largest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

STEP = """
import json, math, sys
import jax
from cnx2_jax.configuration import load_config
from cnx2_jax.tasks import make_task
from cnx2_jax.train import sharding
from cnx2_jax.train.program import make_program
from cnx2_jax.preflight import compiled as programs

def compiled(recipe, *overrides):
    small = ["model.depths=(1,1,1,1)", "model.dims=(8,16,24,32)", "batch_size=32",
             "image_size=16", "data.source=synthetic:64:10", *overrides]
    config = load_config(recipe, [f"--config.{argument}" for argument in small])
    task = make_task(config)
    mesh = sharding.make_mesh(config.mesh)
    program = make_program(task, mesh)
    batch = {"image": jax.ShapeDtypeStruct((32, 16, 16, 1), "uint8"),
             "label": jax.ShapeDtypeStruct((32,), "int32")}
    done = program.step.lower(program.like, batch).compile()
    places = sharding.state_sharding(program.like, mesh).params
    size = {True: 0, False: 0}
    for name, leaf in program.like.params.items():
        size["fsdp" in places[name].spec] += 4 * math.prod(leaf.shape)
    return {"split": size[True], "whole": size[False], "collectives": programs.collectives(done.as_text()),
            "arguments": done.memory_analysis().argument_size_in_bytes}

pretrain, classify = "configs/pretrain.py:digits", "configs/finetune.py:digits"
print(json.dumps({
    "fsdp": compiled(pretrain, "mesh.data=1", "mesh.fsdp=8"),
    "hybrid": compiled(pretrain, "mesh.data=2", "mesh.fsdp=4", "accumulation_steps=2"),
    "data": compiled(pretrain),
    "mixing": compiled(classify, "mesh.data=1", "mesh.fsdp=8", "mixup=0.8", "cutmix=1.0"),
}))
"""


@pytest.fixture(scope="module")
def steps(on_eight_devices, compile_quickly):
    """Of the train step on several meshes: bytes of parameters that are split or whole; its collectives."""
    return on_eight_devices(STEP)


def sent(step, kind):
    return step["collectives"].get(kind, {"bytes": 0})["bytes"]


FEW = 600  # bytes of loss, norms and the task's metrics


def test_split_parameters_are_gathered_and_their_gradients_scattered(steps):
    step = steps["fsdp"]
    assert step["split"] > 5 * step["whole"]
    assert sent(step, "all-gather") == step["split"] * 7 // 8
    assert sent(step, "reduce-scatter") == step["split"] * 7 // 8
    assert 0 <= sent(step, "all-reduce") - 2 * step["whole"] * 7 // 8 <= FEW
    assert step["collectives"].keys() == {"all-gather", "reduce-scatter", "all-reduce"}


def test_hybrid_and_accumulated_gradients_are_reduced_once_per_update(steps):
    step = steps["hybrid"]
    assert sent(step, "all-gather") == step["split"] * 3 // 4
    assert sent(step, "reduce-scatter") == step["split"] * 3 // 4
    # Over `data` goes what `fsdp` has left of each gradient, and the whole ones over both.
    expected = 2 * step["split"] // 4 * 1 // 2 + 2 * step["whole"] * 7 // 8
    assert 0 <= sent(step, "all-reduce") - expected <= FEW
    assert step["collectives"].keys() == {"all-gather", "reduce-scatter", "all-reduce"}


def test_data_parallel_sends_nothing_but_gradients(steps):
    step = steps["data"]
    assert step["collectives"].keys() == {"all-reduce"}
    assert 0 <= sent(step, "all-reduce") - 2 * (step["split"] + step["whole"]) * 7 // 8 <= FEW


def test_mixing_moves_images_and_gathers_nothing_but_parameters(steps):
    step = steps["mixing"]
    assert sent(step, "reduce-scatter") == step["split"] * 7 // 8
    assert sent(step, "all-gather") <= step["split"] * 7 // 8 + 2 * 32 * 16 * 16 * 4


def test_arguments_fall_with_the_devices(steps):
    split, whole = steps["fsdp"]["split"], steps["fsdp"]["whole"]
    saved = steps["data"]["arguments"] - steps["fsdp"]["arguments"]
    assert saved == pytest.approx(3 * split * 7 / 8, rel=0.02)
    assert steps["fsdp"]["arguments"] < 3 * (split / 8 + whole) + 4096


@pytest.mark.parametrize("most", [1, 2, 7, 16, 17, 100, 513])
@pytest.mark.parametrize("first", [1, 16, 300])
def test_largest_batch(most, first):
    tried = []
    found = largest(lambda count: tried.append(count) or count <= most, first)
    assert found <= most < found + 1 + max(1, found // FINENESS)
    assert found in tried and len(tried) == len(set(tried)) < 20


def test_not_even_one_fits():
    assert largest(lambda count: False, 8) == 0


def preflight(*arguments):
    command = [sys.executable, "-m", "cnx2_jax.cli", "preflight", *arguments]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["v9:2x2"], "unknown chip 'v9' in topology 'v9:2x2'"),
        (["h100:1x8", "--slices", "2"], "2 slices of 'h100:1x8': GPUs have none"),
        (["h100:8"], "topology 'h100:8' must be h100:NODESxGPUS, such as h100:1x8"),
        (["v5e:2x2", "--hours", "0"], "--hours 0.0 must be above 0"),
        (["v5e:2x2", "--bath"], "unrecognized arguments: --bath"),
        (
            ["h100:1x8", "--config.batch_sise=8"],
            "unknown config key 'batch_sise'; did you mean 'batch_size'?",
        ),
    ],
)
def test_bad_arguments(arguments, said, capsys):
    config = f"{ROOT}/configs/pretrain.py:digits"
    assert cli.main(["preflight", "--config", config, "--topology", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("topology", "module", "wheel", "extra"),
    [
        ("v5e:2x2", "libtpu", "libtpu", "tpu"),
        ("h100:1x8", "jax_cuda12_plugin", "jax-cuda12-plugin", "cuda"),
    ],
)
def test_a_compiler_that_is_missing(topology, module, wheel, extra):
    if importlib.util.find_spec(module):
        pytest.skip(f"{wheel} is installed")
    done = preflight("--config", "configs/pretrain.py:digits", "--topology", topology)
    assert done.returncode == 2 and done.stdout == ""
    assert f"the wheel {wheel} is not installed; pip install -e '.[{extra}]' brings it" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("slices", [1, 2])
def test_the_memory_of_a_chip_is_shared_by_its_devices(monkeypatch, slices):
    """libtpu gives devices no slice_index unless there are several slices."""
    devices = [
        types.SimpleNamespace(coords=[x, 0, 0], **({"slice_index": number} if slices > 1 else {}))
        for number in range(slices)
        for x in (0, 0, 1, 1)
    ]
    monkeypatch.setattr(topologies, "tpu_devices", lambda name, slices: devices)
    found = topologies.topology("v3:2x1", slices)
    assert found.devices == devices and found.usable_bytes == 16 * 2**30


SMALL = ["--config.model.depths=(1,1,1,1)", "--config.image_size=16", "--config.model.scan=on"]


def test_a_tpu_program():
    pytest.importorskip("libtpu")
    done = preflight(
        "--config", "configs/pretrain.py:digits", "--topology", "v5e:2x4", *SMALL, "--config.mesh.fsdp=8",
        "--config.mesh.data=1", "--hours", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fits"] and found["devices"] == 8 and found["hosts"] == 2
    assert found["usable_bytes"] == 16 * 2**30 > found["peak_bytes"] > found["argument_bytes"]
    assert {"all-gather", "all-reduce"} <= found["collectives"].keys()
    sums = sum(kind["bytes"] for kind in found["collectives"].values())
    assert sums <= 3 * 4 * found["parameters"]
    assert sum(found["cycles"].values()) > 0
    assert found["seconds_at_peak"] == pytest.approx(
        128 * found["matrix_flops_per_image"] / (8 * 197e12), rel=1e-6
    )
    steps = round(25 * 1_281_167 / 128)  # epochs
    assert found["images_per_second_per_host"] == pytest.approx(steps * 128 / 3600 / 2)


def test_a_detector_on_a_tpu():
    """Its suppression loops as long as its data asks, so that no trip count can be read."""
    pytest.importorskip("libtpu")
    done = preflight(
        "--config", "configs/detect.py:smoke", "--topology", "v5e:2x2", "--classes", "3",
        "--config.model.variant=custom", "--config.model.depths=(1,1,1,1)", "--config.model.dims=(8,8,16,16)",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fits"] and found["batch_per_device"] == 1
    assert found["collectives"].keys() == {"all-reduce"}
    assert sum(found["cycles"].values()) > 0


def test_two_slices():
    pytest.importorskip("libtpu")
    done = preflight(
        "--config", "configs/pretrain.py:digits", "--topology", "v5e:2x2", "--slices", "2", *SMALL,
        "--config.mesh.data=2", "--config.mesh.fsdp=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["topology"], found["devices"], found["hosts"]) == ("2 x v5e:2x2", 8, 2)
    # Only gradients cross between slices, and each device has a quarter of them.
    between = found["collectives"]["between slices"]["bytes"]
    assert found["parameters"] < between < 2 * found["parameters"]


def test_what_does_not_fit_a_tpu():
    pytest.importorskip("libtpu")
    done = preflight(
        "--config", "configs/pretrain.py:digits", "--topology", "v5e:2x2", *SMALL,
        "--config.batch_size=1048576",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["fits"] and found["peak_bytes"] > found["usable_bytes"]
    assert "DOES NOT FIT" in done.stdout
