"""Preflight: reading compiled programs, the train step's collectives, and errors for bad arguments."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cnx2_jax import cli
from cnx2_jax.preflight import compiled as programs
from cnx2_jax.preflight.compile import FINENESS, largest

ROOT = Path(__file__).parents[2]


def on_eight_devices(program, **environment):
    """Runs a program on eight virtual CPU devices and returns the JSON that it prints last."""
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


KNOWN = """
import json
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from cnx2_jax.preflight import compiled as programs

mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

def compiled(f, out=P()):
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=out, check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct((8 * 16, 32), "float32")).compile().as_text()

lax = jax.lax
both = ("data", "fsdp")
ring = [(i, (i + 1) % 4) for i in range(4)]

def loop(x):
    return lax.fori_loop(0, 5, lambda i, y: y + jnp.sin(lax.psum(y * x, "data")), x)

found = {
    "gather": compiled(lambda x: lax.all_gather(x, "fsdp", tiled=True)),
    "gather int8": compiled(lambda x: lax.all_gather(x.astype(jnp.int8), both, tiled=True)),
    "reduce": compiled(lambda x: lax.psum(x, both)),
    "scatter": compiled(lambda x: lax.psum_scatter(x, "fsdp", tiled=True), P(both)),
    "exchange": compiled(lambda x: lax.all_to_all(x, "fsdp", 1, 0, tiled=True), P(both)),
    "permute": compiled(lambda x: lax.ppermute(x, "fsdp", ring), P(both)),
    "loop": compiled(loop, P(both)),
    "nothing": compiled(lambda x: 2 * x, P(both)),
}
print(json.dumps({name: programs.collectives(text) for name, text in found.items()}))
"""


def test_collectives_of_programs_whose_answer_is_known():
    found = on_eight_devices(KNOWN)
    part = 16 * 32 * 4  # bytes of what each device holds
    assert found == {
        "gather": {"all-gather": {"count": 1, "bytes": 3 * part}},
        "gather int8": {"all-gather": {"count": 1, "bytes": 7 * part // 4}},
        "reduce": {"all-reduce": {"count": 1, "bytes": 2 * part * 7 // 8}},
        "scatter": {"reduce-scatter": {"count": 1, "bytes": part * 3 // 4}},
        "exchange": {"all-to-all": {"count": 1, "bytes": part * 3 // 4}},
        "permute": {"collective-permute": {"count": 1, "bytes": part}},
        "loop": {"all-reduce": {"count": 5, "bytes": 5 * part}},
        "nothing": {},
    }


ASYNCHRONOUS = """\
HloModule jit_f
%wrapped (p: f32[8]) -> f32[1] {
  %p = f32[8]{0} parameter(0)
  ROOT %rs = f32[1]{0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}
%start_fusion (p.1: f32[20,640]) -> f32[160,640] {
  ROOT %ag.1 = f32[160,640]{0,1:T(8,128)} all-gather(%p.1), replica_groups={{0,1,2,3,4,5,6,7}}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
}
%async_collective_fusion.1 (p.2: f32[20,640]) -> f32[160,640] {
  ROOT %ag.2 = f32[160,640]{0,1:T(8,128)S(1)} all-gather(%p.2), replica_groups={{0,1,2,3,4,5,6,7}}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}
%all-reduce-scatter.4 (p.3: f32[64]) -> f32[8] {
  %ar = f32[64]{0} all-reduce(%p.3), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}, to_apply=%add
  ROOT %ds = f32[8]{0} dynamic-slice(%ar, %i), dynamic_slice_sizes={8}
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %s = ((f32[8]), f32[1], u32[]) async-start(%a), calls=%wrapped
  %d = f32[1]{0} async-done(%s), calls=%wrapped
  %f.1 = f32[160,640]{0,1} fusion(%a), kind=kCustom, calls=%start_fusion
  %f.2 = f32[160,640]{0,1} fusion(%f.1), kind=kCustom, calls=%async_collective_fusion.1
  %f.3 = f32[8]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.4
  %g = ((f32[4]{0}, bf16[2]{0}), /*index=1*/(f32[32]{0}, bf16[16]{0})) all-gather-start(%x, %y), replica_groups=[1,8]<=[8]
  %gd = (f32[32]{0}, bf16[16]{0}) all-gather-done(%g)
  %r = ((f32[32]{0}), (f32[4]{0})) reduce-scatter-start(%x), replica_groups={{0,1,2,3,4,5,6,7}}
  %c = (f32[6,7,7]{2,1,0}, f32[6,7,7]{2,1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%z), source_target_pairs={{0,1}}
  %cd = f32[6,7,7]{2,1,0} collective-permute-done(%c)
  %half = f32[64]{0} all-reduce(%a), replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, to_apply=%add
  %one = f32[64]{0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add
}
"""  # noqa: E501 - as the compilers write it


def test_what_is_in_flight_counts_once():
    assert programs.collectives(ASYNCHRONOUS) == {
        "all-gather": {"count": 2, "bytes": (160 * 640 * 4 + 32 * 4 + 16 * 2) * 7 // 8},
        "reduce-scatter": {"count": 3, "bytes": (8 * 4 + 64 * 4 + 32 * 4) * 7 // 8},
        "collective-permute": {"count": 1, "bytes": 6 * 7 * 7 * 4},
        "all-reduce": {"count": 1, "bytes": 2 * 64 * 4 * 3 // 4},
    }


def test_groups_that_cannot_be_read_are_an_error():
    with pytest.raises(ValueError, match="groups"):
        programs.collectives(ASYNCHRONOUS.replace("[1,8]<=[8]", "unheard_of"))


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
def steps():
    """Of the train step on several meshes: bytes of parameters that are split or whole; its collectives."""
    return on_eight_devices(STEP, JAX_DISABLE_MOST_OPTIMIZATIONS="1")


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
