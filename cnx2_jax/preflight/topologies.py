"""Accelerators that are not there: their devices and memory, and compiling for them.

XLA's TPU and GPU compilers run on any host: the `tpu` extra brings the one, the `cuda` extra the other.
Import this module before anything that starts a JAX backend. Memory is exact. Estimated cycles are the TPU
compiler's own cost model: no overlap, and some operations carry none. They compare two forms of one program
and are no times.
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any

# libtpu asks a metadata server otherwise, and JAX would start the backends themselves.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is held, so there is none to fight over

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.models import create_model
from cnx2_jax.models.state import merge, split
from cnx2_jax.preflight.compiled import cycles_by_kind

# What XLA needs to know of an H100 SXM (NVIDIA's H100 data sheet and CUDA programming guide, compute 9.0).
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  l2_cache_size: 52428800  device_memory_size: 84942979072  memory_bandwidth: 3352320000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the compilers do not say of a chip.

    Attributes:
      gigabytes: its memory, in GiB.
      clock: of its tensor cores, in Hz; None where it is not published.
    """

    gigabytes: int
    clock: float | None


# Memory: Google Cloud's TPU architecture pages, by version; v2's and v3's is given by core, here for both.
# Clocks: v2 to v4, Jouppi et al. 2023 (arXiv 2304.01433), table 4; v5e, v5p and v6e, the published peak in
# bfloat16 over their matrix units' multiply-adds.
CHIPS = {
    "v2": Chip(16, 0.70e9),
    "v3": Chip(32, 0.94e9),
    "v4": Chip(32, 1.05e9),
    "v5e": Chip(16, 1.50e9),
    "v5p": Chip(95, 1.75e9),
    "v6e": Chip(32, 1.75e9),
    "tpu7x": Chip(192, None),
}
# Of a GPU's memory JAX takes this share, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as it was asked for, such as `v5e:16x16`.
      platform: `tpu` or `gpu`.
      devices: abstract ones; on v2, v3 and tpu7x a chip is two of them.
      usable_bytes: memory per device that a program can have.
      clock: in Hz, or None.
    """

    name: str
    platform: str
    devices: list
    usable_bytes: int
    clock: float | None

    @property
    def hosts(self) -> int:
        return len({device.process_index for device in self.devices})


def topology(name: str) -> Topology:
    """Returns the TPU slice `VERSION:SHAPE`, such as `v5e:16x16`, or the GPUs `h100:NODESxGPUS`.

    Raises:
      UserError: it is neither, or the compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind == "h100":
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            raise UserError(f"topology '{name}' must be h100:NODESxGPUS, such as h100:1x8")
        memory = re.search(r"device_memory_size: (\d+)", H100)
        assert memory
        return Topology(name, "gpu", h100_devices(shape), int(GPU_SHARE * int(memory[1])), None)
    if kind not in CHIPS:
        known = ", ".join([*CHIPS, "h100"])
        raise UserError(f"unknown chip '{kind}' in topology '{name}'{nearest(kind, CHIPS)} (known: {known})")
    devices = tpu_devices(name)
    per_chip = len(devices) // len({tuple(device.coords) for device in devices})
    chip = CHIPS[kind]
    return Topology(name, "tpu", devices, chip.gigabytes * 2**30 // per_chip, chip.clock)


def tpu_devices(topology: str) -> list:
    """Returns the devices of a TPU topology such as `v5e:2x2`.

    Raises:
      UserError: the TPU compiler is not installed, or there is no such topology.
    """
    options = {"topology_name": topology}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # both cores as one device, as JAX runs them
    return _devices("tpu", "libtpu", "tpu", topology, **options)


def h100_devices(shape: str = "1x1") -> list:
    """Returns NODESxGPUS H100s.

    Raises:
      UserError: the CUDA plugin is not installed.
    """
    return _devices(
        "cuda", "jax_cuda12_plugin", "cuda", f"h100:{shape}", target_config=H100, topology=f"1x{shape}"
    )


def _devices(platform: str, wheel: str, extra: str, name: str, **options: str) -> list:
    if importlib.util.find_spec(wheel) is None:
        raise UserError(
            f"cannot compile for {name}: the wheel {wheel.replace('_', '-')} is not installed; "
            f"pip install -e '.[{extra}]' brings it"
        )
    try:
        return list(topologies.get_topology_desc(platform=platform, **options).devices)
    except Exception as error:  # whatever a plugin that does not know the topology raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot compile for {name}: {reason[:200]}") from None


def compiler_options(platform: str) -> dict[str, Any] | None:
    """Returns what compiling without the device needs.

    Triton's tile sizes are found by trying them on the GPU; without one, matrix products go to cuBLAS.
    """
    return {"xla_gpu_enable_triton_gemm": False} if platform == "gpu" else None


def compile_gradient(
    variant: str, layout: str, devices: list, *, platform: str, batch: int, image_size: int = 224, **options
):
    """Compiles FCMAE's loss and gradient, the batch spread over the devices.

    Args:
      variant: such as `base`.
      layout: `masked`, `gathered` or `auto`.
      devices: where it would run.
      platform: what `auto` chooses for.
      batch: images per device.
      image_size: pixels along both sides.
      **options: of FCMAE, such as `dtype`, `remat` and `scan`.
    """

    def create():
        return create_model(f"fcmae_{variant}", rngs=nnx.Rngs(0), layout=layout, platform=platform, **options)

    graph, params = split(nnx.eval_shape(create))
    mesh = Mesh(np.array(devices), ("data",))
    whole, parts = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    count = batch * len(devices)

    def place(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    params = {name: place(leaf, whole) for name, leaf in params.items()}
    images = jax.ShapeDtypeStruct((count, image_size, image_size, 3), jnp.float32, sharding=parts)
    keys = place(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count)), parts)

    def loss(params, images, keys):
        return merge(graph, params)(images, keys).loss.mean()

    return jax.jit(jax.value_and_grad(loss)).lower(params, images, keys).compile(compiler_options(platform))


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiler says of a program, per device.

    Attributes:
      temp_bytes: memory besides arguments and results.
      flops, bytes_accessed: XLA's count; a loop's body counts once, so compile with `scan=False` for these.
      cycles: estimated, by kind of operation (the last part of its name), loops times their trips.
    """

    temp_bytes: int
    flops: float
    bytes_accessed: float
    cycles: dict[str, int]


def report(compiled) -> Report:
    """Reads a compiled program."""
    costs = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    cycles = cycles_by_kind(compiled.as_text())
    return Report(
        memory.temp_size_in_bytes, costs.get("flops", 0.0), costs.get("bytes accessed", 0.0), cycles
    )
