"""TPU slices and GPUs that this machine does not have: their devices and memory, to compile for.

XLA's TPU and GPU compilers run on any host; the extra `tpu` installs the one, `cuda` the other. Import this
module before any other that imports JAX, because it sets environment variables that JAX reads when it is
imported.
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any

# Without these, JAX would start TPU and GPU backends, and libtpu would query a metadata server.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # safe, because no process uses a chip

from jax.experimental import topologies

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.train.sharding import slice_of

# XLA's description of an H100 SXM (NVIDIA's H100 data sheet and CUDA programming guide, compute 9.0).
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
    """Properties of a TPU chip that its compiler does not report.

    Attributes:
      gigabytes: memory in GiB.
      clock: clock rate of its tensor cores in Hz; None if it is not published.
    """

    gigabytes: int
    clock: float | None


# Memory: Google Cloud's TPU architecture pages, given there per core for v2 and v3, here per chip.
# Clocks: Jouppi et al. 2023 (arXiv 2304.01433), table 4, for v2 to v4; the published bfloat16 peak divided by
# the multiply-adds of the matrix units per cycle for v5e, v5p and v6e.
CHIPS = {
    "v2": Chip(16, 0.70e9),
    "v3": Chip(32, 0.94e9),
    "v4": Chip(32, 1.05e9),
    "v5e": Chip(16, 1.50e9),
    "v5p": Chip(95, 1.75e9),
    "v6e": Chip(32, 1.75e9),
    "tpu7x": Chip(192, None),
}
# JAX allocates this share of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
GPU_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: such as `v5e:16x16`, or `2 x v5e:16x16` for two slices.
      platform: `tpu` or `gpu`.
      devices: abstract devices; on v2, v3 and tpu7x a chip is two of them.
      usable_bytes: memory per device that a program can use.
      clock: clock rate of the tensor cores in Hz; None if it is not known.
    """

    name: str
    platform: str
    devices: list
    usable_bytes: int
    clock: float | None

    @property
    def hosts(self) -> int:
        return len({device.process_index for device in self.devices})


def topology(name: str, slices: int = 1) -> Topology:
    """Returns TPU slices `VERSION:SHAPE`, such as `v5e:16x16`, or the GPUs `h100:NODESxGPUS`.

    Raises:
      UserError: the name is malformed, the chip is unknown or has no such shape, several slices of GPUs are
        asked for, or the compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind == "h100":
        if slices > 1:
            raise UserError(f"{slices} slices of '{name}': GPUs have none; give more nodes, h100:NODESxGPUS")
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            raise UserError(f"topology '{name}' must be h100:NODESxGPUS, such as h100:1x8")
        memory = re.search(r"device_memory_size: (\d+)", H100)
        assert memory
        return Topology(name, "gpu", h100_devices(shape), int(GPU_SHARE * int(memory[1])), None)
    if kind not in CHIPS:
        known = ", ".join([*CHIPS, "h100"])
        raise UserError(f"unknown chip '{kind}' in topology '{name}'{nearest(kind, CHIPS)} (known: {known})")
    devices = tpu_devices(name, slices)
    per_chip = len(devices) // len({(slice_of(device), *device.coords) for device in devices})
    chip = CHIPS[kind]
    name = name if slices == 1 else f"{slices} x {name}"
    return Topology(name, "tpu", devices, chip.gigabytes * 2**30 // per_chip, chip.clock)


def tpu_devices(topology: str, slices: int = 1) -> list:
    """Returns the devices of slices of a TPU topology such as `v5e:2x2`.

    Raises:
      UserError: the TPU compiler is not installed, or it has no such topology.
    """
    options: dict[str, Any] = {"topology_name": topology}
    if slices > 1:
        options["num_slices"] = slices
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # both cores as one device, as at run time
    return _devices("tpu", "libtpu", "tpu", topology, **options)


def h100_devices(shape: str = "1x1") -> list:
    """Returns the devices of NODESxGPUS H100s.

    Raises:
      UserError: the CUDA plugin is not installed.
    """
    return _devices(
        "cuda", "jax_cuda12_plugin", "cuda", f"h100:{shape}", target_config=H100, topology=f"1x{shape}"
    )


def _devices(platform: str, wheel: str, extra: str, name: str, **options: Any) -> list:
    if importlib.util.find_spec(wheel) is None:
        raise UserError(
            f"cannot compile for {name}: the wheel {wheel.replace('_', '-')} is not installed; "
            f"pip install -e '.[{extra}]' brings it"
        )
    try:
        return list(topologies.get_topology_desc(platform=platform, **options).devices)
    except Exception as error:  # each plugin raises another kind for an unknown topology
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot compile for {name}: {reason[:200]}") from None


def compiler_options(platform: str) -> dict[str, Any] | None:
    """Returns compiler options that let XLA compile without the device.

    XLA finds Triton's tile sizes by timing them on the GPU. Without one, matrix products must use cuBLAS.
    """
    return {"xla_gpu_enable_triton_gemm": False} if platform == "gpu" else None
