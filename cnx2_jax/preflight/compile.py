"""Compiles a run's train step for a topology: does it fit, and what does a step cost?"""

import math
import re
import sys
import time
from collections.abc import Callable

from cnx2_jax.preflight import topologies  # before JAX: it sets environment variables that JAX reads

# isort: split
import jax
from ml_collections import ConfigDict

from cnx2_jax.configuration import total_steps
from cnx2_jax.observe import flops
from cnx2_jax.preflight import compiled as programs
from cnx2_jax.preflight.topologies import Topology
from cnx2_jax.tasks import make_task
from cnx2_jax.tasks.base import Described
from cnx2_jax.train import sharding
from cnx2_jax.train.program import make_program

FINENESS = 16  # `find_batch` finds the largest batch to one part in this many


def preflight(config: ConfigDict, topology: Topology, data: Described) -> dict:
    """Compiles a run's train step from shapes alone and returns its costs.

    Returns:
      JSON with these keys, those in brackets only where the step fits or the figure is known.

      `config`, `topology`, `devices`, `hosts`, `mesh`, `batch_size`, `batch_per_device`, `parameters`.
      `fits`, `usable_bytes`, `peak_bytes`, [`argument_bytes`, `temp_bytes`]: memory per device. `peak_bytes`
        is None if the step does not fit and the compiler does not report how much it would need.
      `matrix_flops_per_image`, [`seconds_at_peak`]: matrix products and convolutions, and the time of a step
        that does them at the devices' peak FLOP/s.
      [`flops_per_image`, `bytes_per_image`]: XLA's count of all operations, if the program has no loops.
      [`collectives`, `cycles`]: see `compiled`.
      [`images_per_second_per_host`, `rate_is`]: the data rate that each host must read, and at what speed.
      [`compile_seconds`, `pixel_bytes_per_image`].

    Raises:
      UserError: see `make_task`, `sharding.make_mesh` and `make_program`.
    """
    task = make_task(config, topology.platform, data)
    mesh = sharding.make_mesh(config.mesh, topology.devices)
    program = make_program(task, mesh)
    batch = task.batch_shapes()
    parameters = sum(math.prod(leaf.shape) for leaf in program.like.params.values())
    found = {
        "config": f"{config.task} {config.model.variant}, {config.model.dtype}, remat {config.model.remat}",
        "topology": topology.name,
        "devices": mesh.size,
        "hosts": topology.hosts,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "batch_per_device": config.batch_size // mesh.size,
        "parameters": parameters,
        "usable_bytes": topology.usable_bytes,
    }
    traced = program.step.trace(program.like, batch)
    work = flops.matrix_flops(traced.jaxpr)
    found["matrix_flops_per_image"] = work / config.batch_size
    if peak := flops.peak(mesh):
        found["seconds_at_peak"] = work / peak
    lowered = traced.lower()
    begin = time.monotonic()
    try:
        compiled = lowered.compile(topologies.compiler_options(topology.platform))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**found, "peak_bytes": _needed_bytes(str(error)), "fits": False}
    found["compile_seconds"] = round(time.monotonic() - begin, 1)
    found |= _costs(compiled, topology, config.batch_size / mesh.size)
    if topology.clock:
        cycles = sum(found["cycles"].values())
        found |= _rate(topology, found, cycles / topology.clock, "at the estimated cycles")
    elif "seconds_at_peak" in found:
        found |= _rate(topology, found, found["seconds_at_peak"], "at peak FLOP/s, an upper bound")
    if "image" in batch:  # a probe reads features
        found["pixel_bytes_per_image"] = math.prod(batch["image"].shape[1:])
    return found


def _costs(compiled, topology: Topology, images_per_device: float) -> dict:
    """Returns the memory, collectives and operations of a compiled step; see `preflight`."""
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    assert text and memory, "the TPU and GPU compilers report both"
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    costs = {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak,
        "fits": peak <= topology.usable_bytes,
        "collectives": programs.collectives(text),
    }
    counts = compiled.cost_analysis() or {}
    if "flops" in counts and not programs.has_loops(text):
        costs["flops_per_image"] = counts["flops"] / images_per_device
        costs["bytes_per_image"] = counts["bytes accessed"] / images_per_device
    if topology.platform == "tpu":
        costs["cycles"] = programs.cycles_by_kind(text)
    return costs


def _needed_bytes(message: str) -> int | None:
    """Reads from a compiler's error how much memory the program needs at least, if it says so."""
    if not (used := re.search(r"(?:[Uu]sed |temporaries \()([\d.]+)([KMGT])", message)):
        return None
    return int(float(used[1]) * 2 ** (10 * ("KMGT".index(used[2]) + 1)))


def _rate(topology: Topology, found: dict, seconds_per_step: float, when: str) -> dict:
    rate = found["batch_size"] / topology.hosts / seconds_per_step
    return {"images_per_second_per_host": rate, "rate_is": when}


def needed_rate(config: ConfigDict, topology: Topology, data: Described, found: dict, hours: float) -> dict:
    """Returns `images_per_second_per_host` and `rate_is` for a run that takes this many hours.

    Args:
      config: of the run.
      topology: the devices.
      found: the result of `preflight`.
      hours: the length of the run.
    """
    steps = total_steps(config, data.num_train)
    return _rate(topology, found, 3600 * hours / steps, f"for {hours:g} hours")


def find_batch(config: ConfigDict, topology: Topology, data: Described) -> dict:
    """Returns the result of `preflight` for the largest batch that fits, to one part in `FINENESS`.

    The search starts at the config's batch size and reports each size on standard error. On return
    `config.batch_size` is the largest that fits, or the smallest possible if none does.

    Raises:
      UserError: see `preflight`.
    """
    unit = len(topology.devices) * config.accumulation_steps
    tried: dict[int, dict] = {}

    def fits(count: int) -> bool:
        config.batch_size = count * unit
        tried[count] = preflight(config, topology, data)
        verdict = "fits" if tried[count]["fits"] else "does not fit"
        print(f"{tried[count]['batch_per_device']} per device: {verdict}", file=sys.stderr, flush=True)
        return tried[count]["fits"]

    best = max(1, largest(fits, max(1, config.batch_size // unit)))
    config.batch_size = best * unit
    return tried[best]


def largest(fits: Callable[[int], bool], first: int) -> int:
    """Returns the largest count that fits, to one part in `FINENESS`; 0 if not even 1 does.

    Args:
      fits: returns whether a count fits; if one does, every smaller one must.
      first: the first count to try, at least 1.
    """
    most, over, count = 0, math.inf, first
    while over - most > max(1, most // FINENESS):
        if fits(count):
            most = count
        else:
            over = count
        count = 2 * most if over == math.inf else (most + int(over)) // 2
    return most
