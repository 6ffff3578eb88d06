"""Compiling pretraining for accelerators that are not there, and reading what the compiler says of it.

XLA's TPU and GPU compilers run on any host: the `tpu` extra brings the one, the `cuda` extra the other.
Import this module before anything that starts a JAX backend. Memory is exact. Estimated cycles are the TPU
compiler's own cost model: no overlap, and some operations carry none. They compare two forms of one program
and are no times.
"""

import collections
import dataclasses
import os
import re

# libtpu asks a metadata server otherwise, and JAX would start the backends themselves.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnx2_jax.errors import UserError
from cnx2_jax.models import create_model
from cnx2_jax.train.state import merge, split

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


def tpu_devices(topology: str) -> list:
    """Returns the devices of a TPU topology such as `v5e:2x2`.

    Raises:
      UserError: the TPU compiler is not installed, or there is no such topology.
    """
    return _devices("tpu", "tpu", topology_name=topology)


def h100_devices() -> list:
    """Returns one H100.

    Raises:
      UserError: the CUDA plugin is not installed.
    """
    return _devices("cuda", "cuda", target_config=H100, topology="1x1x1")


def _devices(platform: str, extra: str, **options: str) -> list:
    try:
        return list(topologies.get_topology_desc(platform=platform, **options).devices)
    except Exception as error:  # whatever a plugin that is missing or does not know the topology raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot compile for {platform} {options.get('topology_name', '')}: {reason[:200]}; "
            f"pip install -e '.[{extra}]' brings the compiler"
        ) from None


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

    # Triton's tile sizes are found by trying them on the GPU; without one, matrix products go to cuBLAS.
    settings: dict[str, str | bool] | None = (
        {"xla_gpu_enable_triton_gemm": False} if platform == "gpu" else None
    )
    return jax.jit(jax.value_and_grad(loss)).lower(params, images, keys).compile(settings)


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


def cycles_by_kind(text: str) -> dict[str, int]:
    """Sums the `estimated_cycles` in a compiled TPU program's text, greatest first."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            name = found[2]
            computations[name] = []
            entry = name if found[1] else entry
        elif name and " = " in line:
            computations[name].append(line)

    def total(name: str) -> collections.Counter[str]:
        sums: collections.Counter[str] = collections.Counter()
        for line in computations[name]:
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                trips = _trips(computations[loop[1]])
                sums.update({kind: trips * cycles for kind, cycles in total(loop[2]).items()})
            elif re.search(r" (call|conditional)\(", line):
                for called in re.findall(r"(?:to_apply|branch_computations)=\{?%?([\w.\-]+)", line):
                    sums.update(total(called))
            elif found := re.search(r'"estimated_cycles":"(\d+)"', line):
                operation = re.search(r'op_name="([^"]*)"', line)
                kind = operation[1].split("/")[-1] if operation else "unnamed"
                sums[kind] += int(found[1])
        return sums

    return dict(total(entry).most_common())


def _trips(condition: list[str]) -> int:
    """Returns how often a loop runs whose counter starts at 0 and is compared with a constant."""
    constants = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    if len(constants) != 1:
        raise ValueError(f"a loop whose number of trips is not plain: {condition}")
    return int(constants[0])
